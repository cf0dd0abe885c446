"""What a running server consists of, handed to its routes whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from fastapi import Request

from xdit_serve.admission import Admission, unavailable
from xdit_serve.body import Bodies
from xdit_serve.dispatch import Dispatcher
from xdit_serve.errors import ApiError
from xdit_serve.keys import Keys
from xdit_serve.metrics import Metrics
from xdit_serve.offers import Offer
from xdit_serve.records import Record
from xdit_serve.sessions import Sessions
from xdit_serve.store import Store, StoreError

WATCH_SECONDS = 0.2


@dataclass(frozen=True)
class Settings:
    """How a server is set up."""

    data_dir: Path
    offers: Sequence[Offer]
    own: tuple[str, ...] = ()
    """Words of the command line that every job gets."""
    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one."""
    keys: tuple[str, ...] = ()
    open: bool = False
    """Nobody is asked for a key although others can connect."""
    origins: tuple[str, ...] = ()
    """Of pages in browsers that may ask."""
    queue: int = 1000
    """Jobs that may wait."""
    keep_hours: float = 168.0
    keep_gb: float = 100.0
    body_seconds: float = 60.0
    leave_seconds: float = 20.0


@dataclass(frozen=True)
class Service:
    settings: Settings
    store: Store
    dispatcher: Dispatcher
    admission: Admission
    keys: Keys
    metrics: Metrics
    bodies: Bodies
    sessions: Sessions

    def owner(self, request: Request) -> str:
        """Whose request it is. ApiError for nobody's."""
        authorization = request.headers.get("authorization")
        owner = self.keys.owner(None if authorization is None else authorization.encode("latin-1"))
        if owner is None:
            raise ApiError(401, "this server wants one of its keys: Authorization: Bearer KEY")
        return owner

    def viewer(self, request: Request) -> str:
        """Likewise, of one who may also be a browser that shows the page: for reading alone."""
        owner = self.sessions.owner(dict(request.headers.raw))
        return self.owner(request) if owner is None else owner

    def admitting(self) -> None:
        """ApiError once the server is about to end."""
        if self.dispatcher.leaving.is_set():
            raise ApiError(503, "the server is about to end", code="leaving", retry=30)

    async def ask(self, what: Callable[..., Any], *args: Any) -> Any:
        """The store's answer, off the event loop. ApiError where it has none now."""
        try:
            return await anyio.to_thread.run_sync(what, *args)
        except StoreError as error:
            raise unavailable(error) from None

    async def job(self, name: str, owner: str, kind: str) -> Record:
        """An owner's job. ApiError where there is none."""
        record: Record | None = await self.ask(self.store.get, name, owner)
        if record is None or record.kind != kind:
            raise ApiError(404, f"no such {kind}: {name[:80]!r}", "id")
        return record

    async def ended(self, job: Record, request: Request) -> Record:
        """The job when it has ended. A client that leaves before takes its job along. ApiError when the server ends."""
        while True:
            record: Record | None = await self.ask(self.store.get, job.id)
            if record is None:
                raise ApiError(404, f"{job.id} was deleted", "id")
            if record.ended:
                return record
            if await request.is_disconnected():
                await self.ask(self.dispatcher.delete, job.id)
                raise ApiError(400, "the client left")
            if self.dispatcher.leaving.is_set():
                message = f"the server is about to end; {job.id} goes on with its next start"
                raise ApiError(503, message, code="leaving", retry=30)
            await anyio.sleep(WATCH_SECONDS)


def short(owner: str) -> str:
    """An owner for a log: tells two apart, and is no key."""
    return hashlib.sha256(owner.encode()).hexdigest()[:8] if owner else ""
