"""The results as one Markdown page, fit to be attached to an issue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu_check.claims import Verdict
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.runner import Kept, Part
from common.system.units import figure

WIDEST = 12
"""Columns; further figures are in the part's json."""


def page(
    machine: Machine,
    about: Mapping[str, Any],
    parts: Sequence[Part],
    results: Mapping[str, Kept],
    found: Sequence[Verdict],
) -> str:
    """Verdicts first, then each part's figures."""
    lines = [f"# {machine.name}, {machine.gpus or 'no'} GPU{'s' if machine.gpus != 1 else ''}: make gpu-check", ""]
    lines.append(f"Commit {about['commit']}, {about['date']}. " + _versions(about))
    if machine.mini:
        lines.append("A miniature on two CPU ranks: it shows that the command works and measures nothing.")
    counts = {said: sum(v.said == said for v in found) for said in ("holds", "falls short", "not tested here")}
    lines += ["", ", ".join(f"{n} {said}" for said, n in counts.items()) + ".", ""]
    lines += ["| verdict | claim | of | figure or reason |", "|---|---|---|---|"]
    order = {"falls short": 0, "holds": 1, "not tested here": 2}
    for one in sorted(found, key=lambda v: order[v.said]):
        lines.append(f"| {one.said} | {one.claim.what} | {one.subject} | {_text(one.figure)} |")
    for part in parts:
        if part.name in results:
            lines += ["", f"## {part.title}", "", *_table(results[part.name])]
    return "\n".join(lines) + "\n"


def _versions(about: Mapping[str, Any]) -> str:
    named = about["versions"] | about.get("cuda", {})
    cards = [f"{card['name']} (driver {card['driver_version']})" for card in about["cards"]]
    return ", ".join([f"{name} {version}" for name, version in named.items()] + cards) + "."


def _table(kept: Kept) -> Iterator[str]:
    if not kept.finished:
        yield f"Not finished: {kept.data['state'] or 'not started'}."
        yield ""
    figures = {key: dict(_figures(row)) for key, row in kept.rows.items()}
    columns = list(dict.fromkeys(name for row in figures.values() for name in row))[:WIDEST]
    yield "| | " + " | ".join([*columns, "note"]) + " |"
    yield "|---" * (len(columns) + 2) + "|"
    for key, row in figures.items():
        note = kept.rows[key].get("error") or kept.rows[key].get("skipped") or ""
        yield f"| {key} | " + " | ".join([*(row.get(name, "") for name in columns), _text(note)]) + " |"


def _figures(row: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """Numbers and short lists of a row, those of nested ones by both names."""
    for name, value in row.items():
        if isinstance(value, bool) or name in ("error", "skipped", "given_up"):
            continue
        if isinstance(value, (int, float)):
            yield within + name, figure(value, 4) if isinstance(value, float) else str(value)
        elif isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            yield within + name, _text("; ".join(value))
        elif isinstance(value, Mapping) and name in ("seconds", "ratios"):
            yield from _figures(value, f"{name} ")


def _text(text: str) -> str:
    return " ".join(str(text).replace("|", "/").split())[:300]
