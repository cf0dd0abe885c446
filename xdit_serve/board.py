"""Where running jobs are, for those who ask. In memory alone: what has to outlive the server is in the store."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from common.workers.group import Event, Preview, Progress

BEFORE, SAMPLED = 2, 90
"""Per cent that stand for what comes before sampling, and for all until its last step."""


@dataclass(frozen=True)
class Live:
    """One job at one moment."""

    version: int = 0
    """Grows with every change."""
    stage: str = "starting"
    step: int = 0
    steps: int = 0
    unit: str = "step"
    seconds_left: float | None = None
    percent: int = 0
    """Never falls while the job runs, whatever stage counts again."""
    preview: bytes = b""
    """A PNG, empty where there is none."""
    preview_step: int = 0


class Board:
    """All running jobs. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, Live] = {}

    def tell(self, job: str, event: Event) -> None:
        """Take in progress and previews."""
        with self._lock:
            live = self._jobs.get(job, Live())
            if isinstance(event, Progress):
                self._jobs[job] = replace(
                    live,
                    version=live.version + 1,
                    stage=event.stage,
                    step=event.step,
                    steps=event.steps,
                    unit=event.unit,
                    seconds_left=event.seconds_left,
                    percent=max(live.percent, percent(event)),
                )
            elif isinstance(event, Preview):
                self._jobs[job] = replace(live, version=live.version + 1, preview=event.png, preview_step=event.step)

    def get(self, job: str) -> Live:
        with self._lock:
            return self._jobs.get(job, Live())

    def drop(self, job: str) -> None:
        with self._lock:
            self._jobs.pop(job, None)


def percent(at: Progress) -> int:
    """Of a whole job, 0 to 99: that it is all done, only its end says."""
    fraction = at.step / at.steps if at.steps else 0.0
    if at.stage == "sampling":
        return BEFORE + int(fraction * (SAMPLED - BEFORE))
    if at.stage == "decoding":
        return SAMPLED + int(fraction * (99 - SAMPLED))
    return 0
