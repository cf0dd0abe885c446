"""Calibrate the planner: least squares over published rows, or over rows that run.py measured.

    python benchmarks/calibrate.py                  # fit, and print errors in-sample and leave-one-out
    python benchmarks/calibrate.py --write          # and put the constants into planner/hardware.json
    python benchmarks/calibrate.py --measured results/bench.json --gpu h200 --output my-machine.json

Residuals are relative. Every constant has a log-normal prior, so a constant that the rows say nothing about stays
where it is; constants belong to all rows, to a kind of GPU, to a machine's links, or to a group (its speed and its
seconds outside sampling), never to a row. Needs scipy: pip install 'xdit-zoo[plot]'.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published import Row, excluded, rows
from planner.hardware import DATA, Links, Profile, get_profile
from planner.model import Pass, Spread, outside_seconds, spread, step_seconds, workload

Key = tuple[str, str]
"""A constant and whose it is: ("matmul", "l40")."""
RELATIVE_NOISE = 0.02
"""Repeatability of a measurement, beside the reading error of each row."""
TOLERANCE = 2.0
"""Residuals beyond this many standard deviations count linearly rather than squared."""
ITERATIONS = 40

NVLINK = ("mochi-h20", "a100-para")
PRIORS: Mapping[str, tuple[float, float]] = {
    # name: (median, standard deviation of the logarithm)
    "matmul": (0.62, 0.2),
    "attention": (0.62, 0.2),
    "convolution": (0.25, 0.5),
    "single_gpu": (1.0, 0.03),
    "half_rows": (300, 0.5),
    "merge_bytes": (40, 0.4),
    "exposed": (0.5, 0.3),
    "layer_overhead_ms": (0.15, 0.7),
    "other_parallel": (1.05, 0.08),
    "elementwise": (25, 0.3),
    "speed": (1.0, 0.03),
    "other_s": (7, 0.8),
    "fsdp_across": (0.3, 0.5),
    "gbs": (20, 0.8),
    "across": (0.8, 0.5),
    "ring_gain": (1.3, 0.3),
    "contention": (1.5, 0.7),
}
SPECIAL: Mapping[Key, tuple[float, float]] = {
    # Where the source names the link, the prior knows it.
    **{("gbs", machine): (130, 0.8) for machine in NVLINK},
    **{("contention", machine): (0.15, 0.7) for machine in NVLINK},
    **{("across", machine): (1.0, 0.2) for machine in NVLINK},
    ("across", "l40-mochi"): (0.1, 0.7),
    ("elementwise", "mochi"): (40, 0.6),
}
LINKS = ("gbs", "across", "ring_gain", "contention")
EVERYONE = ("half_rows", "merge_bytes", "exposed", "layer_overhead_ms", "other_parallel")
OF_GPU = ("matmul", "attention", "convolution", "single_gpu")


def machine_of(row: Row) -> str:
    """Tables made on the same machine share its links."""
    if row.group.startswith("mochi-l40"):
        return "l40-mochi"
    if row.group == "mochi-h20":
        return "mochi-h20"
    if row.group == "mochi-a100-para":
        return "a100-para"
    return row.gpu


def group_of(row: Row) -> str:
    """Whose `speed` and `other_s`: Mochi's tables on L40 are of one machine and one program."""
    return "mochi-l40" if row.group.startswith("mochi-l40") else row.group


def program_of(row: Row) -> str:
    """Whose elementwise traffic: Mochi's own program norms in fp32, diffusers' models share their style."""
    return "mochi" if row.model.family == "mochi" and row.group != "mochi-a100-para" else "diffusers"


def keys_of(row: Row) -> dict[str, Key]:
    keys = {name: (name, "*") for name in EVERYONE}
    keys |= {name: (name, row.gpu) for name in OF_GPU}
    keys |= {name: (name, machine_of(row)) for name in LINKS}
    keys |= {name: (name, group_of(row)) for name in ("speed", "other_s")}
    keys |= {"fsdp_across": ("fsdp_across", machine_of(row)), "elementwise": ("elementwise", program_of(row))}
    return keys


