"""The demo checkpoint: a small ConsisID with random weights and small face models, loaded by the same code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

from cogvideox_xdit import demo as cogvideox
from cogvideox_xdit.config import VAEConfig
from common.demo import cache_home, fill, made_once
from consisid_xdit.config import PREVIEW, ConsisIDConfig, consisid_json
from consisid_xdit.face import IdentityFeatures, save_identity
from consisid_xdit.face_demo import write_face_models
from consisid_xdit.transformer import ConsisIDTransformer
from consisid_xdit.weights import rename_table

SEED = 20241126
_REVISION = 1
"""Goes up when what the demo writes changes, so that nobody's cache holds the old one."""
PORTRAIT = "portrait.png"
IDENTITY = "identity.safetensors"


def demo_config() -> ConsisIDConfig:
    """CogVideoX's small image model (four heads of 16, four layers, 64 x 96 pixels, 17 frames) with a small face."""
    numbers: dict[str, Any] = vars(cogvideox.demo_config("5b-i2v"))
    face: dict[str, Any] = {"cross_head_dim": 16, "cross_heads": 2, "id_dim": 512 + 24, "vit_dim": 32, "depth": 10}
    face |= {"extractor_head_dim": 8, "extractor_heads": 4, "queries": 8, "face_dim": 42}
    return replace(PREVIEW, **numbers, **face)


def demo_checkpoint(name: str = "default", cache_dir: str | Path | None = None) -> Path:
    """The folder of the demo checkpoint, made at first use, whole or not at all, under `cache_dir` (the user's cache).

    Raises ValueError when it cannot be written or when there is no demo of that name.
    """
    if name != "default":
        raise ValueError(f"no demo called {name!r}; consisid-xdit has 'default'")

    def make(folder: Path) -> None:
        config = demo_config()
        random_checkpoint(folder, config, cogvideox.demo_vae("5b-i2v"))
        write_face_models(folder, config, SEED)
        portrait().save(folder / PORTRAIT)
        save_identity(folder / IDENTITY, made_up_identity(config))

    return made_once(cache_home(cache_dir) / f"consisid-demo-{_REVISION}", make)


def random_checkpoint(
    folder: Path, config: ConsisIDConfig, vae: VAEConfig, dtype: torch.dtype = torch.bfloat16
) -> None:
    """CogVideoX's random image checkpoint with its transformer replaced by one that has a face."""
    cogvideox.random_checkpoint(folder, "5b-i2v", config, vae, dtype)
    model = ConsisIDTransformer(config)
    fill(model, SEED)
    cogvideox.write_part(folder / "transformer", consisid_json(config), model.state_dict(), rename_table(config), dtype)
    index = cogvideox.model_index("ConsisIDPipeline", "ConsisIDTransformer3DModel")
    cogvideox.write_json(folder / "model_index.json", index)


def made_up_identity(config: ConsisIDConfig) -> IdentityFeatures:
    """Random features and the whole portrait, for machines without the extra `face`."""
    generator = torch.Generator().manual_seed(SEED)
    hidden = tuple(torch.randn(1, 17, config.vit_dim, generator=generator) for _ in range(config.scales))
    image = torch.from_numpy(np.array(portrait(512)))
    return IdentityFeatures(torch.randn(1, config.id_dim, generator=generator), hidden, image, torch.zeros(5, 2))


def portrait(side: int = 320) -> PIL.Image.Image:
    """A drawn face: what the demo takes for a photograph."""
    image = PIL.Image.new("RGB", (side, side), (40, 60, 90))
    draw = PIL.ImageDraw.Draw(image)

    def spot(x: float, y: float, rx: float, ry: float, colour: tuple[int, int, int]) -> None:
        draw.ellipse([side * (x - rx), side * (y - ry), side * (x + rx), side * (y + ry)], fill=colour)

    spot(0.5, 0.5, 0.27, 0.35, (224, 172, 140))
    for x in (0.39, 0.61):
        spot(x, 0.43, 0.045, 0.03, (250, 250, 250))
        spot(x, 0.43, 0.018, 0.02, (50, 30, 20))
    spot(0.5, 0.54, 0.025, 0.05, (205, 150, 120))
    spot(0.5, 0.67, 0.1, 0.03, (170, 60, 60))
    return image
