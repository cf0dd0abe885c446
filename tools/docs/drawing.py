"""`python -m tools.docs.drawing`: the drawing in docs/parallel.md, from the very code it explains.

Which tokens and heads a rank has at each moment of one attention call comes from `common.registry.layout`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from common.registry.layout import split_evenly

RING, ULYSSES, TOKENS, HEADS = 2, 2, 11, 5
COLOURS = ("#4c78a8", "#72b7b2", "#e45756", "#f2a541")
TARGET = Path(__file__).resolve().parents[2] / "docs" / "img" / "parallel.png"


def starts(counts: tuple[int, ...]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


def grid(axes: Axes, title: str, note: str) -> None:
    axes.set(xlim=(-0.2, TOKENS + 0.2), ylim=(HEADS + 0.2, -0.2), xticks=range(TOKENS + 1), yticks=range(HEADS + 1))
    axes.set_xlabel("tokens")
    axes.set_ylabel("heads")
    axes.tick_params(labelsize=6)
    axes.set_title(title, fontsize=9, loc="left")
    axes.text(0, -0.32, note, transform=axes.transAxes, fontsize=7.5, va="top", wrap=True)


def fill(axes: Axes, rank: int, tokens: range, heads: range, label: str = "") -> None:
    box = Rectangle((tokens.start, heads.start), len(tokens), len(heads), facecolor=COLOURS[rank], edgecolor="white")
    axes.add_patch(box)
    where = (tokens.start + len(tokens) / 2, heads.start + len(heads) / 2)
    axes.text(*where, label or f"rank {rank}", ha="center", va="center", fontsize=7, color="white")


def draw(target: Path = TARGET) -> None:
    """Write the PNG: shards, after the all-to-all, and what the ring adds."""
    counts, heads = split_evenly(TOKENS, RING * ULYSSES), split_evenly(HEADS, ULYSSES)
    at, head_at = starts(counts), starts(heads)
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4))
    notes = (
        f"{TOKENS} tokens over {RING * ULYSSES} ranks: {', '.join(map(str, counts))}.\n"
        "Every rank has all heads of its own tokens.",
        f"Inside a Ulysses group (2 ranks): tokens of the group,\n{' and '.join(map(str, heads))} heads. One exchange "
        "of q, k and v together.",
        "Keys and values of the other group pass by;\neach part's softmax is merged by its log-sum-exp.",
    )
    titles = ("1  shard", "2  all-to-all: heads for tokens", "3  ring: queries of rank 0 meet all keys")
    for axes, title, note in zip(panels, titles, notes, strict=True):
        grid(axes, title, note)
    for rank, count in enumerate(counts):
        fill(panels[0], rank, range(at[rank], at[rank] + count), range(HEADS))
    for r in range(RING):
        group = range(at[r * ULYSSES], at[r * ULYSSES] + sum(counts[r * ULYSSES : (r + 1) * ULYSSES]))
        for u in range(ULYSSES):
            fill(panels[1], r * ULYSSES + u, group, range(head_at[u], head_at[u] + heads[u]))
        label = "own keys first" if r == 0 else "keys of rank 2,\nsent meanwhile"
        fill(panels[2], r * ULYSSES, group, range(heads[0]), label)
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw()