def prior(key: Key) -> tuple[float, float]:
    return SPECIAL.get(key, PRIORS[key[0]])


def sheet(row: Row) -> Profile:
    """What is known of a row's machine before any fit."""
    return get_profile(row.gpu)


def links_sheet(machine: str, links: Links) -> Links:
    """How ranks lie on the machine; the numbers are fitted."""
    nvlink = machine in NVLINK
    return replace(links, gpus_per_socket=8 if nvlink else 4, balanced=machine == "l40-mochi")


@dataclass
class Observation:
    """A figure to be explained, with all that does not depend on the constants worked out once."""

    row: Row
    kind: str
    seconds: float
    sigma: float
    keys: dict[str, Key]
    base: Profile
    work: list[list[Pass]]
    at: Spread

    def predict(self, theta: Mapping[Key, float]) -> float:
        profile = build(self.base, self.keys, theta, single=self.row.implementation.startswith("diffusers"))
        return evaluate(self, profile)


def build(base: Profile, keys: Mapping[str, Key], theta: Mapping[Key, float], single: bool) -> Profile:
    value = {name: theta.get(key, prior(key)[0]) for name, key in keys.items()}
    links = replace(base.links, **{name: value.pop(name) for name in LINKS})
    if not single:
        value.pop("single_gpu")
    return replace(base, links=links, **value)


def evaluate(what: Observation, profile: Profile) -> float:
    row = what.row
    if what.kind == "decode":
        return outside_seconds(row.model, row.size, row.degrees, profile, "reference")[1]
    step = step_seconds(row.model, row.size, row.degrees, profile, "reference", what.at, what.work)
    seconds = sum(step.values())
    if what.kind != "step":
        seconds *= row.size.num_steps
    if what.kind == "total":
        seconds += sum(outside_seconds(row.model, row.size, row.degrees, profile, "reference"))
    return seconds


