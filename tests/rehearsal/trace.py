"""What a rank did on its fake GPU: the record that `tests.rehearsal.tracer` writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from common.system.progress import Report
from tests.helpers.recorder import Collective

HOST = "host"
READER = "reading thread"
"""A second thread of the host, which reads files."""
COMPUTE = "compute"
"""The stream on which a device works by default."""

Clock = dict[str, int]
Where = str
"""`file:function` of the product."""


@dataclass(frozen=True)
class Copy:
    """Between devices. waits: whether the host waits for it. pinned: whether the host's side is page-locked."""

    step: str
    where: Where
    source: str
    target: str
    bytes: int
    waits: bool
    pinned: bool
    stream: str


@dataclass(frozen=True)
class Sync:
    """The host waits: for a number (`read`) or for a stream or device (`synchronize`)."""

    step: str
    where: Where
    what: str


@dataclass(frozen=True)
class Moment:
    """what: `launch`, `copy`, `post` or `wait` (a collective), `host` (the host has waited), or an event of a stream.

    subject: the operator, or the collective. stream: where. knows: how many collectives of each group's stream must be
    done before this can happen, where that matters.
    """

    step: str
    what: str
    subject: Any
    stream: str
    knows: Clock = field(default_factory=dict)


@dataclass
class Trace:
    """What a rank did, by step ("sampling 2", "decoding 1", "loading transformer").

    launches: (step, file:line, operator) -> number and bytes. timeline: everything in order. hazards: races found.
    devices: on which tensors were used.
    """

    launches: defaultdict[tuple[str, str, str], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    copies: list[Copy] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    collectives: list[tuple[str, Collective]] = field(default_factory=list)
    timeline: list[Moment] = field(default_factory=list)
    hazards: list[str] = field(default_factory=list)
    devices: set[str] = field(default_factory=set)

    def totals(self, step: str) -> tuple[int, int]:
        """Kernels and bytes of the steps whose names begin so."""
        rows = [row for (name, _, _), row in self.launches.items() if name.startswith(step)]
        return sum(row[0] for row in rows), sum(row[1] for row in rows)


class Steps(Report):
    """Tells a tracer which stage and step is running."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device=device)
        self.name = "starting"

    @contextmanager
    def stage(self, name: str, total: int | None = None, *more: Any, done: int = 0, **named: Any) -> Iterator[Any]:
        before, self.name = self.name, name if total is None else f"{name} 1"
        at = done + 1
        with super().stage(name, total, *more, done=done, **named) as step:

            def counted(count: int = 1) -> None:
                nonlocal at
                step(count)
                if total is not None:
                    at += count
                    self.name = f"{name} {at}" if at <= total else f"after {name}"

            yield counted
        self.name = before
