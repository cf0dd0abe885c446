"""Rows of the height: the part of every frame that one rank computes where several share a chunk.

Most of an autoencoder looks at one place of the picture and does not know that it has only a part of it. Three things
look further: a convolution at the rows next to its own (`Rows.borders`), a group norm at the statistics of whole frames
(`group_norm`), attention at all places of a frame (`Rows.everyone`). `CausalStream` carries a chunk's `Rows` to them.

The ranks that share a chunk go through its layers together. What they send each other goes in batches over the group of
the whole axis: on NCCL a batch is one launch on the group's stream, in which no order of its messages can block.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.compiler.disable, which would import the compiler here
from torch.nn import functional as F

from common.parallel.mesh import Axis

# Gloo tells messages apart by it: the frames that go to rank 0 have none.
TAG = 1


class Buffers:
    """Memory that messages are sent from and arrive in: one for each kind of message and a whole video.

    Fresh tensors would not be reused on a GPU: the allocator gives out memory that a message has used only after the
    message is known to be done, and the host queues a whole chunk ahead. Reuse is safe there since NCCL's stream first
    waits for all that the computing stream had queued when the message was posted, the last use of what was received
    before among it; and waiting for a message makes the computing stream, not the host, wait, so that a buffer is
    filled again only after its send is done.
    """

    def __init__(self) -> None:
        self.memory: dict[Hashable, Tensor] = {}

    def take(self, kind: Hashable, size: Sequence[int], like: Tensor) -> Tensor:
        """Contiguous memory of this size, the same for every message of a kind; dtype and device of `like`."""
        buffer, count = self.memory.get(kind), math.prod(size)
        if buffer is None or buffer.numel() < count or (buffer.dtype, buffer.device) != (like.dtype, like.device):
            self.memory[kind] = buffer = like.new_empty(count)
        return buffer[:count].view(torch.Size(size))


class Messages:
    """What the ranks of an axis that share chunks send each other.

    Without an axis nothing is sent, and what arrives is whatever the memory holds: for counting and trying out. What
    has arrived holds until the next message of its kind.
    """

    def __init__(self, axis: Axis | None = None) -> None:
        self.axis, self.buffers = axis, Buffers()

    def meet(self, device: torch.device) -> None:
        """Collective over the axis: on NCCL the ranks connect, which a batch among some of them could not do."""
        if self.axis is not None:
            dist.all_reduce(torch.zeros(1, device=device), group=self.axis.group)

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> list[dist.Work]:
        """One batch of contiguous tensors to and from ranks of the axis; a tensor lives until its work was waited for.

        All ranks that share a chunk post their batches in one order. Nothing of no size is sent.
        """
        if self.axis is None:
            return []
        group = self.axis.group
        batch = [dist.P2POp(dist.isend, x, group=group, tag=TAG, group_peer=rank) for rank, x in sends if x.numel()]
        batch += [dist.P2POp(dist.irecv, x, group=group, tag=TAG, group_peer=rank) for rank, x in receives if x.numel()]
        return dist.batch_isend_irecv(batch) if batch else []


@dataclass(frozen=True)
class Borders:
    """The rows above and below a part, (..., count, W) each; None where the picture ends. On their way until `wait`."""

    above: Tensor | None = None
    below: Tensor | None = None
    works: tuple[dist.Work, ...] = ()

    def wait(self) -> Borders:
        """Makes the computing stream wait, not the host, where there is one."""
        for work in self.works:
            work.wait()
        return Borders(self.above, self.below)

    @property
    def rows(self) -> tuple[int, int]:
        """How many there are above and below."""
        return tuple(0 if side is None else side.shape[-2] for side in (self.above, self.below))  # type: ignore[return-value]

    def around(self, x: Tensor, frames: slice) -> Tensor:
        """These frames of x (B, C, T, h, W) with what is above and below, after `wait`."""
        sides = [side[:, :, frames] for side in (self.above, x, self.below) if side is not None]
        return sides[0] if len(sides) == 1 else torch.cat(sides, dim=-2)


class Rows:
    """One rank's part of the height of a chunk. The default is all of it.

    lengths: of the parts from top to bottom, in rows of the latents, none of them empty; wherever a model doubles or
    halves the rows, all parts keep these proportions. part: this rank's. ranks: of each part, in the axis of
    `messages`.
    """

    def __init__(
        self,
        lengths: Sequence[int] = (1,),
        part: int = 0,
        ranks: Sequence[int] | None = None,
        messages: Messages | None = None,
    ) -> None:
        self.lengths, self.part = tuple(lengths), part
        self.ranks = tuple(ranks) if ranks is not None else tuple(range(len(self.lengths)))
        self.messages = messages or Messages()

    @property
    def alone(self) -> bool:
        """Whether this is the whole height."""
        return len(self.lengths) == 1

    def others(self) -> list[int]:
        """The other parts."""
        return [part for part in range(len(self.lengths)) if part != self.part]

    def borders(self, x: Tensor, count: int = 1) -> Borders:
        """Post the exchange of `count` border rows of x (..., h, W) with the parts above and below.

        No part has fewer rows. What arrives holds until the next exchange.
        """
        if self.alone or count == 0:
            return Borders()
        sends, receives = [], []
        for side, part in (("above", self.part - 1), ("below", self.part + 1)):
            if 0 <= part < len(self.lengths):
                size = (*x.shape[:-2], count, x.shape[-1])
                mine = self.messages.buffers.take(f"to {side}", size, x)
                mine.copy_(x[..., :count, :] if side == "above" else x[..., x.shape[-2] - count :, :])
                sends.append((self.ranks[part], mine))
                receives.append((self.ranks[part], self.messages.buffers.take(f"from {side}", size, x)))
        works = self.messages.post(sends, receives)
        boxes = [box for _, box in receives]
        above = boxes.pop(0) if self.part > 0 else None
        return Borders(above, boxes.pop(0) if boxes else None, tuple(works))

    @_disable_dynamo  # compiled parts leave the exchanges as they are
    def everyone(self, x: Tensor, dim: int) -> list[Tensor]:
        """What every part has for x, from top to bottom; along `dim` their sizes are as their rows."""
        x, dim = x.contiguous(), dim % x.ndim
        boxes = []
        for part, length in enumerate(self.lengths):
            size = (*x.shape[:dim], x.shape[dim] * length // self.lengths[self.part], *x.shape[dim + 1 :])
            boxes.append(x if part == self.part else self.messages.buffers.take(("everyone", part), size, x))
        others = self.others()
        works = self.messages.post([(self.ranks[i], x) for i in others], [(self.ranks[i], boxes[i]) for i in others])
        for work in works:
            work.wait()
        return boxes

    @_disable_dynamo
    def merge(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (biased) variance over all parts from those over this one, each (N, G), fp32 or fp64."""
        own = torch.stack((mean, variance))
        every = self.messages.buffers.take("statistics", (len(self.lengths), *own.shape), own)
        every[self.part] = own
        others = [(self.ranks[i], i) for i in self.others()]
        works = self.messages.post(
            [(rank, every[self.part]) for rank, _ in others], [(rank, every[i]) for rank, i in others]
        )
        shares = self._shares(own)
        for work in works:
            work.wait()
        means, variances = every.unbind(1)
        whole = (shares * means).sum(0)
        return whole, (shares * (variances + (means - whole) ** 2)).sum(0)

    def _shares(self, like: Tensor) -> Tensor:
        """Of each part of the height, (parts, 1, 1); made on the device, since a copy would make the host wait."""
        total = sum(self.lengths)
        return torch.cat([like.new_full((1, 1, 1), length / total) for length in self.lengths])


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, rows: Rows) -> Tensor:
    """Group normalisation of x (N, C, ..., h, W) with the statistics of the whole height, in at least fp32."""
    if rows.alone:
        return F.group_norm(x, groups, weight, bias, eps)
    mean, variance = rows.merge(*_statistics(x.unflatten(1, (groups, -1))))
    rate = torch.rsqrt(variance + eps)[:, :, None]
    scale = (rate * weight.to(rate.dtype).view(groups, -1)).flatten(1)
    shift = bias.to(rate.dtype) - (mean[:, :, None] * scale.unflatten(1, (groups, -1))).flatten(1)
    scale, shift = (v.view(*v.shape, *(1,) * (x.ndim - 2)) for v in (scale, shift))
    if x.dtype == rate.dtype:
        return torch.addcmul(shift, x, scale)
    # Computed wide and rounded once, without a wide copy of x.
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x (N, G, ...) over all but the first two, in at least fp32."""
    dims = tuple(range(2, x.ndim))
    if x.dtype in (torch.float32, torch.float64):
        variance, mean = torch.var_mean(x, dims, correction=0)
        return mean, variance
    # Half precision is summed wide as it is read; its own rounding is far above what the difference of squares loses.
    count = math.prod(x.shape[2:])
    mean = x.sum(dims, dtype=torch.float32) / count
    squares = torch.linalg.vector_norm(x, 2, dims, dtype=torch.float32) ** 2 / count
    return mean, (squares - mean**2).clamp(min=0)


def doubled(x: Tensor, above: Tensor | None, below: Tensor | None) -> Tensor:
    """Pictures (N, C, h, W) with every row and column twice, and one more row on each side: (N, C, 2 h + 2, 2 W).

    above, below: the rows beside, (N, C, 1, W); None: zeros, as a convolution has where the picture ends.
    """
    n, channels, height, width = x.shape
    last = x.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    size = (n, channels, 2 * height + 2, 2 * width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=order)
    pairs = out.unflatten(3, (width, 2))
    pairs[:, :, 1:-1].unflatten(2, (height, 2)).copy_(x[:, :, :, None, :, None])
    for edge, row in ((pairs[:, :, :1], above), (pairs[:, :, -1:], below)):
        if row is None:
            edge.zero_()
        else:
            edge.copy_(row[..., None])
    return out