def observe(row: Row) -> list[Observation]:
    base = sheet(row)
    base = replace(base, links=links_sheet(machine_of(row), base.links), fsdp=bool(row.other.get("fsdp")))
    at = spread(row.degrees, base.links, -(-row.degrees.ranks // base.links.gpus_per_node))
    work = workload(row.model, row.size, row.degrees, "reference")
    figures = [(row.kind, row.seconds, row.reading_error)]
    if "vae_decode_s" in row.other:
        # One program's decode time does not depend on the layout; together its rows count about once.
        figures.append(("decode", row.other["vae_decode_s"], 0.5 * row.other["vae_decode_s"]))
    found = []
    for kind, seconds, error in figures:
        sigma = math.hypot(RELATIVE_NOISE, 0.6 * error / seconds)
        found.append(Observation(row, kind, seconds, sigma, keys_of(row), base, work, at))
    return found


@dataclass
class Fit:
    theta: dict[Key, float]
    x: dict[Key, float]
    """In standard deviations of the prior."""


class Problem:
    """Least squares over observations: relative residuals with a smooth linear-beyond-TOLERANCE loss, and the priors.

    Maximum a posteriori. The Jacobian is sparse: a constant touches only the rows that it belongs to.
    """

    def __init__(self, observations: Sequence[Observation]) -> None:
        self.observations = observations
        self.keys = sorted({key for o in observations for key in o.keys.values()})
        self.touched = [[r for r, o in enumerate(observations) if key in o.keys.values()] for key in self.keys]

    def theta(self, x: Any) -> dict[Key, float]:
        return {key: prior(key)[0] * math.exp(prior(key)[1] * x[i]) for i, key in enumerate(self.keys)}

    def residual(self, r: int, theta: Mapping[Key, float]) -> float:
        o = self.observations[r]
        error = math.log(o.predict(theta) / o.seconds) / o.sigma
        return math.copysign(TOLERANCE * math.sqrt(2 * (math.sqrt(1 + (error / TOLERANCE) ** 2) - 1)), error)

    def residuals(self, x: Any) -> Any:
        import numpy as np

        theta = self.theta(x)
        return np.concatenate([[self.residual(r, theta) for r in range(len(self.observations))], x])

    def jacobian(self, x: Any) -> Any:
        import numpy as np

        rows = len(self.observations)
        out, theta, h = np.zeros((rows + len(self.keys), len(self.keys))), self.theta(x), 1e-4
        base = [self.residual(r, theta) for r in range(rows)]
        for i, key in enumerate(self.keys):
            moved = {**theta, key: theta[key] * math.exp(prior(key)[1] * h)}
            for r in self.touched[i]:
                out[r, i] = (self.residual(r, moved) - base[r]) / h
            out[rows + i, i] = 1.0
        return out

    def solve(self) -> Fit:
        import numpy as np
        from scipy.optimize import least_squares

        x0 = np.zeros(len(self.keys))
        found = least_squares(self.residuals, x0, jac=self.jacobian, max_nfev=ITERATIONS, xtol=1e-4, ftol=1e-4)
        return Fit(self.theta(found.x), dict(zip(self.keys, found.x.tolist())))

    def without(self, fit: Fit, jacobian: Any, left_out: Sequence[int], refresh: int = 1) -> dict[Key, float]:
        """The constants when some observations are left out: Gauss-Newton from the full fit.

        The full fit's Jacobian serves for a few steps, then a fresh one is taken `refresh` times.
        """
        import numpy as np

        rows = [r for r in range(len(self.observations)) if r not in left_out]
        part = Problem([self.observations[r] for r in rows])
        columns = [self.keys.index(key) for key in part.keys]
        keep = rows + [len(self.observations) + c for c in columns]
        slope = jacobian[np.ix_(keep, columns)]
        x = np.array([fit.x[key] for key in part.keys])
        for again in range(refresh + 1):
            if again:
                slope = part.jacobian(x)
            inverse = np.linalg.pinv(slope)
            for _ in range(6):
                step = np.clip(inverse @ part.residuals(x), -1, 1)
                x = x - step
                if np.abs(step).max() < 5e-3:
                    break
            if again == 0 and np.abs(x - [fit.x[key] for key in part.keys]).max() < 0.3:
                break  # hardly moved: the Jacobian is still good
        return part.theta(x)


@dataclass
class Errors:
    """Relative errors of one row's prediction: fitted, left out, left out with its twins, from 1 and 2 GPUs only."""

    row: Row
    fitted: float
    left_out: float | None = None
    twins_out: float | None = None
    extrapolated: float | None = None


def twins(one: Observation, observations: Sequence[Observation]) -> list[int]:
    """Observations of the same layout, model and size on the same machine, in whatever table they stand."""

    def same(o: Observation) -> tuple[Any, ...]:
        row = o.row
        return (machine_of(row), row.model.name, row.size.num_frames, row.degrees, bool(row.other.get("fsdp")))

    return [i for i, o in enumerate(observations) if same(o) == same(one)]


def errors(observations: Sequence[Observation], fit: Fit, leave_out: bool, tell: Callable[[str], None]) -> list[Errors]:
    problem = Problem(observations)
    found = [Errors(o.row, o.predict(fit.theta) / o.seconds - 1) for o in observations if o.kind != "decode"]
    if not leave_out:
        return found
    import numpy as np

    small = Problem([o for o in observations if o.row.degrees.ranks <= 2]).solve()
    jacobian = problem.jacobian(np.array([fit.x[key] for key in problem.keys]))
    at = [i for i, o in enumerate(observations) if o.kind != "decode"]
    for number, (i, error) in enumerate(zip(at, found)):
        one = observations[i]
        alone = [k for k, o in enumerate(observations) if o.row.id == one.row.id]
        error.left_out = one.predict(problem.without(fit, jacobian, alone)) / one.seconds - 1
        together = sorted({*alone, *twins(one, observations)})
        error.twins_out = error.left_out
        if len({observations[k].row.id for k in together}) > 1:
            error.twins_out = one.predict(problem.without(fit, jacobian, together)) / one.seconds - 1
        if one.row.degrees.ranks >= 3:
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
        tables.setdefault((row.group, row.model.name, row.degrees.ranks, program), []).append(error)
    return [table for table in tables.values() if len({e.row.degrees for e in table}) > 1]


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
                rows_[0].degrees.ranks,
                best=min(rows_, key=lambda row: row.seconds),
                planner=min(rows_, key=lambda row: predicted[row.id]),
                rule=min(rows_, key=lambda row: (-row.degrees.cfg, row.degrees.ulysses)),
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
                if slow.row.seconds < (1 + apart) * fast.row.seconds or fast.row.degrees == slow.row.degrees:
                    continue
                total += 1
                right += fast.row.seconds * (1 + (of(fast) or 0)) < slow.row.seconds * (1 + (of(slow) or 0))
                order = [(-e.row.degrees.cfg, e.row.degrees.ulysses) for e in (fast, slow)]
                rule += order[0] < order[1]
    return right, rule, total


def profiles(fit: Fit, observations: Sequence[Observation]) -> dict[str, dict[str, Any]]:
    """One profile for each published group, under its name; a second GPU or program of a group gets a suffix."""
    made: dict[str, dict[str, Any]] = {}
    used = {o.row.group: 0 for o in observations}
    for o in observations:
        used[o.row.group] += 1
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
    base = links_sheet(machine_of(row), sheet(row).links)
    links = {name: value.pop(name) for name in LINKS}
    if ("speed", group_of(row)) not in fit.theta:
        value["other_s"] = 1.0
    links |= {"gpus_per_socket": base.gpus_per_socket, "balanced": base.balanced}
    links["kind"] = "nvlink" if machine_of(row) in NVLINK else "pcie"
    single = any(r.implementation.startswith("diffusers") for r in rows() if r.group == row.group)
    if not single:
        value["single_gpu"] = 1.0
    return {"gpu": row.gpu, "scheme": "reference", **value, "fsdp": bool(fsdp), "links": links}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def gpu_constants(fit: Fit, gpu: str) -> dict[str, Any]:
    """What a kind of GPU keeps when it is used by its own name: its efficiencies and what all share."""
    names = ("matmul", "attention", "convolution")
    own = {name: _short(fit.theta[name, gpu]) for name in names}
    shared = {name: _short(fit.theta[name, "*"]) for name in EVERYONE if name != "other_parallel"}
    return {**own, **shared, "elementwise": _short(fit.theta["elementwise", "diffusers"])}


def write(fit: Fit, observations: Sequence[Observation]) -> None:
    """Put the constants into planner/hardware.json."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    for gpu in sorted({o.row.gpu for o in observations}):
        count = len({o.row.id for o in observations if o.row.gpu == gpu})
        data["gpus"][gpu] |= gpu_constants(fit, gpu) | {"calibrated_on": f"{count} published rows on {gpu}"}
    data["profiles"] = profiles(fit, observations)
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def report(found: Sequence[Errors], fit: Fit) -> dict[str, Any]:
    """Everything docs/performance.md shows of a calibration, as plain data."""
    groups: dict[tuple[str, str, str], list[Errors]] = {}
    for error in found:
        groups.setdefault((error.row.group, error.row.model.name, error.row.gpu), []).append(error)
    by_group = [
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
    return {
        "constants": {f"{name}[{whose}]": _short(value) for (name, whose), value in fit.theta.items()},
        "groups": by_group,
        "ordering": ordering,
        "rows": [
            {
                "id": e.row.id,
                "layout": str(e.row.degrees),
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


def show(result: dict[str, Any]) -> None:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

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


@click.command()
@click.option("--write", "do_write", is_flag=True, help="Put the constants into planner/hardware.json.")
@click.option("--report", "report_path", type=click.Path(path_type=Path), help="Write errors and constants as JSON.")
@click.option("--quick", is_flag=True, help="No leave-one-out errors (they take minutes).")
def main(do_write: bool, report_path: Path | None, quick: bool) -> None:
    """Fit the planner's constants to the published rows and print how well they are predicted."""
    observations = [o for row in rows() if row.id not in excluded() for o in observe(row)]
    found = Problem(observations).solve()
    result = report(errors(observations, found, not quick, lambda line: click.echo(line, err=True)), found)
    show(result)
    if report_path:
        report_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if do_write:
        write(found, observations)


if __name__ == "__main__":
    main()
