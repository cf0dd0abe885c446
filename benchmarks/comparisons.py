"""Published figures of video models beside what is predicted for this project: a section of docs/performance.md.

comparisons.json has the rows, with what was assumed; nothing is fitted from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.published import HERE
from common.registry.forks import Size, get_model
from common.system.units import figure
from planner.hardware import get_profile
from planner.layouts import plan
from planner.model import Prediction

UNITS = {"step": "s a step", "sampling": "s sampling", "total": "s end to end"}
Table = Callable[[Sequence[str], Iterable[Sequence[object]]], str]


def section(table: Table) -> list[str]:
    """The section, part by part. table: makes Markdown of heads and lines."""
    groups = json.loads((HERE / "comparisons.json").read_text(encoding="utf-8"))
    parts = [
        "## Beside others' figures",
        "Rows of `benchmarks/published/comparisons.json`, from which nothing is fitted. This project is predicted in "
        "the best layout of as many GPUs at the size and steps that stand there or were assumed, once with the "
        "constants of the GPU's kind and once with those of the model's own program on it (its kernels and its "
        "links; FlashAttention 3 on Hopper cards). Neither was measured.",
    ]
    heads = ("system", "model", "size, frames, steps", "GPUs", "layout, as stated", "unit", "published")
    heads += ("best layout here", "predicted, GPU's constants", "predicted, its program's constants")
    for group in groups:
        sources = dict.fromkeys(row["source"] for row in group["rows"])
        parts += [f"### {group['title']}", f"{'; '.join(sources)}. Assumed: {group['assumed']}."]
        parts.append(table(heads, [_line(row) for row in group["rows"]]))
    return parts


def _line(row: dict[str, Any]) -> list[object]:
    size = Size(row["width"], row["height"], row["frames"], row["steps"])
    model = get_model(row["model"])
    best = [plan(model, size, row["gpus"], get_profile(name), "ours").best for name in row["profiles"]]
    layout = dict.fromkeys(f"{one.layout.cfg} x {one.layout.ring} x {one.layout.ulysses}" for one in best)
    stated = row["layout"] + (f"; {row['precision']}" if "precision" in row else "")
    return [
        row["system"],
        model.title,
        f"{size.width}x{size.height}, {size.num_frames}, {size.num_steps}",
        f"{row['gpus']} x {row['gpu']}",
        stated,
        UNITS[row["covers"]],
        f"{row['seconds']:g}",
        ", ".join(layout),
        *(figure(_seconds(one, row["covers"]), 4) for one in best),
    ]


def _seconds(one: Prediction, covers: str) -> float:
    return {"step": one.step, "sampling": one.sampling, "total": one.total}[covers]
