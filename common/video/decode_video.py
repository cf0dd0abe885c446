"""From latents to all frames of a video, by the best plan that fits into memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from common.parallel.device_memory import free_memory, release_memory
from common.parallel.mesh import Mesh
from common.registry.settings import DecodeOptions
from common.system.failure import is_out_of_memory
from common.system.progress import Report
from common.video.causal import TimeSplit
from common.video.decode import VideoDecoder, decode_frames
from common.video.decode_planning import KnownPlans, decode_plans, plan_decode, plan_for_all, warning


class FrameSink(Protocol):
    """Where rank 0 puts the frames of a video as they are decoded, so that no more than a chunk need be in memory."""

    def begin(self, count: int, height: int, width: int) -> None:
        """So many frames of this size in pixels follow, from the first on, whatever came before."""

    def add(self, frames: Tensor) -> None:
        """The next frames, (t, height, width, 3) uint8 on the CPU."""


class AllFrames:
    """A `FrameSink` that keeps them all: `frames`, (T, H, W, 3) uint8; None as long as nothing has begun."""

    def __init__(self) -> None:
        self.frames: Tensor | None = None
        self.count = 0

    def begin(self, count: int, height: int, width: int) -> None:
        self.frames, self.count = torch.empty(count, height, width, 3, dtype=torch.uint8), 0

    def add(self, frames: Tensor) -> None:
        assert self.frames is not None
        self.frames[self.count : self.count + len(frames)] = frames
        self.count += len(frames)


def decode_video(
    decoder: VideoDecoder,
    latents: Tensor,
    mesh: Mesh,
    options: DecodeOptions,
    report: Report,
    frames: FrameSink,
    room: int | None = None,
    known_plans: KnownPlans | None = None,
) -> None:
    """All frames of a video, in order, to `frames` on rank 0, by the best plan that fits into free memory. Collective.

    latents: (1, C, T, h, w) of the transformer's space, the same on every rank.
    frames: begins anew when a plan runs out of memory after its first chunks; unused on other ranks.
    room: bytes that the decode may take here; default: all that are free.
    known_plans: what this decoder's earlier videos have found out.
    One process falls back to the next smaller plan when memory runs out after all; several try a plan that just fits
    on zeros first, on a GPU, since a rank that fails leaves the others waiting. Raises MemoryError when nothing fits.
    """
    _, channels, length, height, width = latents.shape
    size = (channels, length, height, width)
    tile = options.tile(decoder.spatial_factor)
    ways = decode_plans(decoder, size, mesh.world.size, options.vae, options.vae_chunk, tile)
    free = free_memory(mesh, room)
    known_plans = KnownPlans() if known_plans is None else known_plans
    plan_bytes = partial(known_plans.count, decoder, size, mesh.world.size)
    plans = plan_decode(decoder, size, free, ways, plan_bytes, tries=mesh.device.type == "cuda")
    if mesh.world.size > 1 and mesh.device.type == "cuda":
        plans = (plan_for_all(decoder, size, plans, free, plan_bytes, mesh.world, mesh.device, known_plans.agreed),)
    split = TimeSplit(mesh.world)
    for i, plan in enumerate(plans):
        report.note(f"decode: {plan}")
        if text := warning(plan, ways, free, plan_bytes):
            report.warn(text)
        chunks = decoder.chunks(length, plan.chunk)
        if mesh.is_main:
            count = sum(decoder.num_frames(n, first=k == 0) for k, n in enumerate(chunks))
            frames.begin(count, height * decoder.spatial_factor, width * decoder.spatial_factor)
        try:
            return _hand_on(decode_frames(decoder, latents, plan, split, report.pause), len(chunks), frames, report)
        except Exception as error:
            if not is_out_of_memory(error) or mesh.world.size > 1 or i == len(plans) - 1:
                raise
            report.warn(f"out of memory decoding ({plan}); trying a smaller way")
        release_memory()
    raise AssertionError("there is always a plan")


def _hand_on(pieces: Iterator[Tensor | None], chunks: int, frames: FrameSink, report: Report) -> None:
    with report.stage("decoding", total=chunks, unit="chunk") as step:
        for piece in pieces:
            if piece is not None:
                frames.add(piece)
                step()
