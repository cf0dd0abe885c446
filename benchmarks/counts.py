"""Work and traffic of every layout, ours and the published systems', from the same sizes.

    python benchmarks/counts.py --model cogvideox-2b cogvideox-5b cogvideox-1.5-5b --ranks 4 6 8 12

FLOPs: of all ranks together over those of one process, in per cent (100 is the ideal), and of the busiest rank over an
even share. MB: what a rank sends in a step, the most of any. The published scheme (xDiT: `planner/reference.py`)
carries the text on every rank where the ranks do not divide it, gathers latents after every step and decodes the whole
video on every rank; what it refuses has no numbers. Ours are the formulas that the tests hold against the running
transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import door, forks
from common.registry.forks import Model, Size, get_model, model_names
from common.registry.layout import Coordinates, Layout, layouts_of
from planner import reference
from planner.cost import Pass, passes, sent
from planner.layouts import refusal


def flops(work: list[Pass]) -> float:
    return sum(p.matmul + p.attention for p in work)


def ours(model: Model, size: Size, layout: Layout) -> tuple[list[float], float]:
    """FLOPs of every rank in a step, and the most bytes that a rank sends in one."""
    places = [Coordinates(layout, rank) for rank in range(layout.ranks)]
    work = [flops(passes(model, size, place)) for place in places]
    return work, max(sent(model, size, place).total for place in places) / size.num_steps


def theirs(model: Model, size: Size, layout: Layout) -> tuple[list[float], float] | None:
    if refusal(model, size, layout, "reference"):
        return None
    work = [flops(reference.passes(model, size, layout))] * layout.ranks
    return work, reference.sent(model, size, layout).total / size.num_steps


def row(model: Model, size: Size, layout: Layout, alone: float) -> str:
    cells = [str(layout)]
    for found in (ours(model, size, layout), theirs(model, size, layout)):
        if found is None:
            cells += ["refused", "", ""]
            continue
        work, traffic = found
        cells += [
            f"{100 * sum(work) / alone:.2f} %",
            f"{100 * max(work) * layout.ranks / alone:.2f} %",
            f"{traffic / 1e6:.0f}",
        ]
    frames = model.latents.decoded(size)[0]
    return "| " + " | ".join([*cells, f"{-(-frames // layout.ranks)} of {frames}", f"{frames} of {frames}"]) + " |"


def main() -> None:
    parser = door.Parser(__doc__)
    parser.add_argument("--model", type=forks.named, nargs="+", default=model_names())
    parser.add_argument("--ranks", type=door.ranks, nargs="+", default=[4, 6, 8, 12])
    args = parser.parse_args()
    for name in args.model:
        model = get_model(name)
        size = model.default_size
        alone = sum(ours(model, size, Layout())[0])
        print(f"\n{model.title}, {size.height}x{size.width}, {size.num_frames} frames\n")
        print("| layout | FLOPs | busiest | MB a step | theirs: FLOPs | busiest | MB a step | decoded | theirs |")
        print("|---|---|---|---|---|---|---|---|---|")
        for ranks in args.ranks:
            for layout in layouts_of(ranks):
                if refusal(model, size, layout, "ours") is None:
                    print(row(model, size, layout, alone))


if __name__ == "__main__":
    main()
