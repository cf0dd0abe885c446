"""Seconds and memory of a generation on a machine, layer by layer from the counted FLOPs and bytes.

One layer of one forward pass takes

    matrix products   FLOPs / (peak * matmul * rows / (rows + half_rows))
    attention         FLOPs / (peak * attention)
    elementwise       elementwise * rows * width * 2 bytes / HBM bandwidth
    all-to-all        bytes sent / B * max(1 + contention * crowd, 1 / across), and packing at HBM bandwidth
    ring              (r - 1) * (exposed * h + max(0, (1 - exposed) * h - attention / r)) + merging
    overhead          a constant where tokens are split, and one for each further group of heads

of the published systems. Ours posts its exchanges earlier: all-to-all and ring are there what is waited for in a block
(`planner.overlap`), `exposed` of each exchange whatever it travels under, with packing, merging and copying.
h = bytes / B + 30 us for a hop, and crowd = u - 3 (0 for two ranks, 0.06 for three). B is the links' bandwidth;
`across` counts for groups that lie across sockets. Messages between machines share the machine's network: their time
is what all of its ranks send in one direction over `node_gbs`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from common.registry.forks import Model, Size, Stack
from common.registry.layout import Coordinates, Layout, decode_parts, decode_share, split_evenly, turns_ahead
from planner import cost, overlap, reference
from planner.cost import BYTES, Pass
from planner.hardware import GIGA, Links, Profile

HOP_SECONDS = 3e-5
CROWD_OF_THREE = 0.06
"""A third rank in an all-to-all costs a little of what each further one does."""
SHARING = 0.5
"""Rings across sockets share what is between them: n of them slow each other down by n to this power."""
GROUPS = (1, 2, 3, 4, 6, 8)
"""Numbers of head groups that are compared."""
AS_FAST = 0.002
"""Steps that differ by less of their seconds are as fast as each other."""
KINDS = ("matmul", "attention", "all-to-all", "ring", "fixed")
TEXT_SECONDS = 0.2
"""Tokenizer and launches of a text encoder."""
GIB = 2**30
RUNTIME_GIB = 1.0
"""CUDA context, NCCL buffers, workspaces: what a GPU must have beside weights and activations."""


@dataclass(frozen=True)
class Spread:
    """How the groups of a layout lie on the machines."""

    ulysses_across: bool = False
    rings_across: int = 0
    """Rings that lie across sockets: they share what is between them."""
    ulysses_out: float = 0.0
    """All-to-all: bytes that leave a machine in one direction, in units of one rank's q, k, v and output."""
    ring_out: float = 0.0
    """Ring: messages that leave a machine in one direction, at one hop."""
    cfg_out: bool = False


