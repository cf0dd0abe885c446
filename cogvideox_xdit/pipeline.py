"""CogVideoX from prompt, image or video to frames. The number of ranks changes the time it takes and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_xdit.config import FRAME_STEP, STRENGTH, CheckpointConfig, official_rules, read_checkpoint
from cogvideox_xdit.sampling import Start, draw, sample
from cogvideox_xdit.solver import Solver, dynamic_scale
from cogvideox_xdit.transformer import CogVideoXTransformer, Size
from cogvideox_xdit.vae import CogVideoXDecoder, CogVideoXEncoder, encode
from cogvideox_xdit.weights import check_vae, load_decoder, load_encoder, load_transformer, transformer_files
from common.parallel.guidance import NEGATIVE, POSITIVE
from common.parallel.mesh import on_main
from common.registry.checks import FITS
from common.registry.settings import DecodeOptions, either
from common.run.pipeline import Pipeline, check_output
from common.run.quantize import TransformerFiles
from common.video.causal import TimeSplit, lay_out
from common.video.inputs import Clip, Picture, image_frames, pixels, video_frames
from common.video.latents import check_latents
from common.video.states import StateKeeper
from common.weights.dtypes import latent_dtype


@dataclass(frozen=True)
class Generation:
    """The numbers of one generation, every default filled in."""

    height: int
    width: int
    num_frames: int
    size: Size
    """Latent frames, rows and columns; the first `padding` frames are dropped at the end."""
    padding: int
    solver: Solver
    """The solver at its first step."""
    scales: list[float]
    """Guidance of each step."""
    negative: bool
    """Whether the negative prompt's branch is computed on some rank."""


