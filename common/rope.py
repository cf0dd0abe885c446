"""Rotary positions (Su et al. 2021, arXiv 2104.09864): pairs of channels turn by angles that say where a token is."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of channels of x (..., D) by angles; rope (..., D / 2, 2): cosines and sines.

    rope broadcasts. Computed in at least fp32, returned in the dtype of x. Without gradients x may be overwritten, so
    it has to be the caller's alone.
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # A compiler fuses real arithmetic with its surroundings and leaves complex numbers alone.
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    elif torch.is_grad_enabled():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    else:
        # One complex product reads and writes less than half of what sines and cosines apart do.
        turned = torch.view_as_real(torch.view_as_complex(pairs).mul_(torch.view_as_complex(rope)))
    return turned.flatten(-2).to(x.dtype)
