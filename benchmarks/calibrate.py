"""Calibrate the planner: least squares over published rows, or over rows that run.py measured.

    python benchmarks/calibrate.py                  # fit, and print errors in-sample and leave-one-out
    python benchmarks/calibrate.py --write planner/hardware.json    # and write them there with the constants
    python benchmarks/calibrate.py --measured outputs/bench/mochi-cuda.json --gpu h200 --output mine.json

The last one fits a machine's own constants, starting from a known profile; `xdit-plan --model MODEL --gpu mine.json`
takes them.
Needs scipy, of the extra `plot`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import click

from benchmarks import door
from benchmarks.fitting import (
    EVERYONE,
    LINKS,
    Fit,
    Observation,
    Problem,
    build,
    keys_of,
    links_sheet,
    observe,
    observe_measured,
    prior,
    sheet,
)
from benchmarks.published import Row, excluded, group_of, rows
from common.system.extras import install
from planner.hardware import DATA, get_profile


@dataclass
class Errors:
    """Relative errors of one row's prediction: fitted, left out, left out with its twins, from 1 and 2 GPUs only."""

    row: Row
    fitted: float
    left_out: float | None = None
    twins_out: float | None = None
    extrapolated: float | None = None


def row_of(o: Observation) -> Row:
    """The published row that an observation comes from."""
    assert o.row is not None, "measured observations have no published row"
    return o.row


def twins(one: Observation, observations: Sequence[Observation]) -> list[int]:
    """Observations of the same layout, model and size on the same machine, in whatever table they stand."""

    def same(o: Observation) -> tuple[Any, ...]:
        row = row_of(o)
        return (group_of(row).machine, row.model.name, row.size.num_frames, row.layout, bool(row.other.get("fsdp")))

    return [i for i, o in enumerate(observations) if same(o) == same(one)]


def errors(observations: Sequence[Observation], fit: Fit, leave_out: bool, tell: Callable[[str], None]) -> list[Errors]:
    problem = Problem(observations)
    found = [Errors(row_of(o), o.predict(fit.theta) / o.seconds - 1) for o in observations if o.kind != "decode"]
    if not leave_out:
        return found
    import numpy as np

    small = Problem([o for o in observations if o.layout.ranks <= 2]).solve()
    jacobian = problem.jacobian(np.array([fit.x[key] for key in problem.keys]))
    at = [i for i, o in enumerate(observations) if o.kind != "decode"]
    for number, (i, error) in enumerate(zip(at, found)):
        one = observations[i]
        alone = [k for k, o in enumerate(observations) if row_of(o).id == row_of(one).id]
        error.left_out = one.predict(problem.without(fit, jacobian, alone)) / one.seconds - 1
        together = sorted({*alone, *twins(one, observations)})
        error.twins_out = error.left_out
        if len({row_of(observations[k]).id for k in together}) > 1:
            error.twins_out = one.predict(problem.without(fit, jacobian, together)) / one.seconds - 1
        if one.layout.ranks >= 3:
            error.extrapolated = one.predict({**small.theta}) / one.seconds - 1
        if number % 25 == 24:
            tell(f"left out {number + 1} of {len(at)} rows")
    return found


def mean(values: Sequence[float | None]) -> float | None:
    given = [abs(v) for v in values if v is not None]
    return sum(given) / len(given) if given else None


@dataclass
class Choice:
    """The layout picked for a group and a number of GPUs, and how much more it costs than the best published one."""

    group: str
    model: str
    ranks: int
    best: Row
    planner: Row
    rule: Row

    @property
    def planner_loss(self) -> float:
        return self.planner.seconds / self.best.seconds - 1

    @property
    def rule_loss(self) -> float:
        return self.rule.seconds / self.best.seconds - 1


def _tables(found: Sequence[Errors]) -> list[list[Errors]]:
    """Rows that differ in nothing but the layout: one table, one number of GPUs, one program."""
    tables: dict[tuple[Any, ...], list[Errors]] = {}
    for error in found:
        row = error.row
        program = (row.implementation.split()[0], bool(row.other.get("fsdp")), row.kind)
        tables.setdefault((row.group, row.model.name, row.layout.ranks, program), []).append(error)
    return [table for table in tables.values() if len({e.row.layout for e in table}) > 1]


