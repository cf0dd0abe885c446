"""What the store knows of a job, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Status: TypeAlias = "Literal['queued', 'in_progress', 'completed', 'failed']"
Kind: TypeAlias = "Literal['video', 'image']"
ENDED = ("completed", "failed")


@dataclass(frozen=True)
class Wanted:
    """A job that was let in.

    id: also the name of its folder. owner: whose key asked for it, see `xdit_serve.keys`. arguments: the words of the
    program's command line without where the output goes. shown: what clients are told of it beside its state, plain
    values. output: the name of its file in the job's folder.
    """

    id: str
    owner: str
    kind: Kind
    model: str
    arguments: tuple[str, ...]
    shown: Mapping[str, Any]
    output: str


@dataclass(frozen=True)
class Record(Wanted):
    """A job as it is stored. Times are unix seconds; number: its place in the order of all jobs.

    cancelled: its client has deleted it, and it waits for the ranks to let it go. nbytes: of its files. seconds: by
    stage, of a finished one.
    """

    number: int = 0
    status: Status = "queued"
    cancelled: bool = False
    created: float = 0.0
    started: float | None = None
    completed: float | None = None
    code: str | None = None
    message: str | None = None
    nbytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.status in ENDED
