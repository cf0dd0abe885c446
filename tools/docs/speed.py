"""`python -m tools.docs.speed`: the tables of docs/speed.md, from the files that the benchmarks wrote.

The page is written by hand but for what stands between `<!-- NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "benchmarks" / "results"


def results(stem: str) -> list[dict[str, Any]]:
    """The result files whose names begin so, in order."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{stem}*.json"))]


def steps() -> str:
    """A line for each model, dtype and number of tokens of `benchmarks/step.py --output benchmarks/results/step-*`."""
    sides = ("ours", "diffusers", "ours-compiled", "diffusers-compiled")
    lines = ["| model | dtype | tokens | ours | diffusers | ratio | ours, compiled | diffusers, compiled | ratio |"]
    lines.append("|" + "---|" * 9)
    for found in results("step-"):
        for row in found["rows"]:
            ours, theirs, compiled, both = (row["seconds"][side] for side in sides)
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


def filled(page: str) -> str:
    """The page with its tables made anew."""
    for name, made in {"steps": steps(), "overlap": overlap()}.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = mark.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
