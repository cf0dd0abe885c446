"""Exact FLOPs and bytes of this project's own scheme, per kind, rank and link.

FLOPs are those of matrix products (2mnk) and of attention (4 x heads x queries x keys x head width), as PyTorch's
FlopCounterMode counts them; bytes are what a rank hands to other ranks, as counted at the collectives. Both counts
are compared with the running transformers in tests/test_planner_counts.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from cogvideox_xdit.config import TransformerConfig
from common.layout import Coordinates, Layout, split_evenly
from consisid_xdit.config import ConsisIDConfig
from mochi_xdit.config import MochiConfig
from planner.models import BYTES, Model, Size, video_tokens

GUIDANCE_BYTES = 4
"""Guidance is computed, and its operands are sent, in fp32."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of the transformer on one rank. FLOPs and bytes are whole, not per layer."""

    layers: int
    width: int
    rows: float
    """Tokens that this rank's linear layers see, times the batch."""
    matmul: float
    attention: float
    held: float = 0
    """Bytes of this rank's q, k, v and output of one layer: what the all-to-all packs and unpacks."""
    all_to_all: float = 0
    """Bytes this rank sends to the others of its Ulysses group."""
    hop: float = 0
    """Bytes of the largest message of one hop of the ring, in one layer."""
    ring: float = 0
    """Bytes this rank sends along the ring."""


def branches(place: Coordinates, guided: bool = True) -> tuple[int, ...]:
    """Guidance branches that a rank computes: 0 the prompt, 1 the negative prompt."""
    if place.layout.cfg == 2:
        return (place.cfg,)
    return (0, 1) if guided else (0,)


def forward(model: Model, video: int, text: int, place: Coordinates) -> Pass:
    """One forward pass for `video` and `text` tokens (of all ranks together), batch 1, on one rank."""
    layout, heads = place.layout, split_evenly(model.heads, place.layout.ulysses)
    n = split_evenly(video, layout.sequence)[place.sequence]
    m = split_evenly(text, layout.sequence)[place.sequence]
    matmul = _mochi(model.config, n, m) if isinstance(model.config, MochiConfig) else _cogvideox(model.config, n, m)
    attention = _attention(model, video, text, place)
    if isinstance(model.config, ConsisIDConfig):
        attention += _face_attention(model.config, n)
    sent = _exchanged(model, video, text, place)
    mine = heads[place.ulysses] * model.config.head_dim
    held = (3 * (n + m) * model.hidden + sum(_group(video, text, place)) * mine) * BYTES if layout.ulysses > 1 else 0
    hops = _hops(model, video, text, place)
    return Pass(
        model.layers,
        model.hidden,
        n + m,
        matmul,
        attention,
        held=held,
        all_to_all=model.layers * sent,
        hop=max(hops, default=0),
        ring=model.layers * sum(hops),
    )


def _mochi(config: MochiConfig, n: int, m: int) -> int:
    """Matrix products of n video and m text tokens through the asymmetric transformer."""
    x, y, last = config.hidden_x, config.hidden_y, config.depth - 1
    once = 2 * (config.time_dim * x + x * x) + 2 * x * 2 * x  # time embedding, final modulation
    once += config.depth * 2 * x * 4 * x + last * 2 * x * 4 * y + 2 * x * y  # modulations
    video = config.depth * (2 * x * 3 * x + 2 * x * x + 2 * x * 3 * config.mlp_x) + 2 * 2 * x * config.patch_dim
    text = config.depth * 2 * y * 3 * x + last * (2 * x * y + 2 * y * 3 * config.mlp_y)
    return once + n * video + m * text


def _cogvideox(config: TransformerConfig, n: int, m: int) -> int:
    """Matrix products of n video and m text tokens through the blocks they share."""
    width, time = config.width, config.time_dim
    once = 2 * (width * time + time * time) + config.layers * 2 * 2 * time * 6 * width + 2 * time * 2 * width
    both = config.layers * 24 * width * width
    video = both + 2 * 2 * width * config.out_channels * config.patch_volume
    if isinstance(config, ConsisIDConfig):
        video += config.crossings * 2 * 2 * width * config.cross_heads * config.cross_head_dim
    return once + n * video + m * both


def _attention(model: Model, video: int, text: int, place: Coordinates) -> int:
    """Queries of the Ulysses group over all keys, for this rank's heads."""
    heads = split_evenly(model.heads, place.layout.ulysses)[place.ulysses]
    queries = sum(_group(video, text, place))
    return model.layers * 4 * heads * model.config.head_dim * queries * (video + text)


def _face_attention(config: ConsisIDConfig, n: int) -> int:
    """Video tokens over the face tokens, which every rank has."""
    return config.crossings * 4 * config.cross_heads * config.cross_head_dim * n * config.queries


def _lengths(video: int, text: int, layout: Layout) -> list[int]:
    """Tokens of every rank of one guidance branch, both streams together."""
    return [a + b for a, b in zip(split_evenly(video, layout.sequence), split_evenly(text, layout.sequence))]


def _group(video: int, text: int, place: Coordinates) -> list[int]:
    """Tokens of every rank of this rank's Ulysses group."""
    u = place.layout.ulysses
    return _lengths(video, text, place.layout)[place.ring * u : (place.ring + 1) * u]


def _exchanged(model: Model, video: int, text: int, place: Coordinates) -> int:
    """Bytes to other ranks in one layer's two all-to-alls: q, k, v of their heads, then the output of their tokens."""
    if place.layout.ulysses == 1:
        return 0
    group, width = _group(video, text, place), model.config.head_dim * BYTES
    mine = split_evenly(model.heads, place.layout.ulysses)[place.ulysses]
    own = group[place.ulysses]
    return (3 * own * (model.heads - mine) + (sum(group) - own) * mine) * width


def _hops(model: Model, video: int, text: int, place: Coordinates) -> list[int]:
    """Bytes of k and v that this rank passes on in one layer, hop by hop."""
    layout = place.layout
    heads = split_evenly(model.heads, layout.ulysses)[place.ulysses]
    lengths, u = _lengths(video, text, layout), layout.ulysses
    chunks = [sum(lengths[i * u : (i + 1) * u]) for i in range(layout.ring)]
    size = 2 * heads * model.config.head_dim * BYTES
    return [chunks[(place.ring - hop) % layout.ring] * size for hop in range(layout.ring - 1)]


@dataclass(frozen=True)
class Sent:
    """Bytes a rank sends in a whole generation, by link."""

    all_to_all: int
    ring: int
    cfg: int
    gather: int

    @property
    def total(self) -> int:
        return self.all_to_all + self.ring + self.cfg + self.gather


def sent(model: Model, size: Size, place: Coordinates, text: tuple[int, int] | None = None) -> Sent:
    """What one rank sends while sampling: `text` are the tokens of the two branches."""
    text, video = text or model.text_tokens, video_tokens(model, size)
    passes = [forward(model, video, text[b], place) for b in branches(place, size.guided)]
    shard = split_evenly(video, place.layout.sequence)[place.sequence] * model.patch_dim
    return Sent(
        all_to_all=int(size.num_steps * sum(p.all_to_all for p in passes)),
        ring=int(size.num_steps * sum(p.ring for p in passes)),
        cfg=size.num_steps * shard * GUIDANCE_BYTES if place.layout.cfg == 2 else 0,
        gather=shard * GUIDANCE_BYTES * (place.layout.sequence - 1),
    )
