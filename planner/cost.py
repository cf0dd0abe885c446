"""Exact FLOPs and bytes of this project's own scheme, per kind, rank and link.

FLOPs are those of matrix products (2mnk) and of attention (4 x heads x queries x keys x head width), as PyTorch's
FlopCounterMode counts them; bytes are what a rank hands to other ranks, as counted at the collectives. Both counts
are compared with the running transformers in tests/test_planner_counts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.registry.forks import Model, Size, Stack
from common.registry.layout import Coordinates, Layout, split_evenly

BYTES = 2
"""Of a weight or an activation in bf16 or fp16."""
GUIDANCE_BYTES = 4
"""Guidance is computed, and its operands are sent, in fp32."""


@dataclass(frozen=True)
class SelfAttention:
    """What one block attends to on a rank. Channels in equal to channels of all heads together."""

    heads: int
    head_dim: int
    lengths: tuple[int, ...]
    """Tokens of every rank of the guidance branch, all streams together."""
    place: Coordinates
    normed_whole: bool = False
    """See `common.registry.forks.Stack`."""

    @property
    def group(self) -> tuple[int, ...]:
        """Tokens of every rank of this rank's Ulysses group."""
        u = self.place.layout.ulysses
        return self.lengths[self.place.ring * u : (self.place.ring + 1) * u]

    @property
    def chunks(self) -> list[int]:
        """Tokens of every Ulysses group of the ring."""
        u = self.place.layout.ulysses
        return [sum(self.lengths[i * u : (i + 1) * u]) for i in range(self.place.layout.ring)]


@dataclass(frozen=True)
class Pass:
    """One forward pass of a stack of blocks on one rank. FLOPs and bytes are whole, not per layer."""

    layers: int
    width: int
    rows: float
    """Tokens that this rank's linear layers see, times the batch."""
    matmul: float
    attention: float
    held: float = 0
    """Bytes of this rank's q, k, v and output of one layer: what the all-to-all packs and unpacks."""
    all_to_all: float = 0
    """Bytes this rank sends to the others of its Ulysses group."""
    hop: float = 0
    """Bytes of the largest message of one hop of the ring, in one layer."""
    ring: float = 0
    """Bytes this rank sends along the ring."""
    block: SelfAttention | None = None
    """None where nothing is known of the order in which exchanges are posted: the published systems."""


def branches(place: Coordinates, guided: bool = True) -> tuple[int, ...]:
    """Guidance branches that a rank computes: 0 the prompt, 1 the negative prompt."""
    if place.layout.cfg == 2:
        return (place.cfg,)
    return (0, 1) if guided else (0,)


def tokens_of(stack: Stack, size: Size, branch: int) -> tuple[int, ...]:
    """Tokens of each stream, of all ranks together."""
    return tuple(stream.source.tokens(size)[branch] for stream in stack.streams)


def passes(model: Model, size: Size, place: Coordinates) -> list[Pass]:
    """The forward passes of one step on a rank: every stack of every branch that it computes."""
    return [
        forward(stack, tokens_of(stack, size, branch), place)
        for branch in branches(place, size.guided)
        for stack in model.stacks
    ]


def forward(stack: Stack, tokens: Sequence[int], place: Coordinates) -> Pass:
    """One forward pass for so many tokens of each stream (of all ranks together), batch 1, on one rank."""
    layout = place.layout
    own = [split_evenly(count, layout.sequence)[place.sequence] for count in tokens]
    matmul = stack.once + sum(n * (stack.layers * s.block + s.rest) for n, s in zip(own, stack.streams))
    attention = stack.layers * _attention(stack, tokens, place)
    for cross in stack.cross:
        matmul += cross.layers * cross.matmul * own[0]
        attention += cross.layers * 4 * cross.width * own[0] * cross.keys
    hops = _hops(stack, tokens, place)
    return Pass(
        stack.layers,
        stack.width,
        sum(own),
        matmul,
        attention,
        held=(3 * sum(own) * stack.width + sum(_group(tokens, place)) * _channels(stack, place)) * BYTES
        if layout.ulysses > 1
        else 0,
        all_to_all=stack.layers * _exchanged(stack, tokens, place),
        hop=max(hops, default=0),
        ring=stack.layers * sum(hops),
        block=SelfAttention(
            stack.heads, stack.head_dim, tuple(_lengths(tokens, layout.sequence)), place, stack.normed_whole
        ),
    )


def _channels(stack: Stack, place: Coordinates) -> int:
    """Channels of the heads that a rank of the Ulysses group has."""
    return split_evenly(stack.heads, place.layout.ulysses)[place.ulysses] * stack.head_dim


def _attention(stack: Stack, tokens: Sequence[int], place: Coordinates) -> int:
    """FLOPs in one layer: queries of the Ulysses group over all keys, for this rank's heads."""
    return 4 * _channels(stack, place) * sum(_group(tokens, place)) * sum(tokens)


def _lengths(tokens: Sequence[int], parts: int) -> list[int]:
    """Tokens of every rank of one guidance branch, all streams together."""
    return [sum(shares) for shares in zip(*(split_evenly(count, parts) for count in tokens))]


def _group(tokens: Sequence[int], place: Coordinates) -> list[int]:
    """Tokens of every rank of this rank's Ulysses group."""
    u = place.layout.ulysses
    return _lengths(tokens, place.layout.sequence)[place.ring * u : (place.ring + 1) * u]


def _exchanged(stack: Stack, tokens: Sequence[int], place: Coordinates) -> int:
    """Bytes to other ranks in one layer's two all-to-alls: q, k, v of their heads, then the output of their tokens."""
    if place.layout.ulysses == 1:
        return 0
    group, mine = _group(tokens, place), _channels(stack, place)
    own = group[place.ulysses]
    return (3 * own * (stack.width - mine) + (sum(group) - own) * mine) * BYTES


def _hops(stack: Stack, tokens: Sequence[int], place: Coordinates) -> list[int]:
    """Bytes of k and v that this rank passes on in one layer, hop by hop."""
    layout = place.layout
    lengths, u = _lengths(tokens, layout.sequence), layout.ulysses
    chunks = [sum(lengths[i * u : (i + 1) * u]) for i in range(layout.ring)]
    size = 2 * _channels(stack, place) * BYTES
    return [chunks[(place.ring - hop) % layout.ring] * size for hop in range(layout.ring - 1)]


@dataclass(frozen=True)
class Sent:
    """Bytes a rank sends in a whole generation, by link."""

    all_to_all: int
    ring: int
    cfg: int
    gather: int

    @property
    def total(self) -> int:
        return self.all_to_all + self.ring + self.cfg + self.gather


def latent_numbers(model: Model, size: Size, place: Coordinates | None = None) -> int:
    """Numbers of the latents that are sampled: all of them, or a rank's."""
    place = place or Coordinates(Layout(), 0)
    return sum(
        split_evenly(stream.source.tokens(size)[0], place.layout.sequence)[place.sequence] * stream.sampled
        for stack in model.stacks
        for stream in stack.streams
    )


def sent(model: Model, size: Size, place: Coordinates) -> Sent:
    """What one rank sends while sampling."""
    work = passes(model, size, place)
    shard = latent_numbers(model, size, place) * GUIDANCE_BYTES
    return Sent(
        all_to_all=int(size.num_steps * sum(p.all_to_all for p in work)),
        ring=int(size.num_steps * sum(p.ring for p in work)),
        cfg=size.num_steps * shard if place.layout.cfg == 2 else 0,
        gather=shard * (place.layout.sequence - 1),
    )
