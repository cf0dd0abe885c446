"""What one rank of a layout sends and computes, counted without other ranks and without memory.

with imagined(layout, rank) as mesh, counting(mesh) as counts:
    ...                                     # on meta tensors
counts.flops, counts.sent, counts.issued
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common.memory.estimate import FUSED, Traffic, Workload, imagined
from common.parallel.mesh import Layout, Mesh
from common.parallel.usp import SequenceParallel
from tests.helpers.exchanges import told_exchanges


class Attended(TorchDispatchMode):
    """Tells of every attention."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in func.name():
            self.tell("attention")
        return func(*args, **(kwargs or {}))


@contextmanager
def issuing(mesh: Mesh) -> Iterator[list[str]]:
    """The order within it: the axis' name for every exchange that is posted, `wait` and `attention`."""
    issued: list[str] = []
    with Attended(issued.append), told_exchanges(mesh, issued.append):
        yield issued


@dataclass
class Counts:
    """flops: a multiply-add is two. sent: bytes by axis. issued: see `issuing`."""

    flops: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    issued: list[str] = field(default_factory=list)


@contextmanager
def counting(mesh: Mesh) -> Iterator[Counts]:
    """What happens within it is in the counts when it is left."""
    counts = Counts()
    with (
        FlopCounterMode(display=False, custom_mapping=FUSED) as flops,
        Traffic(mesh) as traffic,
        issuing(mesh) as issued,
    ):
        yield counts
    counts.flops, counts.sent, counts.issued = flops.get_total_flops(), traffic.sent, issued


def shorten(work: Workload, depth: int) -> Workload:
    """With `depth` blocks; those in the middle, which are like the one before them, are left out. Changed in place."""
    del work.transformer.blocks[depth - 1 : -1]  # type: ignore[union-attr,operator]
    return work


def count_attention(layout: Layout, rank: int, tokens: int, text: int, heads: int, width: int) -> Counts:
    """One layer's attention on one rank, bf16."""
    with imagined(layout, rank) as mesh:
        sp = SequenceParallel(mesh)
        lengths = [a + b for a, b in zip(sp.lengths(tokens), sp.lengths(text))]
        q, k, v = torch.empty(3, 1, lengths[sp.rank], heads, width, dtype=torch.bfloat16, device="meta")
        with counting(mesh) as counts:
            sp.attention(q, k, v, lengths)
    return counts
