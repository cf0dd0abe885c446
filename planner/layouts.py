"""Which layouts a number of GPUs admits, why others are refused, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from common.registry.forks import Model, Size, get_model
from common.registry.forks import models as known_models
from common.registry.layout import MOST_RANKS, RULE, Layout, guidance_first, layouts_of
from planner.hardware import Profile, get_profile
from planner.machine import local_profile, with_hiding
from planner.model import RUNTIME_GIB, Prediction, memory_gib, predict

MOST_PIXELS, MOST_FRAMES, MOST_STEPS = 65_536, 1_000_000, 1_000_000
"""Beyond what any machine makes."""
WORTH = 0.03
"""Of a step: what turns of guidance branches have to save, which take memory."""


@dataclass(frozen=True)
class Refusal:
    """A layout that is not possible, and why."""

    layout: Layout
    reason: str


def refusal(model: Model, size: Size, layout: Layout, scheme: str, profile: Profile | None = None) -> str | None:
    """Why a layout cannot run; None when it can. With a profile, also whether its GPUs have the memory."""
    if layout.cfg == 2 and not size.guided:
        return "cfg 2 computes the two guidance branches apart, and without guidance there is one"
    if layout.ulysses > model.heads:
        return f"ulysses {layout.ulysses} is more than the {model.heads} attention heads; the rest can go to ring"
    if scheme == "reference":
        return _reference_refusal(model, size, layout)
    if profile is not None:
        need = memory_gib(model, size, layout, scheme)["sampling"] + RUNTIME_GIB
        if need > profile.memory_gib:
            return (
                f"sampling needs {need:.1f} GiB on each GPU, which has {profile.memory_gib:g}; --shard-weights or "
                "--offload make it fit, at a cost that is not predicted here"
            )
    return None


def _reference_refusal(model: Model, size: Size, layout: Layout) -> str | None:
    """The published systems want everything to divide evenly."""
    if model.heads % layout.ulysses:
        return f"the reference needs the {model.heads} heads to divide by ulysses {layout.ulysses}"
    name, count = "video tokens", model.video_tokens(size)
    if model.published.divides_rows:
        name, count = "rows of patches", model.latents.sampled(size)[1] // model.latents.patch[1]
    if count % layout.sequence:
        return f"the reference needs the {count} {name} to divide by {layout.sequence}"
    return None


def beyond(size: Size, ranks: int) -> list[str]:
    """What is more than any machine holds, or a number of GPUs below 1."""
    limits = (
        *(("--gpus", ranks, MOST_RANKS), ("--width", size.width, MOST_PIXELS), ("--height", size.height, MOST_PIXELS)),
        *(("--num-frames", size.num_frames, MOST_FRAMES), ("--num-steps", size.num_steps, MOST_STEPS)),
    )
    problems = [f"{name} {value} is too large; at most {most}" for name, value, most in limits if value > most]
    return problems if ranks > 0 else [*problems, f"--gpus {ranks} is not a positive number"]


@dataclass(frozen=True)
class Plan:
    """Every layout of a number of GPUs on a machine, fastest first."""

    model: Model
    size: Size
    profile: Profile
    scheme: str
    ranks: int
    nodes: int
    layouts: list[Prediction]
    refused: list[Refusal]
    single: Prediction

    @property
    def best(self) -> Prediction:
        return self.layouts[0]

    def speedup(self, one: Prediction) -> float:
        return self.single.total / one.total


def plan(
    model: Model,
    size: Size,
    ranks: int,
    profile: Profile,
    scheme: str | None = None,
    nodes: int | None = None,
    groups: int | None = None,
) -> Plan:
    """All layouts of `ranks` GPUs. groups: of heads; None: the best number for each layout.

    Raises ValueError for a size the model cannot make, and when no layout is left."""
    scheme = scheme or profile.scheme
    nodes = nodes if nodes is not None else max(1, -(-ranks // profile.links.gpus_per_node))
    problems = model.problems(size) + beyond(size, ranks)
    if not 1 <= nodes <= max(ranks, 1):
        problems.append(f"--nodes {nodes} is not between 1 and the {ranks} GPUs")
    if problems:
        raise ValueError("\n".join(problems))
    layouts, refusals = [], []
    for layout in layouts_of(ranks):
        reason = refusal(model, size, layout, scheme, profile)
        if reason:
            refusals.append(Refusal(layout, reason))
        else:
            layouts.append(predict(model, size, layout, profile, scheme, nodes, groups))
    if not layouts:
        raise ValueError(f"no layout of {ranks} GPUs is possible: {refusals[0].layout}: {refusals[0].reason}")
    layouts.sort(key=lambda p: p.total)
    single = predict(model, size, Layout(), profile, scheme, 1)
    return Plan(model, size, profile, scheme, ranks, nodes, layouts, refusals, single)


def enough(whole: Plan) -> Prediction:
    """The best layout of the fewest GPUs beyond which the video gets less than 3 % faster."""
    candidates = [whole.best]
    for ranks in range(1, whole.ranks):
        nodes = -(-ranks * whole.nodes // whole.ranks)
        with suppress(ValueError):  # these many GPUs have no layout, which says nothing about others
            candidates.append(plan(whole.model, whole.size, ranks, whole.profile, whole.scheme, nodes).best)
    fastest = min(p.total for p in candidates)
    return min((p for p in candidates if p.total <= 1.03 * fastest), key=lambda p: p.layout.ranks)


def choose_degrees(
    models: Sequence[str],
    ranks: int,
    heads: int,
    guided: bool,
    cfg: int | None = None,
    ring: int | None = None,
    ulysses: int | None = None,
    device: str = "cuda",
    size: Size | None = None,
    groups: int | None = None,
) -> tuple[Layout, str] | None:
    """The layout for a checkpoint of a program, with the degrees that were given, and why it was chosen.

    None where the planner cannot tell. size: None: the model's published one. The machine is asked only where there is
    a choice; a checkpoint like none of the models (a demo) is not planned. device: cuda or cpu, of the ranks. groups:
    of heads; None: the best number for each layout.
    """
    if ranks == 1 or None not in (cfg, ring, ulysses):
        return None
    model = _stand_in(models, heads, size)
    hardware = local_profile(device) if model else None
    if model is None or hardware is None:
        return None
    size = replace(size or model.default_size, guided=guided)
    try:
        layout, why = choose_layout(
            model.name, size, ranks, hardware[0], cfg=cfg, ring=ring, ulysses=ulysses, groups=groups
        )
    except ValueError:
        return None
    return layout, f"{why}; from {hardware[1]}"


def _stand_in(models: Sequence[str], heads: int, size: Size | None) -> Model | None:
    """What stands for a program's checkpoint: the first of its models with so many heads that admits the size."""
    alike = [m for m in known_models() if m.name in models and m.heads == heads]
    return next((m for m in alike if size is None or not m.problems(size)), None)