def choices(found: Sequence[Errors], of: Callable[[Errors], float | None]) -> list[Choice]:
    """Best layouts by the planner and by the rule "CFG first, then ring", among the published ones."""
    picked = []
    for table in _tables(found):
        predicted = {e.row.id: e.row.seconds * (1 + (of(e) or 0.0)) for e in table}
        rows_ = [e.row for e in table]
        picked.append(
            Choice(
                rows_[0].group,
                rows_[0].model.name,
                rows_[0].layout.ranks,
                best=min(rows_, key=lambda row: row.seconds),
                planner=min(rows_, key=lambda row: predicted[row.id]),
                rule=min(rows_, key=lambda row: (-row.layout.cfg, row.layout.ulysses)),
            )
        )
    return picked


def pairs_in_order(
    found: Sequence[Errors], of: Callable[[Errors], float | None], apart: float = 0.03
) -> tuple[int, int, int]:
    """Pairs with equal GPUs whose times differ by `apart` or more: (named right, named right by the rule, all)."""
    right = rule = total = 0
    for table in _tables(found):
        for i, a in enumerate(table):
            for b in table[i + 1 :]:
                fast, slow = sorted((a, b), key=lambda e: e.row.seconds)
                if slow.row.seconds < (1 + apart) * fast.row.seconds or fast.row.layout == slow.row.layout:
                    continue
                total += 1
                right += fast.row.seconds * (1 + (of(fast) or 0)) < slow.row.seconds * (1 + (of(slow) or 0))
                order = [(-e.row.layout.cfg, e.row.layout.ulysses) for e in (fast, slow)]
                rule += order[0] < order[1]
    return right, rule, total


def profiles(fit: Fit, observations: Sequence[Observation]) -> dict[str, dict[str, Any]]:
    """One profile for each published group, under its name; a second GPU or program of a group gets a suffix."""
    made: dict[str, dict[str, Any]] = {}
    fitted = {row_of(o).id: row_of(o).group for o in observations}
    used = {group: list(fitted.values()).count(group) for group in fitted.values()}
    for row in rows():
        name = row.group
        first = next(r for r in rows() if r.group == name)
        if row.gpu != first.gpu:
            name = f"{name}-{row.gpu}"
        elif row.other.get("fsdp") and not name.endswith("baseline"):
            name = f"{name}-fsdp"
        if name not in made:
            made[name] = _profile(row, fit, row.other.get("fsdp") or name.endswith("baseline"))
            count = used.get(row.group, 0)
            made[name]["calibrated_on"] = f"{count} rows of {row.group}" if count else f"other tables on {row.gpu}"
    return made


def _profile(row: Row, fit: Fit, fsdp: Any) -> dict[str, Any]:
    keys = keys_of(row)
    value = {name: _short(fit.theta.get(key, prior(key)[0])) for name, key in keys.items()}
    group = group_of(row)
    base = links_sheet(group, sheet(row).links)
    links = {name: value.pop(name) for name in LINKS}
    if ("speed", group.constants_of) not in fit.theta:
        value["other_s"] = 1.0
    links |= {"gpus_per_socket": base.gpus_per_socket, "balanced": base.balanced}
    links |= {"kind": "nvlink" if group.nvlink else "pcie", "source": f"fitted on {_group_with_links(row)}"}
    single = any(r.implementation.startswith("diffusers") for r in rows() if r.group == row.group)
    if not single:
        value["single_gpu"] = 1.0
    return {"gpu": row.gpu, "scheme": "reference", **value, "fsdp": bool(fsdp), "links": links}


def _group_with_links(row: Row) -> str:
    """The group that a row's links were fitted on: its own where that has several GPUs, else one of that machine."""
    machine = group_of(row).machine
    fitted = Counter(
        other.group
        for other in rows()
        if group_of(other).machine == machine and other.layout.ranks > 1 and other.id not in excluded()
    )
    return row.group if row.group in fitted or not fitted else fitted.most_common(1)[0][0]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def gpu_constants(fit: Fit, gpu: str) -> dict[str, Any]:
    """What a kind of GPU keeps when it is used by its own name: its efficiencies and what all share."""
    names = ("matmul", "attention", "convolution")
    own = {name: _short(fit.theta[name, gpu]) for name in names}
    shared = {name: _short(fit.theta[name, "*"]) for name in EVERYONE if name != "other_parallel"}
    return {**own, **shared, "elementwise": _short(fit.theta["elementwise", "diffusers"])}


