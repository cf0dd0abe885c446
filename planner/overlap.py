"""Which work of a block its exchanges travel under, and what of them is left to wait for.

The order in which a block computes, posts and waits is that of `common.parallel.usp.SequenceParallel.attend`;
tests/test_overlap.py records it there and compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from common.registry.layout import head_groups
from planner.cost import BYTES, SelfAttention


@dataclass(frozen=True)
class Work:
    """FLOPs, or seconds, of one kind: matmul, attention, or what a block computes beside its attention."""

    kind: str
    amount: float


@dataclass(frozen=True)
class Post:
    """Bytes, or their seconds on the link, to other ranks of an axis: ulysses or ring."""

    axis: str
    amount: float
    key: int
    """By which a wait names it."""


@dataclass(frozen=True)
class Wait:
    key: int


@dataclass(frozen=True)
class Turn:
    """Here a guidance branch lets the other compute, where they take turns."""


Operation = Work | Post | Wait | Turn


def block(at: SelfAttention, groups: int) -> list[Operation]:
    """What one block does from its projections to its output projection, with heads in so many groups."""
    builder = _Block(at)
    if at.place.layout.ulysses > 1:
        builder.in_groups(groups)
    elif at.place.layout.ring > 1:
        builder.round_the_ring(groups)
    return builder.operations


class _Block:
    def __init__(self, at: SelfAttention) -> None:
        self.at, self.operations = at, list[Operation]()
        self.posted = 0

    def work(self, kind: str, flops: float) -> None:
        self.operations.append(Work(kind, flops))

    def post(self, axis: str, numbers: float) -> int:
        self.operations.append(Post(axis, numbers * BYTES, self.posted))
        self.posted += 1
        return self.posted - 1

    def wait(self, key: int) -> None:
        self.operations.append(Wait(key))

    def turn(self) -> None:
        self.operations.append(Turn())

    def project(self, heads: int, parts: int) -> None:
        """So many of queries, keys, values and output, of so many heads."""
        at = self.at
        tokens = at.lengths[at.place.sequence]
        self.work("matmul", 2 * tokens * at.heads * at.head_dim * parts * heads * at.head_dim)

    def round_the_ring(self, groups: int) -> None:
        at = self.at
        spans = [sum(map(len, parts)) for parts in head_groups(at.heads, 1, groups)]
        if at.normed_whole and len(spans) > 1:
            self.project(at.heads, 1)
        rings = []
        for heads in spans:
            self.project(heads, 1 if at.normed_whole and len(spans) > 1 else 2)
            rings.append(_Ring(self, heads))
        self.project(at.heads, 1)
        for ring in rings:
            ring.attend()
        for step in range(1, at.place.layout.ring):
            self.turn()
            for ring, heads in zip(rings, spans):
                ring.arrive()
                ring.attend()
                if step == at.place.layout.ring - 1:
                    self.project(heads, 1)

    def in_groups(self, groups: int) -> None:
        at = self.at
        group, width, u = at.group, at.head_dim, at.place.ulysses
        own, split = group[u], head_groups(at.heads, at.place.layout.ulysses, groups)
        heads = [sum(map(len, parts)) for parts in split]
        mine = [len(parts[u]) for parts in split]
        if at.normed_whole:
            self.project(at.heads, 2)
        pending = []
        for i, (all_, local_heads) in enumerate(zip(heads, mine)):
            if i == 1:
                self.turn()
            self.project(all_, 1 if at.normed_whole else 3)
            pending.append(self.post("ulysses", 3 * own * (all_ - local_heads) * width))

        def arrive(i: int) -> _Ring:
            self.wait(pending[i])
            return _Ring(self, mine[i])

        self.turn()
        outputs, ring, outside = [], arrive(0), at.place.layout.ring > 1
        for i, local_heads in enumerate(mine):
            ring.go_round()
            next_ring = arrive(i + 1) if outside and i + 1 < len(mine) else None
            ring.attend()
            outputs.append(self.post("ulysses", (sum(group) - own) * local_heads * width))
            if i + 1 < len(mine):
                ring = next_ring or arrive(i + 1)
        self.turn()
        for key, all_ in zip(outputs, heads):
            self.wait(key)
            self.project(all_, 1)


class _Ring:
    """Keys and values of some heads on their way round the ring."""

    def __init__(self, builder: _Block, heads: int) -> None:
        self.block, self.heads, self.step, self.chunks = builder, heads, 0, builder.at.chunks
        self.pending = self._pass_on()

    def go_round(self) -> None:
        while self.pending is not None:
            self.attend()
            self.block.turn()
            self.arrive()

    def arrive(self) -> None:
        assert self.pending is not None
        self.block.wait(self.pending)
        self.step += 1
        self.pending = self._pass_on()

    def attend(self) -> None:
        """Attention over what is here."""
        ring, channels = self.block.at.place.ring, self.heads * self.block.at.head_dim
        keys = self.chunks[(ring - self.step) % len(self.chunks)]
        self.block.work("attention", 4 * self.chunks[ring] * keys * channels)

    def _pass_on(self) -> int | None:
        if self.step == len(self.chunks) - 1:
            return None
        chunk = self.chunks[(self.block.at.place.ring - self.step) % len(self.chunks)]
        return self.block.post("ring", 2 * chunk * self.heads * self.block.at.head_dim)


@dataclass(frozen=True)
class Window:
    """One exchange: what is sent, and the work between its post and the wait for it, in the operations' units."""

    axis: str
    sent: float
    work: float = 0.0