def choose_groups(
    models: Sequence[str], layout: Layout, heads: int, size: Size, device: str, in_turn: bool = False
) -> tuple[int, str]:
    """In how many groups of heads goes what the ranks of a layout exchange, and why.

    in_turn: guidance branches take turns. Other arguments as for `choose_degrees`.
    """
    if heads // layout.ulysses == 1:
        return 1, "a rank has one head"
    model = _stand_in(models, heads, size)
    if model is None:
        return 1, "the planner does not know this checkpoint"
    hardware = with_hiding(local_profile(device), device)
    if hardware is None:
        return 1, "nothing is known of this machine's links; xdit-doctor measures them"
    profile, source = hardware
    best, whole = (predict(model, size, layout, profile, "ours", groups=n, interleave=in_turn) for n in (None, 1))
    seconds = f"{best.step:.4g} s a step predicted with {profile.links}"
    if best.groups == 1:
        return 1, f"{seconds}, and more are no faster; from {source}"
    return best.groups, f"{seconds}, {whole.step:.4g} s with one; from {source}"


def choose_turns(
    models: Sequence[str], layout: Layout, heads: int, size: Size, device: str, groups: int | None
) -> tuple[int | None, str]:
    """Why guidance branches that a layout has on the same ranks should take turns, and the head groups in which each
    goes then; None and "" where they need not.

    groups: of heads, as asked; None: whatever is best. Other arguments as for `choose_degrees`.
    """
    model, hardware = _stand_in(models, heads, size), with_hiding(local_profile(device), device)
    if model is None or hardware is None:
        return None, ""
    profile, source = hardware
    ways = (predict(model, size, layout, profile, "ours", groups=groups, interleave=turns) for turns in (False, True))
    after, in_turn = ways
    if in_turn.step > (1 - WORTH) * after.step:
        return None, ""
    seconds = f"{in_turn.step:.4g} s a step predicted with {profile.links}, {after.step:.4g} s one after the other"
    return in_turn.groups, f"{seconds}; from {source}"


