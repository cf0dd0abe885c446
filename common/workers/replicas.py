"""Several worker groups over one source of jobs: a group that is lost starts again, and its job goes on. No torch.

A thread for each group takes a job, sees to it until it ends, and takes the next. What becomes of a group is not the
job's business: the caller hears of each job that it finished, was cancelled or failed, and of lost groups by notes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from common.registry.forks import Size
from common.registry.request import Request
from common.run.degrees import choose_layout, with_overlap
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
    WorkerGroup,
)
from common.workers.orders import Maker, maker_of
from common.workers.work import with_state

MOST_LOSSES = 3
"""At the same step of one job: then it is the job."""
MOST_STRIKES = 2
"""Faults of a device with no finished job in between: then it is left out."""
WAIT_SECONDS = (0.0, 1.0, 5.0)
"""Before each attempt to start a group that was lost."""
REST_SECONDS = 60.0
"""Before a group that could not be started is tried again."""
TICK_SECONDS = 0.2

Take = Callable[[float], "Job | None"]
"""The next job, waited for so many seconds at most; None: there is none now."""
MakeGroup = Callable[[Sequence[int]], WorkerGroup]
"""A group, not started, over these devices."""


def fitted(request: Request, ranks: int, makers: tuple[Maker, ...] = ()) -> Request:
    """The request with a layout for as many ranks: its own, or the one that is chosen for it."""
    if request.layout.ranks == ranks:
        return request
    video = request.videos[0]
    guided = request.guided(video)
    size = Size.of(video.sampling, guided)
    device, names = str(request.runtime.device), maker_of(request.program, makers).fork.names
    layout, why = choose_layout(names, ranks, request.rules.heads, guided, None, None, None, device, size)
    return with_overlap(replace(request, layout=layout, layout_chosen=why), names)


@dataclass
class _Losses:
    """How often a job's group was lost, and where."""

    at: tuple[int, int] | None = None
    count: int = 0
    causes: list[str] = field(default_factory=list)

    def add(self, loss: Lost) -> bool:
        """Whether the job may be tried again."""
        self.count = self.count + 1 if loss.at == self.at and self.causes else 1
        self.at = loss.at
        self.causes.append(loss.message)
        return self.count < MOST_LOSSES


