"""What one rank runs for one video, for `common.estimate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cogvideox_xdit.config import TransformerConfig, VAEConfig
from cogvideox_xdit.transformer import CogVideoXTransformer, Condition, Size, pack, unpack
from cogvideox_xdit.vae import CogVideoXDecoder
from common.estimate import Workload
from common.guidance import Guidance
from common.parallel import Mesh
from common.usp import SequenceParallel
from common.weights import on_meta

Prepare = Callable[[Any, Tensor, Size, Tensor | None], Condition]
"""(model, text, size, image) -> one branch's condition."""


def _prepare(model: CogVideoXTransformer, text: Tensor, size: Size, image: Tensor | None) -> Condition:
    return model.prepare(text, size, image)


def workload(
    config: TransformerConfig,
    vae: VAEConfig,
    mesh: Mesh,
    height: int,
    width: int,
    num_frames: int,
    guided: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    build: type[CogVideoXTransformer] = CogVideoXTransformer,
    prepare: Prepare = _prepare,
) -> Workload:
    """guided: two branches. build, prepare: the transformer's class and its conditions, for models on this one.

    The encoder of an image is not part of it.
    """
    decoded = (num_frames - 1) // vae.time_compression + 1
    frames = decoded + -decoded % config.patch[0]
    size = (frames, height // vae.space_compression, width // vae.space_compression)
    sp, guidance = SequenceParallel(mesh), Guidance(mesh.cfg)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def step(model: CogVideoXTransformer) -> None:
        image = None
        if config.image_channels:
            image = torch.empty(1, config.image_channels, *size, dtype=wide, device="meta")
        branches = {}
        for b in guidance.branches if guided else guidance.branches[:1]:
            text = torch.empty(1, config.text_length, config.text_dim, device="meta")
            branches[b] = prepare(model, text, size, image)
        tokens = pack(torch.empty(1, config.out_channels, *size, dtype=wide, device="meta"), config.patch)
        z = sp.shard(tokens)
        z = z + guidance(lambda branch: model(z, 500, branches[branch]), 2.0 if guided else 1.0)
        unpack(sp.gather(z, sp.lengths(tokens.shape[1])), size, config.patch)

    return Workload(
        on_meta(build, config, sp),
        step,
        on_meta(CogVideoXDecoder, vae),
        (config.out_channels, decoded, *size[1:]),
        (num_frames, height, width),
        config.text_length,
    )
