"""How long a job still takes, by its own steps so far and by jobs of its kind before it. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from common.registry.request import Request
from common.system.progress import BYTE

MOST_KINDS = 256
DUE_SECONDS = 0.05


def kind_of(request: Request) -> Any:
    """Equal for jobs that take about as long: program, weights, size, steps, layout."""
    video = request.videos[0]
    size = (video.sampling.width, video.sampling.height, video.sampling.num_frames, video.sampling.num_steps)
    return request.program, request.source, size, request.guided(video), request.layout


class Durations:
    """Seconds of each stage of the last job of each kind, in the order of the stages."""

    def __init__(self) -> None:
        self._durations: dict[Any, dict[str, float]] = {}

    def of(self, kind: Any) -> Mapping[str, float]:
        return self._durations.get(kind, {})

    def learn(self, kind: Any, seconds: Mapping[str, float]) -> None:
        """Loading is left out: the next job finds the models loaded."""
        if len(self._durations) >= MOST_KINDS:
            self._durations.clear()
        self._durations[kind] = {name: duration for name, duration in seconds.items() if not name.startswith("loading")}


class Pace:
    """Seconds left of one job. durations: of the stages of a job like it, in their order."""

    def __init__(self, durations: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._durations, self._clock = durations, clock
        self._stage: tuple[str, str] | None = None
        self._start = 0.0
        self._from = 0
        self._first: tuple[float, int] | None = None
        self._last_told: tuple[str, str] | None = None
        self._told_at = 0.0

    def is_due(self, name: str, unit: str, done: int, total: int) -> bool:
        """Whether to tell of this: another stage, all of its units, or DUE_SECONDS after what was told last."""
        now = self._clock()
        if (name, unit) == self._last_told and done != total and now - self._told_at < DUE_SECONDS:
            return False
        self._last_told, self._told_at = (name, unit), now
        return True

    def left(self, name: str, unit: str, done: int, total: int) -> float | None:
        """What is left when this stage has so many of its units done; None where nothing is known of it."""
        now = self._clock()
        if (name, unit) != self._stage:
            self._stage, self._start, self._from, self._first = (name, unit), now, done, None
        own = done - self._from
        if own and self._first is None:
            self._first = now, own
        names = list(self._durations)
        after = sum(self._durations[one] for one in names[names.index(name) + 1 :]) if name in names else 0.0
        # The first step warms up kernels and allocators: it counts only while it is alone.
        if total and self._first is not None and own > self._first[1]:
            here = (now - self._first[0]) / (own - self._first[1]) * (total - done)
        elif total and own:
            here = (now - self._start) / own * (total - done)
        elif name in self._durations:
            share = 1.0 if not total else (total - done) / total
            here = max(0.0, self._durations[name] * share - (now - self._start))
        elif unit == BYTE or not total:
            return sum(self._durations.values()) or None
        else:
            return None
        return here + after