def windows(operations: Iterable[Operation]) -> list[Window]:
    """Every exchange in the order of their posts."""
    exchanges: dict[int, Window] = {}
    pending: set[int] = set()
    for one in operations:
        if isinstance(one, Post):
            exchanges[one.key] = Window(one.axis, one.amount)
            pending.add(one.key)
        elif isinstance(one, Wait):
            pending.remove(one.key)
        elif isinstance(one, Work):
            exchanges |= {key: replace(exchanges[key], work=exchanges[key].work + one.amount) for key in pending}
    return list(exchanges.values())


def waited(operations: Iterable[Operation], exposed: float = 0.0) -> dict[str, float]:
    """Seconds by axis that a rank waits for its exchanges; the operations' own are in seconds.

    One exchange is on the link at a time, those posted meanwhile queue up. exposed: share of each exchange that goes
    under no work.
    """
    clock = free = 0.0
    seconds: dict[str, float] = {"ulysses": 0.0, "ring": 0.0}
    pending: dict[int, tuple[str, float, float]] = {}
    for one in operations:
        if isinstance(one, Work):
            clock += one.amount
        elif isinstance(one, Post):
            begin = max(clock, free)
            free = begin + one.amount
            pending[one.key] = one.axis, free, one.amount * exposed
        elif isinstance(one, Wait):
            axis, arrival, least = pending.pop(one.key)
            wait = max(arrival - clock, least)
            seconds[axis] += wait
            clock += wait
    return seconds


def interleaved(first: Sequence[Operation], second: Sequence[Operation], ahead: int) -> list[Operation]:
    """Two guidance branches on the same ranks, in the order in which these compute them.

    ahead: turns by which the first one leads (`common.registry.layout.turns_ahead`). Keys of the second are made others
    than those of the first.
    """
    sides = [_turns(first), _turns(_renamed(second, _keys(first)))]
    operations = [one for _ in range(ahead) for one in next(sides[0], [])]
    while sides:
        side = sides.pop(0)
        if (turn := next(side, None)) is not None:
            operations += turn
            sides.append(side)
    return operations


def _turns(operations: Iterable[Operation]) -> Iterator[list[Operation]]:
    turn: list[Operation] = []
    for one in operations:
        if isinstance(one, Turn):
            yield turn
            turn = []
        else:
            turn.append(one)
    yield turn


def repeated(operations: Sequence[Operation], times: int) -> list[Operation]:
    """One after the other, each with keys of its own."""
    count = _keys(operations)
    return [one for n in range(times) for one in _renamed(operations, n * count)]


def _keys(operations: Iterable[Operation]) -> int:
    return 1 + max((one.key for one in operations if isinstance(one, Post)), default=-1)


def _renamed(operations: Iterable[Operation], past: int) -> list[Operation]:
    return [replace(one, key=one.key + past) if isinstance(one, Post | Wait) else one for one in operations]
