"""Groups of ranks at work on one source of jobs: started, given jobs, started again when they are lost."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from common.workers.group import ENDINGS, Event, Failed, GroupError, Health, Job, Lost, Note, WorkerGroup

WAIT_SECONDS = 0.2
LONGEST_REST = 30.0
MOST_LOST = 3
"""Times that a job may be lost at the same step before it fails."""


class Crew:
    """Each group has a thread that looks after it.

    take: the next job, waited for so many seconds at most. tell: gets the number of the group and what happened there.
    """

    def __init__(
        self,
        groups: Sequence[WorkerGroup],
        take: Callable[[float], Job | None],
        tell: Callable[[int, Event], None],
    ) -> None:
        self.groups, self._take, self._tell = groups, take, tell
        self._leaving = threading.Event()
        self._cancelled: set[str] = set()
        self._again: list[Job] = []
        self._lost: Counter[tuple[str, int]] = Counter()
        self._restarts = [-1] * len(groups)
        self._threads = [threading.Thread(target=self._look_after, args=(i,), daemon=True) for i in range(len(groups))]

    def start(self) -> None:
        """Returns at once; the groups come up by themselves."""
        for thread in self._threads:
            thread.start()

    def cancel(self, job: str) -> None:
        """End a job wherever it runs."""
        self._cancelled.add(job)
        for group in self.groups:
            group.cancel(job)

    def health(self) -> list[Health]:
        more = [{"restarts": max(0, count)} for count in self._restarts]
        return [replace(group.health(), more=told) for group, told in zip(self.groups, more)]

    def stop(self, seconds: float) -> None:
        """Take no further job, keep the states of those that run, end all ranks."""
        deadline = time.monotonic() + seconds
        self._leaving.set()
        enders = [threading.Thread(target=group.stop, args=(seconds * 0.8,), daemon=True) for group in self.groups]
        for thread in enders:
            thread.start()
        for thread in (*enders, *self._threads):
            if thread.ident is not None:
                thread.join(max(0.1, deadline - time.monotonic()))

    def _look_after(self, place: int) -> None:
        group, up, rest = self.groups[place], False, 0.0
        while not self._leaving.is_set():
            if not up:
                self._leaving.wait(rest)
                up = self._start(place, group)
                rest = 0.0 if up else min(LONGEST_REST, max(1.0, 2 * rest))
                continue
            job = self._again.pop() if self._again else self._take(WAIT_SECONDS)
            if job is not None:
                up = self._make(place, job)
            else:
                up = not any(isinstance(event, Lost) for event in group.events(0.0))

    def _start(self, place: int, group: WorkerGroup) -> bool:
        if self._leaving.is_set():
            return False
        try:
            group.start()
        except GroupError:
            return False
        self._restarts[place] += 1
        return True

    def _make(self, place: int, job: Job) -> bool:
        """One job from its start to its end; False when the group is gone after it."""
        group = self.groups[place]
        try:
            group.submit(job)
        except GroupError as error:
            self._tell(place, Lost(job.id, "", asked=True) if self._leaving.is_set() else Failed(job.id, str(error)))
            return group.health().state in ("idle", "busy")
        if job.id in self._cancelled:
            group.cancel(job.id)
        while True:
            for event in group.events(WAIT_SECONDS):
                if isinstance(event, Lost):
                    self._lose(place, job, event)
                    return False
                self._tell(place, event)
                if isinstance(event, ENDINGS):
                    return True

    def _lose(self, place: int, job: Job, event: Lost) -> None:
        """A job that was lost waits again, unless it was so at the same step too often."""
        at = -1 if event.at is None else event.at[0]
        self._lost[job.id, at] += 1
        if event.asked:
            self._tell(place, event)
        elif self._lost[job.id, at] >= MOST_LOST:
            self._tell(place, Failed(job.id, f"its ranks were lost {MOST_LOST} times: {event.message}"))
        else:
            self._tell(place, Note(job.id, f"the ranks were lost and start again: {event.message}", warning=True))
            self._again.append(Job(job.id, job.request, job.keep_state, job.keep_state))
