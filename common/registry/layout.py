"""How ranks are laid out and what each gets, in plain numbers: no torch, no processes.

`common.parallel.mesh` builds the process groups of a `Layout`; the command line checks one, and the planner counts
with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

MOST_RANKS = 512
"""Beyond what any machine holds: what looks at every layout, or at every step of a ring, ends in minutes."""


@dataclass(frozen=True)
class Layout:
    """Parallel degrees. `cfg` splits the two guidance branches, `ring` and `ulysses` split the tokens.

    Raises ValueError for degrees that no machine could run.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        for name in ("cfg", "ring", "ulysses"):
            degree = getattr(self, name)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise ValueError(f"{name} degree is {degree!r}; it must be a whole number of at least 1")
        if self.cfg > 2:
            raise ValueError(f"cfg degree is {self.cfg}; guidance has two branches, so only 1 or 2 is possible")

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens of one guidance branch."""
        return self.ring * self.ulysses

    @property
    def ranks(self) -> int:
        return self.cfg * self.sequence

    @property
    def degrees(self) -> tuple[int, int, int]:
        """cfg, ring, ulysses: from the outermost axis to the innermost."""
        return self.cfg, self.ring, self.ulysses

    def __str__(self) -> str:
        return f"cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses}"


@dataclass(frozen=True)
class Coordinates:
    """A rank's coordinates in a layout. Ulysses is the innermost axis, cfg the outermost."""

    layout: Layout
    rank: int

    @property
    def cfg(self) -> int:
        return self.rank // self.layout.sequence

    @property
    def ring(self) -> int:
        return self.sequence // self.layout.ulysses

    @property
    def ulysses(self) -> int:
        return self.rank % self.layout.ulysses

    @property
    def sequence(self) -> int:
        """The rank among those that share the tokens of its guidance branch."""
        return self.rank % self.layout.sequence


def split_evenly(n: int, parts: int) -> tuple[int, ...]:
    """How many of n things each part gets: n // parts, and one more in the first n % parts."""
    return tuple(n // parts + (i < n % parts) for i in range(parts))


def head_groups(heads: int, ranks: int, groups: int) -> list[tuple[range, ...]]:
    """Which heads of each group every rank takes. A group's heads are neighbours, and ranks share all heads evenly.

    No more groups than the rank with the fewest heads has heads.
    """
    counts = split_evenly(heads, ranks)
    splits = [split_evenly(count, min(groups, counts[-1])) for count in counts]
    ranges, at = [], 0
    for j in range(len(splits[0])):
        group = []
        for sizes in splits:
            group.append(range(at, at + sizes[j]))
            at += sizes[j]
        ranges.append(tuple(group))
    return ranges


def turns(ring: int, ulysses: int, groups: int) -> int:
    """How often a guidance branch passes its turn to the other in one block, see `common.parallel.interleaver`."""
    round_the_ring = ring - 1
    if ulysses == 1:
        return round_the_ring
    return (2 if groups == 1 else 3) + groups * round_the_ring


def turns_ahead(ring: int, ulysses: int, groups: int) -> int:
    """By how many turns the first branch leads where each has one after the other: half a block, rounded down.

    So one computes its feed-forward, which sends nothing, while the other's projections are on their way. A lead of
    zero is half a turn already, since the second branch begins where the first one passes its turn.
    """
    return max(0, (turns(ring, ulysses, groups) - 1) // 2)


def decode_share(lengths: Sequence[int], rows: int, ranks: int, parts: int) -> float:
    """Of the work of a decode, what its slowest ranks have: a share of latent frames times rows.

    lengths: latent frames of the chunks. Each chunk of `rows` rows is shared by `parts` ranks, as evenly as can be, and
    the chunks are dealt in turn to the `ranks // parts` groups of so many.
    """
    groups = ranks // parts
    busiest = max(sum(lengths[group::groups]) for group in range(groups))
    return busiest / sum(lengths) * -(-rows // parts) / rows


def decode_parts(lengths: Sequence[int], rows: int, ranks: int) -> int:
    """Into how many parts the height is best cut: of the divisors of `ranks` the one with the least `decode_share`.

    Of equal ones that with the fewest rows to a rank, which then holds least, and sends less than it would of tails.
    """

    def cost(parts: int) -> tuple[float, int, int]:
        return round(decode_share(lengths, rows, ranks, parts), 9), -(-rows // parts), parts

    return min((parts for parts in range(1, ranks + 1) if ranks % parts == 0), key=cost)


def layouts_of(ranks: int) -> Iterator[Layout]:
    """Every cfg x ring x ulysses = ranks."""
    for cfg in (1, 2):
        for ring in range(1, ranks // cfg + 1):
            if ranks % (cfg * ring) == 0:
                yield Layout(cfg, ring, ranks // (cfg * ring))


def as_options(layout: Layout) -> str:
    """As the programs take it."""
    cfg = " --cfg-parallel" if layout.cfg == 2 else ""
    return f"--ulysses-degree {layout.ulysses} --ring-degree {layout.ring}{cfg}"


RULE = "by the rule: guidance first, then ring"
"""Why a layout is the first by `guidance_first`."""


def guidance_first(guided: bool) -> Callable[[Layout], tuple[int, int]]:
    """A key to sort layouts by where nothing is known of model and machine: guidance first, then ring.

    The two branches exchange one shard a step, less than any split of the tokens (measured by everyone who published:
    1.9x and more on 2 GPUs); the rest becomes ring, which no number of heads limits.
    """
    return lambda layout: (-layout.cfg if guided else layout.cfg, layout.ulysses)