def choose_replicas(
    models: Sequence[str], ranks: int, heads: int, guided: bool, videos: int | None, device: str, size: Size
) -> int:
    """How many groups of equal size make so many videos soonest; 1 where the planner cannot tell.

    videos: None: many. Other arguments as for `choose_degrees`.
    """
    model = _stand_in(models, heads, size)
    hardware = local_profile(device) if model else None
    if model is None or hardware is None:
        return 1
    try:
        whole = plan(model, replace(size, guided=guided), ranks, hardware[0], "ours")
    except ValueError:
        return 1
    return throughput(whole, videos)[0]


def throughput(whole: Plan, videos: int | None = None) -> tuple[int, Prediction]:
    """How many groups of equal size make most videos in the same time, and the best layout of one of them.

    videos: how many are to be made; None: many. With equal times the fewer groups.
    """
    candidates = [(1, whole.best)]
    for replicas in range(2, min(whole.ranks, videos or whole.ranks) + 1):
        if whole.ranks % replicas == 0:
            nodes = max(1, -(-whole.nodes // replicas))
            with suppress(ValueError):  # fewer GPUs may not have the memory
                part = plan(whole.model, whole.size, whole.ranks // replicas, whole.profile, whole.scheme, nodes)
                candidates.append((replicas, part.best))

    def seconds(replicas: int, one: Prediction) -> float:
        return one.total * (1 / replicas if videos is None else -(-videos // replicas))

    return min(candidates, key=lambda one: (seconds(*one), one[0]))


def choose_layout(
    model_name: str,
    size: Size | None,
    ranks: int,
    gpu: str | Profile | None = None,
    *,
    cfg: int | None = None,
    ring: int | None = None,
    ulysses: int | None = None,
    nodes: int | None = None,
    groups: int | None = None,
) -> tuple[Layout, str]:
    """The degrees that were not given, and why they were chosen, in a line to print.

    gpu: a kind of GPU, a calibrated profile, the path of one, or a Profile; None asks this machine. Where nothing is
    known of model or machine, the rule "CFG first, then ring" decides.
    Raises ValueError when no layout of `ranks` agrees with the given degrees.
    """
    model = get_model(model_name)
    size = size or model.default_size
    degrees = (("cfg", cfg), ("ring", ring), ("ulysses", ulysses))
    if not 1 <= ranks <= MOST_RANKS:
        raise ValueError(f"{ranks} ranks are none, or more than any machine holds ({MOST_RANKS})")
    candidates = [d for d in layouts_of(ranks) if all(want in (None, getattr(d, name)) for name, want in degrees)]
    reasons = {d: refusal(model, size, d, "ours") for d in candidates}
    layouts = [d for d in candidates if reasons[d] is None]
    if not layouts:
        why = f"; {candidates[0]}: {reasons[candidates[0]]}" if candidates else ""
        constraints = ", ".join(f"{name} {want}" for name, want in degrees if want)
        raise ValueError(f"no layout of {ranks} ranks has {constraints or 'these degrees'}{why}")
    hardware = None if gpu else local_profile("cuda")
    profile = gpu if isinstance(gpu, Profile) else get_profile(gpu) if gpu else hardware and hardware[0]
    if profile is None:
        return min(layouts, key=guidance_first(size.guided)), RULE
    nodes = nodes or -(-ranks // profile.links.gpus_per_node)
    predictions = [predict(model, size, d, profile, "ours", nodes, groups) for d in layouts]
    best = min(predictions, key=lambda p: p.total)
    return best.layout, f"{best.total:.0f} s predicted on {profile.name}, bound by {best.bound}"
