"""From noise to latents: the loop. The pipeline runs it, and for one step on meta the estimator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cogvideox_xdit.config import TransformerConfig, VAEConfig
from cogvideox_xdit.transformer import CogVideoXTransformer, Condition, Size, pack, unpack
from cogvideox_xdit.vae import CogVideoXDecoder
from common.estimate import Workload
from common.generation import latent_dtype, require_finite
from common.guidance import Guidance
from common.parallel import Mesh
from common.progress import Stages
from common.usp import SequenceParallel
from common.weights import on_meta


@dataclass(frozen=True)
class Start:
    """What sampling starts from: latents (1, C, T, h, w), T with padding, image latents beside them, and the draws."""

    latents: Tensor
    image: Tensor | None
    generator: torch.Generator


class Steps(Protocol):
    """What the loop asks of a solver; see `cogvideox_xdit.solver.Solver`."""

    @property
    def timesteps(self) -> Sequence[int]: ...

    def step(self, i: int, x: Tensor, v: Tensor, draw: Callable[[], Tensor]) -> Tensor: ...


def sample(
    model: CogVideoXTransformer,
    start: Start,
    conds: Mapping[int, Condition],
    solver: Steps,
    scales: Sequence[float],
    guidance: Guidance,
    stages: Stages,
) -> Tensor:
    """All steps on this rank's tokens.

    start: the same on every rank. conds: of `guidance.branches(*scales)`. scales: one for each of the solver's steps.
    Returns the full final latents (1, C, T, h, w) on every rank, padding included, at least fp32.
    """
    _, channels, *rest = start.latents.shape
    size, patch, sp = (rest[0], rest[1], rest[2]), model.config.patch, model.sp

    def local(z: Tensor) -> Tensor:
        return sp.shard(pack(z, patch)).to(model.device, latent_dtype(model.dtype))

    def noise() -> Tensor:
        return local(draw(size, channels, start.generator))

    z, count = local(start.latents), len(solver.timesteps)
    with stages.stage("sampling", total=count) as step:
        for i, (t, scale) in enumerate(zip(solver.timesteps, scales)):
            predictions = {b: model(z, t, conds[b]) for b in guidance.branches(scale)}
            z = solver.step(i, z, guidance.combine(predictions, scale), noise)
            require_finite(z, f"sampling step {i + 1} of {count}")
            step()
    tokens = size[0] * size[1] * size[2] // model.config.patch_volume
    return unpack(sp.gather(z, sp.lengths(tokens)), size, patch)


def draw(size: Size, channels: int, generator: torch.Generator) -> Tensor:
    """Standard normal fp32 latents (1, channels, T, h, w), drawn frame by frame in the reference's order."""
    frames, rows, columns = size
    return torch.randn(1, frames, channels, rows, columns, generator=generator).transpose(1, 2)


class OneStep:
    """A solver of a single step, of whose numbers nothing depends: for counting."""

    timesteps = (500,)

    def step(self, i: int, x: Tensor, v: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        return x + v


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
    """What one rank runs for one video, for `common.estimate`: one sampling step.

    guided: two branches. build, prepare: the transformer's class and its conditions, for models on this one. The
    encoder of an image is not part of it.
    """
    decoded = (num_frames - 1) // vae.time_compression + 1
    frames = decoded + -decoded % config.patch[0]
    size = (frames, height // vae.space_compression, width // vae.space_compression)
    sp, guidance, scale = SequenceParallel(mesh), Guidance(mesh.cfg), 2.0 if guided else 1.0

    def step(model: CogVideoXTransformer) -> Tensor:
        def empty(channels: int) -> Tensor:
            return torch.empty(1, channels, *size, dtype=latent_dtype(dtype), device="meta")

        image = empty(config.image_channels) if config.image_channels else None
        conds = {}
        for b in guidance.branches(scale):
            text = torch.empty(1, config.text_length, config.text_dim, device="meta")
            conds[b] = prepare(model, text, size, image)
        start = Start(empty(config.out_channels), image, torch.Generator())
        return sample(model, start, conds, OneStep(), [scale], guidance, Stages())

    return Workload(
        on_meta(build, config, sp),
        step,
        on_meta(CogVideoXDecoder, vae),
        (config.out_channels, decoded, *size[1:]),
        (num_frames, height, width),
        config.text_length,
    )
