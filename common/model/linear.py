"""Linear layers of blocks, followed by what a GPU does with the product before it is written, or how it is laid out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.elementwise import fuses, gelu, in_place
from common.weights.float8 import Float8Linear


def in_parts(linear: nn.Module, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The output channels of a linear layer in so many equal parts, (..., D) each.

    Each has memory of its own where that is worth reading x again: a GPU's norms copy what is not contiguous.
    """
    if not (isinstance(linear, nn.Linear) and fuses(x)):
        return linear(x).chunk(parts, dim=-1)
    biases = (None,) * parts if linear.bias is None else linear.bias.chunk(parts)
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(linear.weight.chunk(parts), biases))


def heads_of(
    linear: nn.Module, x: Tensor, count: int, heads: slice, parts: str = "qkv", apart: bool = True
) -> tuple[Tensor, ...]:
    """`parts` of q, k and v, (B, n, h, D) each, from a layer whose outputs are q, then k, then v of `count` heads.

    heads: of which. apart: whether they may be products of their own where all are asked for; see `in_parts`.
    """
    if parts == "qkv" and heads.stop - heads.start == count:
        made: Sequence[Tensor] = in_parts(linear, x, 3) if apart else linear(x).chunk(3, dim=-1)
    else:
        assert isinstance(linear, nn.Linear | Float8Linear)
        width = linear.weight.shape[0] // (3 * count)
        at = ["qkv".index(part) * count for part in parts]
        made = _rows(linear, x, [slice((a + heads.start) * width, (a + heads.stop) * width) for a in at])
    return tuple(part.unflatten(-1, (heads.stop - heads.start, -1)) for part in made)


def _rows(linear: nn.Linear | Float8Linear, x: Tensor, spans: Sequence[slice]) -> Sequence[Tensor]:
    """Some of the output channels."""
    if isinstance(linear, Float8Linear):
        return linear.rows(x, spans)
    biases = [None if linear.bias is None else linear.bias[span] for span in spans]
    return [F.linear(x, linear.weight[span], bias) for span, bias in zip(spans, biases)]


def add_heads(linear: nn.Module, out: Tensor, count: int, heads: slice, so_far: Tensor | None) -> Tensor:
    """A layer of all `count` heads' channels, the part that some heads (B, n, h, D) have in it: (B, n, W).

    so_far: of other heads, to which it is added, and which may be overwritten. The first part has the bias.
    """
    x = out.flatten(2)
    if heads.stop - heads.start == count:
        return linear(x)
    assert isinstance(linear, nn.Linear | Float8Linear)
    width = linear.weight.shape[1] // count
    span = slice(heads.start * width, heads.stop * width)
    if isinstance(linear, Float8Linear):
        return linear.columns(x, span, bias=so_far is None) if so_far is None else so_far + linear.columns(x, span)
    weight = linear.weight[:, span]
    if so_far is None:
        return F.linear(x, weight, linear.bias)
    rows = so_far.flatten(0, 1)
    # Added before the product is rounded.
    total = torch.addmm(rows, x.flatten(0, 1), weight.t(), out=rows if in_place() else None)
    return total.view(so_far.shape)


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """The tanh form of gelu of a linear layer of x (B, n, D)."""
    if x.is_cuda and in_place() and isinstance(linear, nn.Linear) and linear.bias is not None and x.numel():
        # On a GPU this is the tanh form (on the CPU the other one), applied to the product before it is written.
        out = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
        return out.unflatten(0, x.shape[:-1])
    return gelu(linear(x))
