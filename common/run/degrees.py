"""Which parallel degrees a run takes where the command leaves them out."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from common.registry.checks import Ranks, choose_degrees
from common.registry.forks import Size
from common.registry.layout import RULE, Layout
from common.registry.request import Request
from common.system.extras import install


def choose_layout(
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
) -> tuple[Layout, str]:
    """The degrees that were not given, and why they were chosen, in words that go on after them; "" for no choice.

    The planner's for one of these models in this size on this machine's devices (cuda or cpu), else the rule of thumb.
    groups: of heads; None: as many as is best for each layout.
    Raises ValueError as `common.registry.checks.choose_degrees` does.
    """
    from planner import layouts  # not needed for --help

    plan = layouts.choose_degrees(models, ranks, heads, guided, cfg, ring, ulysses, device, size, groups)
    layout = choose_degrees(ranks, heads, guided, cfg, ring, ulysses)
    return plan or (layout, RULE if ranks > 1 and None in (cfg, ring, ulysses) else "")


def with_overlap(request: Request, models: Sequence[str]) -> Request:
    """The request with what hides its layout's exchanges, and why: the number of head groups, and whether guidance
    branches on the same ranks should take turns. What was asked for stays.

    models: the program's, as for `choose_layout`.
    """
    from planner import layouts  # not needed for --help

    runtime, layout, video = request.runtime, request.layout, request.videos[0]
    guided, native = request.guided(video), runtime.engine == "native"
    case = (models, layout, request.rules.heads, Size.of(video.sampling, guided), str(runtime.device))
    groups, why, user_groups = runtime.overlap_groups, request.groups_chosen, runtime.overlap_groups
    if groups is None or why:
        groups, why, user_groups = 1, "no exchange of this project's", None
        if native and layout.sequence > 1:
            groups, why = layouts.choose_groups(*case, bool(runtime.interleave_branches))
    in_turn, turns = None, ""
    if runtime.interleave_branches is None and native and guided and layout.cfg == 1 < layout.ranks:
        in_turn, turns = layouts.choose_turns(*case, user_groups)
    request = replace(request, groups_chosen=why, turns_chosen=turns, groups_in_turn=in_turn)
    return replace(request, runtime=replace(runtime, overlap_groups=groups))


def ray_problems(starts: bool) -> list[str]:
    """What is wrong with --ray-address here. starts: whether this program starts the ranks."""
    if not starts:
        return ["--ray-address under torchrun: Ray starts the processes; leave torchrun out"]
    if importlib.util.find_spec("ray") is None:
        return [f"--ray-address needs the package ray: {install('ray')}"]
    return []


def share_out(
    ranks: Ranks, replicas: int | None, videos: int, starts: bool, model: tuple[Any, ...]
) -> tuple[Ranks, int, list[str]]:
    """The ranks of each of several groups, how many groups, and what is wrong with that.

    replicas: as asked; None: the planner's advice where it has one, else 1. videos: how many are to be made. starts:
    whether this program starts the ranks. model: names, heads, guided, and degrees, device and size as for
    `choose_layout`.
    """
    if replicas is None:
        replicas = _advised(ranks, videos, model) if starts and videos > 1 else 1
    problem = None
    if replicas < 1:
        problem = f"--replicas {replicas} is not a positive number; at least 1"
    elif replicas > 1 and not starts:
        problem = f"--replicas {replicas} under torchrun: each replica starts its own processes; leave torchrun out"
    elif replicas > videos:
        workload = f"{videos} video{' is' if videos == 1 else 's are'} to be made"
        problem = f"--replicas {replicas}, but {workload}, and each replica makes one at a time; at most {videos}"
    elif ranks.count % replicas:
        fitting = ", ".join(str(n) for n in range(1, ranks.count + 1) if ranks.count % n == 0)
        problem = f"--replicas {replicas} does not divide {ranks.count} ranks ({ranks.source}); choose of {fitting}"
    if problem is not None:
        return ranks, 1, [problem]
    each = f"each of {replicas} replicas has {ranks.count // replicas} of them"
    source = ranks.source if replicas == 1 else f"{ranks.source}, and {each}"
    return Ranks(ranks.count // replicas, source), replicas, []


def _advised(ranks: Ranks, videos: int, model: tuple[Any, ...]) -> int:
    names, heads, guided, cfg, ring, ulysses, device, size = model
    if ranks.count == 1 or device != "cuda" or (cfg, ring, ulysses) != (None, None, None):
        return 1
    from planner import layouts  # not needed for --help

    return layouts.choose_replicas(names, ranks.count, heads, guided, videos, device, size)
