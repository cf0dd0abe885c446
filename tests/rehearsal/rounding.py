"""What rounding to bf16 costs with the operations that a GPU's blocks fuse, and with those of the CPU, on a demo.

    python -m tests.rehearsal.rounding mochi --count 60

The CPU widens what a GPU's kernels widen on the fly (`common.model.elementwise.fuses`). Here it is made to run the
GPU's operations, each of which rounds once there as well; only gelu rounds once more than in a GPU's matrix product.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from common.model import elementwise, linear, rope
from tools.demo.evaluate import FRAMES, SEED, generator, pipeline, rules
from tools.demo.lossy import psnr
from tools.demo.world import dataset

SIDES = ("as the CPU computes it", "as a GPU computes it")


@contextmanager
def as_a_gpu_computes() -> Iterator[None]:
    """Blocks run the operations that they run on a GPU."""
    with ExitStack() as held:
        for module in (elementwise, linear, rope):
            held.enter_context(mock.patch.object(module, "fuses", lambda x: True))
        yield


def compared(model: str, count: int) -> Iterator[dict[str, tuple[float, float]]]:
    """For each held-out caption, of both sides: how far the latents are from fp32's (relative Euclidean norm), and the
    PSNR of the video, in dB, where both are decoded in fp32.
    """
    folder, own = rules(model)
    pipes = {dtype: pipeline(model, folder, dtype=dtype) for dtype in ("fp32", "bf16")}
    settings = {"num_steps": own.num_steps, "cfg_scale": own.cfg_scale, "output": "latent"}
    wide, narrow = (generator(model, pipe, **settings) for pipe in pipes.values())

    def away(latents: Tensor, wanted: Tensor, frames: Tensor) -> tuple[float, float]:
        far = torch.linalg.vector_norm(latents - wanted) / torch.linalg.vector_norm(wanted)
        return float(far), psnr(pipes["fp32"].decode(latents), frames)

    for seed, (_, text) in enumerate(dataset(SEED, count, FRAMES[model], test=True)):
        wanted = wide(text, seed).float()
        frames = pipes["fp32"].decode(wanted)
        by_cpu = narrow(text, seed).float()
        with as_a_gpu_computes():
            by_gpu = narrow(text, seed).float()
        yield {side: away(made, wanted, frames) for side, made in zip(SIDES, (by_cpu, by_gpu))}


def line(side: str, values: list[tuple[float, float]]) -> str:
    far, near = zip(*values)
    return (
        f"{side}: latents {statistics.fmean(far):.4f} from fp32's (median {statistics.median(far):.4f}), "
        f"PSNR {statistics.fmean(near):.2f} dB, worst {min(near):.2f} dB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal.rounding", description=__doc__)
    parser.add_argument("model", choices=list(FRAMES))
    parser.add_argument("--count", type=int, default=60, help="captions")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(compared(given.model, given.count))
    for side in SIDES:
        print(line(side, [row[side] for row in rows]), flush=True)


if __name__ == "__main__":
    main()
