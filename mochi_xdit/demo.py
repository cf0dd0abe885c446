"""The demo checkpoint: a small Mochi in a diffusers folder, loaded by the same code as the official one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.run.demo import fill, made_once, write_json, write_part, write_text_encoder
from common.system.files import cache_home
from mochi_xdit.config import MochiConfig, MochiVAEConfig
from mochi_xdit.transformer import MochiTransformer
from mochi_xdit.vae import MochiDecoder, MochiEncoder
from mochi_xdit.weights import decoder_rename, encoder_rename, transformer_rename

SHIPPED = Path(__file__).parent / "demo_data"
SEED = 20241022
_REVISION = 3
"""Goes up when what `random_checkpoint` writes changes, so that nobody's cache holds the old one."""

VAE = MochiVAEConfig(
    encoder_channels=(16, 32, 96, 96),
    decoder_channels=(16, 32, 96, 96),
    layers=(0, 0, 1, 0, 1),
    attention=(False, False, False, False, True),
)
"""Residual blocks only where a cell is at least 4 pixels wide: those near the pixels are most of a decoder's work."""

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "invert_sigmas": True,
    "num_train_timesteps": 1000,
    "shift": 1.0,
}
INDEX = {
    "_class_name": "MochiPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "MochiTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLMochi"],
}
"""scheduler_config.json and model_index.json of the published folder."""


def demo_config(vae: MochiVAEConfig = VAE) -> MochiConfig:
    """Four layers of four heads of 32: 1.5 million parameters in the transformer."""
    sizes: dict[str, Any] = {"depth": 4, "heads": 4, "head_dim": 32, "hidden_y": 64, "text_dim": 64, "text_tokens": 64}
    # The diffusers layout does not store these two: they follow from the widths.
    return MochiConfig(**sizes, mlp_x=4 * 128 * 2 // 3, mlp_y=4 * 64 * 2 // 3, vae=vae)


def demo_checkpoint(name: str = "default", cache_dir: str | Path | None = None) -> Path:
    """The folder of the demo checkpoint: the trained one where the package has it, else random weights.

    The random one is made at first use, whole or not at all, under `cache_dir` (default: the user's cache). Raises
    ValueError when it cannot be written or when there is no demo of that name.
    """
    if name != "default":
        raise ValueError(f"no demo called {name!r}; mochi-xdit has 'default'")
    if (SHIPPED / "model_index.json").is_file():
        return SHIPPED
    return made_once(cache_home(cache_dir) / f"mochi-demo-{_REVISION}", random_checkpoint)


def is_random(folder: Path) -> bool:
    """Whether this demo checkpoint's pictures are noise, those of random weights."""
    return folder != SHIPPED


def random_checkpoint(folder: Path, config: MochiConfig | None = None, seed: int = SEED) -> None:
    """Write random weights of `config` (default: the demo's) and an untrained T5 with a vocabulary into `folder`."""
    config = config or demo_config()
    transformer = MochiTransformer(config)
    fill(transformer, seed)
    with torch.no_grad():
        frequencies = torch.randn(transformer.pos_frequencies.shape, generator=torch.Generator().manual_seed(seed))
        transformer.pos_frequencies.copy_(frequencies * 0.1)
    encoder, decoder = MochiEncoder(config.vae), MochiDecoder(config.vae)
    fill(encoder, seed + 1)
    fill(decoder, seed + 2)
    write_checkpoint(folder, config, transformer.state_dict(), encoder, decoder)
    write_text_encoder(folder, _captions(), seed + 3, config.text_tokens, d_model=config.text_dim)


def write_checkpoint(
    folder: Path, config: MochiConfig, transformer: Mapping[str, Tensor], encoder: nn.Module, decoder: nn.Module
) -> None:
    """Everything but the text encoder as a diffusers folder: bf16 tensors, `pos_frequencies` in fp32."""
    exact = {"pos_frequencies": torch.float32}
    state = {name: p.to(exact.get(name, torch.bfloat16)) for name, p in transformer.items()}
    write_part(folder / "transformer", _transformer_json(config), state, transformer_rename(config))
    vae = {f"encoder.{n}": p.to(torch.bfloat16) for n, p in encoder.state_dict().items()}
    vae |= {f"decoder.{n}": p.to(torch.bfloat16) for n, p in decoder.state_dict().items()}
    table = {f"encoder.{ours}": theirs for ours, theirs in encoder_rename(config.vae).items()}
    table |= {f"decoder.{ours}": theirs for ours, theirs in decoder_rename(config.vae).items()}
    write_part(folder / "vae", _vae_json(config.vae), vae, table)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", INDEX)


def _transformer_json(config: MochiConfig) -> dict[str, object]:
    return {
        "_class_name": "MochiTransformer3DModel",
        "patch_size": config.patch,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.depth,
        "pooled_projection_dim": config.hidden_y,
        "in_channels": config.channels,
        "qk_norm": "rms_norm",
        "text_embed_dim": config.text_dim,
        "time_embed_dim": config.time_dim,
        "activation_fn": "swiglu",
        "max_sequence_length": config.text_tokens,
    }


def _vae_json(config: MochiVAEConfig) -> dict[str, object]:
    return {
        "_class_name": "AutoencoderKLMochi",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "encoder_block_out_channels": config.encoder_channels,
        "decoder_block_out_channels": config.decoder_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers,
        "act_fn": "silu",
        "temporal_expansions": config.temporal,
        "spatial_expansions": config.spatial,
        "add_attention_block": config.attention,
        "latents_mean": config.mean,
        "latents_std": config.std,
        "scaling_factor": config.scaling_factor,
    }


def _captions() -> list[str]:
    colours = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
    ways = ("to the left", "to the right", "up", "down", "upwards slowly", "downwards quickly")
    return [
        f"A {size} {colour} {shape} moves {way} on a {ground} background."
        for size in ("small", "big")
        for colour in colours
        for shape in ("circle", "square", "triangle", "cross")
        for way in ways
        for ground in ("black", "gray", "white")
    ]
