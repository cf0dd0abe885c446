"""The routes of /v1/videos."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from sse_starlette import EventSourceResponse

from xdit_serve import answers
from xdit_serve.errors import ApiError, shortened
from xdit_serve.records import Record
from xdit_serve.service import WATCH_SECONDS, Service

MOST_LISTED = 100
TYPES = {".mp4": "video/mp4", ".png": "image/png"}


def video_routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/videos")
    async def create(request: Request) -> Response:
        return await _told(service, await _admitted(service, request))

    @routes.post("/v1/videos/sync")
    async def create_and_wait(request: Request) -> Response:
        job = await service.ended(await _admitted(service, request), request)
        if job.status == "failed":
            raise failure(job)
        return await file_answer(service, job)

    @routes.get("/v1/videos")
    async def listed(request: Request) -> Response:
        return await _listed(service, request)

    @routes.get("/v1/videos/{name}")
    async def retrieve(request: Request, name: str) -> Response:
        return await _told(service, await service.job(name, service.owner(request), "video"))

    @routes.delete("/v1/videos/{name}")
    async def delete(request: Request, name: str) -> Response:
        return await _deleted(service, await service.job(name, service.owner(request), "video"))

    @routes.get("/v1/videos/{name}/content")
    async def content(request: Request, name: str) -> Response:
        job = await service.job(name, service.viewer(request), "video")
        if (variant := request.query_params.get("variant", "video")) != "video":
            raise ApiError(400, f"variant {shortened(variant, 40)!r} is not made; there is video alone", "variant")
        return await file_answer(service, job)

    @routes.get("/v1/videos/{name}/events")
    async def events(request: Request, name: str) -> Response:
        stream = _events(service, await service.job(name, service.owner(request), "video"))
        return EventSourceResponse(stream, ping=15, shutdown_grace_period=5 * WATCH_SECONDS)

    return routes


async def _told(service: Service, job: Record) -> Response:
    headers = None if job.ended else {"openai-poll-after-ms": str(answers.POLL_MS)}
    return answers.json_answer(await _video(service, job), headers=headers)


async def _deleted(service: Service, job: Record) -> Response:
    await service.ask(service.dispatcher.delete, job.id)
    return answers.json_answer({"id": job.id, "object": "video.deleted", "deleted": True})


async def _listed(service: Service, request: Request) -> Response:
    owner = service.owner(request)
    limit, newest, after = _paging(request.query_params)
    number = None
    if after is not None:
        record = await service.ask(service.store.get, after, owner)
        if record is None:
            raise ApiError(400, f"after: no such video: {shortened(after, 80)}", "after")
        number = record.number
    jobs = await service.ask(service.store.list, owner, "video", number, limit + 1, newest)
    data = [await _video(service, job) for job in jobs[:limit]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return answers.json_answer({"object": "list", "data": data, "has_more": len(jobs) > limit, **ends})


async def _admitted(service: Service, request: Request) -> Record:
    owner = service.owner(request)
    service.admitting()
    fields = await service.bodies.fields(request)
    job: Record = await service.ask(service.admission.video, owner, fields)
    service.dispatcher.wake()
    return job


def _paging(query: Mapping[str, str]) -> tuple[int, bool, str | None]:
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and 1 <= int(limit) <= MOST_LISTED):
        raise ApiError(400, f"limit: {shortened(limit, 40)!r} is not a number from 1 to {MOST_LISTED}", "limit")
    if order not in ("asc", "desc"):
        raise ApiError(400, f"order: {shortened(order, 40)!r} is neither asc nor desc", "order")
    return int(limit), order == "desc", query.get("after") or None


async def _video(service: Service, job: Record) -> dict[str, Any]:
    place = await service.ask(service.store.place, job) if job.status == "queued" else None
    keep = service.settings.keep_hours * 3600
    return answers.video(job, service.dispatcher.board.get(job.id), keep, place)


def failure(job: Record) -> ApiError:
    """Why a job that somebody waited for has failed."""
    status = 400 if job.code == "invalid_request" else 500
    return ApiError(status, job.message or "it failed", code=job.code)


async def file_answer(service: Service, job: Record) -> Response:
    """What a job made. ApiError while there is nothing."""
    if job.status == "failed":
        raise ApiError(404, f"{job.id} failed: {job.message}", "id", job.code)
    if job.status != "completed":
        raise ApiError(409, f"{job.id} is not finished: {job.status}", "id", "not_ready")
    path = service.store.output_of(job)
    try:
        status = await anyio.to_thread.run_sync(path.stat)
    except OSError:
        raise ApiError(404, f"the file of {job.id} is gone", "id") from None
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600", "X-Job-Id": job.id}
    name = f"{job.id}{path.suffix}"
    return FileResponse(path, 200, headers, TYPES[path.suffix], filename=name, stat_result=status)


async def _events(service: Service, job: Record) -> AsyncIterator[dict[str, str]]:
    """What changes of a job until it has ended, or is deleted, or the server ends."""
    last, preview = None, -1
    while not service.dispatcher.leaving.is_set():
        record = await service.ask(service.store.get, job.id)
        if record is None:
            yield {"event": "deleted", "data": json.dumps({"id": job.id, "object": "video.deleted", "deleted": True})}
            return
        video = await _video(service, record)
        if record.ended:
            yield {"event": record.status, "data": json.dumps(video)}
            return
        live = service.dispatcher.board.get(job.id)
        now = (record.status, live.version, video.get("queue_position"))
        if now != last:
            last = now
            yield {"event": "progress", "data": json.dumps(video)}
        if live.preview and live.preview_step != preview:
            preview = live.preview_step
            image = "data:image/png;base64," + base64.b64encode(live.preview).decode()
            yield {"event": "preview", "data": json.dumps({"id": job.id, "step": preview, "image": image})}
        await anyio.sleep(WATCH_SECONDS)
