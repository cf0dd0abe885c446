"""What one rank runs for one video, for `common.estimate`."""

from __future__ import annotations

from pathlib import Path

import torch

from common.estimate import Workload
from common.guidance import NEGATIVE, POSITIVE, Guidance
from common.parallel import Mesh
from common.usp import SequenceParallel
from common.weights import on_meta
from mochi_xdit.config import MochiConfig
from mochi_xdit.transformer import MochiTransformer, pack, unpack
from mochi_xdit.vae import MochiDecoder
from mochi_xdit.weights import EXACT, find_decoder, find_transformer


def workload(
    model_dir: Path | None,
    mesh: Mesh,
    height: int,
    width: int,
    num_frames: int,
    guided: bool = True,
    negative: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Workload:
    """model_dir: None stands for the official model. guided: two branches. negative: the second one has a prompt.

    Prompts count with as many tokens as fit. Errors as of `find_transformer`.
    """
    if model_dir is None:
        config, vae = MochiConfig(), MochiConfig().vae
    else:
        config, vae = find_transformer(model_dir, dtype).config, find_decoder(model_dir, dtype).config
    frames = (num_frames - 1) // vae.temporal_ratio + 1
    size = (frames, height // vae.spatial_ratio, width // vae.spatial_ratio)
    sp, guidance = SequenceParallel(mesh), Guidance(mesh.cfg)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def step(model: MochiTransformer) -> None:
        text = torch.empty(1, config.text_tokens, config.text_dim, device="meta")
        said = {POSITIVE: text, NEGATIVE: text if negative else None}
        branches = {b: model.prepare(size, said[b]) for b in guidance.branches}
        tokens = pack(torch.empty(1, config.channels, *size, dtype=wide, device="meta"), config.patch)
        z, t = sp.shard(tokens), torch.zeros(1, dtype=wide, device="meta")
        z = z + guidance(lambda branch: model(z, t, branches[branch]), 2.0 if guided else 1.0)
        unpack(sp.gather(z, sp.lengths(tokens.shape[1])), size, config.patch)

    return Workload(
        on_meta(MochiTransformer, config, sp),
        step,
        on_meta(MochiDecoder, vae),
        (config.channels, *size),
        (num_frames, height, width),
        config.text_tokens,
        exact=EXACT,
    )
