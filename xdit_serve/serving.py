"""A server from its start to its end: the data folder is taken, ranks come up, requests are answered."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import anyio
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.registry.request import Request
from xdit_serve.admission import Admission
from xdit_serve.app import make_app
from xdit_serve.body import Bodies
from xdit_serve.dispatch import Dispatcher, Keeping, MakeWorkers
from xdit_serve.keys import Keys
from xdit_serve.metrics import Metrics
from xdit_serve.service import Service, Settings
from xdit_serve.sessions import Sessions
from xdit_serve.store import Store

HEADER_SECONDS = 20.0
MOST_CONNECTIONS = 800
BODIES_AT_ONCE = 8
GRACE_SECONDS = 5
Page = Callable[[FastAPI, Service], None]


def serve(
    settings: Settings,
    workers: MakeWorkers,
    memory: Callable[[str, Request], str],
    ready: Callable[[str], None],
    page: Page | None = None,
) -> int:
    """Serve until a signal comes; returns the exit status. StoreError, and OSError for an address that is taken.

    workers: makes the groups that work. memory: as of `Admission`.
    ready: told the address once requests are answered; the ranks may not be up by then.
    """
    store = Store(settings.data_dir)
    try:
        with _listening(settings) as listener:
            service = make_service(settings, store, workers, memory)
            app = make_app(service, page)
            config = uvicorn.Config(
                _living(app, service),
                http=_Protocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
                lifespan="on",
                proxy_headers=True,
            )
            host, port = listener.getsockname()[:2]
            name = f"[{host}]" if ":" in host else host
            server = _Server(config, service, lambda: ready(f"http://{name}:{port}"))
            server.run(sockets=[listener])
            return 0 if server.asked in (signal.SIGTERM, None) else 128 + server.asked
    finally:
        store.close()


def make_service(
    settings: Settings, store: Store, workers: MakeWorkers, memory: Callable[[str, Request], str]
) -> Service:
    """The parts of a server, put together."""
    metrics, keeping = Metrics(), Keeping(settings.keep_hours, settings.keep_gb)
    keys = Keys(settings.keys)
    dispatcher = Dispatcher(store, settings.offers, settings.own, workers, keeping, metrics)
    metrics.watch(store.counts, dispatcher.health)
    return Service(
        settings,
        store,
        dispatcher,
        Admission(store, settings.offers, settings.own, settings.queue, memory, dispatcher.job_seconds),
        keys,
        metrics,
        Bodies(settings.body_seconds, anyio.Semaphore(BODIES_AT_ONCE)),
        Sessions(keys),
    )


def _listening(settings: Settings) -> socket.socket:
    kind = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(kind, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError:
        listener.close()
        raise
    return listener


def _living(app: FastAPI, service: Service) -> FastAPI:
    """The application with the ranks' life around it."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with inner(app):
            service.dispatcher.start()
            yield
            await anyio.to_thread.run_sync(service.dispatcher.stop, service.settings.leave_seconds)

    inner, app.router.lifespan_context = app.router.lifespan_context, life
    return app


class _Server(uvicorn.Server):
    """Says when it answers, and lets no job in from the moment that a signal comes."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready
        self.asked: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.asked = self.asked or sig
        self._service.dispatcher.leaving.set()
        # Not kept to be raised again afterwards, as uvicorn would: the store has to be closed first.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


class _Protocol(H11Protocol):
    """A connection whose request does not come to its body within a time is closed, and so is one too many."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.close()
        else:
            self._late = self.loop.call_later(HEADER_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waits = (self.cycle is None or self.cycle.response_complete) and bool(self.conn.trailing_data[0])
        if waits and self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        elif not waits and self._late is not None:
            self._late.cancel()
            self._late = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)
