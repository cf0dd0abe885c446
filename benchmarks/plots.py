"""The figures of docs/performance.md: python benchmarks/plots.py --output docs/img. Needs matplotlib, extra `plot`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import click

from benchmarks.published import Row, excluded, rows, shown
from common.registry.forks import get_model
from common.system.extras import install
from planner.hardware import get_profile
from planner.layouts import plan
from planner.model import Prediction, predict

PUBLISHED, REFERENCE, OURS, MEASURED = "#444444", "#d97706", "#2563eb", "#059669"
PARTS = {
    "matmul": "#2563eb",
    "attention": "#60a5fa",
    "all-to-all": "#f97316",
    "ring": "#fbbf24",
    "fixed": "#9ca3af",
}
DPI = 130


def profile_of(row: Row) -> str:
    """The calibrated profile that stands for a row."""
    first = next(r for r in rows() if r.group == row.group)
    if row.gpu != first.gpu:
        return f"{row.group}-{row.gpu}"
    return row.group + ("-fsdp" if row.other.get("fsdp") and not row.group.endswith("baseline") else "")


def seconds_of(row: Row, scheme: str = "reference") -> float:
    """What the planner says for what the row's figure covers."""
    found = predict(row.model, row.size, row.layout, get_profile(profile_of(row)), scheme)
    return {"step": found.step, "sampling": found.sampling, "total": found.total}[row.kind]


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    for one in axes if columns > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes


def agreement(path: Path) -> None:
    """Predicted over published, for every row, against the published seconds."""
    figure, axes = _axes(8, 4.4)
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys((row.model.title, row.gpu) for row in rows()))
    colours = plt.get_cmap("tab20")
    for i, (model, gpu) in enumerate(groups):
        table = [r for r in rows() if (r.model.title, r.gpu) == (model, gpu) and r.id not in excluded()]
        if not table:
            continue
        steps = [r.seconds * (r.size.num_steps if r.kind == "step" else 1) for r in table]
        ratio = [100 * (seconds_of(r) / r.seconds - 1) for r in table]
        label = f"{model}, {gpu.upper()} ({len(table)})"
        axes.scatter(steps, ratio, s=22, color=colours(i % 20), label=label, alpha=0.85)
    axes.axhspan(-4, 4, color="#e5e7eb", zorder=0)
    axes.axhline(0, color="#6b7280", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_ylim(-13, 13)
    axes.set_xlabel("published seconds of a generation (steps x seconds a step where that is published)")
    axes.set_ylabel("predicted against published, %")
    axes.set_title("Published rows, predicted by the calibrated planner (grey: 4 %)", fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def speedups(path: Path) -> None:
    """Best speed-up at each number of GPUs: published, predicted for the published scheme, predicted for ours."""
    names = shown()["speedups"]
    figure, every = _axes(11, 3.7, len(names))
    from matplotlib import pyplot as plt

    for axes, name in zip(every, names):
        table = [row for row in rows() if row.group == name and row.id not in excluded()]
        model, size, profile = table[0].model, table[0].size, get_profile(name)
        one = next(row.seconds for row in table if row.layout.ranks == 1)
        counts = sorted({row.layout.ranks for row in table})
        best = {n: min(row.seconds for row in table if row.layout.ranks == n) for n in counts}
        axes.plot(counts, [one / best[n] for n in counts], "o", color=PUBLISHED, label="published, best layout")
        more = range(1, 9)
        for scheme, colour in (("reference", REFERENCE), ("ours", OURS)):
            found = _best(model, size, more, profile, scheme)
            # Both against the published single GPU, so that a scheme's faster start shows.
            base = one if scheme == "reference" else found[1].total
            line = [base / p.total for p in found.values()]
            axes.plot(
                list(found),
                line,
                color=colour,
                label="predicted, our scheme" if scheme == "ours" else "predicted, published scheme",
            )
        axes.plot([1, 8], [1, 8], color="#d1d5db", linewidth=0.8, linestyle="--")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("GPUs")
        axes.set_ylim(0, 8.2)
    every[0].set_ylabel("speed-up end to end")
    every[0].legend(fontsize=7, frameon=False, loc="upper left")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _best(model: Any, size: Any, counts: Sequence[int], profile: Any, scheme: str) -> dict[int, Prediction]:
    """The best layout for each count that has one."""
    found = {}
    for n in counts:
        try:
            found[n] = plan(model, size, n, profile, scheme).best
        except ValueError:
            continue  # the reference scheme has no layout for this many GPUs
    return found


def breakdown(path: Path) -> None:
    """Where the seconds go, our scheme on H100, 1 to 8 GPUs, predicted."""
    names, counts = shown()["breakdown"], (1, 2, 4, 8)
    figure, every = _axes(11, 3.7, len(names))
    from matplotlib import pyplot as plt

    profile = get_profile("h100")
    for axes, name in zip(every, names):
        model = get_model(name)
        found = _best(model, model.default_size, counts, profile, "ours")
        bottom = [0.0] * len(found)
        for part, colour in PARTS.items():
            heights = [p.parts[part] for p in found.values()]
            axes.bar([str(n) for n in found], heights, bottom=bottom, color=colour, label=part, width=0.65)
            bottom = [b + h for b, h in zip(bottom, heights)]
        for i, (total, p) in enumerate(zip(bottom, found.values())):
            layout = f"{p.layout.cfg}x{p.layout.ring}x{p.layout.ulysses}"
            axes.text(i, total, f"{total:.0f} s\n{layout}", ha="center", va="bottom", fontsize=7)
        axes.set_ylim(0, 1.18 * max(bottom))
        axes.set_title(model.title, fontsize=9)
        axes.set_xlabel("H100 (NVLink)")
    every[0].set_ylabel("predicted seconds")
    every[-1].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def measured(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Stages of every measured row of the results files."""
    named = [
        (f"{r['key']['model']}\n{r['key']['program']} {r['key']['cfg']}x{r['key']['ring']}x{r['key']['ulysses']}", r)
        for one in results
        for r in one["rows"]
        if "error" not in r
    ]
    figure, axes = _axes(max(5.0, 1.1 * len(named) + 2), 3.8)
    from matplotlib import pyplot as plt

    bottom = [0.0] * len(named)
    for stage, colour in (("text", "#9ca3af"), ("sampling", MEASURED), ("decode", "#a7f3d0")):
        heights = [row["stages_s"].get(stage, 0.0) for _, row in named]
        axes.bar([name for name, _ in named], heights, bottom=bottom, color=colour, label=stage, width=0.6)
        bottom = [b + h for b, h in zip(bottom, heights)]
    axes.set_ylabel("measured seconds")
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


FIGURES = {
    "published-against-predicted.png": agreement,
    "speedup.png": speedups,
    "breakdown.png": breakdown,
}


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("outputs") / "figures",
    show_default=True,
    help="Folder of the images.",
)
@click.option("--results", type=click.Path(path_type=Path, exists=True), multiple=True, help="Files of run.py.")
def main(output: Path, results: tuple[Path, ...]) -> None:
    """Draw all figures."""
    import json

    if find_spec("matplotlib") is None:
        raise click.UsageError(f"figures are drawn by matplotlib: {install('plot')}")
    output.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(output / name)
        click.echo(output / name)
    if results:
        try:
            measured([json.loads(path.read_text(encoding="utf-8")) for path in results], output / "measured.png")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise click.UsageError(f"one of the --results is no results file of run.py: {error}") from None
        click.echo(output / "measured.png")


if __name__ == "__main__":
    main()
