"""Which parallel degrees a run takes where the command leaves them out."""

from __future__ import annotations

from collections.abc import Sequence

from common.registry.checks import choose_degrees
from common.registry.forks import Size
from common.registry.layout import RULE, Layout


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
) -> tuple[Layout, str]:
    """The degrees that were not given, and why they were chosen, in words that go on after them; "" for no choice.

    The planner's for one of these models in this size on this machine's devices (cuda or cpu), else the rule of thumb.
    Raises ValueError as `common.registry.checks.choose_degrees` does.
    """
    from planner import layouts  # not needed for --help

    planned = layouts.choose_degrees(models, ranks, heads, guided, cfg, ring, ulysses, device, size)
    layout = choose_degrees(ranks, heads, guided, cfg, ring, ulysses)
    return planned or (layout, RULE if ranks > 1 and None in (cfg, ring, ulysses) else "")
