"""Kernels and bytes of one transformer block at its published size: one GPU, eager, one guidance branch, no weights.

python -m tests.rehearsal.blocks mochi cogvideox-5b
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from common.parallel.mesh import Mesh
from common.parallel.usp import SequenceParallel
from tests.helpers.fake_cuda import fake_cuda
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
) -> BlockTraffic:
    """One block of a model of `MODELS`, batch 1.

    tokens: of the prompt; default: the longest.
    """
    short, long = (_prediction(MODELS[model].shallow(n), dtype, capability, tokens) for n in (SHORT, LONG))
    blocks = LONG - SHORT
    return BlockTraffic(
        (len(long.launches) - len(short.launches)) / blocks,
        (long.bytes() - short.bytes()) / blocks,
        (long.bytes(MULTIPLIES) - short.bytes(MULTIPLIES)) / blocks,
        tuple(long.launches),
    )


def _prediction(model: Model, dtype: torch.dtype, capability: tuple[int, int], tokens: int | None) -> Traffic:
    """The kernels of one forward pass; what is computed once per video is not among them."""
    with fake_cuda(capability), torch.inference_mode():
        sp = SequenceParallel(Mesh(device=torch.device("cuda", 0)), dtype=dtype)
        module = model.make(sp, dtype)
        cond = model.prepare(module, model.text(sp.device, tokens), model.size)
        x, t = model.latent_tokens(sp), model.time(sp.device)
        with Traffic() as traffic:
            module(x, t, cond)
    return traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--places", type=int, default=0, metavar="N", help="the N lines that move most")
    given = parser.parse_args()
    for name in given.models:
        counted = count_block(name)
        print(f"{name}: {counted}")
        for where, op, kernels, size in by_place(counted.launches)[: given.places]:
            print(f"    {where:44s} {op:32s} {kernels / LONG:6.1f} {size / LONG / 1e6:10.1f} MB")


if __name__ == "__main__":
    main()
