"""Wan in the benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step_models import STEM, Case, Size, latent_size, write
from common.parallel.usp import SequenceParallel
from common.registry.forks import Model
from common.weights.load import load, on_meta, open_checkpoint
from wan_xdit.config import TransformerConfig
from wan_xdit.transformer import WanTransformer, pack, unpack
from wan_xdit.weights import rename_table

TEXT_LENGTH = 64
"""Of 512: with few blocks the keys and values of the text, made once a generation, are all that differs."""


def step(model: Model, heads: int, depth: int, words: int) -> Reduced:
    """For `benchmarks/step.py` and `benchmarks/links.py`. ValueError for a model that they do not measure."""
    config: TransformerConfig = model.config
    if config.image_channels:
        raise ValueError(f"{model.name}: a step is measured for text to video models only")
    sizes = {"heads": heads, "width": config.head_width * heads, "ffn": config.ffn * heads // config.heads}
    return Reduced(replace(config, text_dim=512, text_length=TEXT_LENGTH, layers=depth, **sizes))


class Reduced:
    def __init__(self, config: TransformerConfig) -> None:
        self.config = config

    def write(self, folder: Path) -> None:
        config = self.config
        heads = {"num_attention_heads": config.heads, "attention_head_dim": config.head_width}
        sizes = {"num_layers": config.layers, "ffn_dim": config.ffn, "text_dim": config.text_dim}
        write(folder, WanTransformer(config), rename_table(config, "diffusers"), heads | sizes)

    def ours(self, folder: Path, sp: SequenceParallel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        checkpoint = open_checkpoint(folder / "transformer" / f"{STEM}.safetensors")
        model = on_meta(WanTransformer, self.config, sp)
        return load(model, checkpoint, rename_table(self.config, "diffusers"), device, dtype)

    def theirs(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).eval()

    def case(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
        return ReducedCase(self.config, latent_size(tokens, 832 / 480, self.config.patch, 4), device, dtype)


class ReducedCase:
    def __init__(self, config: TransformerConfig, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.size, self.dtype = config, size, dtype
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, config.out_channels, *size, generator=generator).to(device)
        self.text = torch.randn(2, config.text_length, config.text_dim, generator=generator).to(device)
        self.t = torch.full((1,), 500.0, device=device)

    def pack(self, latents: Tensor) -> Tensor:
        return pack(latents, self.config.patch)

    def unpack(self, tokens: Tensor) -> Tensor:
        return unpack(tokens, self.size, self.config.patch)

    def prepare(self, model: nn.Module) -> list[Any]:
        assert isinstance(model, WanTransformer)
        return [model.prepare(self.text[i : i + 1], self.size) for i in range(2)]

    def forward(self, model: nn.Module, x: Tensor, cond: Any) -> Tensor:
        return model(x, self.t, cond)

    def their_step(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        x, text = self.latents.to(self.dtype).expand(2, -1, -1, -1, -1), self.text.to(self.dtype)
        good, bad = model(x, self.t.expand(2), text, return_dict=False)[0].chunk(2)
        return good, bad
