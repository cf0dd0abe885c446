"""Demo checkpoints: a small model of each published kind, random weights, loaded by the same code as the real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cogvideox_xdit.config import CONFIGS, TRAINED, TransformerConfig, VAEConfig, transformer_json, vae_json
from cogvideox_xdit.transformer import CogVideoXTransformer
from cogvideox_xdit.vae import CogVideoXDecoder, CogVideoXEncoder
from cogvideox_xdit.weights import rename_table
from common.run.demo import CAPTIONS, fill, made_once, red_circle, write_json, write_part, write_text_encoder
from common.system.files import cache_home

SEED = 20240806
_REVISION = 2
"""Goes up when what `random_checkpoint` writes changes, so that nobody's cache holds the old one."""

SHIPPED = Path(__file__).parent / "demo_data"
IMAGE = "image.png"
"""In the folder of a demo that starts from a picture."""
VAE = VAEConfig(channels=(16, 16, 32, 32), layers=1, groups=8, sample_height=64, sample_width=96)
TRAINED_VAE = VAEConfig(
    channels=(16, 24, 32, 48),
    latent_channels=12,
    layers=1,
    groups=8,
    sample_height=64,
    sample_width=64,
    scaling_factor=1.0,
)
"""The trained demo's; its scaling_factor is measured."""


def demo_config(kind: str) -> TransformerConfig:
    """Four heads of 16 in four layers, for videos of 64 x 96 pixels and 17 frames. ValueError for an unknown kind."""
    if kind not in CONFIGS:
        raise ValueError(f"no demo called {kind!r}; cogvideox-xdit has {', '.join((TRAINED, *CONFIGS))}")
    sizes: dict[str, Any] = {"heads": 4, "head_dim": 16, "layers": 4, "text_dim": 64, "text_length": 64, "time_dim": 32}
    sample: dict[str, Any] = {"sample_height": 8, "sample_width": 12, "sample_frames": 17}
    return replace(CONFIGS[kind], **sizes, **sample, ofs_dim=32 if CONFIGS[kind].ofs_dim else None)


def trained_config() -> TransformerConfig:
    """The trained demo's: 2b's kind, six heads of 32 in four layers, for videos of 64 x 64 pixels and 17 frames."""
    sizes: dict[str, Any] = {"heads": 6, "head_dim": 32, "layers": 4, "time_dim": 64, "text_dim": 64, "text_length": 32}
    channels = TRAINED_VAE.latent_channels
    sample: dict[str, Any] = {"sample_height": 8, "sample_width": 8, "sample_frames": 17}
    return replace(CONFIGS["2b"], **sizes, **sample, in_channels=channels, out_channels=channels)


def demo_vae(kind: str) -> VAEConfig:
    """The small autoencoder with the published scaling of `kind`."""
    return replace(VAE, **scaling(kind))


def scaling(kind: str) -> dict[str, Any]:
    """The published VAE's `scaling_factor` and `inverted` of a kind."""
    return {"scaling_factor": 1.15258426 if kind == "2b" else 0.7, "inverted": kind.startswith("1.5")}


def scheduler_json(kind: str, name: str = "CogVideoXDDIMScheduler") -> dict[str, Any]:
    """The published scheduler_config.json of a kind."""
    return {
        "_class_name": name,
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "snr_shift_scale": 3.0 if kind == "2b" else 1.0,
        "timestep_spacing": "trailing",
    }


def is_random(folder: Path) -> bool:
    """Whether this demo checkpoint's pictures are noise, those of random weights."""
    return folder != SHIPPED


def demo_checkpoint(kind: str = "2b", cache_dir: str | Path | None = None) -> Path:
    """The folder of a demo checkpoint: the trained one, which the package has, or random weights of a published kind.

    Random ones are made at first use, whole or not at all, under `cache_dir` (the user's cache). Raises ValueError when
    that cannot be written or when there is no demo of that name.
    """
    if kind == TRAINED:
        return SHIPPED
    config, vae = demo_config(kind), demo_vae(kind)
    target = cache_home(cache_dir) / f"cogvideox-demo-{kind}-{_REVISION}"

    def make(folder: Path) -> None:
        random_checkpoint(folder, kind, config, vae)
        if config.image_channels:
            red_circle(config.official_size).save(folder / IMAGE)

    return made_once(target, make)


def random_checkpoint(
    folder: Path, kind: str, config: TransformerConfig, vae: VAEConfig, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write random weights, an untrained T5 with a vocabulary, and the kind's scheduler into `folder`."""
    parts = CogVideoXTransformer(config), CogVideoXEncoder(vae), CogVideoXDecoder(vae)
    for i, part in enumerate(parts):
        fill(part, SEED + i)
    transformer, encoder, decoder = parts
    write_checkpoint(folder, kind, transformer, vae, encoder, decoder, dtype)
    write_text_encoder(folder, CAPTIONS, SEED + len(parts), config.text_length, d_model=config.text_dim)


def write_checkpoint(
    folder: Path,
    kind: str,
    transformer: CogVideoXTransformer,
    vae: VAEConfig,
    encoder: nn.Module,
    decoder: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Everything but the text encoder, with the published scheduler of `kind`."""
    config = transformer.config
    pipeline = "CogVideoXImageToVideoPipeline" if config.image_channels else "CogVideoXPipeline"
    write_part(folder / "transformer", transformer_json(config), transformer.state_dict(), rename_table(config), dtype)
    write_vae(folder / "vae", vae, encoder, decoder, dtype)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json(kind))
    write_json(folder / "model_index.json", model_index(pipeline, "CogVideoXTransformer3DModel"))


def model_index(pipeline: str, transformer: str, scheduler: str = "CogVideoXDDIMScheduler") -> dict[str, Any]:
    return {
        "_class_name": pipeline,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", transformer],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def write_vae(folder: Path, config: VAEConfig, encoder: nn.Module, decoder: nn.Module, dtype: torch.dtype) -> None:
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    write_part(folder, vae_json(config), state, None, dtype)