class Replicas:
    """Groups at work. All methods may be called from any thread.

    make: a group over devices. devices: of each group. take: the caller's source of jobs, called by the groups'
    threads. tell: gets the number of the group and what happened there, called by the groups' threads; of every job
    that was taken exactly one of Finished, Cancelled, Failed, and, where `stop` ended it, Lost. Neither of the two may
    raise. makers: of forks that are not registered. A job without `keep_state` begins anew when its group was lost.
    """

    def __init__(
        self,
        make: MakeGroup,
        devices: Sequence[Sequence[int]],
        take: Take,
        tell: Callable[[int, Event], None],
        makers: Sequence[Maker] = (),
    ) -> None:
        self._take, self._tell, self._makers = take, tell, tuple(makers)
        self._lock = threading.Lock()
        self._given_back: deque[tuple[Job, _Losses]] = deque()
        self._cancelled: set[str] = set()
        self._ending = threading.Event()
        self._last = False
        self._one_start = threading.Lock()
        self.groups = [_Replica(self, number, make, tuple(own)) for number, own in enumerate(devices)]

    def start(self) -> None:
        """Start the groups, one after another. GroupError, and nothing left, when one cannot; it may be tried again."""
        try:
            for one in self.groups:
                one.first_start()
        except BaseException:
            for one in self.groups:
                one.stop(0)
            raise
        for one in self.groups:
            one.thread.start()

    def cancel(self, job: str) -> None:
        """End a job that was taken and has not ended."""
        with self._lock:
            self._cancelled.add(job)
        for one in self.groups:
            one.cancel(job)

    def health(self) -> list[Health]:
        """Of each group; `more` has how often it was restarted and the devices that are left out."""
        return [one.health() for one in self.groups]

    def finish(self) -> list[Job]:
        """Return when no job is to be had any more and all have ended. The jobs that no group is left for."""
        self._last = True
        for one in self.groups:
            one.thread.join()
        return [job for job, _ in self._given_back]

    def stop(self, seconds: float) -> None:
        """End all groups; jobs that run are told of as Lost, their states kept. seconds: as for `WorkerGroup.stop`."""
        self._ending.set()
        threads = [threading.Thread(target=one.stop, args=(seconds,)) for one in self.groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in self.groups:
            if one.thread.ident is not None and one.thread is not threading.current_thread():
                one.thread.join()

    def _next(self) -> tuple[Job, _Losses] | None:
        with self._lock:
            if self._given_back:
                return self._given_back.popleft()
        job = self._take(TICK_SECONDS)
        return None if job is None else (job, _Losses())

    def _give_back(self, job: Job, losses: _Losses) -> None:
        with self._lock:
            self._given_back.append((job, losses))

    def _is_cancelled(self, job: str) -> bool:
        with self._lock:
            return job in self._cancelled

    def _ended(self, job: str) -> None:
        with self._lock:
            self._cancelled.discard(job)

    def _may_come_back(self) -> bool:
        """Whether a job may be given back yet, or has been."""
        return bool(self._given_back) or any(one.at_work for one in self.groups)


class _Replica:
    """One group's place, and its thread."""

    def __init__(self, of: Replicas, number: int, make: MakeGroup, devices: tuple[int, ...]) -> None:
        self.of, self.number, self._make, self.devices = of, number, make, devices
        self.group, self.on = make(devices), devices
        self.strikes: dict[int, int] = {}
        self.restarts = 0
        self.usable = self.at_work = False
        self.job: str | None = None
        self.thread = threading.Thread(target=self._work, name=f"replica {number}", daemon=True)

    def first_start(self) -> None:
        self.group.start()
        self.usable = True

    def cancel(self, job: str) -> None:
        if self.job == job:
            self.group.cancel(job)

    def stop(self, seconds: float) -> None:
        self.group.stop(seconds)

    def health(self) -> Health:
        left_out = [device for device in self.devices if device not in self.on]
        more = {"restarts": self.restarts, "left_out": left_out}
        return replace(self.group.health(), more=more)

    def _work(self) -> None:
        while not self.of._ending.is_set():
            if not self.usable and not self._restart():
                if self.of._last or self.of._ending.wait(REST_SECONDS):
                    return
                self.strikes.clear()
                continue
            entry = self.of._next()
            if entry is not None:
                self.at_work = True
                self._see_to(*entry)
                self.at_work = False
            elif not self.of._last:
                self._look_after()
            elif not self.of._may_come_back() or self.of._ending.wait(TICK_SECONDS):
                return

    def _look_after(self) -> None:
        """An idle group may be lost, too."""
        for event in self.group.events(0):
            if isinstance(event, Lost):
                self._note_loss(event)

    def _see_to(self, job: Job, losses: _Losses) -> None:
        """One job, to its end; or given back, where this group cannot go on with it."""
        while not self.of._ending.is_set():
            if self.of._is_cancelled(job.id):
                self._end(job, Cancelled(job.id))
                return
            if not self.usable and not self._restart():
                break
            ending = self._attempt(job)
            if not isinstance(ending, Lost):
                if isinstance(ending, Finished):
                    for device in self.on:
                        self.strikes.pop(device, None)
                self._end(job, ending)
                return
            self._note_loss(ending)
            if ending.asked:
                self._end(job, ending)
                return
            if not losses.add(ending):
                where = "" if ending.at is None else f" at step {ending.at[0]} of {ending.at[1]}"
                message = f"its ranks were lost {MOST_LOSSES} times{where}: {ending.message}"
                self._end(job, Failed(job.id, message, at=ending.at))
                return
            step = "" if ending.at is None else f" after step {ending.at[0]} of {ending.at[1]}"
            self._tell(Note(job.id, f"the ranks were lost{step} and start again: {ending.message}", warning=True))
            job = with_state(job)
        self.of._give_back(job, losses)

    def _attempt(self, job: Job) -> Event:
        """Submit a job and pass on what happens; returns its ending."""
        try:
            request = fitted(job.request, len(self.group.devices), self.of._makers)
            self.job = job.id
            self.group.submit(replace(job, request=request))
        except (GroupError, ValueError) as error:
            self.job = None
            losses = [event for event in self.group.events(0) if isinstance(event, Lost)]
            return replace(losses[0], job=job.id) if losses else Failed(job.id, str(error), wrong_use=True)
        if self.of._is_cancelled(job.id):
            self.group.cancel(job.id)
        while True:
            for event in self.group.events(TICK_SECONDS):
                if isinstance(event, ENDINGS) and event.job in (job.id, None):
                    self.job = None
                    return replace(event, job=job.id)
                self._tell(event)

    def _note_loss(self, loss: Lost) -> None:
        self.usable = False
        self._strike(loss.device)

    def _strike(self, device: int | None) -> None:
        if device is not None:
            self.strikes[device] = self.strikes.get(device, 0) + 1

    def _restart(self) -> bool:
        """Start the group again, over the devices that are not left out; False where that does not succeed."""
        for wait in WAIT_SECONDS:
            if self.of._ending.wait(wait):
                return False
            devices = [device for device in self.devices if self.strikes.get(device, 0) < MOST_STRIKES]
            if not devices:  # none is better than another
                self.strikes.clear()
                devices = list(self.devices)
            try:
                with self.of._one_start:
                    if tuple(devices) != self.on:
                        self.group.stop(0)
                        self.group, self.on = self._make(devices), tuple(devices)
                    self.group.start()
            except GroupError as error:
                self._strike(error.device)
                continue
            self.usable = True
            self.restarts += 1
            return True
        return False

    def _end(self, job: Job, event: Event) -> None:
        self.of._ended(job.id)
        if isinstance(event, Cancelled) and job.keep_state is not None:
            with suppress(OSError):
                job.keep_state.unlink()
        self._tell(event)

    def _tell(self, event: Event) -> None:
        self.of._tell(self.number, event)
