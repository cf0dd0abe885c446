"""Rows of published latency tables with their sources, and which of them no model explains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.registry.forks import Model, Size, get_model
from common.registry.layout import Layout

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One published figure. `kind` says what the seconds cover: `step`, `sampling` or `total`."""

    id: str
    group: str
    model: Model
    size: Size
    gpu: str
    layout: Layout
    seconds: float
    kind: str
    implementation: str
    other: dict[str, Any]
    memory_gb: float | None
    source: str
    how_read: str
    note: str | None

    @property
    def reading_error(self) -> float:
        """Seconds by which the figure may be off because it was rounded or read off a chart."""
        if "±" in self.how_read:
            return float(self.how_read.split("±")[1].split()[0])
        return 0.005 if self.kind == "step" else 0.5


@dataclass(frozen=True)
class Group:
    """What rows of a published group share beside what stands in them; see groups.json."""

    machine: str
    """Tables made on the same machine share its links."""
    constants_of: str
    """Whose `speed` and `other_s`: several tables may be of one machine and one program."""
    program: str
    """Whose elementwise traffic: a program of its own, or diffusers, whose models share their style."""
    nvlink: bool
    balanced: bool
    """Whether ranks are spread evenly over the machine's sockets."""
    kernels: str
    """Whose matrix products and attention: those of its kind of GPU, or of a program with other kernels there."""


def group_of(row: Row) -> Group:
    raw = groups()["groups"].get(row.group, {})
    machine = raw.get("machine", row.gpu)
    links = groups()["machines"].get(machine, {})
    return Group(
        machine,
        raw.get("constants_of", row.group),
        raw.get("program", "diffusers"),
        links.get("nvlink", False),
        links.get("balanced", False),
        raw.get("kernels", row.gpu),
    )


def _kind(text: str) -> str:
    if text.startswith("per step"):
        return "step"
    return "sampling" if text.startswith(("DiT", "sampling", "not stated")) else "total"


def _row(raw: dict[str, Any]) -> Row:
    width, height = (int(n) for n in raw["resolution"].split()[0].split("x"))
    return Row(
        id=raw["id"],
        group=raw["group"],
        model=get_model(raw["model"]),
        size=Size(width, height, raw["frames"], raw["steps"]),
        gpu=raw["gpu"].split("-")[0].split()[0].lower(),
        layout=Layout(raw["cfg"], raw["ring"], raw["ulysses"]),
        seconds=raw["seconds"],
        kind=_kind(raw["seconds_kind"]),
        implementation=raw["implementation"],
        other=raw["other"],
        memory_gb=raw["memory_gb"],
        source=raw["source"],
        how_read=raw["how_read"],
        note=raw["note"],
    )


@cache
def rows() -> tuple[Row, ...]:
    """All of published.json."""
    return tuple(_row(raw) for raw in json.loads((HERE / "published.json").read_text(encoding="utf-8")))


@cache
def groups() -> dict[str, Any]:
    """groups.json."""
    return json.loads((HERE / "groups.json").read_text(encoding="utf-8"))


@cache
def shown() -> dict[str, Any]:
    """shown.json."""
    return json.loads((HERE / "shown.json").read_text(encoding="utf-8"))


@cache
def special_priors() -> dict[tuple[str, str], tuple[float, float]]:
    """Priors of a machine's or a program's own constants: (median, standard deviation of the logarithm)."""
    return {
        (name, whose): (median, spread)
        for kind in ("machines", "programs")
        for whose, entry in groups()[kind].items()
        for name, (median, spread) in entry["priors"].items()
    }


@cache
def excluded() -> dict[str, str]:
    """Why a row is not fitted, by its id."""
    raw = json.loads((HERE / "excluded.json").read_text(encoding="utf-8"))
    return {row: reason for reason, ids in raw.items() for row in ids}
