"""Demo checkpoints: small models of the published kinds, loaded by the same code as the real ones.

One was trained and comes with the package; the others have random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.run.demo import CAPTIONS, fill, made_once, red_circle, write_json, write_part, write_text_encoder
from common.system.files import cache_home
from common.text.t5 import UMT5
from common.weights.load import save
from wan_xdit.checkpoint import DEMO_KINDS, RULES, TRAINED
from wan_xdit.clip import ImageConfig, ImageEncoder
from wan_xdit.clip import rename_table as clip_table
from wan_xdit.config import TransformerConfig, VAEConfig, transformer_json, vae_json
from wan_xdit.transformer import WanTransformer
from wan_xdit.vae import WanDecoder, WanEncoder
from wan_xdit.weights import decoder_table, encoder_table, rename_table

SEED = 20250225
_REVISION = 2
"""Goes up when what `random_checkpoint` writes changes, so that nobody's cache holds the old one."""
SHIPPED = Path(__file__).parent / "demo_data"
IMAGE = "image.png"
"""In the folder of a demo that starts from a picture."""
_VAE = VAEConfig(width=8, decoder_width=8, latent_channels=4, multiples=(1, 1, 2, 2), depth=1)
VAES = {
    "2.1": replace(_VAE, mean=(0.0,) * 4, std=(1.0,) * 4),
    "2.2": replace(_VAE, latent_channels=6, fold=2, shortcuts=True, mean=(0.0,) * 6, std=(1.0,) * 6),
}
IMAGE_ENCODER = ImageConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
)
TRAINED_VAE = VAEConfig(
    width=24,
    decoder_width=32,
    latent_channels=12,
    multiples=(1, 1, 1),
    depth=1,
    temporal=(True, True),
    fold=2,
    shortcuts=True,
    mean=(0.0,) * 12,
    std=(1.0,) * 12,
)
"""The trained demo's: 2.2's kind, 8 x 8 pixels and 4 frames to a latent; training makes its latents white."""


def demo_vae(kind: str) -> VAEConfig:
    """The small autoencoder of a kind."""
    return VAES["2.2" if kind.startswith("ti2v") else "2.1"]


def demo_config(kind: str) -> TransformerConfig:
    """Four heads of 16 in two layers. ValueError for an unknown kind."""
    if kind not in DEMO_KINDS:
        raise ValueError(f"no demo called {kind!r}; wan-xdit has {', '.join((TRAINED, *DEMO_KINDS))}")
    vae = demo_vae(kind)
    channels = vae.latent_channels
    beside = channels + vae.time if kind.startswith("i2v") else 0
    return TransformerConfig(
        width=64,
        heads=4,
        layers=2,
        ffn=128,
        in_channels=channels + beside,
        out_channels=channels,
        text_dim=64,
        text_length=64,
        time_width=32,
        image_width=IMAGE_ENCODER.hidden_size if kind.startswith("i2v-14b") else None,
    )


def trained_config() -> TransformerConfig:
    """The trained demo's: TI2V-5B's kind, four heads of 32 in four layers."""
    channels = TRAINED_VAE.latent_channels
    return TransformerConfig(
        width=128,
        heads=4,
        layers=4,
        ffn=512,
        in_channels=channels,
        out_channels=channels,
        text_dim=64,
        text_length=48,
        time_width=64,
    )


def is_random(folder: Path) -> bool:
    """Whether this demo checkpoint's pictures are noise, those of random weights."""
    return folder != SHIPPED


def demo_checkpoint(kind: str = DEMO_KINDS[0], cache_dir: str | Path | None = None) -> Path:
    """The folder of a demo checkpoint: the trained one, which the package has, or random weights of a published kind.

    Random ones are made at first use, whole or not at all, under `cache_dir` (the user's cache). Raises ValueError when
    that cannot be written or when there is no demo of that name.
    """
    if kind == TRAINED:
        return SHIPPED
    config, vae = demo_config(kind), demo_vae(kind)
    target = cache_home(cache_dir) / f"wan-demo-{kind}-{_REVISION}"

    def make(folder: Path) -> None:
        random_checkpoint(folder, kind, config, vae)
        if config.image_channels:
            red_circle((64, 96)).save(folder / IMAGE)

    return made_once(target, make)


def random_checkpoint(
    folder: Path, kind: str, config: TransformerConfig, vae: VAEConfig, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write random weights and an untrained UMT5 with a vocabulary into `folder`."""
    count = 2 if kind.endswith("a14b") else 1
    experts = [WanTransformer(config) for _ in range(count)]
    encoder, decoder = WanEncoder(vae), WanDecoder(vae)
    for i, part in enumerate((*experts, encoder, decoder)):
        fill(part, SEED + i)
    write_checkpoint(folder, kind, experts, vae, encoder, decoder, dtype)
    if config.image_width:
        write_image_encoder(folder / "image_encoder", IMAGE_ENCODER, dtype)
    write_text_encoder(folder, CAPTIONS, SEED + count + 2, config.text_length, UMT5, d_model=config.text_dim)


def write_checkpoint(
    folder: Path,
    kind: str,
    experts: Sequence[WanTransformer],
    vae: VAEConfig,
    encoder: nn.Module,
    decoder: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Everything but the text encoder, in the diffusers layout."""
    for i, model in enumerate(experts):
        name = "transformer" if i == 0 else f"transformer_{i + 1}"
        table = rename_table(model.config, "diffusers")
        write_part(folder / name, transformer_json(model.config), model.state_dict(), table, dtype)
    write_vae(folder / "vae", vae, encoder, decoder, dtype)
    shift = RULES[kind].shift
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json(shift))
    write_json(folder / "model_index.json", model_index(kind, len(experts)))


def scheduler_json(shift: float) -> dict[str, Any]:
    """A scheduler_config.json as the published folders have it."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }


def model_index(kind: str, experts: int) -> dict[str, Any]:
    """A model_index.json of a kind."""
    second = ["diffusers", "WanTransformer3DModel"] if experts > 1 else [None, None]
    return {
        "_class_name": "WanImageToVideoPipeline" if kind.startswith("i2v") else "WanPipeline",
        "boundary_ratio": RULES[kind].boundary,
        "expand_timesteps": kind.startswith("ti2v"),
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": second,
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def write_image_encoder(folder: Path, config: ImageConfig, dtype: torch.dtype) -> None:
    """A tower of random weights."""
    module = ImageEncoder(config)
    fill(module, SEED - 1)
    save_image_encoder(folder, module, dtype)


def save_image_encoder(folder: Path, module: ImageEncoder, dtype: torch.dtype) -> None:
    """An image_encoder/ folder, without the last block, which nobody reads."""
    raw = {"model_type": "clip_vision_model", "hidden_act": "gelu"} | asdict(module.config)
    write_json(folder / "config.json", raw)
    state = {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
    save(state, folder / "model.safetensors", clip_table(module.config))


def write_vae(folder: Path, config: VAEConfig, encoder: nn.Module, decoder: nn.Module, dtype: torch.dtype) -> None:
    state: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    halves = ((encoder, "encoder", encoder_table), (decoder, "decoder", decoder_table))
    for module, half, names in halves:
        state |= {f"{half}.{name}": tensor for name, tensor in module.state_dict().items()}
        table |= {f"{half}.{ours}": theirs for ours, theirs in names(config, "diffusers").items()}
    write_part(folder, vae_json(config), state, table, dtype)
