"""Which parallel degrees a run takes where the command leaves them out."""

from __future__ import annotations

from collections.abc import Sequence

from common.checks import choose_degrees
from common.layout import Layout


def choose_layout(
    models: Sequence[str],
    ranks: int,
    heads: int,
    guided: bool,
    cfg: int | None = None,
    ring: int | None = None,
    ulysses: int | None = None,
) -> Layout:
    """The degrees that were not given: the planner's for one of these models on this machine, else the rule of thumb.

    Raises ValueError as `common.checks.choose_degrees` does.
    """
    from planner import layouts  # not needed for --help

    planned = layouts.choose_degrees(models, ranks, heads, guided, cfg, ring, ulysses)
    return planned or choose_degrees(ranks, heads, guided, cfg, ring, ulysses)
