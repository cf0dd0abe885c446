"""`python -m tools.docs.memory`: the tables of memory in docs/memory.md and wan_xdit/README.md, counted as `--dry-run`
counts. Minutes.

The pages are written by hand but for what stands between `<!-- memory: MODELS -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from common.memory.choice import estimator
from common.memory.estimate import Estimate, Estimator, imagined
from common.registry.forks import Model, fork_of, get_model
from common.run.command_line import parse
from common.system.units import GIB
from common.weights.placement import Placement

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "docs" / "memory.md", ROOT / "wan_xdit" / "README.md")
MARKED = re.compile(r"(<!-- memory: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
GPUS = (1, 4)
HEADS = ("model", "GPUs", "text", "sampling", "`--shard-weights`", "`--offload block`", "and host", "decode", "least")


def counted(model: Model, gpus: int) -> Estimator:
    """Rank 0 of the layout that the program chooses, at the official defaults."""
    fork = fork_of(model)
    request = parse(fork, ["--dry-run", model.name, "--device", "cuda", "--gpus", str(gpus)])
    with imagined(request.layout) as mesh:
        return estimator(fork, request, mesh)


def row(model: Model, gpus: int) -> str:
    """One line: GiB at the peak of each stage, by placement; the decode as fast as it goes and in the least memory."""
    found, shared = counted(model, gpus), gpus > 1
    stage, block = (found.estimate(Placement(name, shard=name == "block" and shared)) for name in ("stage", "block"))
    sharded = gib(found.estimate(Placement("stage", shard=True)), "sampling") if shared else "-"
    exact = [plan for plan in found.plans if plan.mode == "exact"]
    decoder = stage.stages["decode"].weights
    decodes = [f"{(decoder + found._plan_bytes(plan)) / GIB:.1f}" for plan in (exact[0], exact[-1])]
    size = model.default_size
    cells = [f"{model.title}, {size.width}x{size.height}x{size.num_frames}", str(gpus)]
    cells += [gib(stage, "text"), gib(stage, "sampling"), sharded, gib(block, "sampling"), f"{block.host / GIB:.1f}"]
    return f"| {' | '.join([*cells, *decodes])} |"


def gib(estimate: Estimate, stage: str) -> str:
    return f"{estimate.stages[stage].total / GIB:.1f}"


def lines(models: str) -> Iterator[str]:
    """The table of some models, by their names."""
    yield f"| {' | '.join(HEADS)} |"
    yield "|" + "---|" * len(HEADS)
    for name in models.split():
        for gpus in GPUS:
            print(name, gpus, file=sys.stderr)
            yield row(get_model(name), gpus)


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return MARKED.sub(lambda found: found[1] + "\n".join(lines(found[2])) + "\n" + found[3], text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
