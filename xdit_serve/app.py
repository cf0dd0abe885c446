"""The server's routes together, and what holds for all of them: errors, the log, who may ask."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.system.files import say
from xdit_serve import answers
from xdit_serve.errors import ApiError
from xdit_serve.images import image_routes
from xdit_serve.keys import is_here
from xdit_serve.service import Service, short
from xdit_serve.videos import video_routes

CHANGING = ("POST", "DELETE", "PUT", "PATCH")


def make_app(service: Service, page: Callable[[FastAPI, Service], None] | None = None) -> FastAPI:
    """The application. page: puts something at / and below."""
    app = FastAPI(title="xdit-serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_exception_handler(Exception, _broken)
    app.include_router(video_routes(service))
    app.include_router(image_routes(service))
    _others(app, service)
    if page is not None:
        page(app, service)
    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(service.settings.origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Door, service=service)
    return app


def _others(app: FastAPI, service: Service) -> None:
    since = time.time()

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.owner(request)
        data = [answers.model(offer, since) for offer in service.settings.offers]
        return answers.json_answer({"object": "list", "data": data})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        service.owner(request)
        for offer in service.settings.offers:
            if offer.name == name:
                return answers.json_answer(answers.model(offer, since))
        raise ApiError(404, f"no such model: {name[:80]!r}", "model", "model_not_found")

    @app.get("/health")
    async def health() -> Response:
        groups = [{"state": one.state, "ranks": len(one.ranks)} for one in service.dispatcher.health()]
        ready = service.dispatcher.ready
        status = "ready" if ready else "leaving" if service.dispatcher.leaving.is_set() else "starting"
        return answers.json_answer({"status": status, "groups": groups}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.owner(request)
        return Response(await service.ask(service.metrics.page), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body, error.status, error.headers, media_type="application/json")


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    api_error = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    return Response(api_error.body, api_error.status, error.headers, media_type="application/json")


async def _broken(request: Request, error: Exception) -> Response:
    """A mistake of this program. The client is told that much; the log has the traceback."""
    api_error = ApiError(500, "the server made a mistake; its log says more")
    return Response(api_error.body, api_error.status, media_type="application/json")


class Door:
    """Around everything: a line of the log for each answer, and who may not even ask.

    A server without keys that only this machine can reach is asked by programs of this machine, not by pages that its
    browser shows: those are told apart by the names of the host that they ask and of the one they came from.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self._guarded = not service.keys and not service.settings.open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, stats = time.perf_counter(), {"status": 0, "bytes": 0}

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                stats["status"] = message["status"]
            elif message["type"] == "http.response.body":
                stats["bytes"] += len(message.get("body", b""))
            await send(message)

        headers = dict(scope["headers"])
        try:
            if problem := self._guarded and _foreign(scope["method"], headers, self.service.settings.origins):
                error = ApiError(403, problem)
                answer = Response(error.body, error.status, media_type="application/json")
                await answer(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        finally:
            seconds = time.perf_counter() - start
            self.service.metrics.answered(scope["method"], stats["status"], seconds)
            self._log(scope, headers, stats, seconds)

    def _log(self, scope: Scope, headers: dict[bytes, bytes], stats: dict[str, int], seconds: float) -> None:
        if scope["path"].startswith("/gradio_api/") and stats["status"] < 400:
            return  # the page asks every second
        owner = self.service.keys.owner(headers.get(b"authorization"))
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "client": (scope.get("client") or [""])[0],
        }
        line |= {"key": short(owner or ""), "method": scope["method"], "path": scope["path"][:300]}
        say(json.dumps(line | stats | {"seconds": round(seconds, 4)}))


def _foreign(method: str, headers: dict[bytes, bytes], origins: tuple[str, ...]) -> str:
    """Why a request to a server without keys comes from a page elsewhere; empty where it does not."""
    if not is_here(_host(b"//" + headers.get(b"host", b""))):
        return (
            "this server has no keys and answers to this machine's name alone (localhost); give it a key, or --no-auth"
        )
    origin = headers.get(b"origin")
    if origin is None or method not in CHANGING or origin.decode("latin-1") in origins or is_here(_host(origin)):
        return ""
    return "pages from elsewhere may not ask this server; start it with --cors ORIGIN to let them"


def _host(url: bytes) -> str | None:
    try:
        return urlsplit(url.decode("latin-1")).hostname
    except ValueError:
        return None
