"""Mochi from prompt to frames. The number of ranks changes the time it takes and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.parallel.guidance import NEGATIVE, POSITIVE
from common.registry.settings import DecodeOptions, either
from common.run.pipeline import Pipeline, check_output
from common.run.quantize import TransformerFiles
from common.video.latents import initial_latents
from common.video.states import StateKeeper
from common.weights.load import load, on_meta
from mochi_xdit.config import MochiRules, official_rules
from mochi_xdit.sampling import linear_quadratic_sigmas, sample
from mochi_xdit.transformer import MochiTransformer
from mochi_xdit.vae import MochiDecoder
from mochi_xdit.weights import (
    check_decoder,
    find_decoder,
    find_text_encoder,
    find_transformer,
    load_transformer,
    transformer_files,
)

Text = tuple[Tensor | None, Tensor | None]
"""T5 features (1, L, D) with their mask (1, L); Nones for the empty prompt."""


class MochiPipeline(Pipeline):
    """Mochi over a checkpoint folder, native or diffusers layout. For the options see
    `common.run.pipeline.Pipeline`."""

    def __init__(self, model_dir: str | Path, *where: Any, **options: Any) -> None:
        super().__init__(model_dir, *where, **options)
        self.config = find_transformer(self.model_dir, self.dtype).config
        self.vae_config = find_decoder(self.model_dir, self.dtype).config
        self.rules = official_rules(self.model_dir)
        self.sp.require_heads(self.config.heads, self.config.head_dim)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_steps: int | None = None,
        cfg_scale: float | Sequence[float] | None = None,
        seed: int = 0,
        latents: Tensor | None = None,
        output: str = "frames",
        threshold_noise: float | None = None,
        linear_steps: int | None = None,
        decode: DecodeOptions | None = None,
        latents_file: str | Path | None = None,
        keeper: StateKeeper | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
    ) -> Tensor | None:
        """Generate one video. Collective: every rank calls it with the same arguments.

        Steps and guidance are also taken by diffusers' names, num_inference_steps and guidance_scale.
        height, width: pixels, multiples of 16. num_frames: 6k + 1. cfg_scale: one number, or one for each step.
        threshold_noise, linear_steps: of the schedule, see `mochi_xdit.sampling.linear_quadratic_sigmas`.
        What is None is the checkpoint's own: 848 x 480, 49 frames, 64 steps, or FastMochi's 8 with their schedule.
        latents: noise to start from, (1, 12, T, height / 8, width / 8), in place of the seed's.
        output: `frames` (uint8 (num_frames, height, width, 3) on rank 0, None elsewhere) or `latent` (the final
        latents, (1, 12, T, h, w), on every rank).
        latents_file: where rank 0 puts the final latents before the decode begins.
        keeper: of the state after each step, to go on from another run's.
        Raises ValueError for sizes the model does not admit, FloatingPointError when the latents turn NaN.
        """
        num_steps = either(num_steps=num_steps, num_inference_steps=num_inference_steps)
        cfg_scale = either(cfg_scale=cfg_scale, guidance_scale=guidance_scale)
        rules = self.rules
        shape = self._latent_shape(*rules.size_of(height, width, num_frames))
        scales = _scales(cfg_scale, num_steps, rules)
        threshold, linear = rules.schedule(len(scales), threshold_noise, linear_steps)
        _check_schedule(len(scales), threshold, linear)
        check_output(output)
        latents = initial_latents(latents, shape, seed)
        guided = any(rules.guided(scale) for scale in scales)
        text = self._encode(prompt, negative_prompt if guided else None)
        sigmas = linear_quadratic_sigmas(len(scales), threshold, linear)
        final = self._sample(latents, text, sigmas, scales, keeper)
        return self.finished(final, output, latents_file, decode, model="mochi", prompt=prompt, seed=seed)

    def check_vae(self, frames: bool) -> None:
        check_decoder(self.model_dir, self.dtype)

    def transformer_files(self) -> tuple[TransformerFiles, ...]:
        return transformer_files(self.model_dir, self.dtype)

    def text_folder(self) -> Path:
        return find_text_encoder(self.model_dir, self.runtime.text_encoder_dir)

    def _latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        vae = self.vae_config
        multiple = vae.spatial_ratio * self.config.patch
        for name, value in (("height", height), ("width", width)):
            if value < multiple or value % multiple:
                raise ValueError(f"{name} is {value}; it must be a positive multiple of {multiple}")
        if num_frames < 1 or (num_frames - 1) % vae.temporal_ratio:
            raise ValueError(f"num_frames is {num_frames}; it must be {vae.temporal_ratio}k + 1")
        time = (num_frames - 1) // vae.temporal_ratio + 1
        return (1, self.config.channels, time, height // vae.spatial_ratio, width // vae.spatial_ratio)

    def _encode(self, prompt: str, negative: str | None) -> dict[int, Text]:
        """Features of both branches. The model does not let T5 see an empty prompt, so T5 is not asked for one."""
        prompts = {branch: text for branch, text in ((POSITIVE, prompt), (NEGATIVE, negative)) if text}
        text: dict[int, Text] = dict.fromkeys((POSITIVE, NEGATIVE), (None, None))
        return text | (self.encode_text(prompts, self.config.text_tokens, use_mask=True) if prompts else {})

    def _sample(
        self,
        latents: Tensor,
        text: dict[int, Text],
        sigmas: Sequence[float],
        scales: Sequence[float],
        keeper: StateKeeper | None = None,
    ) -> Tensor:
        size = (latents.shape[2], latents.shape[3], latents.shape[4])
        with self.stage_model("transformer", self.compiled_transformer) as model:
            conds = {b: model.prepare(size, *text[b]) for b in self.guidance.branches(*scales)}
            return sample(model, latents, conds, sigmas, scales, self.guidance, self.report, keeper)

    def load_transformer(self) -> MochiTransformer:
        with self.report.loading("loading transformer") as progress:
            return load_transformer(
                self.model_dir, self.sp, self.device, self.dtype, progress, self.placement, self.mesh.weights
            )

    def load_decoder(self) -> MochiDecoder:
        with self.report.loading("loading decoder") as progress:
            part = find_decoder(self.model_dir, self.dtype)
            module = on_meta(MochiDecoder, part.config)
            return load(module, part.open(), part.rename, self.device, self.dtype, progress=progress)


def _scales(cfg_scale: float | Sequence[float] | None, num_steps: int | None, rules: MochiRules) -> list[float]:
    """One for each step; what is None is the checkpoint's."""
    num_steps = rules.num_steps if num_steps is None else num_steps
    cfg_scale = rules.cfg_scale if cfg_scale is None else cfg_scale
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    scales = [float(cfg_scale)] * num_steps if isinstance(cfg_scale, (int, float)) else [float(s) for s in cfg_scale]
    if len(scales) != num_steps:
        raise ValueError(f"cfg_scale has {len(scales)} values for {num_steps} steps; give one number, or one a step")
    return scales


def _check_schedule(num_steps: int, threshold: float, linear_steps: int | None) -> None:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold_noise is {threshold}; it must lie between 0 and 1")
    if linear_steps is not None and not 1 <= linear_steps < max(num_steps, 2):
        raise ValueError(f"linear_steps is {linear_steps}; it must be at least 1 and less than the {num_steps} steps")
