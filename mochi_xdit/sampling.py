"""From noise to latents: the schedule and the loop. The pipeline runs it, and for one step on meta the estimator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.memory.estimate import Workload
from common.parallel.guidance import NEGATIVE, POSITIVE, Guidance
from common.parallel.mesh import Mesh
from common.parallel.usp import SequenceParallel
from common.registry.forks import Model, Size
from common.system.progress import Report
from common.text.t5 import text_work
from common.video.latents import require_finite
from common.video.previews import View, flow_levels
from common.video.states import StateKeeper
from common.weights.dtypes import latent_dtype
from common.weights.load import on_meta
from mochi_xdit.transformer import MochiCondition, MochiTransformer, pack, unpack
from mochi_xdit.vae import MochiDecoder
from mochi_xdit.weights import KEEP_FP32, find_decoder, find_text_encoder, find_transformer

TIME_SCALE = 1000


def linear_quadratic_sigmas(num_steps: int, threshold: float = 0.025, linear_steps: int | None = None) -> list[float]:
    """Noise levels from 1 (pure noise) to 0, num_steps + 1 of them: linear at first, then quadratic.

    The first `linear_steps` (default: half) steps leave the noise by `threshold` in all; the rest continue with the
    same slope and end at 0. From Mochi's reference sampler (facts: i * th / L, then a i^2 + b i + k).
    """
    if num_steps == 1:
        return [1.0, 0.0]
    linear = num_steps // 2 if linear_steps is None else linear_steps
    quadratic = num_steps - linear
    slope = threshold / linear
    excess = linear - threshold * num_steps
    a = excess / (linear * quadratic**2)
    b = slope - 2 * excess / quadratic**2
    times = [slope * i for i in range(linear)]
    times += [a * i**2 + b * i + a * linear**2 for i in range(linear, num_steps)]
    return [1.0 - t for t in times] + [0.0]


def sample(
    model: MochiTransformer,
    latents: Tensor,
    conds: Mapping[int, MochiCondition],
    sigmas: Sequence[float],
    scales: Sequence[float],
    guidance: Guidance,
    report: Report,
    keeper: StateKeeper | None = None,
) -> Tensor:
    """Euler steps on this rank's tokens.

    latents: (1, 12, T, h, w) full noise, the same on every rank. conds: of `guidance.branches(*scales)`.
    sigmas: len(scales) + 1 noise levels. keeper: of the state after each step.
    Returns the full final latents on every rank, at least fp32.
    """
    size, patch, sp = (latents.shape[2], latents.shape[3], latents.shape[4]), model.config.patch, model.sp
    tokens = pack(latents.to(model.device, latent_dtype(model.dtype)), patch)
    keeper = keeper or StateKeeper()
    lengths = sp.lengths(tokens.shape[1])
    view = View(size, (1, patch, patch), "tyxc", levels=flow_levels(sigmas))
    state = keeper.begin(sp, {"z": sp.shard(tokens)}, lengths, len(scales), view)
    z = state.shards["z"]
    times = torch.tensor([TIME_SCALE * (1.0 - sigma) for sigma in sigmas], dtype=z.dtype, device=z.device)
    with report.stage("sampling", total=len(scales), done=state.step) as step:
        for i, scale in enumerate(scales[state.step :], state.step):
            branches = guidance.branches(scale)
            predictions = sp.each(partial(model, z, times[i : i + 1]), [conds[b] for b in branches])
            z = z + (sigmas[i] - sigmas[i + 1]) * guidance.combine(dict(zip(branches, predictions)), scale)
            require_finite(z, f"sampling step {i + 1} of {len(scales)}")
            keeper.keep(i + 1, {"z": z})
            step()
    return unpack(sp.gather(z, lengths), size, patch)


def workload(
    source: Path | Model,
    size: Size,
    mesh: Mesh,
    dtype: torch.dtype = torch.bfloat16,
    negative: bool = False,
    text_encoder_dir: str | Path | None = None,
) -> Workload:
    """What one rank runs for one video, for `common.memory.estimate`: one sampling step.

    source: a checkpoint's folder, or a registered model's numbers. negative: the branch of the negative prompt has one.
    Prompts count with as many tokens as fit. Errors as of `find_transformer`.
    """
    if isinstance(source, Path):
        config, vae = find_transformer(source, dtype).config, find_decoder(source, dtype).config
    else:
        config, vae = source.config, source.config.vae
    frames = (size.num_frames - 1) // vae.temporal_ratio + 1
    latent = (frames, size.height // vae.spatial_ratio, size.width // vae.spatial_ratio)
    sp, guidance, scale = SequenceParallel(mesh), Guidance(mesh.cfg), 2.0 if size.guided else 1.0

    def step(model: MochiTransformer) -> Tensor:
        features = torch.empty(1, config.text_tokens, config.text_dim, device="meta")
        text = {POSITIVE: features, NEGATIVE: features if negative else None}
        conds = {b: model.prepare(latent, text[b]) for b in guidance.branches(scale)}
        latents = torch.empty(1, config.channels, *latent, dtype=latent_dtype(dtype), device="meta")
        return sample(model, latents, conds, [1.0, 0.0], [scale], guidance, Report())

    find = partial(find_text_encoder, source, text_encoder_dir) if isinstance(source, Path) else None
    return Workload(
        on_meta(MochiTransformer, config, sp),
        step,
        on_meta(MochiDecoder, vae),
        (config.channels, *latent),
        (size.num_frames, size.height, size.width),
        (text_work(config.text_tokens, find),),
        keep_fp32=KEEP_FP32,
    )
