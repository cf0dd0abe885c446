"""A fork's command, called in this process, and its request made by ranks of the pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from common.registry.checks import Rules
from common.registry.forks import Fork, forks
from common.registry.request import Request, WrongUse, draw_seeds
from common.run import launch
from common.run.command_line import parse
from common.run.outputs import Output
from common.system.progress import Report

if TYPE_CHECKING:
    from torch import Tensor

    from tests.helpers.ranks import RankPool


def read(fork: Fork, *arguments: object) -> Request:
    """The request of a command line."""
    return parse(fork, [str(argument) for argument in arguments])


def problems(fork: Fork, *arguments: object) -> list[str]:
    """What is wrong with a command line."""
    try:
        read(fork, *arguments)
    except WrongUse as wrong:
        return wrong.problems
    raise AssertionError("nothing is wrong with it")


def main(fork: Fork, arguments: Sequence[str]) -> int:
    """What the fork's `main` would exit with."""
    return launch.run(fork, fork.module("generate").generate, arguments)


def frames_of(fork: Fork, request: Request) -> list[Tensor]:
    """The frames of a request's videos on one rank; nothing is written."""
    from common.parallel.mesh import Mesh
    from common.video.decode_video import AllFrames

    made: list[Tensor] = []

    @contextmanager
    def opened(_: Output) -> Iterator[AllFrames]:
        kept = AllFrames()
        yield kept
        assert kept.frames is not None
        made.append(kept.frames)

    request = replace(request, videos=tuple(draw_seeds(request.videos)))
    with mock.patch.multiple(Output, keep=lambda *_: None, opened=opened):
        fork.module("generate").generate(request, Mesh(), Report())
    return made


def on_ranks(pool: RankPool, fork: Fork, *arguments: object) -> Request:
    """What a command makes on CPU ranks, without a start of new processes for them; its request."""
    request = read(fork, *arguments, "--device", "cpu")
    request = replace(request, videos=tuple(draw_seeds(request.videos)))
    pool(request.layout.ranks, _as_rank, fork.name, request)
    return request


def _as_rank(fork_name: str, request: Request) -> None:
    from common.parallel.mesh import distributed
    from common.run.rank import resolved
    from common.system.environment import this_process

    fork, report = next(fork for fork in forks() if fork.name == fork_name), Report()
    with distributed(request.layout, "cpu") as mesh:
        request = resolved(fork, request, mesh, this_process(), report)
        fork.module("generate").generate(request, mesh, report)


def demo_of(fork: Fork) -> tuple[Path, Rules]:
    """The folder of a fork's first demo, and its size and other defaults."""
    return fork.demo_folder(), next(iter(fork.demos.values()))
