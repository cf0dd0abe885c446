"""The planner's FLOPs and bytes are those that the running models compute and send, for every registered model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.memory.estimate import FUSED, Traffic, Workload, imagined
from common.parallel.guidance import Guidance
from common.parallel.mesh import Mesh
from common.parallel.usp import SequenceParallel
from common.registry.forks import T5_XXL_PARAMETERS, Model, Size, Stack, fork_of, forks, get_model, model_names
from common.registry.layout import Coordinates, Layout
from common.text.t5 import T5_XXL, new_t5
from common.video.causal import CausalStream, LocalLink, spans
from common.video.decode import DecodePlan, VideoDecoder
from common.video.decode_planning import PeakMemory, decode_memory
from planner import cost
from planner.model import GIB, memory_gib
from tests.helpers.counting import counting, shorten

# Uneven tokens, uneven heads and both; the last rank has least, the first most.
LAYOUTS = [
    (Layout(), 0),
    (Layout(ulysses=2), 1),
    (Layout(ring=2), 0),
    (Layout(ulysses=3), 2),
    (Layout(ring=5), 4),
    (Layout(cfg=2, ulysses=4), 7),
    (Layout(cfg=2, ring=3), 2),
    (Layout(ring=2, ulysses=7), 9),
    (Layout(cfg=2, ring=7, ulysses=2), 20),
    (Layout(ring=4, ulysses=11), 43),
]


FEW = 4
"""Blocks are alike but for Mochi's last one and for the face that ConsisID's read, every second one of them."""


def workload(model: Model, size: Size, mesh: Mesh) -> Workload:
    """What a rank runs by the model's official numbers."""
    return fork_of(model).module("sampling").workload(model, size, mesh)


@dataclass
class Counted:
    """What each forward pass of a step on one rank computes, sends and holds; and what was run."""

    work: Workload
    flops: list[int]
    sent: list[Counter[str]]
    held: list[int]


def run(model: Model, size: Size, layout: Layout, rank: int, depth: int = FEW) -> Counted:
    """One step of one rank on the meta device, with `depth` blocks of the model; what is prepared once for all steps
    is not counted."""
    with imagined(layout, rank) as mesh:
        work = shorten(workload(model, size, mesh), depth)
        transformer = work.transformer.to(torch.bfloat16).requires_grad_(False)
        counted, running = Counted(work, [], [], []), []

        def before(*_: object) -> None:
            running.append([FlopCounterMode(display=False, custom_mapping=FUSED), Traffic(mesh), PeakMemory()])
            for counter in running[-1]:
                counter.__enter__()

        def after(*_: object) -> None:
            flops, traffic, memory = running.pop()
            for counter in (memory, traffic, flops):
                counter.__exit__(None, None, None)
            counted.flops.append(flops.get_total_flops())
            counted.sent.append(traffic.sent)
            counted.held.append(memory.peak)

        transformer.register_forward_pre_hook(before)
        transformer.register_forward_hook(after)
        with torch.inference_mode():
            work.step(transformer)
    return counted


def of_all_blocks(model: Model, size: Size, layout: Layout, rank: int) -> Counted:
    """As `run` at full depth: what two more blocks add is added as often as the model has two more."""
    short, longer = (run(model, size, layout, rank, depth) for depth in (FEW - 2, FEW))
    pairs, odd = divmod(model.stacks[0].layers - FEW, 2)
    assert not odd
    flops = [b + pairs * (b - a) for a, b in zip(short.flops, longer.flops)]
    sent = [Counter({n: b[n] + pairs * (b[n] - a[n]) for n in b}) for a, b in zip(short.sent, longer.sent)]
    return replace(longer, flops=flops, sent=sent)


def tokens_of(model: Model, stack: Stack, size: Size, branch: int, prompt: int) -> list[int]:
    """Tokens of every stream where prompts are as long as fit; a prompt that is left out stays so."""
    streams = zip(stack.streams, cost.tokens_of(stack, size, branch))
    return [prompt if stream.source in model.text and count else count for stream, count in streams]


def said(model: Model, size: Size, place: Coordinates, prompt: int) -> list[Sequence[cost.Pass]]:
    """What the planner says of every forward pass of a step."""
    return [
        [cost.forward(stack, tokens_of(model, stack, size, branch, prompt), place) for stack in model.stacks]
        for branch in cost.branches(place, size.guided)
    ]


DEFAULTS = {fork.models[0].name: number for number, fork in enumerate(forks())}


def layouts_of(name: str) -> list[tuple[Layout, int]]:
    """Every second one, in turns, so that each has two of the forks' first models; of a fork's other models, which
    differ in numbers only, the last."""
    return [*LAYOUTS[DEFAULTS[name] % 2 : -1 : 2], LAYOUTS[-1]] if name in DEFAULTS else LAYOUTS[-1:]


@pytest.mark.parametrize("name", model_names())
@pytest.mark.slow
def test_counts_equal_those_of_the_running_transformer(name: str) -> None:
    """The last layout at full depth too."""
    model = get_model(name)
    for layout, rank in layouts_of(name):
        size = replace(model.default_size, guided=layout.cfg == 2)  # a rank's one branch is enough
        counted = of_all_blocks(model, size, layout, rank)
        if name in DEFAULTS and (layout, rank) == LAYOUTS[-1]:
            whole = run(model, size, layout, rank, model.stacks[0].layers)
            assert (whole.flops, whole.sent) == (counted.flops, counted.sent)
        expected = said(model, size, Coordinates(layout, rank), counted.work.text[0].tokens)
        assert [sum(p.matmul + p.attention for p in passes) for passes in expected] == counted.flops, (layout, rank)
        assert [sum(p.all_to_all for p in passes) for passes in expected] == [s["ulysses"] for s in counted.sent]
        assert [sum(p.ring for p in passes) for passes in expected] == [s["ring"] for s in counted.sent]


