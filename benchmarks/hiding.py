"""What hiding exchanges is predicted to bring on published machines: a section of docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.registry.forks import Model, get_model
from common.registry.layout import Layout
from planner.hardware import Profile, get_profile
from planner.machine import lab
from planner.model import Prediction, hidden_share, predict

Table = Callable[[Sequence[str], Iterable[Sequence[object]]], str]
DATA = Path(__file__).parent / "published" / "hiding.json"
WAYS = ("nothing hidden", "one group", "head groups", "all that can", "and in turn")
SHARED_LAYOUTS = (Layout(1, 1, 4), Layout(1, 4, 1), Layout(1, 2, 2))


def section(table: Table) -> list[str]:
    return [*_machines(table), *_shares(table), *_measured(table)]


def _data() -> dict[str, Any]:
    return json.loads(DATA.read_text(encoding="utf-8"))


def cases() -> list[dict[str, Any]]:
    """Figures to reach on published machines, and what was published."""
    return _data()["cases"]


def profile_of(case: dict[str, Any]) -> Profile:
    profile = get_profile(case["profile"])
    return replace(profile, links=replace(profile.links, **case.get("links", {})))


def ways(model: Model, layout: Layout, profile: Profile) -> list[Prediction]:
    """Predictions with more and more hidden, in the order of WAYS; without the last where no branches take turns."""
    size, all_hides = model.default_size, replace(profile, exposed=0.0)
    found = [
        predict(model, size, layout, replace(profile, exposed=1.0), "ours", groups=1),
        predict(model, size, layout, profile, "ours", groups=1),
        predict(model, size, layout, profile, "ours"),
        predict(model, size, layout, all_hides, "ours"),
    ]
    if layout.cfg == 1 and size.guided:
        found.append(predict(model, size, layout, all_hides, "ours", interleave=True))
    return found


def _reached(case: dict[str, Any], one: Prediction) -> float:
    """By a prediction, in what the case's figures are in."""
    if case["kind"] == "speedup":
        return case["one_gpu"] / one.step
    return {"sampling": one.sampling, "total": one.total}[case["kind"]]


def _machines(table: Table) -> list[str]:
    lines = []
    for case in cases():
        for degrees in case["layouts"]:
            layout = Layout(*degrees)
            found = ways(get_model(case["model"]), layout, profile_of(case))
            figures = [f"{_reached(case, one):.1f} ({one.groups})" for one in found]
            what = f"{case['title']}: {case['unit']}"
            cells = (what, _name(layout), case["published"], case["target"])
            lines.append((*cells, *figures, *["-"] * (len(WAYS) - len(figures))))
    notes = [f"- {case['title']}: {case['note']}" for case in cases()]
    return [
        "## What hiding communication is predicted to bring",
        "Predicted for this project on the machines of `benchmarks/published/hiding.json`; in parentheses the number "
        "of head groups. Nothing of this has been measured on GPUs: what hides there is an assumption.",
        "- *nothing hidden*: every exchange is waited for.\n"
        "- *one group*: heads in one group; a ring hides as much as published rings were found to.\n"
        "- *head groups*: as many as are best; of each of their exchanges as large a share is assumed to hide. "
        "`--overlap-groups auto`, `xdit-plan` and all other tables for this project go by this.\n"
        "- *all that can*: whatever has work to travel under is assumed to be hidden.\n"
        "- *and in turn*: besides, the guidance branches take turns on the same ranks, where cfg is 1.",
        table(("what", "cfg x ring x ulysses", "published", "to reach", *WAYS), lines),
        "Where sums by hand, from FLOPs, bytes and the same links, differ:",
        "\n".join(notes),
    ]


def _name(layout: Layout) -> str:
    return " x ".join(map(str, layout.degrees))


def _shares(table: Table) -> list[str]:
    lines = []
    for name, machine in _data()["machines with several GPUs"]:
        model, profile = get_model(name), get_profile(machine)
        for layout in SHARED_LAYOUTS:
            groups = predict(model, model.default_size, layout, replace(profile, exposed=0.0), "ours").groups
            shares = [
                hidden_share(model, model.default_size, layout, profile, count, in_turn)
                for count, in_turn in ((1, False), (groups, False), (1, True), (groups, True))
            ]
            cells = [f"{100 * share:.0f} %" for share in shares]
            lines.append((name, machine, _name(layout), cells[0], f"{cells[1]} ({groups})", *cells[2:]))
    heads = ("model", "machine", "cfg x ring x ulysses", "one group", "head groups", "in turn", "both")
    return [
        "### What is sent and has work to travel under",
        "Share of the bytes, by the seconds of work that are issued between the post of an exchange and the wait for "
        "it and the seconds that it takes on the machine's links; one with less work counts by what it has. Four GPUs, "
        "each model's published size. In parentheses the number of groups that is best if all of it is hidden.",
        table(heads, lines),
    ]


def _measured(table: Table) -> list[str]:
    rows: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in lab()["measured"]:
        rows.setdefault((row["model"], row["layout"], row["groups"]), {})[row["mbit"]] = row["seconds"]
    rates = (0, 1600, 400, 137)
    lines = [(*key, *(found.get(rate, "") for rate in rates)) for key, found in rows.items()]
    heads = ("model", "cfg x ring x ulysses", "groups", "no limit", *(f"{rate} Mbit/s" for rate in rates[1:]))
    return [
        "### Measured between two CPU ranks",
        f"`{lab()['command']}`. {lab()['about']} The planner's constants for a CPU are fitted to them "
        f"(`planner/lab.json`) and explain them with a mean error of {100 * lab()['mean_error']:.1f} %.",
        table(heads, lines),
    ]
