"""Kernels and bytes of one transformer block at its published size: eager, one guidance branch, no weights.

python -m tests.rehearsal.blocks mochi cogvideox-5b --ring-degree 2
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from common.parallel.mesh import Mesh
from common.parallel.usp import SequenceParallel
from common.registry.layout import Layout
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.recorder import fake_groups, fake_mesh
from tests.rehearsal.models import MODELS, Model
from tests.rehearsal.traffic import MULTIPLIES, Launch, Traffic, by_place

SHORT, LONG = 4, 6
"""Numbers of blocks whose difference is counted: the outer layers, and a last block that has less, cancel out. Both are
even, since some models read something after every second block."""


@dataclass(frozen=True)
class BlockTraffic:
    """Of one block, on average. bytes: read and written; multiplies: those of matrix products and attention alone.

    launches: the kernels of a whole prediction with LONG blocks, to see which lines they come from.
    """

    kernels: float
    bytes: float
    multiplies: float
    launches: tuple[Launch, ...]

    def __str__(self) -> str:
        return (
            f"{self.kernels:.1f} kernels, {self.bytes / 1e9:.2f} GB, "
            f"of which matmuls and attention {self.multiplies / 1e9:.2f} GB"
        )


def count_block(
    model: str,
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] = (9, 0),
    tokens: int | None = None,
    layout: Layout | None = None,
    wide: bool = False,
) -> BlockTraffic:
    """One block of a model of `MODELS`, batch 1, on rank 0 of a layout; default: on one GPU.

    tokens: of the prompt; default: the longest. wide: Wan with fp32 between its blocks, as it runs by default.
    """
    counted = MODELS[model]
    if wide:
        counted = replace(counted, build=partial(counted.build, residual=torch.float32))
    short, long = (_prediction(counted.shallow(n), dtype, capability, tokens, layout) for n in (SHORT, LONG))
    blocks = LONG - SHORT
    return BlockTraffic(
        (len(long.launches) - len(short.launches)) / blocks,
        (long.bytes() - short.bytes()) / blocks,
        (long.bytes(MULTIPLIES) - short.bytes(MULTIPLIES)) / blocks,
        tuple(long.launches),
    )


def _prediction(
    model: Model, dtype: torch.dtype, capability: tuple[int, int], tokens: int | None, layout: Layout | None
) -> Traffic:
    """The kernels of one forward pass; what is computed once per video is not among them."""
    with fake_cuda(capability) as machine, torch.inference_mode():
        device = torch.device("cuda", 0)
        machine.set_device(device)
        with _mesh(layout, device) as mesh:
            sp = SequenceParallel(mesh, dtype=dtype)
            module = model.make(sp, dtype)
            cond = model.prepare(module, model.text(sp.device, tokens), model.size)
            x, t = model.latent_tokens(sp), model.time(sp.device)
            with Traffic() as traffic:
                module(x, t, cond)
    return traffic


@contextmanager
def _mesh(layout: Layout | None, device: torch.device) -> Iterator[Mesh]:
    if layout is None:
        yield Mesh(device=device)
        return
    with fake_groups(0, layout.ranks):
        yield fake_mesh(layout, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--places", type=int, default=0, metavar="N", help="the N lines that move most")
    for axis in ("ring", "ulysses"):
        parser.add_argument(f"--{axis}-degree", type=int, default=1, metavar="N", help="ranks; counted is rank 0")
    parser.add_argument("--wide", action="store_true", help="Wan with fp32 between its blocks")
    given = parser.parse_args()
    layout = Layout(ring=given.ring_degree, ulysses=given.ulysses_degree)
    for name in given.models:
        counted = count_block(name, layout=layout if layout.ranks > 1 else None, wide=given.wide)
        print(f"{name}: {counted}")
        for where, op, kernels, size in by_place(counted.launches)[: given.places]:
            print(f"    {where:44s} {op:32s} {kernels / LONG:6.1f} {size / LONG / 1e6:10.1f} MB")


if __name__ == "__main__":
    main()
