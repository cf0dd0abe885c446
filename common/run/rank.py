"""One rank's whole life: join the others, agree on the request, run the fork's `generate`, leave."""

from __future__ import annotations

import gc
import os
import pickle
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from common.registry.forks import Fork
from common.registry.request import Request, WrongUse, as_wrong_use
from common.run.channel import Channel
from common.system.environment import Process, split_cores
from common.system.failure import describe
from common.system.host import allocator_default, bind_to_gpu
from common.system.progress import Report
from common.system.stopping import SIGNALS, Asked, Stopped, heard, stoppable

if TYPE_CHECKING:
    from torch.distributed import Store

    from common.parallel.mesh import Mesh

Generate: TypeAlias = "Callable[[Request, Mesh, Report], None]"
"""Makes the videos of a request, the same function in every rank."""
Leave: TypeAlias = "Callable[[bool], str]"
"""Called with whether all is done; returns what of an unfinished run is kept, as the end of an error line."""
SELF_TEST_SECONDS = 60.0
SIGNAL_SECONDS = 1.0


def run(
    fork: Fork,
    generate: Generate,
    request: Request,
    process: Process,
    arguments: Sequence[str] = (),
    leave: Leave = lambda done: "",
) -> int:
    """One rank's whole life; returns its exit status, or ends the process when peers may still be waiting for it.

    arguments: the command line that the request was read from, where every rank has read its own.
    leave: called before the process ends in whatever way.
    """
    channel = Channel(process, request.debug)
    report = _report(channel, request)
    try:
        with _interruptible(channel, leave) as signals, _told(channel, report, leave, signals):
            with as_wrong_use():
                request, mesh = _connect(fork, request, process, report, arguments)
                try_connections(mesh, request, report, lambda error: channel.failed(report.where, error))
                request = resolved(fork, request, mesh, process, report)
            generate(request, mesh, report)
            wait_for_all(mesh)
        leave(True)
        if process.world_size > 1:
            channel.leave(0)
    except Stopped as stopped:
        return _interrupted(channel, leave, stopped.status)
    except KeyboardInterrupt:
        channel.interrupted(leave(False))
        return 130
    except _Failed as failed:
        return failed.status
    return 0


def _report(channel: Channel, request: Request) -> Report:
    console = None
    if channel.process.rank == 0:
        from rich.console import Console

        console = Console(file=channel.stderr)
    report = Report(console, channel.at_stage)
    for remark in request.remarks:
        report.note(remark)
    return report


@contextmanager
def _interruptible(channel: Channel, leave: Leave) -> Iterator[Asked]:
    """A signal raises `Stopped` in a rank that is alone, and in rank 0 of torchrun's, which tells for all.

    Other ranks end at once: in a collective that hangs Python would never see a signal. For rank 0 there is a thread.
    """
    at = channel.process
    if at.world_size == 1:
        with stoppable() as signals:
            yield signals
    elif at.launcher == "torchrun" and at.rank == 0:
        with stoppable(once=True) as signals, heard(lambda number: _end(channel, leave, 128 + number)):
            yield signals
    else:
        yield Asked()


def _interrupted(channel: Channel, leave: Leave, status: int) -> int:
    if channel.process.world_size > 1:
        _end(channel, leave, status)
    channel.interrupted(leave(False))
    return status


def _end(channel: Channel, leave: Leave, status: int) -> NoReturn:
    with suppress(ValueError):  # not the main thread, where they are ignored already
        for number in SIGNALS:  # torchrun hands on what a terminal sends to all
            signal.signal(number, signal.SIG_IGN)
    channel.interrupted(leave(False))
    channel.leave(status)


