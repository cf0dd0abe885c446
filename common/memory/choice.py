"""Where the weights go when nobody said it: the first placement that fits, of those that change no result.

every stage loaded (several videos)  ->  one stage at a time  ->  sharded over the ranks  ->  blocks in host memory
->  the same, sharded  ->  blocks read from the files
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from common.memory.estimate import Estimate, Estimator
from common.parallel.device_memory import free_memory, host_memory
from common.parallel.mesh import Mesh, all_min, on_main
from common.registry.forks import Fork, Size
from common.registry.request import Request
from common.registry.settings import Runtime
from common.system.units import gib
from common.weights.dtypes import Precision
from common.weights.placement import Placement

SLACK = 1.25
"""Free memory wanted for each byte of activations: allocators round, and kernels take workspaces."""
WORKSPACE = 512 * 2**20
"""Free memory wanted beside that on a GPU, by arithmetic, not measured: cuBLAS's workspace (32 MiB on Hopper, 8 MiB
elsewhere, for each stream that multiplies), cuDNN's, and what NCCL connects only after free memory was asked for."""

Count = Callable[[Placement, bool], Estimate]
"""(placement, whether models stay between stages) -> what one rank needs."""


@dataclass(frozen=True)
class Room:
    """Memory at hand, in bytes: on every rank's device, and for every rank in its machine's main memory.

    device: cpu or cuda. On a CPU both are the same memory, and blocks that wait there save nothing.
    """

    free: int
    host: int
    device: str = "cuda"


@dataclass(frozen=True)
class Choice:
    """keep: models stay on the device between stages. why: one line for the user. tight: it may not fit after all."""

    placement: Placement
    keep: bool
    why: str
    tight: bool = False


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


def needed(estimate: Estimate, device: str = "cuda") -> tuple[str, int]:
    """The stage that wants most free memory, and how much. The decode has been planned by its own rule."""
    spare = 0 if device == "cpu" else WORKSPACE
    wanted = {name: int(s.weights + SLACK * s.activations + spare) for name, s in estimate.stages.items()}
    wanted["decode"] = estimate.stages["decode"].total
    name = max(wanted, key=lambda stage: wanted[stage])
    return name, wanted[name]


def choose_placement(count: Count, room: Room, ranks: int = 1, keep: bool = False) -> Choice:
    """The first of `candidates` that fits. Raises ValueError, with what to do, when the smallest does not."""
    first, reason = "", ""
    for placement, kept in candidates(ranks, room.device, keep):
        estimate = count(placement, kept)
        stage, wanted = needed(estimate, room.device)
        if wanted > room.free:
            first = first or f"{placement}: {stage} would want {gib(wanted)} of {gib(room.free)} free"
        elif estimate.host > room.host:
            reason = f"; host memory has {gib(room.host)} a rank for {gib(estimate.host)} of blocks"
        else:
            enough = f"{stage} wants {gib(wanted)} of {gib(room.free)} free"
            return Choice(placement, kept, f"{placement} ({enough}{'; ' + first if first else ''}{reason})")
    if estimate.peak > room.free:
        stage, even = estimate.fullest, "" if estimate.fullest == "decode" else f" even when {placement}"
        raise ValueError(
            f"not enough memory: {stage} needs {gib(estimate.stages[stage].total)} on each device{even}, and "
            f"{gib(room.free)} are free; {_advice(stage, ranks)}"
        )
    why = f"{placement} ({estimate.fullest} needs {gib(estimate.peak)} of {gib(room.free)} free, which is tight)"
    return Choice(placement, False, why, tight=True)


def _advice(stage: str, ranks: int) -> str:
    more = {
        "text": "run the text encoder in fewer bits (--text-dtype fp8), or keep features (--text-cache)",
        "decode": "decode in smaller pieces (--vae tiled --vae-tile 256), or make a smaller or shorter video",
    }
    spread = f"more ranks than {ranks} (--gpus), which share the tokens" if ranks > 1 else "several ranks (--gpus)"
    smaller = "a smaller or shorter video (--width, --height, --num-frames)"
    return more.get(stage, f"use {spread}, or make {smaller}") + "; or free memory that other programs hold"


def estimator(fork: Fork, request: Request, mesh: Mesh) -> Estimator:
    """What a rank needs for a request's first video, which has the checkpoint's folder or an official model."""
    video, source, runtime = request.videos[0], request.source, request.runtime
    sampling, precision = video.sampling, Precision.of(runtime)
    work = fork.module("sampling").workload(
        fork.model(source.official) if source.model_dir is None else source.model_dir,
        Size(sampling.width, sampling.height, sampling.num_frames, sampling.num_steps, request.guided(video)),
        mesh,
        precision.dtype,
        negative=bool(video.negative_prompt),
        text_encoder_dir=runtime.text_encoder_dir,
    )
    return Estimator(work, mesh, precision, runtime.device, request.decode)


def room_on(mesh: Mesh, runtime: Runtime, local_ranks: int) -> Room:
    """What the rank with least has, no more than `--max-memory`. Collective."""
    free = free_memory(mesh, runtime.max_bytes)
    return Room(free, all_min(mesh.world, host_memory() // local_ranks, mesh.device), runtime.device)


def with_placement(fork: Fork, request: Request, mesh: Mesh, local_ranks: int) -> tuple[Request, str | None]:
    """The request with the placement that was chosen for its first video, and a line about it. Collective.

    One that says where weights are stays as it is, and so does one that loads no transformer. Raises ValueError on
    every rank when nothing fits, and what opening the files raised.
    """
    runtime = request.runtime
    if runtime.offload is not None or runtime.shard_weights or not request.sampled or not fork.has("sampling"):
        return request, None
    room = room_on(mesh, runtime, local_ranks)

    def choose() -> Choice:
        # Rank 0 has most of everything: the text encoder, the largest shard, the branch with the longer text.
        counted = estimator(fork, request, mesh)
        return choose_placement(_count(counted, room), room, mesh.world.size, runtime.keep_loaded)

    choice = on_main(mesh, choose)
    placement = choice.placement
    runtime = replace(runtime, offload=placement.offload, shard_weights=placement.shard, keep_loaded=choice.keep)
    return replace(request, runtime=runtime), choice.why


def _count(counted: Estimator, room: Room) -> Count:
    return lambda placement, keep: counted.estimate(placement, keep, room.free)
