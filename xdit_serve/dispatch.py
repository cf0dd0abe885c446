"""Between the store and the ranks: the next job goes out, what happens to it comes in, old ones leave."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from common.registry.request import Request, WrongUse
from common.system.failure import NO_SPACE
from common.system.files import say, shown
from common.workers.group import (
    ENDINGS,
    Cancelled,
    Event,
    Failed,
    Finished,
    GroupError,
    Health,
    Job,
    Lost,
    Note,
    Preview,
)
from common.workers.work import with_state
from xdit_serve.board import Board
from xdit_serve.building import build
from xdit_serve.errors import shortened
from xdit_serve.metrics import Metrics
from xdit_serve.offers import Offer
from xdit_serve.records import Record
from xdit_serve.store import STATE, Store, StoreError

TRY_AGAIN_SECONDS = 0.5
ROOM_SECONDS = 3.0
"""After a job that found a full disk: as long no job begins."""
SWEEP_SECONDS = 30.0
START_SECONDS = 30.0
FIRST_GUESS = 10.0
"""Seconds of a job, before one was seen."""


@dataclass(frozen=True)
class Keeping:
    """How long ended jobs stay: hours after their end, and gigabytes of all together."""

    hours: float
    gb: float

    @property
    def seconds(self) -> float:
        return self.hours * 3600


class Workers(Protocol):
    """Groups at work, such as `common.workers.replicas.Replicas`."""

    def start(self) -> None: ...

    def cancel(self, job: str) -> None: ...

    def health(self) -> list[Health]: ...

    def stop(self, seconds: float) -> None: ...


MakeWorkers: TypeAlias = "Callable[[Callable[[float], Job | None], Callable[[int, Event], None]], Workers]"
"""(take, tell) -> groups at work, not started; the two as of `common.workers.replicas.Replicas`."""


class Dispatcher:
    """Keeps the workers busy with the store's jobs. All methods may be called from any thread."""

    def __init__(
        self,
        store: Store,
        offers: Sequence[Offer],
        own: tuple[str, ...],
        workers: MakeWorkers,
        keeping: Keeping,
        metrics: Metrics,
    ) -> None:
        self.store, self.own, self.keeping, self.metrics = store, own, keeping, metrics
        self.offers: Mapping[str, Offer] = {offer.name: offer for offer in offers}
        self.board = Board()
        self.leaving = threading.Event()
        self._numbers = itertools.count(1)
        self._jobs: dict[str, Record] = {}
        self._seconds = FIRST_GUESS
        self._not_before = 0.0
        self._queued = threading.Condition()
        self._workers = workers(self.take, self.tell)
        self._threads = [threading.Thread(target=what, daemon=True) for what in (self._start, self._sweep)]

    def start(self) -> None:
        """Returns at once; the ranks come up by themselves."""
        for thread in self._threads:
            thread.start()

    def _start(self) -> None:
        """Until the workers are there: what is missing may come, such as a GPU that another program holds."""
        while not self.leaving.is_set():
            try:
                self._workers.start()
                return
            except GroupError as error:
                self._say(f"the ranks cannot start, which is tried again in {START_SECONDS:g} s: {error}")
                self.leaving.wait(START_SECONDS)

    def stop(self, seconds: float) -> None:
        """Let no job begin, save those that run, end all ranks."""
        self.leaving.set()
        self.wake()
        self._workers.stop(seconds)

    def wake(self) -> None:
        """A job was queued."""
        with self._queued:
            self._queued.notify_all()

    def delete(self, job: str) -> None:
        """Nobody sees the job any more; where it runs it ends. Raises StoreError."""
        if self.store.delete(job):
            for name, record in list(self._jobs.items()):
                if record.id == job:
                    self._workers.cancel(name)

    def health(self) -> list[Health]:
        return self._workers.health()

    @property
    def ready(self) -> bool:
        return not self.leaving.is_set() and any(one.state in ("idle", "busy") for one in self.health())

    def job_seconds(self) -> float:
        """After how long a place becomes free, by what was seen."""
        return self._seconds / max(1, len(self.health()))

    # What the workers ask for and tell

    def take(self, seconds: float) -> Job | None:
        """The job whose turn it is, waited for so long at most."""
        job = self._next()
        if job is None and not self.leaving.is_set():
            with self._queued:
                self._queued.wait(seconds)
            job = self._next()
        return job

    def _next(self) -> Job | None:
        while not self.leaving.is_set() and time.monotonic() >= self._not_before:
            try:
                record = self.store.take()
            except StoreError as error:
                self._say(f"no job can be taken now: {error}")
                return None
            if record is None:
                return None
            try:
                request = self._request(record)
            except (WrongUse, StoreError) as error:
                why = str(error)
                if isinstance(error, StoreError) or NO_SPACE in why:
                    self._wait_for_room(record, why)
                    return None
                self._insist(lambda: self.store.fail(record.id, "invalid_request", why))  # noqa: B023
                continue
            name = f"{record.id}.{next(self._numbers)}"  # one that comes back goes out under another name
            self._jobs[name] = record
            keep = self.store.folder_of(record.id) / STATE
            previews = bool(record.shown.get("previews", True))
            job = with_state(Job(name, request, None, keep, previews))
            if self._is_deleted(record):  # between the two lines above nobody would have told the workers
                self._workers.cancel(name)
            return job
        return None

    def _request(self, record: Record) -> Request:
        offer = self.offers.get(record.model)
        if offer is None:
            raise WrongUse([f"model {shown(record.model)} is not offered any more"])
        return build(offer, self.own, record.arguments, self.store.make_folder(record.id), record.output)

    def tell(self, number: int, event: Event) -> None:
        """What happened to a job of the group of this number."""
        name = event.job or ""
        record = self._jobs.get(name)
        if record is None:
            return
        if isinstance(event, ENDINGS):
            self._end(record, event)
            self._jobs.pop(name, None)
            self.board.drop(record.id)
        elif isinstance(event, Note):
            self._say(f"{record.id}: {'warning: ' if event.warning else ''}{event.text}")
        elif not isinstance(event, Preview) or record.shown.get("previews", True):
            self.metrics.stepped(record.model, event)
            self.board.tell(record.id, event)

    def _wait_for_room(self, record: Record, why: str) -> None:
        """The job is not to blame: it is the next one again, and for a while none begins."""
        self._say(f"{record.id} waits for room: {why}")
        self._not_before = time.monotonic() + ROOM_SECONDS
        self._insist(lambda: self.store.give_back(record.id))

    def _end(self, record: Record, event: Finished | Cancelled | Failed | Lost) -> None:
        if isinstance(event, Finished):
            self._insist(lambda: self.store.complete(record.id, event.seconds))
            self.metrics.finished(record.model, event.seconds)
            self._seconds = 0.7 * self._seconds + 0.3 * sum(event.seconds.values())
        elif isinstance(event, Failed) and event.disk:
            self._wait_for_room(record, event.message)
        elif isinstance(event, Failed):
            code = "invalid_request" if event.wrong_use else "out_of_memory" if event.memory else "generation_failed"
            self._insist(lambda: self.store.fail(record.id, code, shortened(event.message)))
            self.metrics.failed(code)
            self._say(f"{record.id} failed: {event.message}")
        else:  # cancelled, of which nothing is left; or the workers were told to stop
            self._insist(lambda: self.store.give_back(record.id))

    def _is_deleted(self, record: Record) -> bool:
        with suppress(StoreError):
            return self.store.get(record.id) is None
        return False

    def _insist(self, what: Callable[[], object]) -> None:
        """What a client will be told has to be stored: tried until it is, or until the server leaves.

        What is left out then, the next start finds by the files.
        """
        told = False
        while True:
            try:
                what()
                return
            except StoreError as error:
                if not told:
                    self._say(f"tried again until it can be stored: {error}")
                told = True
            if self.leaving.is_set():
                return
            time.sleep(TRY_AGAIN_SECONDS)

    def _sweep(self) -> None:
        while True:
            with suppress(StoreError):
                jobs = self.store.retire(time.time() - self.keeping.seconds, self.keeping.gb * 1e9)
                if jobs:
                    self._say(f"{len(jobs)} jobs are past --keep-hours or --keep-gb and were removed")
            if self.leaving.wait(SWEEP_SECONDS):
                return

    @staticmethod
    def _say(line: str) -> None:
        say(f"note: {shortened(line)}")
