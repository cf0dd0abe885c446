"""What all worker groups of one process have in common: a thread that watches over ranks, wherever these run. No torch.

A kind of group says how its ranks are started, spoken to, heard and ended (`Ranks`); when a job has ended, and when
the ranks are lost, is decided here. No signal handler is installed, nothing is printed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from common.run.states import Slots
from common.system.failure import Failure, describe, verdict
from common.workers.group import ENDINGS, Event, GroupError, Health, Job, Lost, RankHealth, State
from common.workers.orders import Leave, Maker, Message, Order, maker_of
from common.workers.pace import Durations
from common.workers.work import Work, blamed, prepared

GRACE_SECONDS = 5.0
"""After one rank's error: time for the others to come to the same, which leaves all of them alive."""
ECHO_SECONDS = 1.5
"""After the first rank that lost the connection to another: time for the cause to show."""
POLL_SECONDS = 0.1


@dataclass
class Seat:
    """One rank as its group sees it."""

    rank: int
    pid: int = 0
    stage: str = "starting"
    failure: Failure | None = None
    """What the rank has told of this job."""
    ready: bool = False
    standing: dict[str, Any] = field(default_factory=dict)


class Ranks:
    """The ranks of a group from their start to their end, in its thread. A kind of group has a subclass.

    work: the job under way. broken: the last job left them out of step with each other. reason, device: why they are
    to be ended. asked: because `stop` was called.
    """

    def __init__(self, group: Watched, slots: Sequence[Slots]) -> None:
        self.group, self.slots = group, slots
        self.seats: list[Seat] = []
        self.work: Work | None = None
        self.broken = self.asked = False
        self.reason = ""
        self.device: int | None = None
        self._end: float | None = None
        self._last_heard = time.monotonic()
        self._first_failure: float | None = None

    def start(self) -> None:
        """Start them, fill `seats`, and send each its `Hello`. Raises what says why not."""
        raise NotImplementedError

    def send(self, message: Message) -> None:
        """To every rank, without waiting for one."""
        raise NotImplementedError

    def hear(self, seconds: float) -> None:
        """Wait so long at most for something to happen, and `take` what the ranks have said."""
        raise NotImplementedError

    def wake(self) -> None:
        """Called from other threads: end the wait in `hear`."""

    def ended(self) -> dict[int, Failure | None]:
        """The ranks that have ended, with what is known of it beside what they have told."""
        raise NotImplementedError

    def end(self) -> str:
        """End whatever is left of them; what outlives that, as the end of a line."""
        raise NotImplementedError

    def memory(self, seat: Seat) -> int:
        """Bytes, where the rank has not told."""
        return 0

    def watch(self, calls: deque[Callable[[Ranks], None]]) -> None:
        """Until the ranks are to be ended, or have ended by themselves."""
        while not self._over():
            self.hear(POLL_SECONDS)
            while calls:
                calls.popleft()(self)

    def begin(self, work: Work, order: Order) -> None:
        self.work, self.broken, self._first_failure = work, False, None
        self._last_heard = time.monotonic()
        for seat in self.seats:
            seat.failure = None
        self.send(order)

    def leave(self, job: str) -> None:
        if self.work is not None and self.work.job.id == job:
            self.send(Leave(job))

    def stop(self, seconds: float) -> None:
        self.asked = True
        self.reason = "the group was stopped"
        idle = self.work is None and all(seat.ready for seat in self.seats)
        self._end = time.monotonic() + (seconds if idle else 0.0)
        self.send(None)

    def take(self, seat: Seat, message: dict[str, Any]) -> None:
        """Take in what a rank has said."""
        self._last_heard = time.monotonic()
        if "failure" in message:
            seat.failure = Failure(**message["failure"])
            return
        if "stage" in message:
            seat.stage = message["stage"]
        if "ready" in message:
            seat.ready = True
            if all(one.ready for one in self.seats):
                self.group.become("idle")
            return
        if "ended" in message:
            seat.standing = message
        if self.work is None:
            return
        self.work.heard(seat.rank, message)
        if len(self.work.endings) == len(self.seats) and not self._only_echoes():
            work, self.work = self.work, None
            self.broken = not work.end(self._failures())

    def _over(self) -> bool:
        """Whether the ranks are to be ended; `reason` and `device` say why."""
        if self._end is not None:
            return time.monotonic() > self._end or len(self.ended()) == len(self.seats)
        exits = self.ended()
        if exits:
            self._find_reason(exits)
            return True
        return self._stuck()

    def _stuck(self) -> bool:
        now, starting = time.monotonic(), not all(seat.ready for seat in self.seats)
        if self.work is None and not starting:
            return False
        failures = self._failures()
        if failures:
            self._first_failure = self._first_failure or now
            if now - self._first_failure > (ECHO_SECONDS if self._only_echoes() else GRACE_SECONDS):
                self._find_reason({})
                return True
        elif now - self._last_heard > self.group.timeout:
            where = ", ".join(f"rank {seat.rank} ({seat.stage})" for seat in self.seats)
            self.reason = f"nothing was heard for {self.group.timeout:.0f} s of {where}"
            self._blame(blamed([], [], [seat.rank for seat in self.seats]))
            return True
        return False

    def _failures(self) -> list[Failure]:
        return [seat.failure for seat in self.seats if seat.failure is not None]

    def _only_echoes(self) -> bool:
        """Whether ranks have failed, each because of another: that is no fault of the job's."""
        failures = self._failures()
        return bool(failures) and all(failure.secondary for failure in failures)

    def _find_reason(self, exits: dict[int, Failure | None]) -> None:
        reports = self._failures()
        failed_ranks = {failure.rank for failure in reports}
        alone = {rank: why for rank, why in exits.items() if rank not in failed_ranks}
        failures = reports + [why for why in alone.values() if why is not None]
        silent = [seat for seat in self.seats if seat.rank not in failed_ranks and seat.rank not in exits]
        if failures:
            self.reason = verdict(failures, [(seat.rank, seat.stage) for seat in silent])[1]
        else:
            self.reason = f"rank {min(exits)} ended by itself"
        working = [seat.rank for seat in silent if self.work is None or seat.rank not in self.work.endings]
        self._blame(blamed(reports, list(alone), working))

    def _blame(self, rank: int | None) -> None:
        self.device = None if rank is None else self.group.devices[rank]


