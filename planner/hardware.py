"""Hardware profiles: what a GPU and its links can do, and the few constants that were calibrated.

`hardware.json` holds three tables. `links`: kinds of links between the GPUs of a machine. `gpus`: data sheets and
constants of a kind of GPU. `profiles`: groups of published rows, each a GPU, the links of that machine and what was
calibrated on it. xdit-doctor writes a file of one profile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("hardware.json")
GIGA = 1e9
SCHEMES = ("ours", "reference")


@dataclass(frozen=True)
class Links:
    """The links of a machine, and between machines. Bandwidths: GB/s that a GPU sends while it receives as much."""

    kind: str = "pcie"
    source: str = "assumed"
    """Where the numbers come from, in words that follow them."""
    gbs: float = 16.0
    across: float = 0.8
    """Factor on it for groups that lie across two sockets."""
    ring_gain: float = 1.1
    """Factor on it in rings of more than two, where a link carries one direction only."""
    contention: float = 2.5
    """Loss of an all-to-all with u > 3 ranks: it takes 1 + contention (u - 3) times as long."""
    gpus_per_socket: int = 4
    balanced: bool = False
    """Whether ranks are spread evenly over the sockets, rather than filling the first."""
    gpus_per_node: int = 8
    node_gbs: float = 25.0
    """What one machine sends to the others, all its GPUs together."""

    def __str__(self) -> str:
        return f"{self.kind}, {self.gbs:.3g} GB/s {self.source}"


@dataclass(frozen=True)
class Machine:
    """What tells one machine from another: the kind of its devices (cuda or cpu), their name and their number."""

    device: str
    name: str
    count: int

    def __str__(self) -> str:
        return f"{self.count} x {self.name}"


@dataclass(frozen=True)
class Profile:
    """All the planner knows of a machine. Efficiencies are fractions of the peak."""

    name: str
    gpu: str
    tflops: float
    """Dense bf16 peak."""
    hbm_gbs: float
    memory_gib: float
    links: Links = field(default_factory=Links)
    scheme: str = "ours"
    """Whose scheme the profile stands for when none is asked for."""
    matmul: float = 0.6
    attention: float = 0.6
    convolution: float = 0.25
    elementwise: float = 25.0
    """Times that a token's channels are read or written between matrix products, in a layer."""
    half_rows: float = 250.0
    """Tokens at which matrix products reach half their efficiency."""
    merge_bytes: float = 22.0
    """Bytes per channel and hop for merging the partial results of a ring."""
    exposed: float = 0.6
    """Share of an exchange that goes under no work: fitted on published rings, assumed for head groups on GPUs."""
    group_ms: float = 0.06
    """Per layer and further group of heads, for launches and smaller kernels: assumed."""
    copying: float = 0.0
    """Seconds for each byte sent in which nothing is computed: of a CPU, whose cores carry its messages."""
    layer_overhead_ms: float = 0.12
    """Per layer where tokens are split: launches and waiting for the slowest rank."""
    launch_floor_ms: float = 0.25
    """A layer's kernels cannot be launched faster than this."""
    single_gpu: float = 1.0
    """Factor on the compute of one GPU, where the table's single-GPU row is another program."""
    speed: float = 1.0
    """Factor on a step: software version, clocks."""
    other_s: float = 1.0
    """Seconds end to end outside text, sampling and decoding."""
    other_parallel: float = 1.0
    """Factor on everything outside sampling when there is more than one GPU."""
    fsdp: bool = False
    """Whether more than one GPU means weights gathered for every pass (reference scheme only)."""
    fsdp_across: float = 0.28
    calibrated_on: str = ""
    """Which rows the constants come from; empty for data sheet and defaults."""
    error: float = 0.0
    """Mean relative error of the rows that the constants were fitted to."""
    machine: Machine | None = None
    """The machine that xdit-doctor measured."""

    @property
    def calibration(self) -> str:
        """What the constants come from, and how well they explain it."""
        if not self.calibrated_on:
            return "not calibrated: data sheet"
        apart = f", mean error {100 * self.error:.1f} %" if self.error else ""
        what = "" if self.links.source.startswith("fitted") else "compute "
        return f"{what}calibrated on {self.calibrated_on}{apart}"


