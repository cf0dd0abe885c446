"""Where a video token is: rope angles and sine-cosine tables of this rank's tokens.

Tables are made per axis on the CPU, so that every device sees the same numbers, and picked per token on the device:
a rank pays for its own tokens only. Token order: frame, row, column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvideox_xdit.config import TransformerConfig
from common.parallel.usp import SequenceParallel

Grid = tuple[int, int, int]  # frames, rows and columns of tokens


def axes_of_tokens(grid: Grid, sp: SequenceParallel, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column (each (n,), int64) of this rank's tokens."""
    frames, rows, columns = grid
    index = sp.shard(torch.arange(frames * rows * columns, device=device), dim=0)
    return index // (rows * columns), index // columns % rows, index % columns


def sine_cosine(config: TransformerConfig, grid: Grid, sp: SequenceParallel, device: torch.device) -> Tensor:
    """The fixed table of 2b for this rank's tokens: (n, W) fp64.

    Per token: W/4 numbers for time, 3W/8 for the column, 3W/8 for the row (the column before the row), each half
    sines, half cosines. Rows and columns are counted in units of `space_scale`.
    """
    time, space = config.width // 4, config.width * 3 // 8
    t, h, w = axes_of_tokens(grid, sp, device)
    table_t = _sinusoid(torch.arange(grid[0]) / config.time_scale, time)
    table_h = _sinusoid(torch.arange(grid[1]) / config.space_scale, space)
    table_w = _sinusoid(torch.arange(grid[2]) / config.space_scale, space)
    return torch.cat((table_t.to(device)[t], table_w.to(device)[w], table_h.to(device)[h]), dim=-1)


def _sinusoid(position: Tensor, width: int) -> Tensor:
    frequency = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = torch.outer(position.double(), frequency)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def rope(config: TransformerConfig, grid: Grid, sp: SequenceParallel, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of this rank's video tokens, each (n, head_dim / 2) fp32: time D/8, row 3D/16, column 3D/16."""
    cos, sin = [], []
    widths = (config.head_dim // 4, config.head_dim * 3 // 8, config.head_dim * 3 // 8)
    for position, indices, width in zip(_rope_axes(config, grid), axes_of_tokens(grid, sp, device), widths):
        angle = torch.outer(position, 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
        cos.append(angle.cos().to(device)[indices])
        sin.append(angle.sin().to(device)[indices])
    return torch.cat(cos, dim=-1), torch.cat(sin, dim=-1)


def _rope_axes(config: TransformerConfig, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Positions along each axis, fp32. 1.5 counts; 1.0 lays the grid into the one it was trained on."""
    frames, rows, columns = grid
    if config.patch_time is not None:
        return tuple(torch.arange(n, dtype=torch.float32) for n in grid)  # type: ignore[return-value]
    (top, left), (bottom, right) = crop_region(
        rows, columns, config.sample_height // config.patch_size, config.sample_width // config.patch_size
    )
    # The end is scaled as a whole, offset included; that is the reference's rule, not an even spacing.
    h = torch.linspace(top, bottom * (rows - 1) / rows, rows, dtype=torch.float32)
    w = torch.linspace(left, right * (columns - 1) / columns, columns, dtype=torch.float32)
    t = torch.linspace(0, frames * (frames - 1) / frames, frames, dtype=torch.float32)
    return t, h, w


def crop_region(rows: int, columns: int, base_rows: int, base_columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left), (bottom, right) of a grid scaled, keeping its shape, into the middle of the base grid."""
    if rows / columns > base_rows / base_columns:
        height, width = base_rows, round(base_rows / rows * columns)
    else:
        height, width = round(base_columns / columns * rows), base_columns
    top, left = round((base_rows - height) / 2), round((base_columns - width) / 2)
    return (top, left), (top + height, left + width)
