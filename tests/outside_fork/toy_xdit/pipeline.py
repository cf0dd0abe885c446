"""The toy from prompt to frames and sound."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.registry.forks import Size
from common.registry.settings import DecodeOptions
from common.run.pipeline import Pipeline
from common.run.quantize import TransformerFiles
from common.video.latents import draw_noise
from common.weights.checkpoint import open_checkpoint
from common.weights.load import check, load, on_meta
from common.weights.placement import place
from toy_xdit.config import LATENTS, RULES, Sound, read_config
from toy_xdit.sampling import sample
from toy_xdit.text import LlamaFiles
from toy_xdit.transformer import ToyTransformer, pack, unpack
from toy_xdit.vae import SoundDecoder, ToyDecoder
from toy_xdit.weights import transformer_files


class ToyPipeline(Pipeline):
    def __init__(self, model_dir: str | Path, *where: Any, **options: Any) -> None:
        super().__init__(model_dir, *where, **options)
        self.config = read_config(self.model_dir)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str,
        height: int = RULES.height,
        width: int = RULES.width,
        num_frames: int = RULES.num_frames,
        num_steps: int = RULES.num_steps,
        seed: int = 0,
        decode: DecodeOptions | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Frames (T, H, W, 3) uint8 and samples (1, n), both on rank 0 alone; no samples beside a picture."""
        size, config, sp = Size(width, height, num_frames, num_steps, False), self.config, self.sp
        text, _ = self.encode_text({0: prompt}, config.text_tokens, use_mask=False)[0]
        tokens = pack(draw_noise((1, config.channels, *LATENTS.decoded(size)), seed))
        sound = draw_noise((1, Sound().tokens(size)[0], config.sound_channels), seed + 1)
        n, m, half = tokens.shape[1], sound.shape[1], num_steps // 2
        z, s = sp.shard(tokens).to(self.device), sp.shard(sound).to(self.device)
        for i, steps in enumerate((range(half), range(half, num_steps))):
            with self.stage_model(f"transformer {i + 1}", partial(self._transformer, i)) as model:
                cond = model.prepare(text, n, m)
                with self.report.stage("sampling", total=len(steps)) as step:
                    z, s = sample(model, z, s, cond, steps, num_steps, step)
        z, s = sp.gather(z, sp.lengths(n)), sp.gather(s, sp.lengths(m))
        frames = self.decode(unpack(z, LATENTS.sampled(size)), decode)
        return frames, self._samples(s) if m and self.mesh.is_main else None

    def text_files(self) -> LlamaFiles:
        return LlamaFiles(Path(self.runtime.text_encoder_dir or self.model_dir / "text_encoder"))

    def transformer_files(self) -> tuple[TransformerFiles, ...]:
        return transformer_files(self.model_dir, self.dtype)

    def check_vae(self, frames: bool) -> None:
        for name, part in (("vae", ToyDecoder), ("sound", SoundDecoder)):
            check(on_meta(part, self.config), open_checkpoint(self.model_dir / name / "model.safetensors"))

    def _transformer(self, index: int) -> ToyTransformer:
        files = self.transformer_files()[index]
        model, where = on_meta(ToyTransformer, self.config, self.sp), (self.placement, self.mesh.weights)
        with self.report.loading(f"loading transformer {index + 1}") as progress:
            return place(model, files.checkpoint, files.rename, self.device, self.dtype, (), *where, progress)

    def load_decoder(self) -> ToyDecoder:
        file = open_checkpoint(self.model_dir / "vae" / "model.safetensors")
        return load(on_meta(ToyDecoder, self.config), file, None, self.device, self.dtype)

    def _samples(self, sound: Tensor) -> Tensor:
        """On rank 0: there is little of it."""
        file = open_checkpoint(self.model_dir / "sound" / "model.safetensors")
        decoder = load(on_meta(SoundDecoder, self.config), file, None, self.device, torch.float32)
        return decoder(sound.float()).cpu()
