"""The work of the published systems (xDiT and its forks), on which the tables were measured, as far as it is known.

Differences to ours, where a model's `Published` says so: the two guidance branches go through as one batch where they
are on one rank; text is split over the ranks only where their number divides it, else every rank carries all of it.
Always: every rank decodes the whole video and encodes the text. All ranks are alike, so fractions of tokens stand for
uneven shards.
"""

from __future__ import annotations

from common.registry.forks import Model, Size, Stack
from common.registry.layout import Layout
from planner.cost import BYTES, Pass, Sent, tokens_of


def passes(model: Model, size: Size, layout: Layout) -> list[Pass]:
    """The forward passes of one step on any rank; a negative prompt is padded to the length of the prompt."""
    branches = 2 // layout.cfg if size.guided else 1
    batch, times = (branches, 1) if model.published.batched else (1, branches)
    splits = model.published.splits_text
    return [_pass(stack, tokens_of(stack, size, 0), layout, batch, splits) for stack in model.stacks] * times


def _pass(stack: Stack, tokens: tuple[int, ...], layout: Layout, batch: int, splits_text: bool) -> Pass:
    width, u, r = stack.width, layout.ulysses, layout.ring
    video, text = tokens[0], sum(tokens[1:])
    divided = splits_text and text % layout.sequence == 0
    n = video / layout.sequence
    m = text / layout.sequence if divided else text
    queries = (video + text) / layout.sequence if divided else (n * u + text) / u
    exchanged = n + (m if divided else 0)  # replicated text needs no exchange
    tensor = batch * exchanged * width * BYTES
    return Pass(
        stack.layers,
        width,
        rows=batch * (n + m),
        matmul=batch * stack.layers * _linear(stack, tokens, layout.sequence if divided else 1, layout.sequence),
        attention=batch * stack.layers * 4 * queries * (video + text) * width,
        held=4 * tensor if u > 1 else 0,
        all_to_all=stack.layers * 4 * tensor * (u - 1) / u,
        hop=2 * tensor if r > 1 else 0,
        ring=stack.layers * (r - 1) * 2 * tensor,
    )


def _linear(stack: Stack, tokens: tuple[int, ...], text_parts: int, parts: int) -> float:
    """FLOPs of one layer's matrix products, and of its cross attention, averaged over the layers."""
    first, *others = stack.streams
    cross = sum(c.layers / stack.layers * (c.matmul + 4 * c.keys * c.width) for c in stack.cross)
    video = tokens[0] / parts * (first.block + cross)
    return video + sum(count / text_parts * s.block for count, s in zip(tokens[1:], others))


def sent(model: Model, size: Size, layout: Layout) -> Sent:
    """Bytes a rank sends in a whole generation; guidance and the last gather exchange bf16 latents once each."""
    steps = passes(model, size, layout)
    shard = int(model.video_tokens(size) / layout.sequence * model.latents.token_channels * BYTES)
    return Sent(
        all_to_all=int(size.num_steps * sum(p.all_to_all for p in steps)),
        ring=int(size.num_steps * sum(p.ring for p in steps)),
        cfg=size.num_steps * shard if layout.cfg == 2 else 0,
        gather=size.num_steps * shard * (layout.sequence - 1),
    )
