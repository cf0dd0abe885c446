"""CogVideoX in the benchmarks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.forks import narrowed
from benchmarks.step_models import STEM, Case, Size, latent_size, write
from benchmarks.true_size import Hollow, bf16
from cogvideox_xdit import demo
from cogvideox_xdit.config import TransformerConfig, VAEConfig, transformer_config, transformer_json, vae_json
from cogvideox_xdit.transformer import CogVideoXTransformer, pack, unpack
from cogvideox_xdit.vae import CogVideoXDecoder, CogVideoXEncoder
from cogvideox_xdit.weights import load_transformer, rename_table
from common.parallel.usp import SequenceParallel
from common.registry import forks as registry
from common.registry.forks import Model
from common.video.decode import VideoDecoder
from common.weights.load import on_meta


def step(model: Model, heads: int, depth: int, words: int) -> Reduced:
    """For `benchmarks/step.py`. ValueError for a model that it does not measure."""
    if model.config.image_channels:
        raise ValueError(f"{model.name}: a step is measured for text to video models only")
    return Reduced(model.config, heads, depth)


class Reduced:
    """A published checkpoint's, text to video."""

    def __init__(self, config: TransformerConfig, heads: int, depth: int) -> None:
        self.config: TransformerConfig = replace(config, heads=heads, layers=depth, sample_height=200, sample_width=200)

    def write(self, folder: Path) -> None:
        write(folder, CogVideoXTransformer(self.config), rename_table(self.config), transformer_json(self.config))

    def ours(self, folder: Path, sp: SequenceParallel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        config = transformer_config(json.loads((folder / "transformer" / "config.json").read_text()))
        return load_transformer(folder, config, sp, device, dtype)

    def theirs(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import CogVideoXTransformer3DModel

        return CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).eval()

    def case(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
        # A number of columns that peers can divide over ranks.
        return ReducedCase(self.config, latent_size(tokens, 1.5, self.config.patch, 4), device, dtype)


class ReducedCase:
    def __init__(self, config: TransformerConfig, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.size, self.dtype, self.device = config, size, dtype, device
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, config.out_channels, *size, generator=generator).to(device)
        self.text = torch.randn(2, config.text_length, config.text_dim, generator=generator).to(device)
        self.t = torch.full((1,), 499, device=device)
        self.image: Tensor | None = None
        if config.image_channels:
            self.image = torch.randn(1, config.image_channels, *size, generator=generator).to(device)
        self.rope = self._their_rope() if config.rotary else None

    def _their_rope(self) -> Any:
        """Made once for a generation there too."""
        from diffusers import CogVideoXPipeline

        raw = transformer_json(self.config)
        config = SimpleNamespace(**{name: raw.get(name) for name in (*raw, "patch_size_t")})
        pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
        frames, rows, columns = self.size
        make = CogVideoXPipeline._prepare_rotary_positional_embeddings
        return make(pipe, rows * 8, columns * 8, frames, self.device)  # type: ignore[arg-type]

    def pack(self, latents: Tensor) -> Tensor:
        return pack(latents, self.config.patch)

    def unpack(self, tokens: Tensor) -> Tensor:
        return unpack(tokens, self.size, self.config.patch)

    def prepare(self, model: nn.Module) -> list[Any]:
        assert isinstance(model, CogVideoXTransformer)
        return [model.prepare(self.text[i : i + 1], self.size, self.image) for i in range(2)]

    def forward(self, model: nn.Module, x: Tensor, cond: Any) -> Tensor:
        return model(x, self.t, cond)

    def their_step(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        z = self.latents if self.image is None else torch.cat((self.latents, self.image), dim=1)
        x = z.transpose(1, 2).to(self.dtype).expand(2, -1, -1, -1, -1)
        text, t = self.text.to(self.dtype), self.t.expand(2)
        given = {"image_rotary_emb": self.rope, "return_dict": False} | self.their_extras()
        good, bad = model(x, text, t, **given)[0].transpose(1, 2).chunk(2)
        return good, bad

    def their_extras(self) -> dict[str, Any]:
        return {}


def inputs(model: Model, size: registry.Size) -> dict[str, Any]:
    """A grey picture, for models that start from one."""
    if not model.config.image_channels:
        return {}
    import numpy as np

    return {"image": np.full((size.height, size.width, 3), 128, dtype=np.uint8)}


def true_size(model: Model) -> Hollow:
    """A folder of the true sizes, in the diffusers layout."""
    assert model.demo is not None
    config: TransformerConfig = model.config
    transformer = bf16(on_meta(CogVideoXTransformer, config))
    pipeline = "CogVideoXImageToVideoPipeline" if config.image_channels else "CogVideoXPipeline"
    index = demo.model_index(pipeline, "CogVideoXTransformer3DModel")
    return folder_of(model, transformer, rename_table(config), transformer_json(config), model.demo.name, index)


def folder_of(
    model: Model, transformer: dict[str, Tensor], rename: Any, described: dict[str, Any], kind: str, index: Any
) -> Hollow:
    """With the autoencoder and the scheduler of a published kind."""
    vae = VAEConfig(**demo.scaling(kind))
    parts = bf16(on_meta(CogVideoXEncoder, vae), "encoder.") | bf16(on_meta(CogVideoXDecoder, vae), "decoder.")
    return Hollow(
        weights={
            f"transformer/{STEM}.safetensors": (transformer, rename),
            f"vae/{STEM}.safetensors": (parts, None),
        },
        jsons={
            "transformer/config.json": described,
            "vae/config.json": vae_json(vae),
            "scheduler/scheduler_config.json": demo.scheduler_json(kind),
        },
        index=index,
        text_tokens=model.config.text_length,
    )


def decoder(narrow: int) -> VideoDecoder:
    """For `benchmarks/decode.py`, with channels divided by `narrow`."""
    vae = VAEConfig()
    return CogVideoXDecoder(replace(vae, channels=narrowed(vae.channels, narrow)))


def their_decoder(narrow: int) -> Any:
    """Diffusers' of the same sizes."""
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(block_out_channels=narrowed(VAEConfig().channels, narrow))
