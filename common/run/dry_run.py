"""`--dry-run`: what a command would do, printed without doing it: layout, memory, bytes, FLOPs, what is chosen and why.

Starts no ranks and reads no weights. The figures are those of `common.memory.estimate`, for the first and the last
rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from common.memory.choice import Room, candidates, choose_placement, estimator, long_sampling
from common.memory.estimate import STAGES, Estimate, Estimator, imagined
from common.parallel.device_memory import host_memory
from common.registry.forks import Fork
from common.registry.request import Request
from common.system.units import gb, gib
from common.weights.placement import Placement


def run(fork: Fork, request: Request) -> int:
    """Print the plan of a checked request; returns the exit status. ValueError when it could not run."""
    if not fork.has("sampling"):
        raise ValueError(f"--dry-run is not possible: {fork.program} does not say what it would run")
    if request.source.demo is not None:
        folder = fork.demo_folder(request.source.demo)
        request = replace(request, source=replace(request.source, model_dir=folder))
    _head(request)
    layout = request.layout
    counted: dict[int, Estimator] = {}
    for rank in dict.fromkeys((0, layout.ranks - 1)):
        with imagined(layout, rank) as mesh:
            counted[rank] = estimator(fork, request, mesh)
    counted[layout.ranks - 1].peaks = counted[0].peaks  # a plan needs the same on every rank
    room = _room(request)
    free = room.free if room else float("inf")
    _step(counted[0])
    if slow := long_sampling(request, counted[0].flops, layout.ranks):
        refused = "; refused unless --device cpu is given" if request.cpu_by_default else ""
        print(f"time        {slow}{refused}")
    _placements(counted[0], request, free)
    return _verdict(counted, request, room)


def _head(request: Request) -> None:
    source, video, layout = request.source, request.videos[0].sampling, request.layout
    what = f"official {source.official}" if source.official else f"demo {source.demo}" if source.demo else ""
    print(f"dry run of {request.program}: {what or source.model_dir}, nothing is loaded or made")
    size = f"{video.width}x{video.height}, {video.num_frames} frames, {video.num_steps} steps"
    print(f"video       {size}, {request.runtime.dtype}")
    why = request.layout_chosen and f"; {request.layout_chosen}"
    print(f"layout      {layout}, {layout.ranks} x {request.runtime.device}{why}")
    for remark in request.remarks:
        print(f"note        {remark}")


def _step(counted: Estimator) -> None:
    """FLOPs and bytes of rank 0 in one step."""
    passes = f"{counted.passes} forward pass{'' if counted.passes == 1 else 'es'}"
    print(f"compute     {counted.flops / 1e12:.4g} TFLOP a step on rank 0, {passes}")
    sent = {name: size for name, size in counted.sent.items() if name != "sequence"}
    said = ", ".join(f"{name} {gb(size)}" for name, size in sent.items()) or "nothing"
    print(f"sent        {said} a step by rank 0")


def _room(request: Request) -> Room | None:
    """Memory of this machine's devices or as the option says; None when it is not known."""
    ranks, given = request.layout.ranks, request.runtime.max_bytes
    host = host_memory() // ranks
    if request.on_cpu:
        return Room(host if given is None else min(given, host), host, "cpu")
    count = min(torch.cuda.device_count(), ranks) if torch.cuda.is_available() else 0
    free = [torch.cuda.mem_get_info(i)[0] for i in range(count)] + ([] if given is None else [given])
    return Room(min(free), host, "cuda") if free else None


def _placements(counted: Estimator, request: Request, free: float) -> None:
    """What rank 0 would need by each placement."""
    runtime = request.runtime
    print(f"{'':12}{'text':>12}{'sampling':>12}{'decode':>12}{'host':>12}   rank 0, weights + activations")
    for placement, keep in candidates(request.layout.ranks, runtime.device, runtime.keep_loaded):
        estimate = counted.estimate(placement, keep, free)
        cells = [gib(estimate.stages[name].total) for name in STAGES] + [gib(estimate.host) if estimate.host else "-"]
        print(f"{'':12}" + "".join(f"{cell:>12}" for cell in cells) + f"   {placement}")


def _verdict(counted: Mapping[int, Estimator], request: Request, room: Room | None) -> int:
    """What would be chosen, and its memory in full."""
    free = room.free if room else float("inf")
    runtime, ranks = request.runtime, request.layout.ranks
    if runtime.offload is not None or runtime.shard_weights:
        placement, keep = Placement(runtime.offload or "stage", runtime.shard_weights), runtime.keep_loaded
        fits = "" if room is None else _fits(counted[0].estimate(placement, keep, free), room)
        print(f"as asked    {placement}{fits}")
    elif room is None:
        print("chosen      not known: no GPU is visible here; say with --max-memory how many GiB each has free")
        return 0
    else:
        try:
            choice = choose_placement(
                lambda placement, keep: counted[0].estimate(placement, keep, room.free),
                room,
                ranks,
                runtime.keep_loaded,
            )
        except ValueError as error:
            print(f"refused     {error}")
            raise
        placement, keep = choice.placement, choice.keep
        print(f"chosen      {choice.why}")
    for rank, one in counted.items():
        _detail(rank, one.estimate(placement, keep, free))
    if said := counted[0].estimate(placement, keep, free).warning:
        print(f"warning     {said}")
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
