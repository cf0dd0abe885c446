"""Where the weights go when nobody said it: the first placement that fits, of those that change no result.

every stage loaded (several videos)  ->  one stage at a time  ->  sharded over the ranks  ->  blocks in host memory
->  the same, sharded  ->  blocks read from the files
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from common.memory.estimate import Estimate, Estimator
from common.memory.seconds import LONG, cpu_seconds, duration
from common.parallel.device_memory import free_memory, host_memory
from common.parallel.interleaver import Interleaver
from common.parallel.mesh import Mesh, all_min, on_main
from common.registry.forks import Fork, Size
from common.registry.request import Request
from common.registry.settings import Runtime
from common.system.units import gibs
from common.video.decode import DecodePlan
from common.video.decode_planning import TILES_COST
from common.weights.dtypes import Precision
from common.weights.placement import Placement, held_bytes

Count = Callable[[Placement, bool], Estimate]
"""(placement, whether models stay between stages) -> what one rank needs."""


@dataclass(frozen=True)
class FreeMemory:
    """Memory at hand, in bytes: on every rank's device, and for every rank in its machine's main memory."""

    free: int
    host: int
    device: str = "cuda"
    """`cpu` or `cuda`. On a CPU both are the same memory, and blocks that wait there save nothing."""


@dataclass(frozen=True)
class Choice:
    """Where the weights of a run go."""

    placement: Placement
    keep: bool
    """Models stay on the device between stages."""
    why: str
    """One line for the user."""
    tight: bool = False
    """It may not fit after all."""


def candidates(ranks: int, device: str = "cuda", keep: bool = False) -> Iterator[tuple[Placement, bool]]:
    """Placements with whether models stay, from the fastest to the smallest."""
    if keep:
        yield Placement("none"), True
    yield Placement("stage"), False
    if ranks > 1:
        yield Placement("stage", shard=True), False
    if device != "cpu":
        yield Placement("block"), False
        if ranks > 1:
            yield Placement("block", shard=True), False
    yield Placement("disk"), False


def needed(estimate: Estimate) -> tuple[str, int]:
    """The stage that wants most free memory, and how much."""
    name = max(estimate.stages, key=lambda stage: estimate.stages[stage].wanted)
    return name, estimate.stages[name].wanted


def fits(estimate: Estimate, free: float) -> bool:
    """Whether a placement gives every stage what it wants.

    Where models leave, the decode has the device for itself, and no placement gives it more: a tight one is tried.
    """
    stages = dict(estimate.stages)
    if not estimate.keep and stages.pop("decode").total > free:
        return False
    return all(stage.wanted <= free for stage in stages.values())


def choose_placement(count: Count, memory: FreeMemory, ranks: int = 1, keep: bool = False) -> Choice:
    """The first of `candidates` that fits. Raises ValueError, with what to do, when the smallest does not."""
    first, reason = "", ""
    for placement, kept in candidates(ranks, memory.device, keep):
        estimate = count(placement, kept)
        if kept and estimate.warning:
            first = f"{placement}: no room for the exact decode beside it"
        elif not fits(estimate, memory.free):
            first = first or f"{placement}: {_short(estimate, memory.free)}"
        elif estimate.host > memory.host:
            has, blocks = gibs(memory.host, estimate.host)
            reason = f"; host memory has {has} a rank for {blocks} of blocks"
        else:
            enough = _enough(estimate, memory.free)
            return Choice(placement, kept, f"{placement} ({enough}{'; ' + first if first else ''}{reason})")
    if estimate.peak > memory.free:
        stage, even = estimate.fullest, "" if estimate.fullest == "decode" else f" even when {placement}"
        need, free = gibs(estimate.peak, memory.free)
        raise ValueError(
            f"not enough memory: {stage} needs {need} on each device{even}, and {free} are free; "
            f"{_advice(stage, ranks, estimate.plan)}"
        )
    return Choice(placement, False, f"{placement} ({_enough(estimate, memory.free)})", tight=True)


def _enough(estimate: Estimate, free: int) -> str:
    """That a placement fits, in figures that say so: where the margin has no room, those without it as well."""
    stage, peak = needed(estimate)
    without, with_margin, room = gibs(estimate.stages[stage].total, peak, free)
    if peak <= free:
        return f"{stage} wants {with_margin}, margin included, of {room} free"
    return f"{stage} needs {without} of {room} free, which is tight: with its margin it would want {with_margin}"


def _short(estimate: Estimate, free: int) -> str:
    stage, peak = needed(estimate)
    want, room = gibs(peak, free)
    return f"{stage} would want {want}, margin included, of {room} free"


def _advice(stage: str, ranks: int, plan: DecodePlan) -> str:
    tiles = f"let tiles change the picture ({TILES_COST}; --vae auto), or " if plan.mode == "exact" else ""
    more = {
        "text": "run the text encoder in fewer bits (--text-dtype fp8), or keep features (--text-cache)",
        "decode": f"{tiles}make a smaller video (--width, --height)",
    }
    spread = f"more ranks than {ranks} (--gpus), which share the tokens" if ranks > 1 else "several ranks (--gpus)"
    smaller = "a smaller or shorter video (--width, --height, --num-frames)"
    return more.get(stage, f"use {spread}, or make {smaller}") + "; or free memory that other programs hold"


def estimator(fork: Fork, request: Request, mesh: Mesh) -> Estimator:
    """What a rank needs for a request's first video, which has the checkpoint's folder or an official model.

    Guidance branches take turns where the request says so.
    """
    mesh = replace(mesh, interleaver=Interleaver() if request.runtime.interleave_branches else None)
    video, source, runtime = request.videos[0], request.source, request.runtime
    sampling, precision = video.sampling, Precision.of(runtime)
    work = fork.module("sampling").workload(
        fork.model(source.official) if source.model_dir is None else source.model_dir,
        Size.of(sampling, request.guided(video)),
        mesh,
        precision.dtype,
        negative=bool(video.negative_prompt),
        text_encoder_dir=runtime.text_encoder_dir,
    )
    return Estimator(work, mesh, precision, runtime.device, request.decode)


def free_memory_on(mesh: Mesh, runtime: Runtime, local_ranks: int) -> FreeMemory:
    """What the rank with least has, no more than `--max-memory`. Collective.

    Models that are kept on a GPU count as free: they serve this run, or go.
    """
    reclaimable = held_bytes(mesh.cache.models.values()) if mesh.cache is not None and mesh.device.type == "cuda" else 0
    free = free_memory(mesh, runtime.max_bytes, reclaimable)
    return FreeMemory(free, all_min(mesh.world, host_memory() // local_ranks, mesh.device), runtime.device)


@dataclass(frozen=True)
class Outlook:
    """What is known of a run before its work begins."""

    placement: Placement
    keep: bool
    """`placement`, `keep`: where the weights go."""
    why: str = ""
    """A line on where the weights go, where the program chose it."""
    warnings: tuple[str, ...] = ()
    """What the user would rather know now than after hours."""
    interleave: bool = False
    """Whether guidance branches take turns."""
    groups: int | None = None
    """Groups of heads."""
    turns: str = ""
    """A line on whether branches take turns, where the program chose it."""


def with_placement(fork: Fork, request: Request, mesh: Mesh, local_ranks: int) -> tuple[Request, Outlook | None]:
    """The request with the placement that was chosen for its first video, and what is to be told. Collective.

    One that says where weights are keeps its placement, and one that samples nothing stays as it is. Raises ValueError
    on every rank when nothing fits or a CPU would take hours unasked, and what opening the files raised.
    """
    runtime = request.runtime
    if not request.sampled or not fork.has("sampling"):
        return request, None
    memory = free_memory_on(mesh, runtime, local_ranks)

    def look() -> Outlook:
        # Rank 0 has most of everything: the text encoder, the largest shard, the branch with the longer text.
        costs = estimator(fork, request, mesh)
        slow = long_sampling(request, costs.flops)
        if slow and request.cpu_by_default:
            raise ValueError(f"no GPU is visible, and {slow}; to wait for it say --device cpu")
        outlook = _placed(costs, request, memory, mesh.world.size)
        outlook = in_turn(outlook, request, memory.free, partial(_counted_again, costs, fork, mesh))
        return replace(outlook, warnings=(*outlook.warnings, slow)) if slow else outlook

    decision = on_main(mesh, look)
    placement = decision.placement
    runtime = replace(
        runtime,
        offload=placement.offload,
        shard_weights=placement.shard,
        keep_loaded=decision.keep,
        interleave_branches=decision.interleave,
        overlap_groups=decision.groups,
    )
    return replace(request, runtime=runtime), decision


def _placed(costs: Estimator, request: Request, memory: FreeMemory, ranks: int) -> Outlook:
    runtime = request.runtime
    placement, keep, why = Placement(runtime.offload or "stage", runtime.shard_weights), runtime.keep_loaded, ""
    if runtime.offload is None and not runtime.shard_weights:
        choice = choose_placement(lambda where, kept: costs.estimate(where, kept, memory.free), memory, ranks, keep)
        placement, keep, why = choice.placement, choice.keep, choice.why
    warning = costs.estimate(placement, keep, memory.free).warning
    return Outlook(placement, keep, why, (warning,) if warning else ())


def _counted_again(costs: Estimator, fork: Fork, mesh: Mesh, request: Request) -> Estimator:
    """For a request that differs in its sampling alone."""
    again = estimator(fork, request, mesh)
    again.peaks = costs.peaks
    return again


def in_turn(outlook: Outlook, request: Request, free: float, count: Callable[[Request], Estimator]) -> Outlook:
    """The outlook with whether guidance branches take turns, where nobody said it and where it would do nothing.

    They do where weights stream, which then come once a step for both, or where exchanges are predicted to wait, and
    where what both hold has room.
    free: bytes of each device. count: what a request needs.
    """
    interleave, placement, where = request.runtime.interleave_branches, outlook.placement, request.layout
    outlook = replace(outlook, interleave=bool(interleave), groups=request.runtime.overlap_groups)
    streams = placement.offload in ("block", "disk") or (placement.shard and where.ranks > 1)
    guided = request.guided(request.videos[0])
    if interleave and not (guided and (streams or where.sequence > 1)):
        why = "one GPU whose weights stay waits for nothing" if guided else "without guidance there is one branch"
        warning = f"--interleave-branches has no effect: {why}"
        return replace(outlook, interleave=False, warnings=(*outlook.warnings, warning))
    pays = streams or request.turns_chosen
    if interleave is None and pays and guided and where.cfg == 1 and request.runtime.engine == "native":
        groups = request.groups_in_turn or outlook.groups
        runtime = replace(request.runtime, interleave_branches=True, overlap_groups=groups)
        estimate = count(replace(request, runtime=runtime)).estimate(placement, outlook.keep, free)
        if fits(estimate, free):
            why = "each block comes once a step for both" if streams else request.turns_chosen
            heads = "" if groups == outlook.groups else f", each in {groups} groups of heads"
            return replace(outlook, interleave=True, groups=groups, turns=f"guidance branches take turns{heads}: {why}")
    return outlook


def long_sampling(request: Request, flops: int, ranks: int = 1) -> str:
    """That sampling takes hours on this machine's CPU, with how many; empty where it does not.

    flops: of one step on rank 0. ranks: as for `cpu_seconds`.
    """
    if not request.on_cpu:
        return ""
    steps = sum(video.sampling.num_steps for video in request.videos if video.latents is None)
    seconds = cpu_seconds(flops * steps, Precision.of(request.runtime).dtype, ranks)
    return "" if seconds < LONG else f"sampling takes at least {duration(seconds)} on this machine's CPU"
