"""Wan from prompt, and image where there is one, to frames. The number of ranks changes the time it takes and nothing
else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.model.compile import compile_transformer
from common.parallel.device_memory import host_memory
from common.parallel.guidance import NEGATIVE, POSITIVE
from common.parallel.mesh import on_main
from common.registry.checks import FITS
from common.registry.settings import DecodeOptions, either
from common.run.pipeline import Pipeline, check_output
from common.run.quantize import TransformerFiles
from common.system.environment import this_process
from common.text.t5 import EncoderFiles
from common.video.causal import TimeSplit, lay_out
from common.video.inputs import Picture, as_array, image_frames, pixels
from common.video.latents import initial_latents
from common.video.pictures import seen_part
from common.video.states import StateKeeper
from common.weights.ahead import read_ahead
from common.weights.dtypes import latent_dtype, parse_dtype
from wan_xdit.checkpoint import RESIDUALS, SOLVER, find_checkpoint
from wan_xdit.clip import ImageEncoder, check_image_encoder, load_image_encoder
from wan_xdit.sampling import Start, Tokens, Turn, remaining, sample, turns
from wan_xdit.solver import Solver, new_solver
from wan_xdit.text import clean, find_text_encoder
from wan_xdit.transformer import WanTransformer
from wan_xdit.vae import WanDecoder, WanEncoder, encode
from wan_xdit.weights import check_vae, expert_files, load_decoder, load_encoder, load_transformer, transformer_files


class WanPipeline(Pipeline):
    """Wan 2.1 and 2.2 over a checkpoint folder. For the options see `common.run.pipeline.Pipeline`.

    residual: dtype of the stream between the blocks, fp32 as in the authors' program or bf16 for the weights' own.
    """

    def __init__(self, model_dir: str | Path, *where: Any, residual: str = "fp32", **options: Any) -> None:
        self.files = find_checkpoint(Path(model_dir))
        self.rules = self.files.rules
        super().__init__(model_dir, *where, **options)
        if residual not in RESIDUALS:
            raise ValueError(f"residual is {residual!r}; choose one of {', '.join(RESIDUALS)}")
        self.residual = torch.promote_types(parse_dtype(residual), self.dtype) if residual == "fp32" else None
        self.config, self.vae_config = self.files.config, self.files.vae_config
        self.sp.require_heads(self.config.heads, self.config.head_width)

    @property
    def model_key(self) -> Any:
        return super().model_key, self.residual

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_steps: int | None = None,
        cfg_scale: float | None = None,
        seed: int = 0,
        latents: Tensor | None = None,
        output: str = "frames",
        image: Picture | None = None,
        fit: str = FITS[0],
        cfg_scale_2: float | None = None,
        shift: float | None = None,
        solver: str = SOLVER,
        decode: DecodeOptions | None = None,
        latents_file: str | Path | None = None,
        keeper: StateKeeper | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor | None:
        """Generate one video. Collective: every rank calls it with the same arguments.

        Steps and guidance are also taken by diffusers' names, num_inference_steps and guidance_scale.
        negative_prompt: None for the authors' own sentence; an empty one is empty.
        height, width: pixels, multiples of 16, of 32 for TI2V-5B. num_frames: 4k + 1. What is None is the
        checkpoint's own. cfg_scale: guidance, 1 for none; cfg_scale_2: of the second expert, for checkpoints with two.
        latents: noise to start from, (1, C, T, h, w), in place of the seed's.
        image: the first frame, for checkpoints that take one: a file, a PIL image or uint8 (H, W, 3).
        fit: where its shape is not height x width: `crop` cuts both sides alike, `stretch` gives the shape up, `pad`
        puts it between black bars. The report says what was done. The image tower sees what the frame shows.
        shift, solver: see `wan_xdit.solver`.
        output: `frames` (uint8 (num_frames, height, width, 3) on rank 0, None elsewhere) or `latent` (the final
        latents, (1, C, T, h, w), on every rank).
        latents_file: where rank 0 puts the final latents before the decode begins.
        keeper: of the state after each step, to go on from another run's.
        Raises ValueError for what the model does not admit, FloatingPointError when the latents turn NaN.
        """
        num_steps = either(num_steps=num_steps, num_inference_steps=num_inference_steps)
        cfg_scale = either(cfg_scale=cfg_scale, guidance_scale=guidance_scale)
        self.files.check_task(image is not None)
        check_output(output)
        rules = self.rules
        height, width, num_frames = rules.size_of(height, width, num_frames)
        shape = self._latent_shape(height, width, num_frames)
        shift = rules.shift_of(width, height) if shift is None else shift
        ode_solver = new_solver(solver, rules.num_steps if num_steps is None else num_steps, shift)
        plan = turns(ode_solver.timesteps, rules.boundary, rules.scales(cfg_scale, cfg_scale_2))
        latents = initial_latents(latents, shape, seed)
        picture = None if image is None else self._first_frame(image, height, width, fit)
        guided = any(rules.guided(turn.scale) for turn in plan) or self.mesh.cfg.size > 1
        text = self._encode(prompt, negative_prompt, guided)
        start = self._start(latents, picture, num_frames)
        clip_tokens = None if image is None or self.config.image_width is None else self._see(image, height, width, fit)
        final = self._sample(start, text, clip_tokens, ode_solver, plan, keeper or StateKeeper())
        return self.finished(final, output, latents_file, decode, model="wan", prompt=prompt, seed=seed)

    def check_vae(self, frames: bool) -> None:
        check_vae(self.files, self.dtype, frames)
        if frames and self.files.image_encoder is not None and self.mesh.is_main:
            check_image_encoder(self.files.image_encoder, self.config.image_width, self.dtype)

    def transformer_files(self) -> tuple[TransformerFiles, ...]:
        return transformer_files(self.model_dir, self.dtype)

    def text_files(self) -> EncoderFiles:
        return find_text_encoder(self.text_folder())

    def _latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int, int]:
        """Of the latents of a video (1, C, T, h, w). ValueError for a size that the checkpoint does not admit."""
        vae, multiple = self.vae_config, self.rules.size_multiple
        for name, value in (("height", height), ("width", width)):
            if value < multiple or value % multiple:
                raise ValueError(f"{name} is {value}; it must be a positive multiple of {multiple}")
        if num_frames < 1 or (num_frames - 1) % vae.time:
            raise ValueError(f"num_frames is {num_frames}; it must be {vae.time}k + 1")
        time = (num_frames - 1) // vae.time + 1
        return 1, self.config.out_channels, time, height // vae.space, width // vae.space

    def _encode(self, prompt: str, negative: str | None, guided: bool) -> dict[int, Tensor]:
        """UMT5 features (1, L, D) of the branches, zeros where no token is. negative: None for the authors' own."""
        prompts = {POSITIVE: clean(prompt)}
        if guided:
            prompts[NEGATIVE] = clean(self.rules.negative_prompt if negative is None else negative)
        text = self.encode_text(prompts, self.config.text_length, use_mask=True)
        return {branch: features for branch, (features, _) in text.items()}

    def _start(self, latents: Tensor, picture: Tensor | None, num_frames: int) -> Start:
        """picture: the first frame, (1, H, W, 3) uint8."""
        if picture is None:
            return Start(latents)
        if self.files.per_token:
            return Start(latents, first=self._latents_of(picture, 1))
        image_latents = self._latents_of(picture, num_frames)
        mask = image_latents.new_zeros(1, self.vae_config.time, *image_latents.shape[2:])
        mask[:, :, 0] = 1
        return Start(latents, torch.cat((mask, image_latents), dim=1))

    def _latents_of(self, picture: Tensor, frames: int) -> Tensor:
        """Latents (1, C, t, h, w) of a video that shows the picture, then grey."""
        compute_dtype = latent_dtype(self.dtype)
        video = torch.nn.functional.pad(pixels(picture, compute_dtype), (0, 0, 0, 0, 0, frames - 1))
        with self.stage_model("encoder", self._load_encoder) as encoder, self.report.stage("encoding image"):
            return encode(encoder, video, TimeSplit(self.mesh.world)).to(compute_dtype)

    def _first_frame(self, image: Picture, height: int, width: int, fit: str) -> Tensor:
        """uint8 (1, H, W, 3). Rank 0 reads it."""
        return on_main(self.mesh, lambda: image_frames(image, height, width, fit, self.report.note, self.rules))

    def _see(self, image: Picture, height: int, width: int, fit: str) -> Tensor:
        """CLIP's tokens (1, M, image_width) of what the first frame shows. The encoder runs on rank 0 alone."""

        def see() -> Tensor:
            part = seen_part(as_array(image), height, width, fit)
            with self.stage_model("image encoder", self._load_image_encoder) as encoder:
                return encoder(torch.from_numpy(part.copy())).to(latent_dtype(self.dtype))

        with self.report.stage("seeing image"):
            return on_main(self.mesh, see)

    def _load_image_encoder(self) -> ImageEncoder:
        assert self.files.image_encoder is not None
        return load_image_encoder(self.files.image_encoder, self.device, self.dtype)

    def _sample(
        self,
        start: Start,
        text: dict[int, Tensor],
        image: Tensor | None,
        solver: Solver,
        plan: list[Turn],
        keeper: StateKeeper,
    ) -> Tensor:
        tokens = Tokens(start, self.sp, self.config.patch, self.device, self.dtype)
        for turn in remaining(plan, tokens.begin(keeper, solver)):
            name = "transformer" if turn.expert == 0 else "second transformer"
            with self.stage_model(name, partial(self._compiled_expert, turn.expert)) as model:
                # Where blocks stream memory is short, and to fill all of them once more would take a pass of its own.
                keep = not self.placement.streams
                conds = {
                    b: model.prepare(text[b], start.size, start.beside, image, keep, tokens.still)
                    for b in self.guidance.branches(turn.scale)
                }
                with self.report.stage("sampling", total=len(turn.steps)) as step, self._next_expert(turn, plan):
                    sample(model, tokens, conds, solver, turn, self.guidance, step, keeper)
        return tokens.latents()

    def _next_expert(self, turn: Turn, plan: list[Turn]) -> AbstractContextManager[None]:
        """Within it the files of the expert whose turn comes next are read, by one rank of each machine."""
        later_experts = [later.expert for later in plan if later.expert > turn.expert]
        if not later_experts or self.keeps or self.placement.streams or this_process().local_rank:
            return nullcontext()
        return read_ahead(expert_files(self.files, later_experts[0], self.dtype), host_memory())

    def _compiled_expert(self, expert: int) -> WanTransformer:
        model = self.load_transformer(expert)
        compile_transformer(model, self.runtime.compiling)
        return model

    def load_transformer(self, expert: int = 0) -> WanTransformer:
        """Of two experts, 0 is the one for high noise."""
        with self.report.loading("loading transformer") as progress:
            options = (self.device, self.dtype, progress, self.placement, self.mesh.weights, self.residual)
            return load_transformer(self.files, expert, self.sp, *options)

    def _load_encoder(self) -> WanEncoder:
        with self.report.stage("loading encoder"):
            return lay_out(load_encoder(self.files, self.device, self.dtype), self.device)

    def load_decoder(self) -> WanDecoder:
        with self.report.stage("loading decoder"):
            return load_decoder(self.files, self.device, self.dtype)