def usual_links(data: dict[str, Any], gpu: str) -> dict[str, Any]:
    """Links of a kind of GPU: of the machine with most published rows among those with the GPU's usual kind of link.

    Empty where there is no such machine: the links stay assumed.
    """
    nvlink = data["gpus"][gpu]["link"] == "nvlink"
    together = [row for row in rows() if row.layout.ranks > 1 and row.id not in excluded()]
    mine = [row for row in together if row.gpu == gpu and group_of(row).nvlink == nvlink]
    if not mine:
        return {}
    machine = Counter(group_of(row).machine for row in mine).most_common(1)[0][0]
    group = Counter(row.group for row in mine if group_of(row).machine == machine).most_common(1)[0][0]
    fitted = data["profiles"][group]["links"]
    # To cross sockets is no short cut: above 1 the fit followed one machine's noise.
    return {name: fitted[name] for name in ("kind", "source", *LINKS)} | {"across": min(1.0, fitted["across"])}


def put(data: dict[str, Any], found: Sequence[Errors]) -> None:
    """The links of kinds of GPU and the mean errors of profiles, into hardware.json's tables."""
    for gpu in sorted({error.row.gpu for error in found}):
        data["gpus"][gpu]["links"] = data["gpus"][gpu].get("links", {}) | usual_links(data, gpu)
    for name, entry in data["profiles"].items():
        own = [e.fitted for e in found if name.startswith(e.row.group) and e.row.gpu == entry["gpu"]]
        entry["error"] = _short(mean(own) or 0.0)


def write(fit: Fit, observations: Sequence[Observation], found: Sequence[Errors], path: Path) -> None:
    """Write planner/hardware.json with new constants to `path`."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    for gpu in sorted({row_of(o).gpu for o in observations}):
        count = len({row_of(o).id for o in observations if row_of(o).gpu == gpu})
        data["gpus"][gpu] |= gpu_constants(fit, gpu) | {"calibrated_on": f"{count} published rows on {gpu}"}
    data["profiles"] = profiles(fit, observations)
    put(data, found)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def report(found: Sequence[Errors], fit: Fit) -> dict[str, Any]:
    """Everything docs/performance.md shows of a calibration, as plain data."""
    return {
        "constants": {f"{name}[{whose}]": _short(value) for (name, whose), value in fit.theta.items()},
        "groups": _by_group(found),
        "ordering": _ordering(found),
        "rows": [
            {
                "id": e.row.id,
                "layout": str(e.row.layout),
                "published": e.row.seconds,
                "kind": e.row.kind,
                "fitted": e.fitted,
                "left_out": e.left_out,
                "twins_out": e.twins_out,
                "from_1_and_2": e.extrapolated,
            }
            for e in found
        ],
        "excluded": excluded(),
    }


def _by_group(found: Sequence[Errors]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[Errors]] = {}
    for error in found:
        groups.setdefault((error.row.group, error.row.model.name, error.row.gpu), []).append(error)
    return [
        {
            "group": group,
            "model": model,
            "gpu": gpu,
            "rows": len(table),
            "fitted": mean([e.fitted for e in table]),
            "left_out": mean([e.left_out for e in table]),
            "twins_out": mean([e.twins_out for e in table]),
            "from_1_and_2": mean([e.extrapolated for e in table]),
        }
        for (group, model, gpu), table in groups.items()
    ]


def _ordering(found: Sequence[Errors]) -> dict[str, dict[str, Any]]:
    ways: dict[str, Callable[[Errors], float | None]] = {
        "fitted": lambda e: e.fitted,
        "left_out": lambda e: e.left_out if e.left_out is not None else e.fitted,
    }
    ordering = {}
    for name, of in ways.items():
        right, rule, total = pairs_in_order(found, of)
        picked = choices(found, of)
        ordering[name] = {
            "pairs": total,
            "right": right,
            "right_by_rule": rule,
            "tables": len(picked),
            "best": sum(c.planner_loss == 0 for c in picked),
            "best_by_rule": sum(c.rule_loss == 0 for c in picked),
            "worst_loss": max(c.planner_loss for c in picked),
            "worst_loss_by_rule": max(c.rule_loss for c in picked),
            "mean_loss": mean([c.planner_loss for c in picked]),
            "mean_loss_by_rule": mean([c.rule_loss for c in picked]),
        }
    return ordering


def show(result: dict[str, Any]) -> None:
    click.echo(f"{'group':26}{'model':20}{'rows':>5}{'fit %':>8}{'LOO %':>8}{'twins %':>9}{'from 1,2 %':>12}")
    for g in result["groups"]:
        cells = [percent(g[name]) for name in ("fitted", "left_out", "twins_out", "from_1_and_2")]
        click.echo(f"{g['group']:26}{g['model']:20}{g['rows']:5}{cells[0]:>8}{cells[1]:>8}{cells[2]:>9}{cells[3]:>12}")
    for way, o in result["ordering"].items():
        click.echo(
            f"{way}: pairs 3 % apart named right {o['right']}/{o['pairs']} (rule {o['right_by_rule']}); best layout "
            f"{o['best']}/{o['tables']} (rule {o['best_by_rule']}); worst loss {percent(o['worst_loss'])} % "
            f"(rule {percent(o['worst_loss_by_rule'])} %), mean {percent(o['mean_loss'])} % "
            f"(rule {percent(o['mean_loss_by_rule'])} %)"
        )
    click.echo(f"{len(result['excluded'])} rows are not fitted; benchmarks/published/excluded.json says why")


def own_profile(path: Path, gpu: str, output: Path) -> None:
    """Fit a machine's own constants to its measurements and write them as a profile for `--gpu`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        base = get_profile(gpu)
        observations = observe_measured(data["rows"], base)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise ValueError(f"{path} is no results file of benchmarks/run.py") from None
    problem = Problem(observations)
    found = problem.solve()
    names = {name: found.theta[key] for o in observations for name, key in o.keys.items()}
    made = build(base, {name: _short(value) for name, value in names.items()}, single=False)
    click.echo(f"{'layout':34}{'kind':10}{'measured':>10}{'fitted':>10}{'fit %':>8}{'LOO %':>8}")
    for o, without in zip(observations, _left_out(problem, found)):
        fitted = o.predict(found.theta)
        errors_ = [percent(seconds / o.seconds - 1) for seconds in (fitted, without) if seconds is not None]
        cells = "".join(f"{cell:>8}" for cell in errors_)
        click.echo(f"{o.layout!s:34}{o.kind:10}{o.seconds:>10.2f}{fitted:>10.2f}{cells}")
    own = asdict(made) | {"name": output.stem, "calibrated_on": f"{path.name}, {len(observations)} figures"}
    output.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
    click.echo(f"written: {output} (xdit-plan --model MODEL --gpu {output})")


