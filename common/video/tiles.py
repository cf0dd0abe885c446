"""Cutting a picture into overlapping tiles at absolute positions, and blending them back."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """One tile's stretch along an axis: [start, stop), of which `fade_in` and `fade_out` overlap its neighbours."""

    start: int
    stop: int
    fade_in: int = 0
    fade_out: int = 0

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def scaled(self, factor: int) -> Span:
        return Span(self.start * factor, self.stop * factor, self.fade_in * factor, self.fade_out * factor)

    def weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(stop - start,): 1 inside, linear in the overlaps; the weights of all tiles add up to 1 everywhere."""
        weight = torch.ones(self.stop - self.start, dtype=dtype, device=device)
        for fade, side in ((self.fade_in, slice(None, self.fade_in)), (self.fade_out, slice(-self.fade_out, None))):
            if fade:
                ramp = (torch.arange(fade, dtype=dtype, device=device) + 0.5) / fade
                weight[side] = ramp if side.start is None else 1 - ramp
        return weight


def cut(length: int, limit: int, overlap: int) -> tuple[Span, ...]:
    """The fewest spans of at most `limit` that cover `length`, neighbours sharing about `overlap`.

    The axis is divided evenly at absolute positions and each part reaches half the overlap over its borders, so
    any length is covered exactly. The overlap is reduced to an even number and at most a third of the limit: never
    do more than two spans meet.
    """
    overlap = max(0, min(overlap, limit // 3)) // 2 * 2
    count = 1
    while max(span.stop - span.start for span in _divide(length, count, overlap)) > limit:
        count += 1
    return _divide(length, count, overlap)


def _divide(length: int, count: int, overlap: int) -> tuple[Span, ...]:
    borders = [length * i // count for i in range(count + 1)]
    spans = []
    for left, right in itertools.pairwise(borders):
        fade_in = overlap if left > 0 else 0
        fade_out = overlap if right < length else 0
        spans.append(Span(left - fade_in // 2, right + fade_out // 2, fade_in, fade_out))
    return tuple(spans)


@dataclass(frozen=True)
class Tile:
    """A rectangle of the picture, in latent pixels."""

    rows: Span
    columns: Span

    def of(self, z: Tensor) -> Tensor:
        """This tile of (..., h, w)."""
        return z[..., self.rows.slice, self.columns.slice]

    def size(self, scale: int = 1) -> tuple[int, int]:
        """Height and width, times `scale`."""
        return (self.rows.stop - self.rows.start) * scale, (self.columns.stop - self.columns.start) * scale

    def blend(self, canvas: Tensor, piece: Tensor, scale: int) -> None:
        """Add this tile's pixels (..., h * scale, w * scale) to the canvas (..., H * scale, W * scale)."""
        rows, columns = self.rows.scaled(scale), self.columns.scaled(scale)
        piece = piece.to(device=canvas.device, dtype=canvas.dtype)
        vertical = rows.weight(canvas.dtype, canvas.device)[:, None]
        piece = piece * vertical * columns.weight(canvas.dtype, canvas.device)
        canvas[..., rows.slice, columns.slice] += piece


def tiles(height: int, width: int, limit: tuple[int, int] | None, overlap: int) -> tuple[Tile, ...]:
    """The tiles of a latent picture, row by row; one tile when there is no limit. All sizes in latent pixels."""
    tall, wide = limit or (height, width)
    rows, columns = cut(height, tall, overlap), cut(width, wide, overlap)
    return tuple(Tile(row, column) for row, column in itertools.product(rows, columns))