def _table() -> dict[str, Any]:
    return json.loads(DATA.read_text(encoding="utf-8"))


@cache
def table() -> Mapping[str, Any]:
    """hardware.json."""
    return _table()


_LINKS = {f.name for f in fields(Links)}


# What a profile's numbers must lie between, both included; a bare default suits what is a factor, a time or a count.
_ANY, _ABOVE_0 = (0.0, 1e6), (1e-6, 1e6)
_BOUNDS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("tflops", "hbm_gbs", "memory_gib", "gbs", "node_gbs"), _ABOVE_0),
    **dict.fromkeys(("matmul", "attention", "convolution", "across", "ring_gain", "fsdp_across"), _ABOVE_0),
    **dict.fromkeys(("single_gpu", "speed"), _ABOVE_0),
    **dict.fromkeys(("gpus_per_socket", "gpus_per_node"), (1.0, 1e6)),
    "exposed": (0.0, 1.0),
}
_LONGEST_FILE = 1 << 20


def read_profile(path: Path) -> Profile:
    """A profile that xdit-doctor or benchmarks/calibrate.py wrote. ValueError says what is wrong with the file."""
    try:
        with path.open(encoding="utf-8") as file:
            raw = json.loads(file.read(_LONGEST_FILE))
    except OSError as error:
        raise ValueError(f"hardware profile {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"hardware profile {path} is not readable JSON: {error}") from None
    raw = raw.get("profile", raw) if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or not {"gpu", "tflops", "hbm_gbs", "memory_gib"} <= raw.keys():
        raise ValueError(f"hardware profile {path} lacks gpu, tflops, hbm_gbs or memory_gib; xdit-doctor writes one")
    try:
        return make_profile(raw.get("name", path.stem), raw)
    except ValueError as error:
        raise ValueError(f"hardware profile {path}: {error}; xdit-doctor writes one anew") from None


def make_profile(name: str, raw: Mapping[str, Any]) -> Profile:
    """From the flat fields of a profile, its `links` and its `machine`; unknown fields are notes.

    Raises ValueError, with the field, for a value of the wrong kind or out of bounds.
    """
    links, machine = raw.get("links", {}), raw.get("machine") or {}
    for part, table_ in (("links", links), ("machine", machine)):
        if not isinstance(table_, Mapping):
            raise ValueError(f"{part} is {_shown(table_)}, not a table")
    own = _checked(Profile, {"name": name, **{k: v for k, v in raw.items() if k not in ("links", "machine", "name")}})
    values = _checked(Machine, machine, "machine.")
    whole = values.keys() == {one.name for one in fields(Machine)}
    profile = Profile(
        links=Links(**_checked(Links, links, "links.")), machine=Machine(**values) if whole else None, **own
    )
    if profile.scheme not in SCHEMES:
        raise ValueError(f"scheme is {_shown(profile.scheme)}; it must be one of {', '.join(SCHEMES)}")
    return profile


def _checked(
    kind: type[Profile] | type[Links] | type[Machine], raw: Mapping[str, Any], within: str = ""
) -> dict[str, Any]:
    """The values of the fields of `kind` that are given, each of the field's type and within its bounds."""
    values = {}
    for one in fields(kind):
        if one.name in raw:
            value, low_high = raw[one.name], _BOUNDS.get(one.name, _ANY)
            if problem := _problem(str(one.type), value, *low_high):
                raise ValueError(f"{within}{one.name} is {_shown(value)}; it must be {problem}")
            values[one.name] = value
    return values


def _problem(kind: str, value: object, low: float, high: float) -> str | None:
    """What a value should be instead; kind: its field's type. NaN lies within no bounds."""
    if kind in ("str", "bool"):
        return None if type(value).__name__ == kind else {"str": "a text", "bool": "true or false"}[kind]
    numbers = int if kind == "int" else (int, float)
    if isinstance(value, numbers) and not isinstance(value, bool) and low <= value <= high:
        return None
    return f"{'a whole number' if kind == 'int' else 'a number'} from {low:g} to {high:g}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def names() -> tuple[list[str], list[str]]:
    """(kinds of GPU, calibrated profiles) that `get_profile` knows."""
    return list(table()["gpus"]), list(table()["profiles"])


def known_names() -> str:
    """What `get_profile` takes, in words."""
    kinds = ", ".join(names()[0])
    return f"a kind of GPU ({kinds}), a calibrated profile (see --list-gpus), or the path of one of xdit-doctor's"


def published_machines(profile: Profile) -> dict[str, Profile]:
    """The profiles of machines with this kind of GPU and other links, fitted to rows of their own, one for each.

    Empty for what is no kind of GPU.
    """
    machines: dict[tuple[str, float], tuple[str, Profile]] = {}
    for name, entry in table()["profiles"].items():
        if entry["gpu"] == profile.name and entry.get("error"):
            other = get_profile(name)
            machines.setdefault((other.links.kind, other.links.gbs), (name, other))
    machines.pop((profile.links.kind, profile.links.gbs), None)
    return dict(machines.values())


def describe(name: str) -> str:
    """One line about a name: data sheet, and what its constants come from."""
    profile = get_profile(name)
    what = f"{profile.tflops:g} TFLOP/s bf16, {profile.hbm_gbs:g} GB/s, {profile.memory_gib:g} GiB"
    return f"{what}; {profile.links}; {profile.calibration}"


def get_profile(name: str, link: str | None = None, node_gbs: float | None = None) -> Profile:
    """A kind of GPU (`l40`), a calibrated profile (`mochi-l40-e2e`) or the path of a profile file.

    link: kind of link or GB/s in place of the profile's own. node_gbs: between machines.
    Raises ValueError naming what is known.
    """
    data = table()
    if name.endswith(".json") or "/" in name:
        profile = read_profile(Path(name).expanduser())
    elif name in data["profiles"]:
        entry = data["profiles"][name]
        profile = make_profile(name, {**data["gpus"][entry["gpu"]], **entry, "links": _links(data, entry)})
    elif name.lower() in data["gpus"]:
        entry = data["gpus"][name.lower()]
        profile = make_profile(name.lower(), {**entry, "gpu": name.lower(), "links": _links(data, entry)})
    else:
        raise ValueError(f"--gpu {name} is unknown; {known_names()}")
    return with_links(profile, link, node_gbs)


def with_links(profile: Profile, link: str | None, node_gbs: float | None) -> Profile:
    """The profile with another kind of link or GB/s, and other GB/s between machines; None keeps its own."""
    links = profile.links if link is None else parse_link(link, profile.links)
    return replace(profile, links=links if node_gbs is None else replace(links, node_gbs=node_gbs))


def _links(data: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    links = entry.get("links", {})
    kind = links.get("kind", entry.get("link", "pcie"))
    return {**data["links"][kind], "kind": kind, **links}


def parse_link(link: str, old: Links) -> Links:
    """`nvlink`, `pcie`, `pcie+qpi` or a number of GB/s, which keeps what else is known of the machine."""
    kinds = table()["links"]
    if link in kinds:
        values = {k: v for k, v in kinds[link].items() if k in _LINKS}
        return Links(**{**values, "kind": link, "gpus_per_node": old.gpus_per_node, "node_gbs": old.node_gbs})
    try:
        gbs = float(link)
    except ValueError:
        gbs = 0.0
    if not 0 < gbs < float("inf"):
        raise ValueError(f"--link {link} is unknown; choose {', '.join(kinds)} or a number of GB/s above 0")
    return replace(old, gbs=gbs, source="as given")