def _left_out(problem: Problem, fit: Fit) -> list[float | None]:
    """Each figure predicted without its layout; None where it is the only layout."""
    import numpy as np

    observations = problem.observations
    if len({o.layout for o in observations}) < 2:
        return [None] * len(observations)
    jacobian = problem.jacobian(np.array([fit.x[key] for key in problem.keys]))
    found: list[float | None] = []
    for o in observations:
        same = [k for k, other in enumerate(observations) if other.layout == o.layout]
        found.append(o.predict(problem.without(fit, jacobian, same)))
    return found


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


@click.command()
@click.option(
    "--write",
    "data_path",
    type=click.Path(path_type=Path),
    callback=door.writable,
    help="Write planner/hardware.json with the new constants here.",
)
@click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path),
    callback=door.writable,
    help="Write errors and constants as JSON.",
)
@click.option("--quick", is_flag=True, help="No leave-one-out errors (they take minutes).")
@click.option(
    "--measured", type=click.Path(path_type=Path, exists=True), help="Results of run.py in place of the rows."
)
@click.option("--gpu", help="With --measured: the profile to start from.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    callback=door.writable,
    help="With --measured: the profile to write.",
)
def main(
    data_path: Path | None,
    report_path: Path | None,
    quick: bool,
    measured: Path | None,
    gpu: str | None,
    output: Path | None,
) -> None:
    """Fit the planner's constants and print how well the rows are predicted."""
    if find_spec("scipy") is None:
        raise click.UsageError(f"constants are fitted by scipy: {install('plot')}")
    if measured is not None:
        if gpu is None or output is None:
            raise click.UsageError("--measured needs --gpu, a profile to start from, and --output")
        try:
            own_profile(measured, gpu, output)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        return
    observations = [o for row in rows() if row.id not in excluded() for o in observe(row)]
    found = Problem(observations).solve()
    apart = errors(observations, found, not quick, lambda line: click.echo(line, err=True))
    result = report(apart, found)
    show(result)
    if report_path:
        report_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if data_path:
        write(found, observations, apart, data_path)


if __name__ == "__main__":
    main()
