"""Linear layers of blocks, followed by what a GPU does with the product before it is written, or how it is laid out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.elementwise import fuses, gelu, in_place
from common.parallel.attention import join_heads
from common.weights.float8 import Float8Linear


def heads_of(
    linear: nn.Module,
    x: Tensor,
    count: int,
    heads: slice,
    parts: str = "qkv",
    apart: bool = True,
    rest: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`parts` of q, k and v, (B, n, h, D) each, from a layer whose outputs are q, then k, then v of `count` heads.

    heads: of which. apart: whether each has memory of its own where all are asked for and that is worth reading x
    again: a GPU's norms copy what is not contiguous. rest: (B, m, h, D), tokens that follow x in v, the last of
    `parts`: (B, n + m, h, D), in memory as attention reads it.
    """
    each = heads.stop - heads.start
    if parts == "qkv" and each == count and not (apart and fuses(x) and isinstance(linear, nn.Linear)):
        *projections, last = linear(x).chunk(3, dim=-1)
    else:
        assert isinstance(linear, nn.Linear | Float8Linear)
        width = linear.weight.shape[0] // (3 * count)
        at = ["qkv".index(part) * count for part in parts]
        spans = [slice((a + heads.start) * width, (a + heads.stop) * width) for a in at]
        if rest is not None and in_place() and fuses(x) and isinstance(linear, nn.Linear) and len(x) == 1:
            projections = [part.unflatten(-1, (each, -1)) for part in _rows(linear, x, spans[:-1])]
            return *projections, _product_before(linear, x, spans[-1], rest)
        *projections, last = _rows(linear, x, spans)
    *projections, last = (part.unflatten(-1, (each, -1)) for part in (*projections, last))
    return *projections, last if rest is None else join_heads(last, rest)


def _rows(linear: nn.Linear | Float8Linear, x: Tensor, spans: Sequence[slice]) -> Sequence[Tensor]:
    """Some of the output channels."""
    if isinstance(linear, Float8Linear):
        return linear.rows(x, spans)
    biases = [None if linear.bias is None else linear.bias[span] for span in spans]
    return [F.linear(x, linear.weight[span], bias) for span, bias in zip(spans, biases)]


def _product_before(linear: nn.Linear, x: Tensor, span: slice, rest: Tensor) -> Tensor:
    """Some of the output channels of x (1, n, W), written where `rest` (1, m, h, D) follows: (1, n + m, h, D)."""
    n, weight = x.shape[1], linear.weight[span].t()
    out = rest.new_empty(1, n + rest.shape[1], *rest.shape[2:])
    rows = out[0, :n].flatten(1)
    if linear.bias is None:
        torch.mm(x[0], weight, out=rows)
    else:
        torch.addmm(linear.bias[span], x[0], weight, out=rows)
    out[:, n:] = rest
    return out


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


def add_product(x: Tensor, linear: nn.Linear, inputs: Tensor, factor: float) -> Tensor:
    """x + factor * linear(inputs) of a layer without bias; x (B, n, W), which may be overwritten. Rounded once."""
    if not in_place():
        return torch.add(x, linear(inputs), alpha=factor)
    for rows, of_rows in zip(x, inputs):
        torch.addmm(rows, of_rows, linear.weight.t(), alpha=factor, out=rows)
    return x


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """The tanh form of gelu of a linear layer of x (B, n, D)."""
    if x.is_cuda and in_place() and isinstance(linear, nn.Linear) and linear.bias is not None and x.numel():
        # On a GPU this is the tanh form (on the CPU the other one), applied to the product before it is written.
        out = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
        return out.unflatten(0, x.shape[:-1])
    return gelu(linear(x))
