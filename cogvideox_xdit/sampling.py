"""From noise to latents: the loop. The pipeline runs it, and for one step on meta the estimator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cogvideox_xdit.config import CheckpointConfig, VAEConfig, read_checkpoint
from cogvideox_xdit.transformer import CogVideoXTransformer, Condition, pack, unpack
from cogvideox_xdit.transformer import Size as Grid
from cogvideox_xdit.vae import CogVideoXDecoder
from common.memory.estimate import Workload
from common.parallel.guidance import Guidance
from common.parallel.mesh import Mesh
from common.parallel.usp import SequenceParallel
from common.registry.forks import Model, Size
from common.system.progress import Report
from common.text.t5 import text_work
from common.video.latents import require_finite
from common.video.previews import Levels, View
from common.video.states import StateKeeper
from common.weights.dtypes import latent_dtype
from common.weights.load import on_meta


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

    @property
    def levels(self) -> tuple[Levels, ...]: ...

    @property
    def memory(self) -> Mapping[str, Tensor]: ...

    def recall(self, memory: Mapping[str, Tensor]) -> None: ...

    def step(self, i: int, x: Tensor, v: Tensor, draw: Callable[[], Tensor]) -> Tensor: ...


def sample(
    model: CogVideoXTransformer,
    start: Start,
    conds: Mapping[int, Condition],
    solver: Steps,
    scales: Sequence[float],
    guidance: Guidance,
    report: Report,
    keeper: StateKeeper | None = None,
) -> Tensor:
    """All steps on this rank's tokens.

    start: the same on every rank. conds: of `guidance.branches(*scales)`. scales: one for each of the solver's steps.
    keeper: of the state after each step.
    Returns the full final latents (1, C, T, h, w) on every rank, padding included, at least fp32.
    """
    _, channels, *rest = start.latents.shape
    size, patch, sp = (rest[0], rest[1], rest[2]), model.config.patch, model.sp

    def local(z: Tensor) -> Tensor:
        return sp.shard(pack(z, patch)).to(model.device, latent_dtype(model.dtype))

    def noise() -> Tensor:
        return local(draw(size, channels, start.generator))

    count, keeper = len(solver.timesteps), keeper or StateKeeper()
    lengths = sp.lengths(size[0] * size[1] * size[2] // model.config.patch_volume)
    view = View(size, patch, clean=("before",), levels=solver.levels)
    state = keeper.begin(sp, {"z": local(start.latents)}, lengths, count, view)
    z = state.shards["z"]
    if state.step:
        solver.recall(state.shards)
        start.generator.set_state(state.whole["generator"])
    with report.stage("sampling", total=count, done=state.step) as step:
        for i in range(state.step, count):
            t, scale = solver.timesteps[i], scales[i]
            branches = guidance.branches(scale)
            predictions = sp.each(partial(model, z, t), [conds[b] for b in branches])
            z = solver.step(i, z, guidance.combine(dict(zip(branches, predictions)), scale), noise)
            require_finite(z, f"sampling step {i + 1} of {count}")
            keeper.keep(i + 1, {"z": z, **solver.memory}, {"generator": start.generator.get_state()})
            step()
    return unpack(sp.gather(z, lengths), size, patch)


def draw(size: Grid, channels: int, generator: torch.Generator) -> Tensor:
    """Standard normal fp32 latents (1, channels, T, h, w), drawn frame by frame in the reference's order."""
    frames, rows, columns = size
    return torch.randn(1, frames, channels, rows, columns, generator=generator).transpose(1, 2)


class OneStep:
    """A solver of a single step, of whose numbers nothing depends: for counting."""

    timesteps = (500,)
    levels = ((0.0, 1.0, 1.0, 0.0),)
    memory: Mapping[str, Tensor] = {}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        pass

    def step(self, i: int, x: Tensor, v: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        return x + v


Prepare = Callable[[Any, Tensor, Grid, Tensor | None], Condition]
"""(model, text, size, image) -> one branch's condition."""


def _prepare(model: CogVideoXTransformer, text: Tensor, grid: Grid, image: Tensor | None) -> Condition:
    return model.prepare(text, grid, image)


def workload(
    source: Path | Model,
    size: Size,
    mesh: Mesh,
    dtype: torch.dtype = torch.bfloat16,
    negative: bool = False,
    text_encoder_dir: str | Path | None = None,
    read: Callable[[Path], CheckpointConfig] = read_checkpoint,
    build: type[CogVideoXTransformer] = CogVideoXTransformer,
    prepare: Prepare = _prepare,
) -> Workload:
    """What one rank runs for one video, for `common.memory.estimate`: one sampling step.

    source: a checkpoint's folder, or a registered model's numbers. negative: of no matter, an empty prompt is as long.
    read, build, prepare: a folder's numbers, the transformer's class and its conditions, for models on this one. The
    encoder of an image is not part of it.
    """
    if isinstance(source, Path):
        checkpoint = read(source)
        config, vae = checkpoint.transformer, checkpoint.vae
    else:
        config, vae = source.config, VAEConfig()
    latent_frames = (size.num_frames - 1) // vae.time_compression + 1
    space = (size.height // vae.space_compression, size.width // vae.space_compression)
    grid = (latent_frames + -latent_frames % config.patch[0], *space)
    sp, guidance, scale = SequenceParallel(mesh), Guidance(mesh.cfg), 2.0 if size.guided else 1.0

    def step(model: CogVideoXTransformer) -> Tensor:
        def empty(channels: int) -> Tensor:
            return torch.empty(1, channels, *grid, dtype=latent_dtype(dtype), device="meta")

        image = empty(config.image_channels) if config.image_channels else None
        text = torch.empty(1, config.text_length, config.text_dim, device="meta")
        conds = {b: prepare(model, text, grid, image) for b in guidance.branches(scale)}
        start = Start(empty(config.out_channels), image, torch.Generator())
        return sample(model, start, conds, OneStep(), [scale], guidance, Report())

    find = (lambda: Path(text_encoder_dir or source)) if isinstance(source, Path) else None
    return Workload(
        on_meta(build, config, sp),
        step,
        on_meta(CogVideoXDecoder, vae),
        (config.out_channels, latent_frames, *space),
        (size.num_frames, size.height, size.width),
        (text_work(config.text_length, find),),
    )
