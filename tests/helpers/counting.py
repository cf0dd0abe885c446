"""Counts what one rank of a layout sends and computes, without ranks and without memory: meta tensors, no processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

import common.usp
from common.estimate import FUSED
from common.parallel import Axis, Layout, Mesh
from common.usp import SequenceParallel


@dataclass
class Counts:
    """bytes and calls per axis name, FLOPs (a multiply-add is two), and the order in which things were issued."""

    bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    events: list[str] = field(default_factory=list)
    flops: int = 0


def as_rank(layout: Layout, rank: int = 0) -> Mesh:
    """The mesh that rank `rank` of the layout would have. Its groups are the names of the axes, not process groups."""
    sequence, ulysses = rank % layout.sequence, rank % layout.ulysses
    axes: dict[str, tuple[int, int]] = {
        "world": (layout.ranks, rank),
        "cfg": (layout.cfg, rank // layout.sequence),
        "sequence": (layout.sequence, sequence),
        "ring": (layout.ring, sequence // layout.ulysses),
        "ulysses": (layout.ulysses, ulysses),
    }
    named: dict[str, Any] = {n: Axis(size, r, n if size > 1 else None) for n, (size, r) in axes.items()}  # type: ignore[arg-type]
    return Mesh(layout=layout, device=torch.device("cpu"), **named)


@contextmanager
def counting() -> Iterator[Counts]:
    """Within it, tensors must be on the meta device; every exchange is counted instead of sent."""
    counts = Counts()

    def all_to_all(send: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
        # The rank's own rows are copied, not sent; at most one entry of `sent` is its own.
        counts.calls[group] += 1
        counts.events.append(group)
        own = counts.own_rank[group]  # type: ignore[attr-defined]
        rows = sum(n for i, n in enumerate(sent) if i != own)
        row = send.element_size() * (send[0].numel() if send.shape[0] else 0)
        counts.bytes[group] += rows * row
        return send.new_empty(sum(received), *send.shape[1:])

    def with_lse(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        counts.events.append("attention")
        heads_first = [t.transpose(1, 2).shape for t in (q, k, v)]
        counts.flops += sdpa_flop(*heads_first)
        return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)

    with (
        mock.patch.object(common.usp.collectives, "all_to_all_single", all_to_all),
        mock.patch.object(common.usp.collectives, "wait_tensor", lambda t: t),
        mock.patch.object(common.usp, "attention_with_lse", with_lse),
        mock.patch.object(common.usp, "attention", lambda *args: with_lse(*args)[0]),
        FlopCounterMode(display=False, custom_mapping=FUSED) as flops,
    ):
        counts.own_rank = {}  # type: ignore[attr-defined]
        yield counts
    counts.flops += flops.get_total_flops()


def register(counts: Counts, mesh: Mesh) -> None:
    """Tell the counter which entry of a split is this rank's own."""
    names = ("world", "cfg", "sequence", "ring", "ulysses")
    counts.own_rank = {name: getattr(mesh, name).rank for name in names}  # type: ignore[attr-defined]


def count_attention(layout: Layout, rank: int, tokens: int, text: int, heads: int, width: int) -> Counts:
    """One layer's attention on one rank, bf16."""
    mesh = as_rank(layout, rank)
    sp = SequenceParallel(mesh)
    lengths = [a + b for a, b in zip(sp.lengths(tokens), sp.lengths(text))]
    q, k, v = torch.empty(3, 1, lengths[sp.rank], heads, width, dtype=torch.bfloat16, device="meta")
    with counting() as counts:
        register(counts, mesh)
        sp.attention(q, k, v, lengths)
    return counts
