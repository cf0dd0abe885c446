"""`--dry-run`: what a command would do, printed without doing it: layout, memory, bytes, FLOPs, what is chosen and why.

Starts no ranks and reads no weights. The figures are those of `common.memory.estimate`, for the first and the last
rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from common.memory.choice import (
    FreeMemory,
    Outlook,
    candidates,
    choose_placement,
    estimator,
    in_turn,
    long_sampling,
    needed,
)
from common.memory.estimate import STAGES, Estimate, Estimator, imagined
from common.parallel.device_memory import host_memory
from common.registry.forks import Fork
from common.registry.request import Request, WrongUse
from common.run.destination import existing_problems
from common.run.unfinished import taken_up, with_whole
from common.system.units import figure, gb, gib, gibs
from common.weights.placement import Placement


def run(fork: Fork, request: Request) -> int:
    """Print the plan of a checked request; returns the exit status. ValueError when it could not run."""
    if not fork.has("sampling"):
        raise ValueError(f"--dry-run is not possible: {fork.program} does not say what it would run")
    if request.source.demo is not None:
        folder = fork.demo_folder(request.source.demo)
        request = replace(request, source=replace(request.source, model_dir=folder))
    _head(request)
    estimators = _counted(fork, request)
    memory = _free_memory(request)
    free = memory.free if memory else float("inf")
    _step(estimators[0])
    if slow := long_sampling(request, estimators[0].flops, request.layout.ranks):
        refusal = "; refused unless --device cpu is given" if request.cpu_by_default else ""
        print(f"time        {slow}{refusal}")
    _placements(estimators[0], request, free)
    return _verdict(fork, estimators, request, memory)


def _counted(fork: Fork, request: Request) -> dict[int, Estimator]:
    """By rank, the first and the last."""
    layout, estimators = request.layout, dict[int, Estimator]()
    for rank in dict.fromkeys((0, layout.ranks - 1)):
        with imagined(layout, rank) as mesh:
            estimators[rank] = estimator(fork, request, mesh)
    estimators[layout.ranks - 1].peaks = estimators[0].peaks  # a plan needs the same on every rank
    return estimators


def _head(request: Request) -> None:
    source, video, layout = request.source, request.videos[0].sampling, request.layout
    what = f"official {source.official}" if source.official else f"demo {source.demo}" if source.demo else ""
    print(f"dry run of {request.program}: {what or source.model_dir}, nothing is loaded or made")
    size = f"{video.width}x{video.height}, {video.num_frames} frames, {video.num_steps} steps"
    print(f"video       {size}, {request.runtime.dtype}")
    why = request.layout_chosen and f"; {request.layout_chosen}"
    print(f"layout      {layout}, {layout.ranks} x {request.runtime.device}{why}")
    if request.groups_chosen and layout.sequence > 1:
        print(f"groups      {request.runtime.overlap_groups} of heads; {request.groups_chosen}")
    for remark in request.remarks:
        print(f"note        {remark}")
    for problem in _refused(request):
        print(f"note        a run would be refused: {problem}")


def _refused(request: Request) -> list[str]:
    """What a run would not write over."""
    try:
        if request.source.official is None:  # else there are no weights, on which it hangs what a run goes on with
            request = with_whole(taken_up(request, request.overwrite))
        return existing_problems(request)
    except WrongUse as wrong:
        return wrong.problems


def _step(costs: Estimator) -> None:
    """FLOPs and bytes of rank 0 in one step."""
    passes = f"{costs.passes} forward pass{'' if costs.passes == 1 else 'es'}"
    print(f"compute     {figure(costs.flops / 1e12, 4)} TFLOP a step on rank 0, {passes}")
    traffic = {name: size for name, size in costs.sent.items() if name != "sequence"}
    text = ", ".join(f"{name} {gb(size)}" for name, size in traffic.items()) or "nothing"
    print(f"sent        {text} a step by rank 0")


def _free_memory(request: Request) -> FreeMemory | None:
    """Memory of this machine's devices or as the option says; None when it is not known."""
    ranks, limit = request.layout.ranks, request.runtime.max_bytes
    host = host_memory() // ranks
    if request.on_cpu:
        return FreeMemory(host if limit is None else min(limit, host), host, "cpu")
    count = min(torch.cuda.device_count(), ranks) if torch.cuda.is_available() else 0
    free = [torch.cuda.mem_get_info(i)[0] for i in range(count)] + ([] if limit is None else [limit])
    return FreeMemory(min(free), host, "cuda") if free else None


