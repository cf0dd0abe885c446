"""Least squares for the planner's constants: what is observed, what the constants are, and the solver.

Residuals are relative. Every constant has a log-normal prior, so a constant that the rows say nothing about stays
where it is; constants belong to all rows, to a kind of GPU, to a machine's links, or to a group (its speed and its
seconds outside sampling), never to a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.published import Group, Row, group_of, special_priors
from common.registry.forks import Model, Size, get_model
from common.registry.layout import Layout
from planner.hardware import Links, Profile, get_profile
from planner.model import Pass, Spread, outside_seconds, spread, step_in_groups, workload

Key = tuple[str, str]
"""A constant and whose it is: ("matmul", "l40")."""
RELATIVE_NOISE = 0.02
"""Repeatability of a measurement, beside the reading error of each row."""
TOLERANCE = 2.0
"""Residuals beyond this many standard deviations count linearly rather than squared."""
ITERATIONS = 40

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
LINKS = ("gbs", "across", "ring_gain", "contention")
EVERYONE = ("half_rows", "merge_bytes", "exposed", "layer_overhead_ms", "other_parallel")
OF_GPU = ("matmul", "attention", "convolution", "single_gpu")


def keys_of(row: Row) -> dict[str, Key]:
    group = group_of(row)
    keys = {name: (name, "*") for name in EVERYONE}
    keys |= {name: (name, group.kernels) for name in OF_GPU}
    keys |= {name: (name, group.machine) for name in LINKS}
    keys |= {name: (name, group.constants_of) for name in ("speed", "other_s")}
    keys |= {"fsdp_across": ("fsdp_across", group.machine), "elementwise": ("elementwise", group.program)}
    return keys


def prior(key: Key) -> tuple[float, float]:
    return special_priors().get(key, PRIORS[key[0]])


def sheet(row: Row) -> Profile:
    """What is known of a row's machine before any fit."""
    return get_profile(row.gpu)


def links_sheet(group: Group, links: Links) -> Links:
    """How ranks lie on the machine; the numbers are fitted."""
    return replace(links, gpus_per_socket=8 if group.nvlink else 4, balanced=group.balanced)


@dataclass
class Observation:
    """A figure to be explained, with all that does not depend on the constants worked out once."""

    row: Row | None
    """Where it comes from, None for a measured one."""
    model: Model
    size: Size
    layout: Layout
    scheme: str
    kind: str
    """`step`, `sampling`, `total` or `decode`."""
    seconds: float
    sigma: float
    keys: dict[str, Key]
    base: Profile
    work: list[list[Pass]]
    at: Spread

    prior: Callable[[Key], tuple[float, float]]

    def predict(self, theta: Mapping[Key, float]) -> float:
        single = self.row is not None and self.row.implementation.startswith("diffusers")
        value = {n: theta[k] if k in theta else self.prior(k)[0] for n, k in self.keys.items()}
        return self.evaluate(build(self.base, value, single))

    def evaluate(self, profile: Profile) -> float:
        """Seconds on a machine."""
        if self.kind == "decode":
            return outside_seconds(self.model, self.size, self.layout, profile, self.scheme)[1]
        how = (self.model, self.size, self.layout, profile, self.scheme, self.at)
        _, parts = step_in_groups(*how, work=self.work)
        seconds = sum(parts.values())
        if self.kind != "step":
            seconds *= self.size.num_steps
        if self.kind == "total":
            seconds += sum(outside_seconds(self.model, self.size, self.layout, profile, self.scheme))
        return seconds


def build(base: Profile, value: Mapping[str, float], single: bool) -> Profile:
    """The profile with some constants replaced."""
    of_links = {name: value[name] for name in LINKS if name in value}
    others = {n: v for n, v in value.items() if n not in LINKS and (single or n != "single_gpu")}
    return replace(base, links=replace(base.links, **of_links), **others)  # type: ignore[arg-type]


def observe(row: Row) -> list[Observation]:
    """A published row: its seconds, and its seconds of decoding where they are given."""
    base = sheet(row)
    base = replace(base, links=links_sheet(group_of(row), base.links), fsdp=bool(row.other.get("fsdp")))
    at = spread(row.layout, base.links, -(-row.layout.ranks // base.links.gpus_per_node))
    work = workload(row.model, row.size, row.layout, "reference")
    figures = [(row.kind, row.seconds, row.reading_error)]
    if "vae_decode_s" in row.other:
        # One program's decode time does not depend on the layout; together its rows count about once.
        figures.append(("decode", row.other["vae_decode_s"], 0.5 * row.other["vae_decode_s"]))
    found = []
    for kind, seconds, error in figures:
        sigma = math.hypot(RELATIVE_NOISE, 0.6 * error / seconds)
        what = (row, row.model, row.size, row.layout, "reference", kind, seconds, sigma)
        found.append(Observation(*what, keys_of(row), base, work, at, prior))
    return found


OWN = ("matmul", "attention", "convolution", "elementwise", "layer_overhead_ms", *LINKS)
"""What a user's measurements can move; everything else stays as in the profile they start from."""


def observe_measured(rows_: Sequence[Mapping[str, Any]], base: Profile) -> list[Observation]:
    """Rows of run.py on one machine, our program: sampling and decoding. ValueError when there is none.

    Constants start from those of `base`, with the spread that the published tables' have.
    """

    def around(key: Key) -> tuple[float, float]:
        name = key[0]
        return getattr(base.links if name in LINKS else base, name), PRIORS[name][1]

    found = []
    for row in rows_:
        key = row["key"]
        if "error" in row or key["program"] != "ours":
            continue
        model, layout = get_model(key["model"]), Layout(key["cfg"], key["ring"], key["ulysses"])
        size = Size(key["width"], key["height"], key["num_frames"], key["num_steps"], key["guided"])
        if problems := model.problems(size):
            raise ValueError(f"the results hold a row of an impossible size: {'; '.join(problems)}")
        at = spread(layout, base.links, -(-layout.ranks // base.links.gpus_per_node))
        names = [n for n in OWN if layout.sequence > 1 or n not in ("layer_overhead_ms", *LINKS)]
        keys = {name: (name, "own") for name in names}
        work = workload(model, size, layout, "ours")
        for kind in ("sampling", "decode"):
            seconds = row["stages_s"].get(kind)
            if seconds and not 0 < seconds < math.inf:
                raise ValueError(f"the results hold a row of {seconds} seconds")
            if seconds:
                what = (None, model, size, layout, "ours", kind, seconds, RELATIVE_NOISE)
                found.append(Observation(*what, keys, base, work, at, around))
    if not found:
        raise ValueError("the results hold no row of our program that succeeded")
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
        self.priors = [next(o.prior(key) for o in observations if key in o.keys.values()) for key in self.keys]
        self.touched = [[r for r, o in enumerate(observations) if key in o.keys.values()] for key in self.keys]

    def theta(self, x: Any) -> dict[Key, float]:
        return {k: m * math.exp(sd * x[i]) for i, (k, (m, sd)) in enumerate(zip(self.keys, self.priors))}

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
            moved = {**theta, key: theta[key] * math.exp(self.priors[i][1] * h)}
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
