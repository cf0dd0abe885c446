"""What one asks of a group of resident ranks, and what it tells: values and the protocol, no implementation. No torch.

A group has a number of ranks, each with a device of its own, which load models, make one video at a time and stay.
The implementations are `common.workers.local.LocalGroup` (processes of this machine) and
`common.workers.ray_group.RayGroup`; `common.workers.replicas.Replicas` keeps several at work and is what most callers
want. All methods may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from common.registry.request import Request


class GroupError(RuntimeError):
    """A group that cannot start, or cannot take this job; one line for the user.

    device: the one that is to be suspected, where that is known.
    """

    def __init__(self, message: str, device: int | None = None) -> None:
        super().__init__(message)
        self.device = device


@dataclass(frozen=True)
class Job:
    """One video on one group."""

    id: str
    """Of the caller's choice, not given before."""
    request: Request
    """As `common.run.command_line.parse` makes it, with one video, whose seed is drawn and whose output nobody else
    writes; with a layout for as many ranks as the group has."""
    state: Path | None = None
    """The file to go on from, see `common.run.states.StateFile`; it must be of the same video."""
    keep_state: Path | None = None
    """Where the newest state is written every `request.save_every` seconds, and when the job does not finish; removed
    when it finishes or is cancelled. It may be the same file as `state`."""
    previews: bool = False
    """Whether previews are made; there are none of a checkpoint of which no video was decoded here before."""


@dataclass(frozen=True)
class Progress:
    """Where a job is."""

    job: str
    stage: str
    """Names as in `common.system.progress`."""
    step: int = 0
    steps: int = 0
    """`step`, `steps`: how many of the stage's steps, chunks or bytes are done, of how many; 0 of 0 for a stage that
    does not count."""
    seconds_left: float | None = None
    """Of the whole job by what is known so far; None: nothing is."""
    unit: str = "step"
    """Of `step` and `steps`."""


@dataclass(frozen=True)
class Note:
    """A line for the user, as the command line prints them."""

    job: str
    text: str
    warning: bool = False
    """It is a warning."""


@dataclass(frozen=True)
class Preview:
    """A small picture of what the video will be."""

    job: str
    step: int
    """How many steps were done."""
    png: bytes
    """The bytes of the file."""


@dataclass(frozen=True)
class Finished:
    """The output is whole."""

    job: str
    seconds: Mapping[str, float]
    """By stage, of rank 0."""
    sidecar: Path
    """The json beside the output."""


@dataclass(frozen=True)
class Cancelled:
    """Nothing of the job is left; the ranks are idle and keep their models."""

    job: str


@dataclass(frozen=True)
class Failed:
    """The job cannot be made; the ranks are idle. Its newest state is in `keep_state`."""

    job: str
    message: str
    """One line."""
    wrong_use: bool = False
    """The request asks for what this checkpoint or machine does not have."""
    memory: bool = False
    """Memory ran out."""
    disk: bool = False
    """No space was left on a disk, where there may be some later."""
    at: tuple[int, int] | None = None
    """(steps done, steps) of the sampling, where that had begun."""


@dataclass(frozen=True)
class Lost:
    """The group's ranks are gone, and it with them: `start` makes new ones. The job can go on from its `keep_state`."""

    job: str | None
    """The job that was running."""
    message: str
    """One line."""
    at: tuple[int, int] | None = None
    """(steps done, steps) of the newest state, where there is one."""
    device: int | None = None
    """That of `WorkerGroup.devices` whose rank was the cause, where that is known."""
    asked: bool = False
    """It was `stop` that ended them."""


Event: TypeAlias = "Progress | Note | Preview | Finished | Cancelled | Failed | Lost"
"""Each job that was submitted has exactly one of Finished, Cancelled, Failed and Lost, and nothing after that."""
ENDINGS = (Finished, Cancelled, Failed, Lost)

State: TypeAlias = Literal["starting", "idle", "busy", "lost", "stopped"]


@dataclass(frozen=True)
class RankHealth:
    """One rank."""

    pid: int
    """0 where there is none."""
    device: int
    """A GPU's number, or on a CPU the place of the rank."""
    memory: int = 0
    """Bytes, of its device as PyTorch counts them, on a CPU resident memory of the process."""
    models: tuple[str, ...] = ()
    """What it keeps loaded."""


@dataclass(frozen=True)
class Health:
    """A group at one moment."""

    state: State
    ranks: tuple[RankHealth, ...] = ()
    job: str | None = None
    """The job that is running."""
    loadings: int = 0
    """Models that rank 0 has loaded since it started."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What an implementation has to tell beside."""


class WorkerGroup(Protocol):
    """Resident ranks. They end with the process that made the group, whatever becomes of it."""

    devices: tuple[int, ...]
    """One for each rank: numbers of GPUs as this process counts them, or on a CPU any that tell the ranks apart."""

    def start(self) -> None:
        """Ranks up, connected, idle; also after `Lost`. Blocks. Raises GroupError, and then no process is left."""

    def submit(self, job: Job) -> None:
        """Returns at once. Raises GroupError unless the group is idle and the layout has as many ranks as it has."""

    def events(self, timeout: float) -> list[Event]:
        """What happened since the last call, in order; waits up to `timeout` seconds for the first event."""

    def cancel(self, job: str) -> None:
        """End a job at its next step or decode chunk, on all ranks alike. Returns at once; nothing for another job.

        A job that is past the last of these ends as it would have.
        """

    def health(self) -> Health:
        """Never raises, never waits for a rank."""

    def stop(self, seconds: float) -> None:
        """End the ranks: asks, and kills what is left after `seconds`. A running job is `Lost`, its state kept."""