def _placements(costs: Estimator, request: Request, free: float) -> None:
    """What rank 0 would need by each placement."""
    runtime = request.runtime
    heads = "".join(f"{name:>12}" for name in (*STAGES, "host"))
    print(f"{'':12}{heads}   rank 0, weights + activations; host: of each rank")
    for placement, keep in candidates(request.layout.ranks, runtime.device, runtime.keep_loaded):
        estimate = costs.estimate(placement, keep, free)
        cells = [gib(estimate.stages[name].total) for name in STAGES] + [gib(estimate.host) if estimate.host else "-"]
        print(f"{'':12}" + "".join(f"{cell:>12}" for cell in cells) + f"   {placement}")


def _verdict(fork: Fork, estimators: Mapping[int, Estimator], request: Request, memory: FreeMemory | None) -> int:
    """What would be chosen, and its memory in full."""
    free = memory.free if memory else float("inf")
    runtime, ranks = request.runtime, request.layout.ranks
    if runtime.offload is not None or runtime.shard_weights:
        placement, keep = Placement(runtime.offload or "stage", runtime.shard_weights), runtime.keep_loaded
        fits = "" if memory is None else _fits(estimators[0].estimate(placement, keep, free), memory)
        print(f"as asked    {placement}{fits}")
    elif memory is None:
        print("chosen      not known: no GPU is visible here; say with --max-memory how many GiB each has free")
        return 0
    else:
        try:
            choice = choose_placement(
                lambda placement, keep: estimators[0].estimate(placement, keep, memory.free),
                memory,
                ranks,
                runtime.keep_loaded,
            )
        except ValueError as error:
            print(f"refused     {error}")
            raise
        placement, keep = choice.placement, choice.keep
        print(f"chosen      {choice.why}")
    estimators = _branches(fork, estimators, request, free, Outlook(placement, keep))
    for rank, one in estimators.items():
        _detail(rank, one.estimate(placement, keep, free))
    if warning := estimators[0].estimate(placement, keep, free).warning:
        print(f"warning     {warning}")
    return 0


def _branches(
    fork: Fork, estimators: Mapping[int, Estimator], request: Request, free: float, outlook: Outlook
) -> Mapping[int, Estimator]:
    """The counts of the run as it would be: with guidance branches in turn, where that would be chosen."""
    again: dict[int, Estimator] = {}

    def count(variant: Request) -> Estimator:
        again.update(_counted(fork, variant))
        for rank, one in again.items():
            one.peaks = estimators[rank].peaks
        return again[0]

    outlook = in_turn(outlook, request, free, count)
    for text in filter(None, (outlook.turns, *outlook.warnings)):
        print(f"branches    {text}")
    return again if outlook.interleave and again else estimators


def _fits(estimate: Estimate, memory: FreeMemory) -> str:
    stage, demand = needed(estimate)
    need, most, free = gibs(estimate.peak, demand, memory.free)
    text = f": {estimate.fullest} needs {need}, which "
    if estimate.peak > memory.free:
        return f"{text}DOES NOT FIT into {free}"
    tight = f", but is tight: with its margin {stage} would want {most}" if demand > memory.free else ""
    return f"{text}fits into {free}{tight}"


def _detail(rank: int, estimate: Estimate) -> None:
    lines = []
    for name, stage in estimate.stages.items():
        if stage.total:
            lines.append(f"{name} {gib(stage.weights)} + {gib(stage.activations)}")
    print(f"rank {rank:<7}{', '.join(lines)}; decode {estimate.plan}")
    if "weights" in estimate.sent:
        print(f"{'':12}weights {gb(estimate.sent['weights'])} sent a step")