class CogVideoXPipeline(Pipeline):
    """CogVideoX over a checkpoint folder in the diffusers layout. For the options see `common.run.pipeline.Pipeline`.

    scheduler: `ddim` or `dpm` in place of the checkpoint's own.
    """

    def __init__(self, model_dir: str | Path, *where: Any, scheduler: str | None = None, **options: Any) -> None:
        self.checkpoint = self.read_config(Path(model_dir))
        self.rules = official_rules(self.checkpoint.transformer)
        self.own_dtype = self.rules.dtype
        super().__init__(model_dir, *where, **options)
        self.scheduler = scheduler
        self.config, self.vae_config = self.checkpoint.transformer, self.checkpoint.vae
        self.sp.require_heads(self.config.heads, self.config.head_dim)
        Solver(self.checkpoint.scheduler, self.rules.num_steps, scheduler)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_steps: int | None = None,
        cfg_scale: float | None = None,
        seed: int = 0,
        latents: Tensor | None = None,
        output: str = "frames",
        image: Picture | None = None,
        video: Clip | None = None,
        fit: str = FITS[0],
        strength: float = STRENGTH,
        dynamic_cfg: bool = False,
        decode: DecodeOptions | None = None,
        latents_file: str | Path | None = None,
        keeper: StateKeeper | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor | None:
        """Generate one video. Collective: every rank calls it with the same arguments.

        Steps and guidance are also taken by diffusers' names, num_inference_steps and guidance_scale.
        height, width: pixels, multiples of 16. num_frames: 8k + 1 or 8k. What is None is the checkpoint's own.
        cfg_scale: guidance, none at 1 or less; dynamic_cfg lets it vary as the official demo does.
        latents: noise to start from, (1, C, T, height / 8, width / 8), in place of the seed's; T as `latent_size` says.
        image: the first frame, for checkpoints that take one and only for them: a file, a PIL image or uint8 (H, W, 3).
        video: what a text checkpoint starts from: a file or uint8 (T, H, W, 3); strength, of (0, 1], is how much of
        the schedule is run on it.
        fit: where the shape of image or video is not height x width: `crop` cuts both sides alike, `stretch` gives the
        shape up, `pad` puts it between black bars. The report says what was done.
        output: `frames` (uint8 (num_frames, height, width, 3) on rank 0, None elsewhere) or `latent` (the final
        latents, (1, C, T, h, w) without padding, on every rank).
        latents_file: where rank 0 puts the final latents before the decode begins.
        keeper: of the state after each step, to go on from another run's.
        Raises ValueError for what the model does not admit, FloatingPointError when the latents turn NaN.
        """
        num_steps = either(num_steps=num_steps, num_inference_steps=num_inference_steps)
        cfg_scale = either(cfg_scale=cfg_scale, guidance_scale=guidance_scale)
        self.config.check_task(image is not None, video is not None)
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; it must be above 0 and at most 1")
        share = 1.0 if video is None else strength
        run = self.generation(height, width, num_frames, num_steps, cfg_scale, dynamic_cfg, share)
        self.check(run, latents, output, video is not None)
        frames = self._first_frames(image, video, fit, run)
        text = self.encode_prompts(prompt, negative_prompt, run)
        # The seed's draws come in the reference's order: image or video, noise, steps.
        generator = torch.Generator("cpu").manual_seed(seed)
        frame_latents = None if frames is None else self.encode_frames(frames, generator)
        start = self.start(run, frame_latents, latents, generator)
        final = self._sample(start, text, run, keeper)[:, :, run.padding :]
        return self.finished(final, output, latents_file, decode, model="cogvideox", prompt=prompt, seed=seed)

    def generation(
        self,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        num_steps: int | None,
        cfg_scale: float | None,
        dynamic_cfg: bool = False,
        share: float = 1.0,
    ) -> Generation:
        """What is None is the checkpoint's own. share, of (0, 1]: how much of the schedule is run.

        Raises ValueError for what the checkpoint does not admit.
        """
        rules = self.rules
        height, width, num_frames = rules.size_of(height, width, num_frames)
        size, padding = self.latent_size(height, width, num_frames)
        if self.config.learned and size[0] != self.config.latent_frames:
            sample_frames = self.config.sample_frames
            self.report.warn(
                f"learned positions exist for {sample_frames} frames only; sines and cosines stand in for them"
            )
        num_steps = rules.num_steps if num_steps is None else num_steps
        cfg_scale = rules.cfg_scale if cfg_scale is None else cfg_scale
        guided = rules.guided(cfg_scale)
        solver = Solver(self.checkpoint.scheduler, num_steps, self.scheduler, share)
        scales = [cfg_scale if guided else 1.0] * len(solver)
        if dynamic_cfg and guided:
            scales = [dynamic_scale(cfg_scale, t, len(solver)) for t in solver.timesteps]
        negative = guided or self.mesh.cfg.size > 1
        return Generation(height, width, num_frames, size, padding, solver, scales, negative)

    def latent_size(self, height: int, width: int, num_frames: int) -> tuple[Size, int]:
        """Latent frames (padding included), rows and columns; and how many padding frames stand in front.

        Raises ValueError when the checkpoint does not admit the size.
        """
        vae, config = self.vae_config, self.config
        multiple = vae.space_compression * config.patch_size
        for name, value in (("height", height), ("width", width)):
            if value < multiple or value % multiple:
                raise ValueError(f"{name} is {value}; it must be a positive multiple of {multiple}")
        if num_frames < 1 or num_frames % FRAME_STEP > 1:
            raise ValueError(f"num_frames is {num_frames}; it must be {FRAME_STEP}k + 1 or {FRAME_STEP}k")
        config.check_area(height // vae.space_compression, width // vae.space_compression)
        frames = (num_frames - 1) // vae.time_compression + 1
        padding = -frames % config.patch[0]
        return (frames + padding, height // vae.space_compression, width // vae.space_compression), padding

    def check(self, run: Generation, latents: Tensor | None, output: str, from_video: bool = False) -> None:
        """Raise ValueError for an unknown output, and for latents that do not fit or stand beside a video."""
        check_output(output)
        if latents is not None:
            if from_video:
                raise ValueError("latents and video exclude each other: sampling starts from one of them")
            check_latents(latents, (1, self.config.out_channels, *run.size))

    def _first_frames(self, image: Picture | None, video: Clip | None, fit: str, run: Generation) -> Tensor | None:
        """What sampling starts from besides noise, uint8 (T, H, W, 3), if anything. Collective."""
        size, note = (run.height, run.width), self.report.note
        if image is not None:
            return on_main(self.mesh, lambda: image_frames(image, *size, fit, note, self.rules))
        if video is not None:
            return on_main(self.mesh, lambda: video_frames(video, *size, run.num_frames, fit, note, self.rules))
        return None

    def encode_prompts(self, prompt: str, negative_prompt: str, run: Generation) -> dict[int, Tensor]:
        """T5 features (1, L, D) of the branches that are computed. Collective."""
        prompts = {POSITIVE: prompt} | ({NEGATIVE: negative_prompt} if run.negative else {})
        # Padding is encoded and attended to without a mask: so the model was trained.
        text = self.encode_text(prompts, self.config.text_length, use_mask=False)
        return {branch: features for branch, (features, _) in text.items()}

    def start(
        self, run: Generation, frame_latents: Tensor | None, latents: Tensor | None, generator: torch.Generator
    ) -> Start:
        """Latents to begin with. frame_latents: as `encode_frames` gives them. latents: in place of noise."""
        image = None
        if latents is None:
            latents = draw(run.size, self.config.out_channels, generator)
        if frame_latents is not None and self.config.image_channels:
            image = self.image_latents(frame_latents, run.size)
        elif frame_latents is not None:
            scaled = frame_latents * self.vae_config.scaling_factor
            # What stands in front is dropped at the end, so it may be a copy of the first frame.
            scaled = torch.cat((scaled[:, :, :1].expand(-1, -1, run.padding, -1, -1), scaled), dim=2)
            latents = run.solver.add_noise(scaled, latents)
        return Start(latents, image, generator)

    def encode_frames(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """A sample of the autoencoder's latents of frames (T, H, W, 3): (1, C, t, h, w) on the CPU, unscaled."""
        compute_dtype = latent_dtype(self.dtype)
        with self.stage_model("encoder", self._load_encoder) as encoder, self.report.stage("encoding video"):
            split = TimeSplit(self.mesh.world)
            mean, logvar = (x.to("cpu", compute_dtype) for x in encode(encoder, pixels(frames, compute_dtype), split))
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32)
        return mean + torch.exp(logvar / 2) * noise

    def image_latents(self, encoded: Tensor, size: Size) -> Tensor:
        """What stands beside the noise: encoded frames (1, C, k, h, w), scaled as in training, then zeros."""
        factor = self.vae_config.scaling_factor
        # The 1.5 checkpoint was trained on latents divided by the factor by which all others are multiplied.
        scaled = encoded / factor if self.vae_config.inverted else encoded * factor
        zeros = scaled.new_zeros(1, scaled.shape[1], size[0] - scaled.shape[2], *size[1:])
        return torch.cat((scaled, zeros), dim=2)

    def _sample(
        self, start: Start, text: dict[int, Tensor], run: Generation, keeper: StateKeeper | None = None
    ) -> Tensor:
        """The final latents, padding included, (1, C, T, h, w). The model is gone when this returns."""
        with self.stage_model("transformer", self.compiled_transformer) as model:
            conds = {b: model.prepare(text[b], run.size, start.image) for b in self.guidance.branches(*run.scales)}
            return sample(model, start, conds, run.solver, run.scales, self.guidance, self.report, keeper)

    def check_vae(self, frames: bool) -> None:
        check_vae(self.model_dir, self.vae_config, self.dtype, frames)

    def transformer_files(self) -> tuple[TransformerFiles, ...]:
        return transformer_files(self.model_dir, self.dtype)

    @staticmethod
    def read_config(model_dir: Path) -> CheckpointConfig:
        return read_checkpoint(model_dir)

    def load_transformer(self) -> CogVideoXTransformer:
        with self.report.loading("loading transformer") as progress:
            options = (self.device, self.dtype, progress, self.placement, self.mesh.weights)
            return load_transformer(self.model_dir, self.config, self.sp, *options)

    def _load_encoder(self) -> CogVideoXEncoder:
        with self.report.stage("loading encoder"):
            return lay_out(load_encoder(self.model_dir, self.vae_config, self.device, self.dtype), self.device)

    def load_decoder(self) -> CogVideoXDecoder:
        with self.report.stage("loading decoder"):
            return load_decoder(self.model_dir, self.vae_config, self.device, self.dtype)
