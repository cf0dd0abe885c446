"""Linear layers of blocks, followed by what a GPU does with the product before it is written, or how it is laid out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.elementwise import fuses, gelu, in_place


def in_parts(linear: nn.Module, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The output channels of a linear layer in so many equal parts, (..., D) each.

    Each has memory of its own where that is worth reading x again: a GPU's norms copy what is not contiguous.
    """
    if not (isinstance(linear, nn.Linear) and fuses(x)):
        return linear(x).chunk(parts, dim=-1)
    biases = (None,) * parts if linear.bias is None else linear.bias.chunk(parts)
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(linear.weight.chunk(parts), biases))


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """The tanh form of gelu of a linear layer of x (B, n, D)."""
    if x.is_cuda and in_place() and isinstance(linear, nn.Linear) and linear.bias is not None and x.numel():
        # On a GPU this is the tanh form (on the CPU the other one), applied to the product before it is written.
        out = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
        return out.unflatten(0, x.shape[:-1])
    return gelu(linear(x))
