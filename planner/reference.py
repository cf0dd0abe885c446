"""The work of the published systems (xDiT and its forks), on which the tables were measured, as far as it is known.

Differences to ours: CogVideoX's two guidance branches go through as one batch where they are on one rank; its text is
split over the ranks only where their number divides it, else every rank carries all of it; every rank decodes the
whole video and encodes the text. All ranks are alike, so fractions of tokens stand for uneven shards.
"""

from __future__ import annotations

from cogvideox_xdit.config import TransformerConfig
from common.layout import Layout
from consisid_xdit.config import ConsisIDConfig
from mochi_xdit.config import MochiConfig
from planner.cost import Pass, Sent
from planner.models import BYTES, TYPICAL_PROMPT, Model, Size, video_tokens


def passes(model: Model, size: Size, layout: Layout) -> list[Pass]:
    """The forward passes of one step on any rank."""
    count = 2 // layout.cfg if size.guided else 1
    if isinstance(model.config, MochiConfig):
        return [_pass(model, size, layout, batch=1, text=TYPICAL_PROMPT, divided=False)] * count
    text = model.config.text_length
    return [_pass(model, size, layout, count, text, divided=text % layout.sequence == 0)]


def _pass(model: Model, size: Size, layout: Layout, batch: int, text: int, divided: bool) -> Pass:
    video, width, u, r = video_tokens(model, size), model.hidden, layout.ulysses, layout.ring
    n = video / layout.sequence
    m = text / layout.sequence if divided else text
    queries = (video + text) / layout.sequence if divided else (n * u + text) / u
    exchanged = n + (m if divided else 0)  # replicated text needs no exchange
    tensor = batch * exchanged * width * BYTES
    return Pass(
        model.layers,
        width,
        rows=batch * (n + m),
        matmul=batch * model.layers * _linear(model.config, n, m),
        attention=batch * model.layers * 4 * queries * (video + text) * width,
        held=4 * tensor if u > 1 else 0,
        all_to_all=model.layers * 4 * tensor * (u - 1) / u,
        hop=2 * tensor if r > 1 else 0,
        ring=model.layers * (r - 1) * 2 * tensor,
    )


def _linear(config: MochiConfig | TransformerConfig, n: float, m: float) -> float:
    """FLOPs of one layer's matrix products on n video and m text tokens."""
    if isinstance(config, MochiConfig):
        x, y = config.hidden_x, config.hidden_y
        video = 2 * (4 * x * x + 3 * x * config.mlp_x)
        return n * video + m * 2 * (3 * y * x + x * y + 3 * y * config.mlp_y)
    layer = 24 * config.width * config.width
    face = 0.0
    if isinstance(config, ConsisIDConfig):
        cross = config.cross_heads * config.cross_head_dim
        face = config.crossings / config.layers * (4 * config.width * cross + 4 * config.queries * cross)
    return n * (layer + face) + m * layer


def sent(model: Model, size: Size, layout: Layout) -> Sent:
    """Bytes a rank sends in a whole generation; guidance and the last gather exchange bf16 latents once each."""
    steps = passes(model, size, layout)
    shard = int(video_tokens(model, size) / layout.sequence * model.patch_dim * BYTES)
    return Sent(
        all_to_all=int(size.num_steps * sum(p.all_to_all for p in steps)),
        ring=int(size.num_steps * sum(p.ring for p in steps)),
        cfg=size.num_steps * shard if layout.cfg == 2 else 0,
        gather=size.num_steps * shard * (layout.sequence - 1),
    )
