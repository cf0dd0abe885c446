"""What a clip shows, read from its pixels by plain image analysis: no network, nothing trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.demo.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, mask

_UNIT_AREA = {shape: float(mask(shape, 12.0, torch.tensor([32.0]), torch.tensor([32.0])).sum()) for shape in SHAPES}


@dataclass(frozen=True)
class Reading:
    """Attributes read from a clip; None where nothing could be made out."""

    shape: str | None
    colour: str | None
    direction: str | None
    size: str | None
    background: str | None
    travel: float = 0.0
    """Pixels between the centres of the first and the last frames."""


def _nearest(colour: Tensor, table: dict[str, tuple[int, int, int]]) -> str:
    names = list(table)
    distances = (torch.tensor([table[n] for n in names]).float() - colour).norm(dim=1)
    return names[int(distances.argmin())]


def read(frames: Tensor) -> Reading:
    """Read uint8 frames (T, H, W, 3)."""
    video = frames.float()
    border = torch.cat([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], dim=1)
    background = border.flatten(0, 1).median(dim=0).values
    ground = _nearest(background, BACKGROUNDS)
    distance = (video - background).norm(dim=-1)
    peak = distance.flatten().quantile(0.99)
    cover = distance > 0.5 * peak
    plain = (border.flatten(0, 1) - background).norm(dim=1).median() < 40
    if not plain or peak < 40 or cover.sum() < 10 * len(frames):
        return Reading(None, None, None, None, ground)
    core = distance > 0.8 * peak
    colour = _nearest(video[core].median(dim=0).values, COLOURS)
    centres = [_centre(c) for c in cover]
    direction, travel = _direction([c for c in centres if c is not None])
    shape, radius = _shape(cover, centres)
    small, big = SIZES.values()
    size = None if radius is None else ("small" if radius < (small + big) / 2 else "big")
    return Reading(shape, colour, direction, size, ground, travel)


def _centre(cover: Tensor) -> tuple[float, float] | None:
    ys, xs = cover.nonzero(as_tuple=True)
    if len(xs) < 10:
        return None
    return float(xs.float().mean() + 0.5), float(ys.float().mean() + 0.5)


def _direction(centres: list[tuple[float, float]]) -> tuple[str | None, float]:
    if len(centres) < 4:
        return None, 0.0
    points = torch.tensor(centres)
    third = max(len(points) // 3, 1)
    step = points[-third:].mean(0) - points[:third].mean(0)
    travel = float(step.norm())
    if travel < 2.5:
        return None, travel
    scores = {name: float(step @ torch.tensor(d)) for name, d in DIRECTIONS.items()}
    best = max(scores, key=lambda name: scores[name])
    return (best if scores[best] > 0.85 * travel else None), travel


def _shape(cover: Tensor, centres: list[tuple[float, float] | None]) -> tuple[str | None, float | None]:
    """The template that overlaps most with the mask, each drawn at the mask's centroid and area."""
    found = [(c, xy) for c, xy in zip(cover, centres, strict=True) if xy is not None]
    if not found:
        return None, None
    area = torch.stack([c for c, _ in found]).float().sum((1, 2)).median()
    overlap = {}
    for shape in SHAPES:
        radius = float(12.0 * (area / _UNIT_AREA[shape]) ** 0.5)
        cx, cy = torch.tensor([xy for _, xy in found]).T
        # The triangle's area is not centred on its drawing point.
        drawn = mask(shape, radius, cx, cy, cover.shape[-1]) > 0.5
        shift = _centre(mask(shape, radius, torch.tensor([32.0]), torch.tensor([32.0]))[0] > 0.5)
        if shift is not None:
            cx, cy = cx - (shift[0] - 32), cy - (shift[1] - 32)
            drawn = mask(shape, radius, cx, cy, cover.shape[-1]) > 0.5
        masks = torch.stack([c for c, _ in found])
        overlap[shape] = float((drawn & masks).sum() / (drawn | masks).sum())
    best = max(overlap, key=lambda name: overlap[name])
    if overlap[best] < 0.6:
        return None, None
    return best, float(12.0 * (area / _UNIT_AREA[best]) ** 0.5)
