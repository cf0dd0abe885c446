"""What a group sends its ranks, and what they send back: the same words under every kind of group. No torch.

To a rank: `Hello` once, then an `Order` for each job, `Leave` a job, or None, which ends the rank.
From a rank, plain values: `{"ready": true}`; `{"stage": where, "at": [name, unit, done, total]}`; `{"note": text,
"warning": bool}`; `{"failure": ...}` as `common.system.failure.Failure` has it; and at the end of each job `{"ended":
how, "job": id, "seconds": {stage: s}, "memory": bytes, "models": names, "loadings": n}`, where how is `finished`,
`cancelled` or `failed`.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from common.registry.forks import Fork, forks

_LENGTH = struct.Struct("<q")


@dataclass(frozen=True)
class Hello:
    """What a rank is told first."""

    path: tuple[str, ...]
    """`sys.path`, so that modules of what follows are found."""
    on_cpu: bool
    timeout: float
    """Seconds until the ranks have met."""


@dataclass(frozen=True)
class Order:
    """One job for one rank."""

    job: str
    number: int
    """The number of the order, the same on all ranks."""
    fresh: bool
    """The groups of processes are made anew, whatever the layout."""
    package: str
    """The package of the fork."""
    module: str
    name: str
    """`module`, `name`: of the fork's `generate`."""
    request: bytes
    """The request, pickled."""
    keep: bool
    """Models stay where memory allows."""


@dataclass(frozen=True)
class Leave:
    """End this job at the next place where all ranks are together."""

    job: str


Message: TypeAlias = "Hello | Order | Leave | None"


@dataclass(frozen=True)
class Maker:
    """Whose videos: a fork, and the function of a module that makes them in every rank."""

    fork: Fork
    module: str = ""
    name: str = "generate"

    @property
    def where(self) -> tuple[str, str, str]:
        return self.fork.package, self.module or f"{self.fork.package}.generate", self.name


def maker_of(program: str, others: tuple[Maker, ...] = ()) -> Maker:
    """The maker of a program's videos: one of `others`, else of a registered fork. ValueError for an unknown one."""
    makers = (*others, *map(Maker, forks()))
    maker = next((one for one in makers if one.fork.program == program), None)
    if maker is None:
        programs = ", ".join(dict.fromkeys(one.fork.program for one in makers))
        raise ValueError(f"no fork here is {program!r}; there are {programs}")
    return maker


def framed(message: Message) -> bytes:
    """A message as bytes in a pipe."""
    data = pickle.dumps(message)
    return _LENGTH.pack(len(data)) + data


def messages(descriptor: int) -> Iterator[Any]:
    """Messages from a pipe, as they come, until it is closed."""
    while (head := _exactly(descriptor, _LENGTH.size)) is not None:
        data = _exactly(descriptor, _LENGTH.unpack(head)[0])
        if data is None:
            return
        yield pickle.loads(data)


def _exactly(descriptor: int, size: int) -> bytes | None:
    pieces = b""
    while len(pieces) < size:
        piece = os.read(descriptor, size - len(pieces))
        if not piece:
            return None
        pieces += piece
    return pieces
