"""Mochi in the benchmarks."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.forks import narrowed
from benchmarks.step_models import STEM, Case, Size, latent_size, write
from benchmarks.true_size import Hollow, bf16, hollow
from common.parallel.usp import SequenceParallel
from common.registry.forks import Model
from common.video.decode import VideoDecoder
from common.weights.load import on_meta, save
from mochi_xdit import demo, weights
from mochi_xdit.config import MochiConfig, MochiVAEConfig
from mochi_xdit.transformer import MochiTransformer, pack, unpack
from mochi_xdit.vae import MochiDecoder, MochiEncoder
from mochi_xdit.weights import load_transformer, transformer_rename

TEXT_DIM = 512
"""Of 4096: the pool over the text runs once a forward in diffusers, and with few blocks it would weigh too much."""
GB = 10**9


def step(model: Model, heads: int, depth: int, words: int) -> Reduced:
    """For `benchmarks/step.py`. ValueError for a number of heads that cannot be."""
    if heads % 3:
        raise ValueError(f"{heads} heads: Mochi's feed-forward is 8/3 of its width; give a multiple of 3")
    return Reduced(heads, depth, words)


class Reduced:
    """words: text tokens of 256 that are no padding; the negative prompt is empty."""

    def __init__(self, heads: int, depth: int, words: int) -> None:
        self.words, width = words, 128 * heads
        sizes = {"hidden_y": width // 2, "mlp_x": 8 * width // 3, "mlp_y": 4 * width // 3, "text_dim": TEXT_DIM}
        self.config = MochiConfig(depth=depth, heads=heads, **sizes)

    def write(self, folder: Path) -> None:
        config = self.config
        numbers = {"num_layers": config.depth, "num_attention_heads": config.heads, "text_embed_dim": config.text_dim}
        numbers |= {"pooled_projection_dim": config.hidden_y, "_class_name": "MochiTransformer3DModel"}
        write(folder, MochiTransformer(config), transformer_rename(config), numbers)

    def ours(self, folder: Path, sp: SequenceParallel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_transformer(folder, sp, device, dtype)

    def theirs(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import MochiTransformer3DModel

        return MochiTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).eval()

    def case(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
        return MochiCase(latent_size(tokens, 53 / 30, (1, 2, 2), 1), self.words, device, dtype)


class MochiCase:
    def __init__(self, size: Size, words: int, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, 12, *size, generator=generator).to(device)
        self.text = torch.randn(1, 256, TEXT_DIM, generator=generator).to(device)
        self.mask = (torch.arange(256) < words)[None].to(device)
        self.t = torch.full((1,), 250.0, device=device)

    def pack(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def unpack(self, tokens: Tensor) -> Tensor:
        return unpack(tokens, self.size)

    def prepare(self, model: nn.Module) -> list[Any]:
        assert isinstance(model, MochiTransformer)
        return [model.prepare(self.size, self.text, self.mask), model.prepare(self.size)]

    def forward(self, model: nn.Module, x: Tensor, cond: Any) -> Tensor:
        return model(x, self.t, cond)

    def their_step(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        # Its attention cannot take prompts of two lengths at once, so the branches go one by one.
        x, text = self.latents.to(self.dtype), self.text.to(self.dtype)
        masks = (self.mask, torch.zeros_like(self.mask))
        good, bad = (model(x, text, self.t, mask, return_dict=False)[0] for mask in masks)
        return good, bad


def true_size(model: Model) -> Hollow:
    """A folder of the true sizes, in the diffusers layout."""
    config: MochiConfig = model.config
    halves = {
        "encoder.": (on_meta(MochiEncoder, config.vae), weights.encoder_rename(config.vae)),
        "decoder.": (on_meta(MochiDecoder, config.vae), weights.decoder_rename(config.vae)),
    }
    vae = {name: t for prefix, (part, _) in halves.items() for name, t in bf16(part, prefix).items()}
    table = {prefix + ours: theirs for prefix, (_, rename) in halves.items() for ours, theirs in rename.items()}
    transformer = bf16(on_meta(MochiTransformer, config), keep_fp32=weights.KEEP_FP32)
    return Hollow(
        weights={
            f"transformer/{STEM}.safetensors": (transformer, transformer_rename(config)),
            f"vae/{STEM}.safetensors": (vae, table),
        },
        jsons={
            "transformer/config.json": demo._transformer_json(config),
            "vae/config.json": demo._vae_json(config.vae),
            "scheduler/scheduler_config.json": demo.SCHEDULER,
        },
        index=demo.INDEX,
        text_tokens=config.text_tokens,
    )


def decoder(narrow: int) -> VideoDecoder:
    """For `benchmarks/decode.py`, with channels divided by `narrow`."""
    vae = MochiVAEConfig()
    return MochiDecoder(replace(vae, decoder_channels=narrowed(vae.decoder_channels, narrow)))


def their_decoder(narrow: int) -> Any:
    """Diffusers' of the same sizes."""
    from diffusers import AutoencoderKLMochi

    widths = narrowed(MochiVAEConfig().decoder_channels, narrow)
    return AutoencoderKLMochi(decoder_block_out_channels=widths)


def write_layouts(folder: Path, gigabytes: float) -> tuple[int, int]:
    """For `benchmarks/load_memory.py`: both file layouts of a transformer of that size; returns bytes and blocks."""
    numbers = {"num_attention_heads": 8, "pooled_projection_dim": 512, "text_embed_dim": 1024}
    blocks = on_meta(MochiTransformer, MochiConfig.from_diffusers(numbers)).blocks
    numbers["num_layers"] = 1 + int(gigabytes * GB / (4 * sum(p.numel() for p in blocks[0].parameters())))
    config = MochiConfig.from_diffusers(numbers)
    model = MochiTransformer(config)
    for layout, table in (("native", None), ("diffusers", transformer_rename(config))):
        target = folder / layout / ("transformer" if table else "")
        target.mkdir(parents=True)
        name = f"{STEM}.safetensors" if table else "dit.safetensors"
        save(model.state_dict(), target / name, table)
        with open(target / name, "rb+") as file:
            os.fsync(file.fileno())  # pages that wait for the disk would count as private
    (folder / "diffusers" / "transformer" / "config.json").write_text(json.dumps(numbers))
    return sum(p.numel() for p in model.parameters()) * 4, config.depth


def write_blocks(folder: Path, depth: int) -> MochiTransformer:
    """For `benchmarks/placement.py`: true widths, few blocks, zeros in a sparse file; returns the module on meta."""
    meta = on_meta(MochiTransformer, MochiConfig(depth=depth))
    state = {name: tensor.to(torch.bfloat16) for name, tensor in meta.state_dict().items()}
    hollow(folder / "dit.safetensors", state)
    return meta


def predict(model: MochiTransformer) -> None:
    """One prediction for 160 tokens."""
    cond = model.prepare((2, 16, 20), torch.zeros(1, 8, model.config.text_dim))
    model(torch.zeros(1, 160, model.config.patch_dim), torch.tensor([500.0]), cond)
