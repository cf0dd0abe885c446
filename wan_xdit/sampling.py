"""From noise to latents: the loop. The pipeline runs it for each expert, and for one step on meta the estimator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.memory.estimate import Workload
from common.parallel.guidance import Guidance
from common.parallel.mesh import Mesh
from common.parallel.usp import SequenceParallel
from common.registry.forks import Model, Size
from common.text.t5 import UMT5, text_work
from common.video.latents import require_finite
from common.video.previews import View, flow_levels
from common.video.states import StateKeeper
from common.weights.dtypes import latent_dtype
from common.weights.load import on_meta
from wan_xdit.checkpoint import WanRules, find_checkpoint
from wan_xdit.config import TransformerConfig, VAEConfig, vae_of
from wan_xdit.solver import PREDICTED, Solver, new_solver
from wan_xdit.text import UMT5_XXL, find_text_encoder
from wan_xdit.transformer import Condition, WanTransformer, pack, unpack
from wan_xdit.transformer import Size as Grid
from wan_xdit.vae import WanDecoder
from wan_xdit.weights import fp32_names


@dataclass(frozen=True)
class Start:
    """What sampling starts from, the same on every rank."""

    latents: Tensor
    """(1, C, T, h, w) noise."""
    beside: Tensor | None = None
    """(1, C', T, h, w) mask and image latents, for checkpoints that take them."""
    first: Tensor | None = None
    """(1, C, 1, h, w) latents of a first frame that stays as it is, for checkpoints with times per token."""

    @property
    def size(self) -> Grid:
        return self.latents.shape[2], self.latents.shape[3], self.latents.shape[4]


@dataclass(frozen=True)
class Turn:
    """The steps that one expert takes, with its guidance. A model of one transformer has one turn."""

    expert: int
    steps: range
    scale: float


def turns(timesteps: Sequence[float], boundary: float | None, scales: tuple[float, float]) -> list[Turn]:
    """Who takes which steps: the first expert from the time `boundary` (of 1000) up, the second one below.

    None: there is one. An expert whose turn does not come is left out.
    """
    count = len(timesteps)
    high = count if boundary is None else sum(t >= 1000 * boundary for t in timesteps)
    both = Turn(0, range(high), scales[0]), Turn(1, range(high, count), scales[1])
    return [turn for turn in both if turn.steps]


def remaining(plan: Sequence[Turn], step: int) -> list[Turn]:
    """The turns after so many steps; an expert that has had its own is left out."""
    rest = [replace(turn, steps=range(max(turn.steps.start, step), turn.steps.stop)) for turn in plan]
    return [turn for turn in rest if turn.steps]


class Tokens:
    """This rank's tokens of the latents, (1, n, C * patch volume), of which the first `still` belong to a frame that
    stays."""

    def __init__(
        self, start: Start, sp: SequenceParallel, patch: Grid, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.size, self.sp, self.patch = start.size, sp, patch
        tokens = pack(start.latents, patch)
        self.lengths = sp.lengths(tokens.shape[1])
        self.z = sp.shard(tokens).to(device, latent_dtype(dtype))
        self.first: Tensor | None = None
        if start.first is not None:
            offset = sum(self.lengths[: sp.rank])
            first = pack(start.first, patch)[:, offset : offset + self.z.shape[1]]
            self.first = first.to(self.z) if first.shape[1] else None
        self.keep_first()

    def begin(self, keeper: StateKeeper, solver: Solver) -> int:
        """Take up the keeper's state where it has one, the solver too; returns how many steps are done."""
        view = View(self.size, self.patch, clean=PREDICTED, levels=flow_levels(solver.sigmas))
        state = keeper.begin(self.sp, {"z": self.z}, self.lengths, len(solver), view)
        if state.step:
            self.z = state.shards["z"]
            solver.recall(state.step, state.shards)
        return state.step

    @property
    def still(self) -> int:
        return 0 if self.first is None else self.first.shape[1]

    def keep_first(self) -> None:
        """Put the frame that stays back in its place."""
        if self.first is not None:
            self.z = torch.cat((self.first, self.z[:, self.still :]), dim=1)

    def latents(self) -> Tensor:
        """The full latents (1, C, T, h, w), on every rank."""
        return unpack(self.sp.gather(self.z, self.lengths), self.size, self.patch)


def sample(
    model: WanTransformer,
    tokens: Tokens,
    conds: Mapping[int, Condition],
    solver: Solver,
    turn: Turn,
    guidance: Guidance,
    step: Callable[[], object],
    keeper: StateKeeper,
) -> None:
    """The steps of one turn, on this rank's tokens, which are changed.

    conds: of `guidance.branches(turn.scale)`. step: called after each. keeper: of the state then.
    """
    for i in turn.steps:
        t = solver.timesteps[i]
        branches = guidance.branches(turn.scale)
        predictions = model.sp.each(partial(model, tokens.z, t), [conds[b] for b in branches])
        tokens.z = solver.step(i, tokens.z, guidance.combine(dict(zip(branches, predictions)), turn.scale))
        tokens.keep_first()
        require_finite(tokens.z, f"sampling step {i + 1} of {len(solver)}")
        keeper.keep(i + 1, {"z": tokens.z, **solver.memory})
        step()


def _numbers(source: Path | Model) -> tuple[TransformerConfig, VAEConfig, int]:
    """Of transformer and autoencoder, and how many experts there are."""
    if isinstance(source, Path):
        files = find_checkpoint(source)
        return files.config, files.vae_config, len(files.experts)
    assert isinstance(source.rules, WanRules)
    return source.config, vae_of(source.config), 1 if source.rules.boundary is None else 2


def workload(
    source: Path | Model,
    size: Size,
    mesh: Mesh,
    dtype: torch.dtype = torch.bfloat16,
    negative: bool = False,
    text_encoder_dir: str | Path | None = None,
) -> Workload:
    """What one rank runs for one video, for `common.memory.estimate`: one sampling step.

    source: a checkpoint's folder, or a registered model's numbers. negative: of no matter, an empty prompt is as long.
    The encoders of an image are not part of it.
    """
    config, vae, experts = _numbers(source)
    grid = ((size.num_frames - 1) // vae.time + 1, size.height // vae.space, size.width // vae.space)
    sp, guidance = SequenceParallel(mesh), Guidance(mesh.cfg)
    solver, turn = new_solver("unipc", 2, 1.0), Turn(0, range(1), 2.0 if size.guided else 1.0)

    def step(model: WanTransformer) -> Tensor:
        def empty(channels: int) -> Tensor:
            return torch.empty(1, channels, *grid, dtype=latent_dtype(dtype), device="meta")

        beside = empty(config.image_channels) if config.image_channels else None
        image = None
        if config.image_width is not None:
            image = torch.empty(1, config.image_tokens, config.image_width, device="meta")
        text = torch.empty(1, config.text_length, config.text_dim, device="meta")
        conds = {b: model.prepare(text, grid, beside, image) for b in guidance.branches(turn.scale)}
        tokens = Tokens(Start(empty(config.out_channels), beside), sp, config.patch, model.device, dtype)
        sample(model, tokens, conds, solver, turn, guidance, lambda: None, StateKeeper())
        return tokens.latents()

    find = partial(find_text_encoder, text_encoder_dir or source) if isinstance(source, Path) else None
    return Workload(
        on_meta(WanTransformer, config, sp, torch.float32),
        step,
        on_meta(WanDecoder, vae),
        (config.out_channels, *grid),
        (size.num_frames, size.height, size.width),
        (text_work(config.text_length, find, UMT5_XXL, UMT5),),
        keep_fp32=fp32_names(config),
        experts=experts,
        kept=len(guidance.branches(turn.scale)) * config.kept_numbers * dtype.itemsize,
    )
