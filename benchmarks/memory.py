"""Memory of a rank in each stage, and what would be chosen as memory falls: the figures of docs/memory.md.

    python benchmarks/memory.py                     # a model of each fork at its published size
    python benchmarks/memory.py --gpus 8 --model mochi

Counted without weights or GPUs by `common.memory.estimate`, in bf16, in GiB. Not counted: the CUDA context (about half
a GiB), NCCL's buffers and the allocator's rounding. One command's own figures: `mochi-xdit --dry-run`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import click

from benchmarks import door
from common.memory.choice import FreeMemory, candidates, choose_placement
from common.memory.estimate import Estimator, Precision, imagined
from common.registry.forks import Model, fork_of, forks
from common.registry.layout import MOST_RANKS, Layout
from common.system.units import GIB
from common.weights.placement import Placement
from planner import choose_layout, get_model

CARDS = (80, 48, 24, 16, 12, 10, 8)
"""GiB that a card may have; half of one is taken to be in use already."""
HOST = 256


def rows(model: Model, gpus: int, float8: bool) -> tuple[Layout, Estimator]:
    """Rank 0's estimator in the layout that the rule or this machine's profile gives."""
    layout, _ = choose_layout(model.name, None, gpus)
    with imagined(layout) as mesh:
        work = fork_of(model).module("sampling").workload(model, model.default_size, mesh)
        return layout, Estimator(work, mesh, Precision(float8=float8))


@click.command()
@click.option("--model", "models", type=door.ModelName(), multiple=True, help="Default: one of each fork.")
@click.option(
    "--gpus", "counts", type=click.IntRange(1, MOST_RANKS), multiple=True, default=(1, 2, 4, 8), show_default=True
)
@click.option("--fp8", is_flag=True, help="Matmul weights of the blocks in float8.")
def main(models: tuple[str, ...], counts: tuple[int, ...], fp8: bool) -> None:
    """Print two markdown tables: memory by placement, and what is chosen on cards of several sizes."""
    found = {
        (name, gpus): rows(get_model(name), gpus, fp8)
        for name in models or [fork.models[0].name for fork in forks()]
        for gpus in counts
    }
    print("| model | ranks | layout | placement | text | sampling: weights + work | decode | host |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, gpus), (layout, counted) in found.items():
        for placement, _ in candidates(gpus):
            _line(name, gpus, layout, counted, placement)
    print("\n| model | ranks | " + " | ".join(f"{card} GiB" for card in CARDS) + " |")
    print("|---" * (2 + len(CARDS)) + "|")
    for (name, gpus), (_, counted) in found.items():
        chosen = [_chosen(counted, gpus, card) for card in CARDS]
        print(f"| {name} | {gpus} | " + " | ".join(chosen) + " |")


def _line(name: str, gpus: int, layout: Layout, counted: Estimator, placement: Placement) -> None:
    estimate = counted.estimate(placement)
    stages = estimate.stages
    text, sampling, decode = (stages[stage] for stage in ("text", "sampling", "decode"))
    degrees = f"{layout.cfg} x {layout.ring} x {layout.ulysses}"
    cells = f"{sampling.weights / GIB:.2f} + {sampling.activations / GIB:.2f}"
    host = f"{estimate.host / GIB:.1f}" if estimate.host else ""
    said = placement.offload + (", sharded" if placement.shard else "")
    totals = f"{text.total / GIB:.2f} | {cells} | {decode.total / GIB:.2f}"
    print(f"| {name} | {gpus} | {degrees} | {said} | {totals} | {host} |")


def _chosen(counted: Estimator, gpus: int, card: int) -> str:
    memory = FreeMemory(int((card - 0.5) * GIB), HOST * GIB // gpus)
    try:
        choice = choose_placement(lambda p, keep: counted.estimate(p, keep, memory.free), memory, gpus)
    except ValueError:
        return "refused"
    tiled = ", tiles" if counted.estimate(choice.placement, choice.keep, memory.free).plan.tile else ""
    return choice.placement.offload + (", sharded" if choice.placement.shard else "") + tiled


if __name__ == "__main__":
    main()
