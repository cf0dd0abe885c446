"""The program every fork runs: read the command, start the ranks, prove that they can talk, make the videos.

A fork's cli.py is a `Program` and two lines:

    def main() -> None:
        sys.exit(program.main(PROGRAM))
"""

from __future__ import annotations

import json
import os
import pickle
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common import launch, quantize
from common.cli import parse
from common.failure import describe
from common.files import claimed, identity, lenient_streams, remove_partial, say, shown, tell
from common.host import allocator_default, bind_to_gpu, ensure_temporary_folder
from common.options import version
from common.progress import StageRecord, Stages
from common.request import Program, Request, Setup, Video, WrongUse, draw_seeds, settings
from common.stopping import Asked, Stopped, stoppable

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

    from common.parallel import Mesh

SELF_TEST_SECONDS = 60.0


def main(program: Program, arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    launch.open_standard_streams()
    lenient_streams()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["quantize"]:
        return quantize.run(program, arguments[1:])
    try:
        at = launch.place()
    except ValueError as error:
        say(f"error: {error}")
        return 2
    started = time.time()
    if at.launcher == "supervise":
        return run_rank(program, pickle.loads(launch.handed_down()), at, started)
    try:
        request = parse(program, arguments, at)
    except WrongUse as wrong:
        if at.local_rank == 0:
            for problem in wrong.problems:
                say(f"error: {shown(problem)}")
        return 2
    except click.exceptions.Exit as done:
        return done.exit_code
    except KeyboardInterrupt:
        return 130
    ensure_temporary_folder(request.output.parent)
    if request.dry_run:
        return _dry_run(program, request, at)
    with suppress(OSError):
        request.output.parent.mkdir(exist_ok=True)  # missing only when it is our own default
    with ExitStack() as held:
        try:
            release = held.enter_context(claimed([video.output for video in request.videos] if at.rank == 0 else []))
        except ValueError as taken:
            say(f"error: {taken}")
            return 2
        return _run(program, request, at, arguments, started, release)


def _run(
    program: Program,
    request: Request,
    at: launch.Place,
    arguments: Sequence[str],
    started: float,
    release: Callable[[], None],
) -> int:
    """Start the ranks, or be one. release: gives the names of the outputs back."""
    setup = request.setup
    if at.launcher is None and setup.ranks > 1:
        command = [sys.executable, program.script, *arguments]  # arguments: for whoever looks at the process list
        handed = pickle.dumps(request)
        return launch.supervise(
            command, setup.ranks, setup.on_cpu, handed, setup.debug, lambda: clean_up(request, started)
        )
    return run_rank(program, request, at, started, arguments, release)


def _dry_run(program: Program, request: Request, at: launch.Place) -> int:
    """Say what would be done; of torchrun's ranks the first one does."""
    if at.rank:
        return 0
    from common import dry_run

    try:
        return dry_run.run(program, request)
    except Exception as error:
        say(f"error: {describe(error, 0, 'dry run').message}")
        return 2 if isinstance(error, ValueError) else 1


def clean_up(request: Request, since: float) -> str:
    """After a failure: remove what is half written; name the latents this run has finished, for `--from-latents`."""
    kept = []
    for video in request.videos:
        for path in (*video.files, *video.latents_files):
            remove_partial(path)
        for path in video.latents_files:
            with suppress(OSError):
                if path.stat().st_mtime >= since:
                    kept.append(shown(path))
    return f"; finished latents are kept, decode them with --from-latents {kept[-1]}" if kept else ""


def run_rank(
    program: Program,
    request: Request,
    at: launch.Place,
    started: float,
    arguments: Sequence[str] = (),
    release: Callable[[], None] = lambda: None,
) -> int:
    """One rank's whole life; returns its exit status, or ends the process when peers may still be waiting for it.

    arguments: the command line that the request was read from, where every rank has read its own.
    release: called before the process ends in whatever way.
    """
    link = launch.Link(at, request.setup.debug)
    console = None
    if at.rank == 0:
        from rich.console import Console

        console = Console(file=link.stderr)
    stages = Stages(console, link.at_stage)
    for remark in request.remarks:
        stages.note(remark)

    def after_failure() -> str:
        kept = clean_up(request, started) if at.rank == 0 and at.launcher != "supervise" else ""
        release()
        return kept

    try:
        # With peers, signals end a rank at once: in a collective that hangs Python would never see them.
        with stoppable() if at.world_size == 1 else nullcontext(Asked()) as asked:
            with _reporting(link, stages, after_failure, asked, wrong_use=True):
                request, mesh = _connect(request, at, stages, arguments)
                _self_test(mesh, request.setup, stages, link)
                setup = _with_demo(program, request.setup, mesh, at, stages)
                with stages.stage("opening the checkpoint", quiet=True):
                    setup = _place_weights(program, setup, request, mesh, at, stages)
                    request = _as_placed(request, setup)
                    pipeline = program.pipeline(setup, mesh, stages)
                    program.check_weights(pipeline, setup, request.videos)
            with _reporting(link, stages, after_failure, asked):
                make_videos(program, pipeline, request, mesh, stages)
                _wait_for_all(mesh)
        if at.world_size > 1:
            release()
            link.leave(0)
    except Stopped as stopped:
        after_failure()
        return stopped.status
    except KeyboardInterrupt:
        after_failure()
        return 130
    except _Failed as failed:
        return failed.status
    return 0


class _Failed(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


@contextmanager
def _reporting(
    link: launch.Link,
    stages: Stages,
    after_failure: Callable[[], str],
    asked: Asked,
    wrong_use: bool = False,
) -> Iterator[None]:
    """Tell the user of an exception once. With peers, leave at once: they would wait in a collective for us.

    asked: a signal that came; an exception is then only what a library made of it, as imports do.
    WrongUse is status 2. wrong_use: so is a plain ValueError, which means that the command asks for what this machine
    or checkpoint does not have.
    """
    try:
        yield
    except Exception as error:
        if asked.number is not None:
            raise Stopped(asked.number) from None
        status = 2 if isinstance(error, WrongUse) or (wrong_use and type(error) is ValueError) else 1
        link.failed(stages.where, error, status, after_failure())
        if link.place.world_size > 1:
            link.leave(status)
        raise _Failed(status) from None


def _connect(request: Request, at: launch.Place, stages: Stages, arguments: Sequence[str]) -> tuple[Request, Mesh]:
    """The request that all ranks run, and this rank's mesh. Collective."""
    with stages.stage("starting", quiet=True):
        if not request.setup.on_cpu:  # before torch starts its threads and CUDA reads its settings
            os.environ.update(allocator_default(os.environ))
            bind_to_gpu(at.local_rank)
        from common.parallel import distributed, meet

        store = meet(request.setup.timeout)
        if at.launcher == "torchrun" and store is not None:
            request = _of_rank_0(request, at, store, arguments)
        setup = request.setup
        if setup.on_cpu:
            launch.split_cores(at)
        mesh = distributed(setup.layout, "cpu" if setup.on_cpu else setup.device, setup.timeout, store)
    stages.device = mesh.device
    ranks = "1 rank" if setup.ranks == 1 else f"{setup.ranks} ranks"
    stages.note(f"{ranks} on {mesh.device.type}: {setup.layout}{setup.chosen and f' ({setup.chosen})'}")
    return request, mesh


def _of_rank_0(request: Request, at: launch.Place, store: Store, arguments: Sequence[str]) -> Request:
    """Rank 0's request, on every rank: what was chosen by looking at the machine (layout, device) must be one choice.

    Before any process group exists, for groups of different layouts would wait for each other without end. Raises
    ValueError on a rank whose command line is another.
    """
    if at.rank == 0:
        store.set("request", pickle.dumps((list(arguments), request)).hex())
        return request
    theirs, request = pickle.loads(bytes.fromhex(store.get("request").decode()))
    if list(arguments) != theirs:
        mine = shlex.join(arguments)
        raise ValueError(f"this rank was started with `{mine}`, rank 0 with `{shlex.join(theirs)}`; give all the same")
    return request


def _self_test(mesh: Mesh, setup: Setup, stages: Stages, link: launch.Link) -> None:
    from common.selftest import self_test

    with stages.stage("testing the connections", quiet=True):
        limit = min(setup.timeout, SELF_TEST_SECONDS)
        self_test(mesh, limit, lambda error: link.failed(stages.where, error))


def _with_demo(program: Program, setup: Setup, mesh: Mesh, at: launch.Place, stages: Stages) -> Setup:
    """The setup with a real checkpoint directory; a demo checkpoint is made by one rank of each machine."""
    if setup.source.demo is None:
        return setup
    with stages.stage("making the demo checkpoint", quiet=True):
        if at.local_rank == 0:
            program.make_demo(setup.source.demo)
        _wait_for_all(mesh)
        folder = program.make_demo(setup.source.demo)
    return replace(setup, source=replace(setup.source, model_dir=folder))


def _place_weights(
    program: Program, setup: Setup, request: Request, mesh: Mesh, at: launch.Place, stages: Stages
) -> Setup:
    """The setup with a placement, and a line about it where it had none. Collective."""
    from common.choice import settle

    setup, why = settle(program, setup, request.videos[0], mesh, at.local_world_size)
    if why is not None:
        stages.note(f"weights: {why}")
    return setup


def _as_placed(request: Request, setup: Setup) -> Request:
    """The request with what was chosen, for the json beside the video."""
    placed = {name: getattr(setup, name) for name in ("offload", "shard_weights", "keep_loaded")}
    return replace(request, setup=replace(request.setup, **placed))


def _wait_for_all(mesh: Mesh) -> None:
    if mesh.world.group is not None:
        import torch

        torch.distributed.all_reduce(torch.zeros(1), group=mesh.world.group)


def make_videos(program: Program, pipeline: Any, request: Request, mesh: Mesh, stages: Stages) -> None:
    """All videos of a request, one after the other, each complete on disk before the next begins. Collective."""
    from common.parallel import broadcast_object
    from common.video import VideoFile

    videos = broadcast_object(mesh.world, draw_seeds(request.videos), mesh.device)
    for number, video in enumerate(videos, 1):
        if len(videos) > 1:
            stages.about = f"video {number} of {len(videos)}"
            stages.note(f"{stages.about}: {video.prompt}")
        if video.latents is None:
            stages.note(f"seed {video.seed}")
        first, began = len(stages.records), time.perf_counter()
        before = [identity(path) for path in video.latents_files]
        make = program.generate if video.latents is None else program.decode
        frames = make(pipeline, video, request.setup, stages)
        of_peers = _gather(mesh, stages.records[first:])[1:]
        if mesh.is_main:
            count, height, width, _ = frames.shape  # decoded from a file, they need not be what the options say
            made = settings(request.setup, video) | {"width": width, "height": height, "num_frames": count}
            with stoppable(), VideoFile(video.output, video.fps, video.prompt, json.dumps(made)) as file:
                with stages.stage("writing"):
                    file.add(frames)
                    file.close()
                seconds = time.perf_counter() - began
                cost = {"seconds": seconds, "stages": _costs(stages.records[first:], of_peers)}
                file.finish(video.sidecar, {"program": program.name, "settings": made} | cost | _surroundings(mesh))
            _remove_latents(video, before)
            tell(shown(video.output))


def _remove_latents(video: Video, before: Sequence[object]) -> None:
    """Remove the latents that this run has written; what an earlier one has kept is not ours. before: `identity`s."""
    for path, earlier in zip(video.latents_files, before):
        if identity(path) != earlier:
            with suppress(OSError):
                path.unlink()


def read_latents(path: Path, channels: int) -> Tensor:
    """The latents (1, C, T, h, w) of --from-latents; WrongUse says what the file holds instead."""
    from common.generation import load_latents

    try:
        return load_latents(path, channels)
    except ValueError as error:
        raise WrongUse([f"--from-latents {error}"]) from None


def _gather(mesh: Mesh, records: list[StageRecord]) -> list[list[StageRecord]]:
    if mesh.world.group is None:
        return [records]
    import torch.distributed as dist

    gathered: list[Any] = [None] * mesh.world.size
    dist.all_gather_object(gathered, records, group=mesh.world.group)
    return gathered


def _costs(mine: list[StageRecord], of_peers: list[list[StageRecord]]) -> list[dict[str, Any]]:
    """Seconds and peak memory by stage: rank 0's seconds, the bytes of every rank that ran the stage."""
    costs = []
    for record in mine:
        peaks = [
            r.peak_bytes for r in (record, *(other for peer in of_peers for other in peer)) if r.name == record.name
        ]
        costs.append(record.as_dict() | {"peak_bytes": max(peaks), "peak_bytes_by_rank": peaks})
    return costs


def _surroundings(mesh: Mesh) -> dict[str, Any]:
    written = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"device": _device_name(mesh), "versions": _versions(), "written": written}


def _device_name(mesh: Mesh) -> str:
    if mesh.device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(mesh.device)
    return "cpu"


def _versions() -> dict[str, str | None]:
    import platform
    from importlib import metadata

    import torch

    found: dict[str, str | None] = {"xdit-zoo": version(), "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found | {"cuda": torch.version.cuda}
