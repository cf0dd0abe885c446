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
from common.run.unfinished import states_saved, taken_up, with_interrupted, with_whole
from common.system.environment import Process, open_standard_streams, this_process
from common.system.failure import describe
from common.system.files import claimed, discard_stdout, lenient_streams, say, shown
from common.system.host import ensure_temporary_folder
from common.system.stopping import Stopped, stoppable

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
    start_time = time.time()
    outcome = _read(fork, arguments)
    if isinstance(outcome, int):
        return outcome
    process, request, arguments = outcome
    ensure_temporary_folder(request.output.parent)
    if request.dry_run:
        return _dry_run(fork, request, process)
    with suppress(OSError):
        request.output.parent.mkdir(exist_ok=True)  # missing only when it is our own default
    if process.rank:
        return rank.run(fork, generate, request, process, arguments)
    try:
        with stoppable():  # from before there is anything to remove
            return _run(fork, generate, request, process, arguments, start_time)
    except Stopped as stopped:
        return stopped.status


def _run(
    fork: Fork,
    generate: rank.Generate,
    request: Request,
    process: Process,
    arguments: Sequence[str],
    start_time: float,
) -> int:
    """What rank 0, or the parent of all ranks, does besides: hold the outputs' names, keep what is left."""
    with ExitStack() as stack:
        try:
            outputs = dict.fromkeys((request.output, *(video.output for video in request.videos)))
            release = stack.enter_context(claimed(list(outputs)))
            request = taken_up(request, fresh=request.overwrite)
        except ValueError as error:
            say(f"error: {error}")
            return 2
        # Now that no other run can make them.
        request = with_whole(request)
        if there := existing_problems(request):
            for problem in there:
                say(f"error: {shown(problem)}")
            return 2
        if request.replicas > 1 or request.ray_address is not None:
            from common.workers import prompts

            return prompts.run(prompts.Maker(fork, generate.__module__, generate.__qualname__), request, arguments)
        starts = process.launcher is None and request.layout.ranks > 1
        ranks = request.layout.ring * request.layout.ulysses if starts else 1
        request, close = stack.enter_context(states_saved(request, arguments, ranks))

        def leave(done: bool) -> str:
            afterword = "" if done else clean_up(request, start_time)
            afterword += close(done, bool(afterword))
            release()
            return afterword

        if starts:
            return _start(fork, generate, request, arguments, leave)
        return rank.run(fork, generate, request, process, arguments, leave)


def _read(fork: Fork, arguments: list[str]) -> tuple[Process, Request, list[str]] | int:
    """This process among others, the request, and what it is read from.

    The exit status where there is none, of which the user is told.
    """
    try:
        process = this_process()
    except ValueError as error:
        say(f"error: {error}")
        return 2
    try:
        arguments = with_interrupted(arguments, fork.program)
        return process, parse(fork, arguments, process), arguments
    except WrongUse as wrong:
        if process.local_rank == 0:
            for problem in wrong.problems:
                say(f"error: {shown(problem)}")
        return 2
    except click.exceptions.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        return 130


def _dry_run(fork: Fork, request: Request, process: Process) -> int:
    """Say what would be done; of torchrun's ranks the first one does."""
    if process.rank:
        return 0
    from common.run import dry_run

    try:
        return dry_run.run(fork, request)
    except BrokenPipeError:  # head, or a pager, has read enough
        discard_stdout()
        return 1
    except Exception as error:
        say(f"error: {describe(error, 0, 'dry run').message}")
        return 2 if isinstance(error, ValueError) else 1


def _start(fork: Fork, generate: rank.Generate, request: Request, arguments: Sequence[str], leave: rank.Leave) -> int:
    """Start a process for each rank, see `common.run.child`, and watch over them."""
    command = [sys.executable, str(CHILD), fork.program, *arguments]  # these: for whoever looks at the process list
    # The request is unpickled when the modules that its values come from can be found.
    payload = pickle.dumps((sys.path, fork.package, generate.__module__, generate.__qualname__, pickle.dumps(request)))
    slots = [descriptor for one in request.slots for descriptor in one]
    return supervise(command, request.layout.ranks, request.on_cpu, payload, request.debug, leave, slots)
