"""The toy's numbers. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.registry.checks import Rules
from common.registry.forks import Latents, Size
from common.weights.schema import build, read_object


@dataclass(frozen=True)
class Config:
    """What config.json says of each of the two transformers."""

    layers: int = 2
    heads: int = 4
    width: int = 64
    channels: int = 4
    sound_channels: int = 8
    text_dim: int = 32
    text_tokens: int = 24


LATENTS = Latents(channels=4, patch=(1, 2, 2), frame_step=1)
FPS, RATE = 8, 8000
"""Frames and samples of sound a second."""


class ToyRules(Rules):
    """The toy is distilled: no scale makes a second branch of it."""

    def guided(self, scale: float) -> bool:
        return False


RULES = ToyRules(
    heads=4,
    width=64,
    height=64,
    num_frames=1,
    num_steps=4,
    cfg_scale=1.0,
    fps=FPS,
    frame_step=1,
    default_prompt="a bell",
)


@dataclass(frozen=True)
class Sound:
    """Where the tokens of the sound come from: five a frame of a video, none beside a picture."""

    def tokens(self, size: Size) -> tuple[int, int]:
        count = 0 if size.num_frames == 1 else 5 * size.num_frames
        return count, count


def read_config(folder: Path) -> Config:
    """CheckpointError for a folder that is none of the toy's."""
    path = folder / "transformer" / "config.json"
    names = ("layers", "heads", "width", "channels", "sound_channels", "text_dim", "text_tokens")
    return build(Config, {name: name for name in names}, read_object(path), str(path))


def read_rules(folder: Path) -> Rules:
    read_config(folder)
    return RULES
