"""From latents to all frames of a video, by the best plan that fits into memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from common.parallel.device_memory import free_memory, release_memory
from common.parallel.mesh import Mesh
from common.registry.settings import DecodeOptions
from common.system.failure import is_out_of_memory
from common.system.progress import Report
from common.video.causal import TimeSplit
from common.video.decode import VideoDecoder, decode_frames
from common.video.decode_planning import (
    AgreedPlans,
    decode_memory,
    decode_plans,
    plan_decode,
    plan_for_all,
    warning,
)


def decode_video(
    decoder: VideoDecoder,
    latents: Tensor,
    mesh: Mesh,
    options: DecodeOptions,
    report: Report,
    room: int | None = None,
    agreed: AgreedPlans | None = None,
) -> Tensor | None:
    """All frames (T, H, W, 3) uint8 on rank 0, None elsewhere, by the best plan that fits into free memory.

    latents: (1, C, T, h, w) of the transformer's space, the same on every rank.
    room: bytes that the decode may take here; default: all that are free.
    agreed: what several ranks have found out, kept by the caller for its next videos.
    One process falls back to the next smaller plan when memory runs out after all; several try a plan that just fits
    on zeros first, on a GPU, since a rank that fails leaves the others waiting. Raises MemoryError when nothing fits.
    """
    _, channels, frames, height, width = latents.shape
    size = (channels, frames, height, width)
    tile = options.tile(decoder.spatial_factor)
    ways = decode_plans(decoder, size, mesh.world.size, options.vae, options.vae_chunk, tile)
    free = free_memory(mesh, room)
    counted = cache(lambda plan: decode_memory(decoder, size, plan, ranks=mesh.world.size))
    plans = plan_decode(decoder, size, free, ways, counted, tries=mesh.device.type == "cuda")
    if mesh.world.size > 1 and mesh.device.type == "cuda":
        agreed = {} if agreed is None else agreed
        plans = (plan_for_all(decoder, size, plans, free, counted, mesh.world, mesh.device, agreed),)
    split = TimeSplit(mesh.world)
    for i, plan in enumerate(plans):
        report.note(f"decode: {plan}")
        if said := warning(plan, ways, free, counted):
            report.warn(said)
        try:
            return _collect(
                decode_frames(decoder, latents, plan, split, report.pause),
                len(decoder.chunks(frames, plan.chunk)),
                report,
            )
        except Exception as error:
            if not is_out_of_memory(error) or mesh.world.size > 1 or i == len(plans) - 1:
                raise
            report.warn(f"out of memory decoding ({plan}); trying a smaller way")
        release_memory()
    raise AssertionError("there is always a plan")


def _collect(pieces: Iterator[Tensor | None], chunks: int, report: Report) -> Tensor | None:
    with report.stage("decoding", total=chunks, unit="chunk") as step:
        kept = []
        for piece in pieces:
            if piece is not None:
                kept.append(piece)
                step()
    return torch.cat(kept) if kept else None
