"""`python -m tools.docs.tables`: the tables of README.md and docs/speed.md, from the files that benchmarks wrote.

The pages are written by hand but for what stands between `<!-- NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "speed.md")
RESULTS = ROOT / "benchmarks" / "results"
PUBLISHED = ROOT / "benchmarks" / "published" / "published.json"
# One group of published rows for each model family and GPU that has one GPU and several in it.
GROUPS = ("mochi-l40-sampling", "cogvideox-2b-l40", "cogvideox-5b-l40", "cogvideox-5b-a100", "cogvideox1.5-l40")
GROUPS += ("cogvideox1.5-h20", "consisid-h100")
MEASURED_TOKENS = 4000
SIDES = ("ours", "diffusers", "ours-compiled", "diffusers-compiled")


def results(stem: str) -> list[dict[str, Any]]:
    """The result files whose names begin so, in order."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{stem}*.json"))]


def steps() -> str:
    """A line for each model, dtype and number of tokens of `benchmarks/step.py --output benchmarks/results/step-*`."""
    lines = ["| model | dtype | tokens | ours | diffusers | ratio | ours, compiled | diffusers, compiled | ratio |"]
    lines.append("|" + "---|" * 9)
    for found in results("step-"):
        for row in found["rows"]:
            ours, theirs, compiled, both = (row["seconds"][side] for side in SIDES)
            cells = [found["options"]["model"], row["dtype"], str(row["tokens"])]
            cells += [f"{ours:.3f} s", f"{theirs:.3f} s", f"{theirs / ours:.2f}"]
            cells += [f"{compiled:.3f} s", f"{both:.3f} s", f"{both / compiled:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    found = results("step-")[0]
    where = f"{found['device']}, torch {found['versions']['torch']}, diffusers {found['versions']['diffusers']}"
    options = found["options"]
    about = f"{options['heads']} heads, {options['depth']} blocks, medians of {options['rounds']} rounds in turns"
    return "\n".join(lines) + f"\n\n{where}, {found['date']}; {about}."


def overlap() -> str:
    """A line for each file of `benchmarks/overlap.py --output benchmarks/results/overlap-*`."""
    lines = ["| ranks | tokens | 1 group | 2 groups | 4 groups |", "|---|---|---|---|---|"]
    for found in results("overlap-"):
        cells = [f"{found['seconds'][groups]:.3f} s" for groups in ("1", "2", "4")]
        lines.append(f"| {found['options']['ranks']} | {found['options']['tokens']} | " + " | ".join(cells) + " |")
    found = results("overlap-")[0]
    return "\n".join(lines) + f"\n\nCPU, torch {found['torch']}, {found['date']}."


def measured() -> str:
    """The ratios of `steps` at one number of tokens."""
    lines = ["| model | diffusers / ours | both compiled |", "|---|---|---|"]
    for found in results("step-"):
        for row in found["rows"]:
            if row["dtype"] == "bf16" and abs(row["tokens"] - MEASURED_TOKENS) < MEASURED_TOKENS / 10:
                ours, theirs, compiled, both = (row["seconds"][side] for side in SIDES)
                lines.append(f"| {found['options']['model']} | {theirs / ours:.2f} | {both / compiled:.2f} |")
    found = results("step-")[0]
    return "\n".join(lines) + f"\n\n{found['device']}, torch {found['versions']['torch']}, {found['date']}."


def published() -> str:
    """One GPU and the fastest layout of each of GROUPS, of how many with as many GPUs, and the planner's profile."""
    rows = json.loads(PUBLISHED.read_text())
    heads = ("model", "GPU", "size, frames", "seconds of", "one GPU", "fastest", "its GPUs, cfg x ring x ulysses")
    lines = ["| " + " | ".join((*heads, "fastest of", "`--gpu` of xdit-plan")) + " |"]
    lines.append("|" + "---|" * (len(heads) + 2))
    for group in GROUPS:
        mine = [row for row in rows if row["group"] == group]
        one = next(row for row in mine if row["n_gpus"] == 1)
        best = min(mine, key=lambda row: row["seconds"])
        layout = f"{best['n_gpus']}, {best['cfg']} x {best['ring']} x {best['ulysses']}"
        tried = {
            (row["cfg"], row["ring"], row["ulysses"])
            for row in mine
            if (row["model"], row["n_gpus"]) == (best["model"], best["n_gpus"])
        }
        size = f"{one['resolution']}, {one['frames']}"
        what = one["seconds_kind"].split(" (")[0]
        cells = [one["model"], one["gpu"], size, what, str(one["seconds"]), str(best["seconds"]), layout]
        cells += [str(len(tried)), f"`{group}`"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with its tables made anew."""
    for name, make in {"steps": steps, "overlap": overlap, "measured": measured, "published": published}.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if mark.search(page):
            made = make()
            page = mark.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", page)
    return page


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(filled(file.read_text()))
