"""`--dry-run`: what a command would do, printed without doing it: layout, memory, bytes, FLOPs, what is chosen and why.

Starts no ranks and reads no weights. The figures are those of `common.estimate`, for the first and the last rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.choice import Room, candidates, choose_placement, estimator
from common.estimate import STAGES, Estimate, Estimator, imagined
from common.memory import host_memory
from common.parallel import Layout
from common.placement import Placement
from common.registry import Model, Size, fork_of
from common.request import Setup, Source, Video
from common.units import GIB, gb, gib

if TYPE_CHECKING:
    from common.estimate import Workload
    from common.parallel import Mesh
    from common.request import Program, Request


def run(program: Program, request: Request) -> int:
    """Print the plan of a checked request; returns the exit status: 0, or 2 when it could not run."""
    setup, video = request.setup, request.videos[0]
    assert program.workload is not None
    if setup.source.demo is not None:
        folder = program.make_demo(setup.source.demo)
        setup = replace(setup, source=replace(setup.source, model_dir=folder))
    layout = setup.layout
    _head(program, setup, video, layout)
    counted: dict[int, Estimator] = {}
    for rank in dict.fromkeys((0, layout.ranks - 1)):
        with imagined(layout, rank) as mesh:
            counted[rank] = estimator(program.workload(setup, video, mesh), setup, mesh)
    counted[layout.ranks - 1].peaks = counted[0].peaks  # a plan needs the same on every rank
    room = _room(setup)
    free = room.free if room else float("inf")
    _step(counted[0])
    _placements(counted[0], setup, layout.ranks, free)
    return _verdict(counted, setup, layout.ranks, room)


def official_workload(model: Model, size: Size, mesh: Mesh) -> Workload:
    """What a rank runs for one video of a registered model, by the model's own program and its official numbers."""
    program = fork_of(model).module("cli").PROGRAM
    extra = {option.name: option.default for option in program.options}
    setup = Setup(Source(official=model.name), model.rules, mesh.layout.ranks, mesh.layout, chosen="", extra=extra)
    scale = model.rules.cfg_scale if size.guided else 1.0
    numbers = (size.width, size.height, size.num_frames, size.num_steps, scale, model.rules.fps)
    return program.workload(setup, Video("", "", *numbers, Path()), mesh)


def _head(program: Program, setup: Setup, video: Video, layout: Layout) -> None:
    source = setup.source
    what = f"official {source.official}" if source.official else f"demo {source.demo}" if source.demo else ""
    print(f"dry run of {program.name}: {what or source.model_dir}, nothing is loaded or made")
    print(
        f"video       {video.width}x{video.height}, {video.num_frames} frames, {video.num_steps} steps, {setup.dtype}"
    )
    print(f"layout      {layout}, {layout.ranks} x {setup.device}{setup.chosen and f'; {setup.chosen}'}")


def _step(counted: Estimator) -> None:
    """FLOPs and bytes of rank 0 in one step."""
    passes = f"{counted.passes} forward pass{'' if counted.passes == 1 else 'es'}"
    print(f"compute     {counted.flops / 1e12:.4g} TFLOP a step on rank 0, {passes}")
    sent = {name: size for name, size in counted.sent.items() if name != "sequence"}
    said = ", ".join(f"{name} {gb(size)}" for name, size in sent.items()) or "nothing"
    print(f"sent        {said} a step by rank 0")


def _room(setup: Setup) -> Room | None:
    """Memory of this machine's devices or as the option says; None when it is not known."""
    host = host_memory() // setup.ranks
    given = None if setup.max_memory is None else int(setup.max_memory * GIB)
    if setup.on_cpu:
        return Room(host if given is None else min(given, host), host, "cpu")
    count = min(torch.cuda.device_count(), setup.ranks) if torch.cuda.is_available() else 0
    free = [torch.cuda.mem_get_info(i)[0] for i in range(count)] + ([] if given is None else [given])
    return Room(min(free), host, "cuda") if free else None


def _placements(counted: Estimator, setup: Setup, ranks: int, free: float) -> None:
    """What rank 0 would need by each placement."""
    print(f"{'':12}{'text':>12}{'sampling':>12}{'decode':>12}{'host':>12}   rank 0, weights + activations")
    for placement, keep in candidates(ranks, setup.device, setup.keep_loaded):
        estimate = counted.estimate(placement, keep, free)
        cells = [gib(estimate.stages[name].total) for name in STAGES] + [gib(estimate.host) if estimate.host else "-"]
        print(f"{'':12}" + "".join(f"{cell:>12}" for cell in cells) + f"   {placement}")


def _verdict(counted: Mapping[int, Estimator], setup: Setup, ranks: int, room: Room | None) -> int:
    """What would be chosen, and its memory in full."""
    free = room.free if room else float("inf")
    if setup.offload is not None or setup.shard_weights:
        placement, keep = Placement(setup.offload or "stage", setup.shard_weights), setup.keep_loaded
        fits = "" if room is None else _fits(counted[0].estimate(placement, keep, free), room)
        print(f"as asked    {placement}{fits}")
    elif room is None:
        print("chosen      not known: no GPU is visible here; say with --max-memory how many GiB each has free")
        return 0
    else:
        try:
            choice = choose_placement(
                lambda placement, keep: counted[0].estimate(placement, keep, room.free), room, ranks, setup.keep_loaded
            )
        except ValueError as error:
            print(f"refused     {error}")
            raise
        placement, keep = choice.placement, choice.keep
        print(f"chosen      {choice.why}")
    for rank, one in counted.items():
        _detail(rank, one.estimate(placement, keep, free))
    return 0


def _fits(estimate: Estimate, room: Room) -> str:
    tight = "fits into" if estimate.peak <= room.free else "DOES NOT FIT into"
    return f": {estimate.fullest} needs {gib(estimate.peak)}, which {tight} {gib(room.free)}"


def _detail(rank: int, estimate: Estimate) -> None:
    said = []
    for name, stage in estimate.stages.items():
        if stage.total:
            said.append(f"{name} {gib(stage.weights)} + {gib(stage.activations)}")
    print(f"rank {rank:<7}{', '.join(said)}; decode {estimate.plan}")
    if "weights" in estimate.sent:
        print(f"{'':12}weights {gb(estimate.sent['weights'])} sent a step")