class Watched:
    """The part of a `common.workers.group.WorkerGroup` that does not depend on where its ranks are.

    devices, on_cpu, keep_loaded, timeout, makers: as for `common.workers.local.LocalGroup`.
    """

    def __init__(
        self, devices: Sequence[int], on_cpu: bool, keep_loaded: bool, timeout: float, makers: Sequence[Maker]
    ) -> None:
        if not devices or len(set(devices)) != len(devices):
            raise GroupError(f"a group needs at least one device, and each once, not {list(devices)}")
        self.devices = tuple(devices)
        self.on_cpu, self.keep_loaded, self.timeout = on_cpu, keep_loaded, timeout
        self._makers = tuple(makers)
        self._condition = threading.Condition()
        self._events: deque[Event] = deque()
        self._calls: deque[Callable[[Ranks], None]] = deque()
        self._state: State = "stopped"
        self._job: str | None = None
        self._failure = ""
        self._suspect: int | None = None
        self._ranks: Ranks | None = None
        self._slots: Sequence[Slots] = ()
        self._thread: threading.Thread | None = None
        self._durations = Durations()
        self._orders = 0
        self.stopping = threading.Event()
        """`stop` was called: for ranks that are being started, which nobody is asked of yet."""

    @contextmanager
    def _new_ranks(self) -> Iterator[Ranks]:
        """Ranks that are not started yet, with all that they need while they live."""
        raise NotImplementedError
        yield

    def start(self) -> None:
        with self._condition:
            if self._state not in ("stopped", "lost"):
                raise GroupError("the group is running")
            self._state, self._failure = "starting", ""
        if self._thread is not None:
            self._thread.join()
        self._calls.clear()
        self.stopping.clear()
        self._job = None
        # The kernel ends a process of ours when the thread ends that has started it: this one lives as long as they do.
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()
        with self._condition:
            self._condition.wait_for(lambda: self._state != "starting")
            if self._state != "idle":
                raise GroupError(self._failure or "the group was stopped while it started", self._suspect)

    def submit(self, job: Job) -> None:
        try:
            maker = maker_of(job.request.program, self._makers)
        except ValueError as error:
            raise GroupError(str(error)) from None
        with self._condition:
            if self._state != "idle":
                raise GroupError(f"the group is {self._state}")
            self._state, self._job = "busy", job.id
        slots = self._slots
        try:
            request = prepared(job, len(self.devices), self.on_cpu, slots, maker.fork)
        except BaseException:
            with self._condition:
                if self._state == "busy":
                    self._state, self._job = "idle", None
            raise
        self._orders += 1
        number = self._orders

        def begin(ranks: Ranks) -> None:
            work = Work(job, request, slots, self._durations, self._emit, number)
            ranks.begin(work, work.order(maker, ranks.broken, self.keep_loaded))

        self._ask(begin)

    def events(self, timeout: float) -> list[Event]:
        with self._condition:
            self._condition.wait_for(lambda: bool(self._events), timeout)
            events = list(self._events)
            self._events.clear()
        return events

    def cancel(self, job: str) -> None:
        self._ask(lambda ranks: ranks.leave(job))

    def health(self) -> Health:
        with self._condition:
            state, job, ranks = self._state, self._job, self._ranks
        seats = list(ranks.seats) if ranks is not None else []
        loadings = seats[0].standing.get("loadings", 0) if seats else 0
        statuses = []
        for seat, device in zip(seats, self.devices):
            memory = seat.standing.get("memory", 0) or (ranks.memory(seat) if ranks is not None else 0)
            statuses.append(RankHealth(seat.pid, device, memory, tuple(seat.standing.get("models", ()))))
        return Health(state, tuple(statuses), job, loadings)

    def stop(self, seconds: float) -> None:
        thread = self._thread
        if thread is None:
            return
        self.stopping.set()
        self._ask(lambda ranks: ranks.stop(seconds))
        thread.join()
        with self._condition:
            self._state = "stopped"

    def become(self, state: State, failure: str = "") -> None:
        """For the group's thread."""
        with self._condition:
            self._state, self._failure = state, failure
            self._condition.notify_all()

    def _ask(self, what: Callable[[Ranks], None]) -> None:
        """Have the group's thread do something; dropped when it has ended."""
        with self._condition:
            self._calls.append(what)
            if self._ranks is not None:
                self._ranks.wake()

    def _emit(self, event: Event) -> None:
        with self._condition:
            self._events.append(event)
            if isinstance(event, ENDINGS):
                self._job = None
                if not isinstance(event, Lost):
                    self._state = "idle"
            self._condition.notify_all()

    def _watch(self) -> None:
        """The group's thread: from the start of the ranks to their end."""
        try:
            with self._new_ranks() as ranks:
                try:
                    ranks.start()
                    with self._condition:
                        self._ranks, self._slots = ranks, ranks.slots
                    ranks.watch(self._calls)
                except Exception as error:  # whatever it is, nobody else would tell the caller
                    ranks.reason = str(error) if isinstance(error, GroupError) else describe(error, 0, "").message
                with self._condition:
                    self._ranks = None
                ranks.reason += ranks.end()
                self._gone(ranks)
        except Exception as error:
            self.become("lost", describe(error, 0, "").message)

    def _gone(self, ranks: Ranks) -> None:
        """All ranks have ended: say so."""
        with self._condition:
            starting, job = self._state == "starting", self._job
        self._suspect = ranks.device
        self.become("stopped" if ranks.asked else "lost", ranks.reason)
        if ranks.work is not None:
            ranks.work.lost(ranks.reason, ranks.device, ranks.asked)
        elif job is not None or not (starting or ranks.asked):
            self._emit(Lost(job, ranks.reason, None, ranks.device, ranks.asked))
