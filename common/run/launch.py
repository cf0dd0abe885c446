"""`run`: what a fork's command does. It reads the command line, then plans, quantizes, starts the ranks, or is one."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import click

from common.registry.forks import Fork
from common.registry.request import Request, WrongUse
from common.run import quantize, rank
from common.run.command_line import parse
from common.run.destination import existing_problems
from common.run.outputs import clean_up
from common.run.supervise import supervise
from common.system.environment import Process, open_standard_streams, this_process
from common.system.failure import describe
from common.system.files import claimed, lenient_streams, say, shown
from common.system.host import ensure_temporary_folder

CHILD = Path(__file__).with_name("child.py")


def run(fork: Fork, generate: rank.Generate, arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted.

    generate: makes the videos of a request, in every rank; a function of a module that can be imported by its name.
    arguments: default: the process's own.
    """
    open_standard_streams()
    lenient_streams()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["quantize"]:
        return quantize.run(fork, arguments[1:])
    started = time.time()
    read = _read(fork, arguments)
    if isinstance(read, int):
        return read
    process, request = read
    ensure_temporary_folder(request.output.parent)
    if request.dry_run:
        return _dry_run(fork, request, process)
    with suppress(OSError):
        request.output.parent.mkdir(exist_ok=True)  # missing only when it is our own default
    with ExitStack() as held:
        try:
            mine = [video.output for video in request.videos] if process.rank == 0 else []
            release = held.enter_context(claimed(mine))
        except ValueError as taken:
            say(f"error: {taken}")
            return 2
        # Now that no other run can make them.
        there = existing_problems(request.videos) if process.rank == 0 and not request.overwrite else []
        if there:
            for problem in there:
                say(f"error: {shown(problem)}")
            return 2
        if process.launcher is None and request.layout.ranks > 1:
            return _start(fork, generate, request, arguments, started)
        return rank.run(fork, generate, request, process, started, arguments, release)


def _read(fork: Fork, arguments: Sequence[str]) -> tuple[Process, Request] | int:
    """This process among others and the request; the exit status where there is none, of which the user is told."""
    try:
        process = this_process()
    except ValueError as error:
        say(f"error: {error}")
        return 2
    try:
        return process, parse(fork, arguments, process)
    except WrongUse as wrong:
        if process.local_rank == 0:
            for problem in wrong.problems:
                say(f"error: {shown(problem)}")
        return 2
    except click.exceptions.Exit as done:
        return done.exit_code
    except KeyboardInterrupt:
        return 130


def _dry_run(fork: Fork, request: Request, process: Process) -> int:
    """Say what would be done; of torchrun's ranks the first one does."""
    if process.rank:
        return 0
    from common.run import dry_run

    try:
        return dry_run.run(fork, request)
    except Exception as error:
        say(f"error: {describe(error, 0, 'dry run').message}")
        return 2 if isinstance(error, ValueError) else 1


def _start(fork: Fork, generate: rank.Generate, request: Request, arguments: Sequence[str], started: float) -> int:
    """Start a process for each rank, see `common.run.child`, and watch over them."""
    command = [sys.executable, str(CHILD), fork.program, *arguments]  # these: for whoever looks at the process list
    # The request is unpickled when the modules that its values come from can be found.
    handed = pickle.dumps((sys.path, fork.package, generate.__module__, generate.__qualname__, pickle.dumps(request)))
    return supervise(
        command, request.layout.ranks, request.on_cpu, handed, request.debug, lambda: clean_up(request, started)
    )
