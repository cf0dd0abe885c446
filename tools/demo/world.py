"""The synthetic world: clips of one moving shape on a plain background, and captions in plain words.

Everything follows from a seed. A scene is a handful of attributes; its caption names some of them.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 220, 50),
    "green": (40, 170, 70),
    "cyan": (60, 210, 220),
    "blue": (40, 70, 220),
    "purple": (140, 50, 180),
    "pink": (245, 130, 190),
}
BACKGROUNDS = {"black": (16, 16, 16), "gray": (90, 90, 96), "white": (240, 240, 240)}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SIZES = {"small": 8.0, "big": 12.5}
"""Radius in pixels of the circle; the other shapes cover about the same area."""
SPEEDS = {"slowly": 0.9, "quickly": 1.8}
"""Pixels per frame."""

_VERBS = ("moves", "slides", "glides", "drifts")
_WAYS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
_PREPOSITIONS = ("on", "over", "across", "against")


@dataclass(frozen=True)
class Scene:
    """One clip's attributes."""

    shape: str
    colour: str
    direction: str
    size: str
    speed: str
    background: str
    x: float
    y: float
    """`x`, `y`: where the shape's centre is in the middle of the clip, in pixels."""

    @property
    def attributes(self) -> tuple[str, ...]:
        return (self.shape, self.colour, self.direction, self.size, self.speed, self.background)


FIELDS = ("shape", "colour", "direction", "size", "speed", "background")
VALUES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "direction": tuple(DIRECTIONS),
    "size": tuple(SIZES),
    "speed": tuple(SPEEDS),
    "background": tuple(BACKGROUNDS),
}


def held_out(attributes: tuple[str, ...]) -> bool:
    """One combination of attributes in ten is never trained on; evaluation draws from these only."""
    return hashlib.sha256(" ".join(attributes).encode()).digest()[0] % 10 == 0


def draw(rng: random.Random, frames: int, test: bool = False) -> Scene:
    """A scene whose shape stays inside the picture for `frames` frames."""
    while True:
        picked = tuple(rng.choice(VALUES[field]) for field in FIELDS)
        if held_out(picked) == test:
            break
    _, _, direction, size, speed, _ = picked
    margin = SIZES[size] * 1.25 + 1
    travel = SPEEDS[speed] * (frames - 1) / 2
    centre = []
    for step in DIRECTIONS[direction]:
        room = max(SIZE / 2 - margin - abs(step) * travel, 0)
        centre.append(SIZE / 2 + rng.uniform(-room, room))
    return Scene(*picked, *centre)


def caption(scene: Scene, rng: random.Random) -> str:
    """Plain words for a scene. Shape, colour and direction are always named, the rest mostly."""
    size = f"{scene.size} " if rng.random() < 0.8 else ""
    way = rng.choice(_WAYS[scene.direction])
    speed = f" {scene.speed}" if rng.random() < 0.8 else ""
    verb = rng.choice(_VERBS)
    motion = f"{verb}{speed} {way}" if rng.random() < 0.5 else f"{verb} {way}{speed}"
    where = ""
    if rng.random() < 0.8:
        where = f" {rng.choice(_PREPOSITIONS)} a {scene.background} background"
    article = "An" if not size and scene.colour[0] in "aeiou" else "A"
    text = f"{article} {size}{scene.colour} {scene.shape} {motion}{where}."
    return text if rng.random() < 0.8 else text.lower().rstrip(".")


def _distance(shape: str, x: Tensor, y: Tensor, r: float) -> Tensor:
    """Signed distance to the outline, negative inside; exact near the edges, which is where it counts."""
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.886 * r
    if shape == "triangle":
        slope = math.sqrt(0.75)
        sides = torch.maximum(slope * x, -slope * x) - 0.5 * y
        return torch.maximum(sides, y) - 0.68 * r
    long, short = 1.15 * r, 0.42 * r
    upright = torch.maximum(x.abs() - short, y.abs() - long)
    lying = torch.maximum(x.abs() - long, y.abs() - short)
    return torch.minimum(upright, lying)


def mask(shape: str, radius: float, cx: Tensor, cy: Tensor, size: int = SIZE) -> Tensor:
    """How much of each pixel the shape covers: (T, size, size) in [0, 1] for T centres."""
    grid = torch.arange(size) + 0.5
    x = grid[None, None, :] - cx[:, None, None]
    y = grid[None, :, None] - cy[:, None, None]
    return (0.5 - _distance(shape, x, y, radius)).clamp(0, 1)


def render(scene: Scene, frames: int) -> Tensor:
    """The clip as uint8 (frames, 64, 64, 3)."""
    step = torch.arange(frames) - (frames - 1) / 2
    dx, dy = (SPEEDS[scene.speed] * d for d in DIRECTIONS[scene.direction])
    cover = mask(scene.shape, SIZES[scene.size], scene.x + dx * step, scene.y + dy * step)
    fore = torch.tensor(COLOURS[scene.colour], dtype=torch.float32)
    back = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32)
    return (back + (fore - back) * cover[..., None]).round().to(torch.uint8)


def dataset(seed: int, count: int, frames: int, test: bool = False) -> list[tuple[Scene, str]]:
    """`count` scenes with captions, from one seed."""
    rng = random.Random(f"{seed}:{test}")
    scenes = [draw(rng, frames, test) for _ in range(count)]
    return [(scene, caption(scene, rng)) for scene in scenes]
