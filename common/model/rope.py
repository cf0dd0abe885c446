"""Rotary positions (Su et al. 2021, arXiv 2104.09864): pairs of channels turn by angles that say where a token is."""

from __future__ import annotations

import torch
from torch import Tensor

from common.model.elementwise import at_least_fp32, fuses
from common.parallel.attention import empty_heads, join_heads


def rotation(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """What `rotate_pairs` takes for angles of these cosines and sines (n, heads or 1, D / 2): (2, n, heads or 1, D / 2,
    2), what the first and the second channel of each pair add to both.

    dtype: of what will be turned. For half precision the table is in fp16 on a GPU: where every head has angles of its
    own it is as large as the queries, and read for each of them. Its rounding is an eighth of bf16's.
    """
    half = dtype != at_least_fp32(dtype) and fuses(cos)
    # Filled in rather than stacked: these are among the largest tensors that a generation keeps.
    table = cos.new_empty(2, *cos.shape, 2, dtype=torch.float16 if half else cos.dtype)
    table[0, ..., 0], table[0, ..., 1] = cos, sin
    table[1, ..., 0], table[1, ..., 1] = -sin, cos
    return table


def rotate_pairs(x: Tensor, rope: Tensor, rest: Tensor | None = None) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of channels of x (B, n, H, D) by the angles of a `rotation`.

    rest: (B, m, H, D), tokens without a position, which follow x in the result (B, n + m, H, D). In memory the result
    is as attention reads it. In the dtype of x, computed in at least fp32.
    """
    pairs = x.unflatten(-1, (-1, 2))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        turned = _turned(pairs, rope).flatten(-2).to(x.dtype)
        return turned if rest is None else join_heads(turned, rest)
    n, m = x.shape[1], 0 if rest is None else rest.shape[1]
    out = empty_heads(x, n + m)
    _turn_into(out[:, :n].unflatten(-1, (-1, 2)), pairs, rope)
    if rest is not None:
        out[:, n:] = rest
    return out


def _turned(pairs: Tensor, rope: Tensor) -> Tensor:
    compute_dtype = at_least_fp32(pairs.dtype)
    pairs = pairs.to(compute_dtype)
    if torch.compiler.is_compiling():
        # A compiler fuses real arithmetic with its surroundings and leaves complex numbers alone.
        return pairs[..., :1] * rope[0] + pairs[..., 1:] * rope[1]
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope[0].to(compute_dtype)))


def _turn_into(out: Tensor, pairs: Tensor, rope: Tensor) -> None:
    """Turned pairs (..., D / 2, 2) into `out`, with as little memory read and written as possible."""
    compute_dtype = at_least_fp32(pairs.dtype)
    if pairs.dtype == compute_dtype:
        angles = torch.view_as_complex(rope[0])
        torch.mul(torch.view_as_complex(pairs), angles, out=torch.view_as_complex(out))
    elif fuses(pairs):
        # There are no complex numbers in half precision; wide ones would move as much again as all this does.
        torch.mul(pairs[..., :1], rope[0], out=out)
        out.addcmul_(pairs[..., 1:], rope[1])
    else:
        turned = torch.view_as_complex(pairs.to(compute_dtype)).mul_(torch.view_as_complex(rope[0]))
        out.copy_(torch.view_as_real(turned))
