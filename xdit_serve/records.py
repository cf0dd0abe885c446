"""What the store knows of a job, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Status: TypeAlias = "Literal['queued', 'in_progress', 'completed', 'failed']"
Kind: TypeAlias = "Literal['video', 'image']"
ENDED = ("completed", "failed")


@dataclass(frozen=True)
class JobSpec:
    """A job that was let in."""

    id: str
    """Also the name of its folder."""
    owner: str
    """Whose key asked for it, see `xdit_serve.keys`."""
    kind: Kind
    model: str
    arguments: tuple[str, ...]
    """The words of the program's command line without where the output goes."""
    shown: Mapping[str, Any]
    """What clients are told beside the state, plain values."""
    output: str
    """The name of its file in the job's folder."""


@dataclass(frozen=True)
class Record(JobSpec):
    """A job as it is stored. Times are unix seconds."""

    number: int = 0
    """Its place in the order of all jobs."""
    status: Status = "queued"
    cancelled: bool = False
    """Its client has deleted it, and it waits for the ranks to let it go."""
    created: float = 0.0
    started: float | None = None
    completed: float | None = None
    code: str | None = None
    message: str | None = None
    nbytes: int = 0
    """Bytes of its files."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By stage, of a finished job."""

    @property
    def ended(self) -> bool:
        return self.status in ENDED