def test_an_empty_negative_prompt_is_counted_without_text() -> None:
    model = get_model("mochi")
    size = Size(848, 480, 163, 64)
    counted = of_all_blocks(model, size, Layout(ring=3, ulysses=2), 5)
    place = Coordinates(Layout(1, 3, 2), 5)
    negative = cost.forward(model.stacks[0], (model.video_tokens(size), 0), place)
    assert (negative.matmul + negative.attention, negative.all_to_all) == (counted.flops[1], counted.sent[1]["ulysses"])
    assert counted.flops[1] < counted.flops[0]


@pytest.mark.parametrize("name", sorted({*DEFAULTS, "cogvideox-1.5-5b"}))
def test_guidance_and_the_last_gather_send_what_is_said(name: str) -> None:
    model = get_model(name)
    size, layout, rank = model.default_size, Layout(cfg=2, ring=2, ulysses=2), 5
    with imagined(layout, rank) as mesh, counting(mesh) as counts:
        sp, guidance = SequenceParallel(mesh), Guidance(mesh.cfg)
        lengths = sp.lengths(model.video_tokens(size))
        shard = torch.empty(1, lengths[sp.rank], model.latents.token_channels, device="meta")
        guidance.combine(dict.fromkeys(guidance.branches(4.5), shard), 4.5)
        sp.gather(shard, lengths)
    sent = cost.sent(model, replace(size, num_steps=1), Coordinates(layout, rank))
    assert sent.cfg == counts.sent["cfg"]
    assert sent.gather == counts.sent["sequence"]


def test_a_generation_sends_every_steps_bytes() -> None:
    model = get_model("mochi")
    size, place = Size(848, 480, 49, 64), Coordinates(Layout(1, 2, 3), 4)
    tokens = [(model.video_tokens(size), text) for text in model.text[0].tokens(size)]
    passes = [cost.forward(model.stacks[0], both, place) for both in tokens]
    sent = cost.sent(model, size, place)
    assert sent.all_to_all == 64 * sum(p.all_to_all for p in passes)
    assert sent.total == sent.all_to_all + sent.ring + sent.gather
    assert cost.sent(model, replace(size, guided=False), place).ring == 64 * passes[0].ring


@pytest.mark.parametrize("latents", [1, 4, 5, 13])
@pytest.mark.parametrize("name", sorted(DEFAULTS))
@pytest.mark.slow
def test_decoders_compute_what_is_said(name: str, latents: int) -> None:
    model = get_model(name)
    work = workload(model, model.default_size, Mesh())
    z = torch.empty(1, work.latents[0], latents, 6, 8, device="meta")
    with counting(Mesh()) as counts:
        decode_all(work.decoder, z)
    assert model.decoder.decoding(latents, 6, 8).flops == counts.flops
    assert sum(p.numel() for p in work.decoder.parameters()) == pytest.approx(model.decoder.parameters, rel=0.01)


def decode_all(decoder: VideoDecoder, z: torch.Tensor) -> None:
    """All chunks in order, as `common.video.decode` runs them on one rank."""
    link = LocalLink()
    parts = spans(decoder.chunks(z.shape[2], max(decoder.chunk_choices)))
    for k, part in enumerate(parts):
        decoder(z[:, :, part], CausalStream(link, first=k == 0, last=k == len(parts) - 1))


@pytest.mark.parametrize("latents", [9, 10, 28])
@pytest.mark.parametrize("name", sorted(DEFAULTS))
@pytest.mark.slow
def test_memory_of_decoding_is_what_the_decoders_hold(name: str, latents: int) -> None:
    model = get_model(name)
    work = workload(model, model.default_size, Mesh())
    decoder = work.decoder.to(torch.bfloat16)
    plan = DecodePlan("exact", max(decoder.chunk_choices))
    counted = decode_memory(decoder, (work.latents[0], latents, 60, 90), plan)
    assert model.decoder.decoding(latents, 60, 90).peak == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("name", ["mochi", "cogvideox-2b", "cogvideox-1.5-5b"])
@pytest.mark.slow
def test_memory_of_sampling_is_what_a_block_holds(name: str) -> None:
    model = get_model(name)
    size = replace(model.default_size, guided=False)
    for layout in (Layout(), Layout(ulysses=2), Layout(ring=2), Layout(ring=2, ulysses=2), Layout(ring=3)):
        held = max(run(model, size, layout, 0).held)
        expected = memory_gib(model, size, layout, "ours")["sampling"] * GIB - 2 * model.parameters
        assert expected == pytest.approx(held, rel=0.2), layout


@pytest.mark.parametrize("name", model_names())
def test_parameters_are_those_of_the_transformer(name: str) -> None:
    model = get_model(name)
    work = workload(model, model.default_size, Mesh())
    assert sum(p.numel() for p in work.transformer.parameters()) == model.parameters
    assert max(stack.heads for stack in model.stacks) == model.heads


def test_parameters_are_those_of_the_text_encoder() -> None:
    assert sum(p.numel() for p in new_t5(T5_XXL).parameters()) == T5_XXL_PARAMETERS
