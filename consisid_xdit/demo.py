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
from common.run.demo import fill, made_once, write_json, write_part
from common.system.files import cache_home
from consisid_xdit.config import PREVIEW, TRAINED, ConsisIDConfig, consisid_json
from consisid_xdit.face import IdentityFeatures, save_identity
from consisid_xdit.face_demo import write_face_models
from consisid_xdit.transformer import ConsisIDTransformer
from consisid_xdit.weights import rename_table

SEED = 20241126
_REVISION = 2
"""Goes up when what the demo writes changes, so that nobody's cache holds the old one."""
SHIPPED = Path(__file__).parent / "demo_data"
PORTRAIT = "portrait.png"
IDENTITY = "identity.safetensors"
SHOWN = {"red_circle.safetensors": ("circle", "red"), "blue_cross.safetensors": ("cross", "blue")}
"""Identity files beside the trained checkpoint, and what their pictures show."""


def demo_config() -> ConsisIDConfig:
    """CogVideoX's small image model (four heads of 16, four layers, 64 x 96 pixels, 17 frames) with a small face."""
    numbers: dict[str, Any] = vars(cogvideox.demo_config("5b-i2v"))
    face: dict[str, Any] = {"cross_head_dim": 16, "cross_heads": 2, "id_dim": 512 + 24, "vit_dim": 32, "depth": 10}
    face |= {"extractor_head_dim": 8, "extractor_heads": 4, "queries": 8, "face_dim": 42}
    return replace(PREVIEW, **numbers, **face)


def trained_config() -> ConsisIDConfig:
    """The trained demo's: five heads of 32 in four layers, 64 x 64 pixels, 17 frames, eight face tokens."""
    channels = cogvideox.TRAINED_VAE.latent_channels
    numbers: dict[str, Any] = {"heads": 5, "head_dim": 32, "layers": 4, "time_dim": 64, "text_dim": 64}
    numbers |= {"text_length": 32, "in_channels": 2 * channels, "out_channels": channels}
    numbers |= {"sample_height": 8, "sample_width": 8, "sample_frames": 17}
    face: dict[str, Any] = {"cross_head_dim": 32, "cross_heads": 4, "id_dim": 96, "vit_dim": 64, "depth": 5}
    face |= {"extractor_head_dim": 16, "extractor_heads": 4, "queries": 8, "face_dim": 106}
    return replace(PREVIEW, **numbers, **face)


OUTLINE = 4.0
"""Weight of the outline beside the colours in `shape_identity`: colours alone hardly differ from shape to shape."""


def shape_identity(picture: torch.Tensor, config: ConsisIDConfig) -> IdentityFeatures:
    """Features of a picture (64, 64, 3) uint8 that stand for a face's: fixed random projections of colours and outline.

    The identity vector sees 8 x 8 means; the hidden states are 16 places with 4 x 4 means each and a code of the place.
    The outline is each pixel's distance from the corner's colour, relative to the largest.
    """
    generator = torch.Generator().manual_seed(SEED)
    colours = (picture.float() / 127.5 - 1).movedim(-1, 0)[None]
    distance = (colours - colours[..., :1, :1]).norm(dim=1, keepdim=True)
    outline = OUTLINE * distance / distance.amax().clamp_min(1e-6)

    def project(features: list[torch.Tensor], width: int) -> torch.Tensor:
        parts = [x @ torch.randn(x.shape[-1], width, generator=generator) / x.shape[-1] ** 0.5 for x in features]
        return torch.stack(parts).sum(0)

    whole = [torch.nn.functional.avg_pool2d(x, 8).flatten(1) for x in (colours, outline)]  # (1, 64 c)
    places = [_places(x) for x in (colours, outline)]
    vector = project(whole, config.id_dim)
    codes = [torch.randn(1, 16, config.vit_dim, generator=generator) for _ in range(config.scales)]
    hidden = tuple(project(places, config.vit_dim) + code for code in codes)
    return IdentityFeatures(vector, hidden, picture, torch.zeros(5, 2))


def _places(x: torch.Tensor) -> torch.Tensor:
    """(1, c, 64, 64) -> (1, 16, 16 c): 4 x 4 places of 4 x 4 means each."""
    means = torch.nn.functional.avg_pool2d(x, 4).unfold(2, 4, 4).unfold(3, 4, 4)
    return means.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def is_random(folder: Path) -> bool:
    """Whether this demo checkpoint's pictures are noise, those of random weights."""
    return folder != SHIPPED


def demo_checkpoint(name: str = "face", cache_dir: str | Path | None = None) -> Path:
    """The folder of a demo checkpoint: `shapes`, trained, which the package has, or `face`, with small face models.

    The latter has random weights and is made at first use, whole or not at all, under `cache_dir` (the user's cache).
    Raises ValueError when it cannot be written or when there is no demo of that name.
    """
    if name == TRAINED:
        return SHIPPED
    if name != "face":
        raise ValueError(f"no demo called {name!r}; consisid-xdit has {TRAINED} and face")

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
    write_part(folder / "transformer", consisid_json(config), model.state_dict(), rename_table(config), dtype)
    index = cogvideox.model_index("ConsisIDPipeline", "ConsisIDTransformer3DModel")
    write_json(folder / "model_index.json", index)


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