def spread(layout: Layout, links: Links, nodes: int = 1) -> Spread:
    """Ranks fill machines in order, and within one its sockets (evenly where the links say so)."""
    ranks = layout.ranks
    per_node = -(-ranks // nodes)
    in_node = min(per_node, ranks)
    per_socket = links.gpus_per_socket
    if links.balanced and in_node > per_socket:
        per_socket = -(-in_node // 2)
    node = [rank // per_node for rank in range(ranks)]
    socket = [(rank // per_node, rank % per_node // per_socket) for rank in range(ranks)]
    u, r = layout.ulysses, layout.ring
    groups = [list(range(start, start + u)) for start in range(0, ranks, u)] if u > 1 else []
    rings = []
    if r > 1:
        rings = [[c * layout.sequence + j * u + i for j in range(r)] for c in range(layout.cfg) for i in range(u)]
    pairs = [(a, b) for group in groups for a in group for b in group if node[a] != node[b]]
    hops = [(ring[j], ring[(j + 1) % r]) for ring in rings for j in range(r)]
    return Spread(
        ulysses_across=any(len({socket[k] for k in group}) > 1 for group in groups),
        rings_across=sum(len({socket[k] for k in ring}) > 1 for ring in rings),
        ulysses_out=_most(node[a] for a, b in pairs) / u,
        ring_out=_most(node[a] for a, b in hops if node[a] != node[b]),
        cfg_out=layout.cfg == 2 and node[0] != node[layout.sequence],
    )


def _most(values: Iterable[int]) -> int:
    return max(Counter(values).values(), default=0)


def pass_seconds(work: Pass, layout: Layout, at: Spread, profile: Profile, groups: int = 1) -> dict[str, float]:
    """Seconds of one forward pass, by kind; `elementwise` and `overhead` besides those of `KINDS`.

    groups: of heads, in which the all-to-all of our scheme goes.
    """
    if work.block is not None:
        return our_seconds([work], layout, at, profile, groups)
    seconds = _computing(work, layout, profile)
    ring = _ring(work, layout.ring, at, profile, seconds["attention"] / work.layers)
    seconds["all-to-all"] += work.layers * _all_to_all(work, layout.ulysses, at, profile.links)
    seconds["ring"] += work.layers * ring
    return seconds


def our_seconds(
    passes: Sequence[Pass], layout: Layout, at: Spread, profile: Profile, groups: int = 1
) -> dict[str, float]:
    """Seconds of one forward pass of our scheme, or of two that take turns on the same ranks, as of `pass_seconds`."""
    timings = [(work, _computing(work, layout, profile)) for work in passes]
    waits, layers = _waited(timings, layout, at, profile, groups), passes[0].layers
    seconds = _sum([of_one for _, of_one in timings])
    seconds["overhead"] += len(passes) * layers * (groups - 1) * profile.group_ms / 1e3
    seconds["all-to-all"] += layers * waits["ulysses"]
    seconds["ring"] += layers * waits["ring"]
    return seconds


def _computing(work: Pass, layout: Layout, profile: Profile) -> dict[str, float]:
    """Seconds of one forward pass in which no exchange is waited for."""
    peak, hbm, layers = profile.tflops * 1e12, profile.hbm_gbs * GIGA, work.layers
    full = work.rows / (work.rows + profile.half_rows)
    values = work.rows * work.width
    seconds = {
        "matmul": work.matmul / (peak * profile.matmul * full),
        "attention": work.attention / (peak * profile.attention),
        "elementwise": layers * profile.elementwise * values * BYTES / hbm,
        "overhead": layers * profile.layer_overhead_ms / 1e3 if layout.sequence > 1 else 0.0,
    }
    launch_floor = layers * profile.launch_floor_ms / 1e3
    seconds["overhead"] += max(0.0, launch_floor - seconds["matmul"] - seconds["attention"] - seconds["elementwise"])
    merging = layout.ring * profile.merge_bytes * values / hbm if layout.ring > 1 else 0.0
    seconds["all-to-all"] = layers * 2 * work.held / hbm + work.all_to_all * profile.copying
    seconds["ring"] = layers * merging + work.ring * profile.copying
    return seconds


Timed = tuple[Pass, Mapping[str, float]]
"""A pass and its seconds of computing."""


def _waited(passes: Sequence[Timed], layout: Layout, at: Spread, profile: Profile, groups: int) -> dict[str, float]:
    """Seconds by axis that one block of our scheme waits, or one of each of two branches that take turns."""
    if len(passes) == 1:
        return overlap.waited(_timed(*passes[0], layout, at, profile, groups), profile.exposed)
    first, second = (_timed(*one, layout, at, profile, groups) for one in passes)
    ahead = turns_ahead(layout.ring, layout.ulysses, groups)
    # A turn reaches into the next block: what two blocks more bring is that of two blocks.
    some, more = (
        overlap.waited(
            overlap.interleaved(overlap.repeated(first, n), overlap.repeated(second, n), ahead),
            profile.exposed,
        )
        for n in (2, 4)
    )
    return {axis: (more[axis] - some[axis]) / 2 for axis in some}


def _timed(
    work: Pass, seconds: Mapping[str, float], layout: Layout, at: Spread, profile: Profile, groups: int
) -> list[overlap.Operation]:
    """One block with seconds in place of FLOPs and bytes, and with what it computes beside attention at its end."""
    assert work.block is not None
    exchange = _all_to_all(work, layout.ulysses, at, profile.links)
    hop = _hop(work, layout.ring, at, profile.links)
    rest = sum(seconds[kind] for kind in ("matmul", "attention", "elementwise")) / work.layers
    operations: list[overlap.Operation] = []
    for one in overlap.block(work.block, groups):
        if isinstance(one, overlap.Work):
            one = replace(one, amount=one.amount * seconds[one.kind] / (getattr(work, one.kind) or 1))
            rest -= one.amount
        elif isinstance(one, overlap.Post):
            whole, axis = (hop, work.hop) if one.axis == "ring" else (exchange, work.all_to_all / work.layers)
            one = replace(one, amount=whole * one.amount / axis if axis else 0.0)
        operations.append(one)
    return [*operations, overlap.Work("rest", max(0.0, rest))]


def hidden_share(
    model: Model, size: Size, layout: Layout, profile: Profile, groups: int = 1, interleave: bool = False
) -> float:
    """Of the bytes of a block of our scheme, the share whose exchange has enough work to travel under.

    An exchange that has less counts by what it has.
    """
    at = spread(layout, profile.links, -(-layout.ranks // profile.links.gpus_per_node))
    passes = workload(model, size, layout, "ours")[0]
    blocks = [_timed(p, _computing(p, layout, profile), layout, at, profile, groups) for p in passes]
    if interleave and len(blocks) == 2:
        first, second = (overlap.repeated(block, 4) for block in blocks)
        blocks = [overlap.interleaved(first, second, turns_ahead(layout.ring, layout.ulysses, groups))]
    windows = [one for block in blocks for one in overlap.windows(block)]
    whole = sum(one.sent for one in windows)
    return sum(min(one.sent, one.work) for one in windows) / whole if whole else 0.0


def _all_to_all(work: Pass, u: int, at: Spread, links: Links) -> float:
    """Seconds of one block's two exchanges on the links."""
    if u == 1:
        return 0.0
    crowd = max(CROWD_OF_THREE, u - 3) if u > 2 else 0.0
    slower = max(1 + links.contention * crowd, 1 / links.across if at.ulysses_across else 1)
    inside = work.all_to_all / work.layers / (links.gbs * GIGA) * slower
    outside = at.ulysses_out * work.held / u / (links.node_gbs * GIGA) * u
    return max(inside, outside)


def _hop(work: Pass, r: int, at: Spread, links: Links) -> float:
    """Seconds of the largest message of one hop on the links."""
    across = links.across / at.rings_across**SHARING if at.rings_across else 1
    bandwidth = links.gbs * GIGA * across * (links.ring_gain if r > 2 else 1)
    return max(work.hop / bandwidth, at.ring_out * work.hop / (links.node_gbs * GIGA)) + HOP_SECONDS


def _ring(work: Pass, r: int, at: Spread, profile: Profile, attention: float) -> float:
    """Seconds that one block of a published system waits for its ring."""
    if r == 1:
        return 0.0
    hop = _hop(work, r, at, profile.links)
    hidden = (1 - profile.exposed) * hop
    return (r - 1) * (profile.exposed * hop + max(0.0, hidden - attention / r))


@dataclass(frozen=True)
class Prediction:
    """One layout on one machine. Seconds; GiB per GPU and stage; bytes that the busiest rank sends."""

    layout: Layout
    text: float
    step: float
    sampling: float
    decode: float
    other: float
    parts: dict[str, float] = field(repr=False)
    """Seconds end to end by kind, see KINDS."""
    memory_gib: dict[str, float]
    """Weights and activations at the peak of each stage: text, sampling, decode."""
    sent: cost.Sent
    fits: bool
    groups: int = 1
    """Of heads, in which the all-to-all goes."""

    @property
    def total(self) -> float:
        return self.text + self.sampling + self.decode + self.other

    @property
    def bound(self) -> str:
        """The kind that takes most of the time."""
        return max(KINDS, key=lambda kind: self.parts[kind])


def predict(
    model: Model,
    size: Size,
    layout: Layout,
    profile: Profile,
    scheme: str | None = None,
    nodes: int | None = None,
    groups: int | None = None,
    interleave: bool = False,
) -> Prediction:
    """What the layout costs. nodes: machines, by default as few as hold the ranks. groups: of heads; None: the best.

    interleave: guidance branches on the same ranks take turns.
    """
    scheme = scheme or profile.scheme
    nodes = nodes or -(-layout.ranks // profile.links.gpus_per_node)
    at = spread(layout, profile.links, nodes)
    groups, seconds = step_in_groups(model, size, layout, profile, scheme, at, groups, interleave=interleave)
    sampling = size.num_steps * sum(seconds.values())
    text, decode, other = outside_seconds(model, size, layout, profile, scheme)
    parts = {kind: size.num_steps * seconds.get(kind, 0.0) for kind in KINDS}
    parts["matmul"] += size.num_steps * seconds["elementwise"]
    parts["fixed"] = text + decode + other + size.num_steps * (seconds["overhead"] + seconds["cfg"])
    memory = memory_gib(model, size, layout, scheme)
    traffic = (
        cost.sent(model, size, Coordinates(layout, 0)) if scheme == "ours" else reference.sent(model, size, layout)
    )
    fits = max(memory.values()) + RUNTIME_GIB <= profile.memory_gib
    return Prediction(
        layout, text, sampling / size.num_steps, sampling, decode, other, parts, memory, traffic, fits, groups
    )


def workload(model: Model, size: Size, layout: Layout, scheme: str) -> list[list[Pass]]:
    """The passes of one step on each rank that may be the slowest."""
    if scheme == "reference":
        return [reference.passes(model, size, layout)]
    # The first rank of a branch has the most tokens and heads.
    places = [Coordinates(layout, c * layout.sequence) for c in range(layout.cfg)]
    return [cost.passes(model, size, place) for place in places]


def _most_groups(model: Model, layout: Layout) -> int:
    return 1 if layout.sequence == 1 else max(1, min(stack.heads for stack in model.stacks) // layout.ulysses)


def step_in_groups(
    model: Model,
    size: Size,
    layout: Layout,
    profile: Profile,
    scheme: str,
    at: Spread,
    groups: int | None = None,
    work: list[list[Pass]] | None = None,
    interleave: bool = False,
) -> tuple[int, dict[str, float]]:
    """The number of head groups, and seconds of one step with it by kind; of numbers that are as fast the least."""
    work = work or workload(model, size, layout, scheme)
    most = _most_groups(model, layout)
    numbers = [number for number in GROUPS if number <= most]
    if groups is not None or scheme == "reference":
        numbers = [min(groups or 1, most)]
    candidates = [(n, step_seconds(model, size, layout, profile, scheme, at, work, n, interleave)) for n in numbers]
    least = min(sum(seconds.values()) for _, seconds in candidates)
    return next(one for one in candidates if sum(one[1].values()) <= (1 + AS_FAST) * least)


def step_seconds(
    model: Model,
    size: Size,
    layout: Layout,
    profile: Profile,
    scheme: str,
    at: Spread,
    work: list[list[Pass]] | None = None,
    groups: int = 1,
    interleave: bool = False,
) -> dict[str, float]:
    """Seconds of one sampling step on the slowest rank, by kind."""
    work = work or workload(model, size, layout, scheme)
    if interleave and scheme == "ours" and layout.cfg == 1 and size.guided:
        count = len(model.stacks)
        rank_seconds = [
            _sum([our_seconds(pair, layout, at, profile, groups) for pair in zip(passes[:count], passes[count:])])
            for passes in work
        ]
    else:
        rank_seconds = [_sum([pass_seconds(p, layout, at, profile, groups) for p in passes]) for passes in work]
    seconds = max(rank_seconds, key=lambda kinds: sum(kinds.values()))
    if scheme == "reference" and layout.ranks == 1:
        for kind in ("matmul", "attention", "elementwise"):
            seconds[kind] *= profile.single_gpu
    seconds = {kind: value * profile.speed for kind, value in seconds.items()}
    if scheme == "reference" and profile.fsdp and layout.ranks > 1:
        seconds["overhead"] += len(work[0]) / len(model.stacks) * _gather_weights(model, layout, profile, at)
    return {**seconds, "cfg": _guidance(model, size, layout, profile.links, at)}


def _sum(parts: list[dict[str, float]]) -> dict[str, float]:
    return {kind: sum(part[kind] for part in parts) for kind in parts[0]}


def _gather_weights(model: Model, layout: Layout, profile: Profile, at: Spread) -> float:
    """Every rank takes the weights it lacks from the others, once a pass; nothing of it was seen to hide."""
    gather_bytes = model.parameters * BYTES * (layout.ranks - 1) / layout.ranks
    slow = profile.fsdp_across if at.ulysses_across or at.rings_across else 1.0
    return gather_bytes / (profile.links.gbs * GIGA * slow)


def _guidance(model: Model, size: Size, layout: Layout, links: Links, at: Spread) -> float:
    if layout.cfg == 1:
        return 0.0
    shard = cost.latent_numbers(model, size) / layout.sequence * cost.GUIDANCE_BYTES
    # All ranks of a branch send at once, through one network when the branches are on different machines.
    bandwidth = links.node_gbs / layout.sequence if at.cfg_out else links.gbs
    return shard / (bandwidth * GIGA) + HOP_SECONDS


def outside_seconds(
    model: Model, size: Size, layout: Layout, profile: Profile, scheme: str
) -> tuple[float, float, float]:
    """Seconds of text, decoding, and the rest."""
    peak = profile.tflops * 1e12
    work = sum(t.parameters * sum(t.tokens(size)[: 2 if size.guided else 1]) for t in model.text)
    text = len(model.text) * TEXT_SECONDS + 2 * work / (peak * 0.4)
    video = model.decoder.decoding(*model.latents.decoded(size))
    decode = video.flops / (peak * profile.convolution)
    if scheme == "ours":
        lengths, rows, parts = _decode_grid(model, size, layout)
        decode *= decode_share(lengths, rows, layout.ranks, parts)
    parallel = profile.other_parallel if layout.ranks > 1 else 1.0
    return text, decode * (parallel if scheme == "reference" else 1.0), profile.other_s * parallel


def _decode_grid(model: Model, size: Size, layout: Layout) -> tuple[tuple[int, ...], int, int]:
    """Latent frames of the chunks, rows of the latents, and the parts that the height is cut into."""
    frames, rows, columns = model.latents.decoded(size)
    lengths = split_evenly(frames, model.decoder.decoding(frames, rows, columns).chunks)
    return lengths, rows, decode_parts(lengths, rows, layout.ranks)


def memory_gib(model: Model, size: Size, layout: Layout, scheme: str) -> dict[str, float]:
    """GiB of weights and activations per GPU at the peak of each stage.

    Reference: all models stay loaded, and text and decode are not shared.
    """
    batch = 2 if scheme == "reference" and model.published.batched and layout.cfg == 1 and size.guided else 1
    sampling = batch * max(_block_bytes(stack, size, layout) for stack in model.stacks)
    transformer, encoders = model.parameters * BYTES, [t.parameters * BYTES for t in model.text]
    decoder = model.decoder.parameters * BYTES
    frames = model.decoder.decoding(*model.latents.decoded(size)).peak
    if scheme == "ours":
        _, rows, parts = _decode_grid(model, size, layout)
        frames *= -(-rows // parts) / rows
    encoding = 0.2e9 if encoders else 0.0
    largest = max(encoders, default=0) + encoding
    stages = {"text": largest, "sampling": transformer + sampling, "decode": decoder + frames}
    if scheme == "reference":
        weights = transformer + sum(encoders) + decoder
        stages = {"text": weights + encoding, "sampling": weights + sampling, "decode": weights + frames}
    return {stage: round(value / GIB, 2) for stage, value in stages.items()}


def _block_bytes(stack: Stack, size: Size, layout: Layout) -> int:
    """A rank's tensors at the widest moment of a block.

    Residual, its normalised copy and one result beside q, k, v with what attention makes of them, their exchanged
    copies (of two exchanges where there are two), or the hidden layer of the feed-forward. A ring alone makes queries
    only after keys and values have left; from three ranks on, more parts of them are on their way at once.
    """
    rows = max(sum(cost.tokens_of(stack, size, branch)) for branch in (0, 1)) / layout.sequence
    tensors = 4 if layout.sequence == 1 else 7 if layout.ulysses == 1 else 11 if layout.ring == 1 else 12
    tensors += 3 if layout.ring > 2 else 0
    return math.ceil(rows) * (3 * stack.width + max(stack.feed_forward, tensors * stack.width)) * BYTES