class _Failed(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


@contextmanager
def _told(channel: Channel, report: Report, leave: Leave, signals: Asked) -> Iterator[None]:
    """Tell the user of an exception once. With peers, leave at once: they would wait in a collective for us.

    signals: a signal that came; an exception is then only what a library made of it.
    WrongUse is status 2.
    """
    try:
        yield
    except Exception as error:
        if channel.process.launcher == "torchrun" and signals.number is None and describe(error, 0, "").secondary:
            time.sleep(SIGNAL_SECONDS)  # the peer may be gone by a signal that is on its way to us, too
        if signals.number is not None:
            raise Stopped(signals.number) from None
        status = 2 if isinstance(error, WrongUse) else 1
        channel.failed(report.where, error, status, leave(False))
        if channel.process.world_size > 1:
            channel.leave(status)
        raise _Failed(status) from None


def _connect(
    fork: Fork, request: Request, process: Process, report: Report, arguments: Sequence[str]
) -> tuple[Request, Mesh]:
    """The request that all ranks run, and this rank's mesh. Collective."""
    with report.stage("starting", quiet=True):
        if not request.on_cpu:  # before torch starts its threads and CUDA reads its settings
            os.environ.update(allocator_default(os.environ))
            bind_to_gpu(process.local_rank)
        _import(fork)
        from common.parallel.mesh import distributed, meet

        store = meet(request.timeout)
        if process.launcher == "torchrun" and store is not None:
            request = _of_rank_0(request, process, store, arguments)
        if request.on_cpu:
            split_cores(process)
        mesh = distributed(request.layout, request.runtime.device, request.timeout, store)
    report.device = mesh.device
    count = request.layout.ranks
    why = request.layout_chosen and f" ({request.layout_chosen})"
    report.note(f"{'1 rank' if count == 1 else f'{count} ranks'} on {mesh.device.type}: {request.layout}{why}")
    if request.groups_chosen and request.layout.sequence > 1:
        report.note(f"head groups: {request.runtime.overlap_groups} ({request.groups_chosen})")
    return request, mesh


def _import(fork: Fork) -> None:
    """All that the pipeline needs. Imports leave no garbage: not looking for any takes a sixth of their time off, and
    what they have made is not looked through whenever a stage is dropped.
    """
    gc.disable()
    try:
        if fork.pipeline:
            fork.pipeline_class()
    finally:
        gc.enable()
        gc.freeze()


def _of_rank_0(request: Request, process: Process, store: Store, arguments: Sequence[str]) -> Request:
    """Rank 0's request, on every rank: what was chosen by looking at the machine (layout, device) must be one choice.

    Before any process group exists, for groups of different layouts would wait for each other without end. Raises
    ValueError on a rank whose command line is another.
    """
    if process.rank == 0:
        store.set("request", pickle.dumps((list(arguments), request)).hex())
        return request
    theirs, request = pickle.loads(bytes.fromhex(store.get("request").decode()))
    if list(arguments) != theirs:
        mine = shlex.join(arguments)
        raise ValueError(f"this rank was started with `{mine}`, rank 0 with `{shlex.join(theirs)}`; give all the same")
    return request


def try_connections(mesh: Mesh, request: Request, report: Report, on_hang: Callable[[TimeoutError], None]) -> None:
    """Through every group of the mesh; one that hangs ends this process after `on_hang`. Collective."""
    from common.parallel.self_test import self_test

    with report.stage("testing the connections", quiet=True):
        limit = min(request.timeout, SELF_TEST_SECONDS)
        self_test(mesh, limit, on_hang)


def resolved(fork: Fork, request: Request, mesh: Mesh, process: Process, report: Report) -> Request:
    """The request with a real checkpoint directory, and a placement of its weights; says what is known in advance.

    A demo checkpoint is made by one rank of each machine. Collective.
    """
    from common.memory.choice import with_placement

    name = request.source.demo
    if name is not None:
        with report.stage("making the demo checkpoint", quiet=True):
            if process.local_rank == 0:
                fork.demo_folder(name)
            wait_for_all(mesh)
            request = replace(request, source=replace(request.source, model_dir=fork.demo_folder(name)))
    with report.stage("opening the checkpoint", quiet=True):
        request, outlook = with_placement(fork, request, mesh, process.local_world_size)
    if outlook is not None and outlook.why:
        report.note(f"weights: {outlook.why}")
    if outlook is not None and outlook.turns:
        report.note(outlook.turns)
    for warning in outlook.warnings if outlook is not None else ():
        report.warn(warning)
    return request


def wait_for_all(mesh: Mesh) -> None:
    """Until every rank has come here. Collective."""
    if mesh.world.group is not None:
        import torch

        torch.distributed.all_reduce(torch.zeros(1), group=mesh.world.group)
