"""The planner's FLOPs and bytes are those that the running transformers compute and send."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cogvideox_xdit.transformer import CogVideoXTransformer
from cogvideox_xdit.vae import CogVideoXDecoder
from common.decode import DecodePlan, PeakMemory, decode_memory
from common.guidance import Guidance
from common.layout import Coordinates
from common.parallel import Layout
from common.usp import SequenceParallel
from common.vae import CausalStream, LocalLink, spans
from common.weights import on_meta
from consisid_xdit.config import ConsisIDConfig
from consisid_xdit.transformer import ConsisIDTransformer
from mochi_xdit.config import MochiConfig
from mochi_xdit.transformer import MochiTransformer
from mochi_xdit.vae import MochiDecoder
from planner import cost
from planner.decoding import decoding
from planner.model import GB_RUNTIME, memory_gb
from planner.models import MODELS, Model, Size, default_size, get_model, latent_frames, video_tokens
from tests.counting import Counts, as_rank, counting, register

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


def shallow(model: Model, layers: int = 4) -> Model:
    """The true model with fewer layers: the formula is linear in them."""
    depth = {"depth": layers} if isinstance(model.config, MochiConfig) else {"layers": layers}
    return replace(model, config=replace(model.config, **depth))


def run(model: Model, size: Size, text: int, layout: Layout, rank: int) -> Counts:
    """What one forward pass of one rank computes and sends, counted."""
    mesh = as_rank(layout, rank)
    sp = SequenceParallel(mesh)
    latents = (latent_frames(model, size), size.height // 8, size.width // 8)
    config = model.config
    if isinstance(config, MochiConfig):
        transformer = on_meta(MochiTransformer, config, sp).to(torch.bfloat16).requires_grad_(False)
        cond = transformer.prepare(latents, torch.empty(1, text, config.text_dim, device="meta"))
    else:
        kind = ConsisIDTransformer if isinstance(config, ConsisIDConfig) else CogVideoXTransformer
        transformer = on_meta(kind, config, sp).to(torch.bfloat16).requires_grad_(False)
        cond = prepared(transformer, config, text, latents)
    n = sp.lengths(video_tokens(model, size))[sp.rank]
    x = torch.empty(1, n, model.patch_dim, device="meta")
    with counting() as counts, PeakMemory() as held, torch.no_grad():
        register(counts, mesh)
        transformer(x, torch.zeros((), device="meta"), cond)
    counts.held = held.peak  # type: ignore[attr-defined]
    return counts


@torch.no_grad()
def prepared(transformer, config, text: int, latents: tuple[int, int, int]):
    image = torch.empty(1, config.image_channels, *latents, device="meta") if config.image_channels else None
    words = torch.empty(1, text, config.text_dim, device="meta")
    if not isinstance(config, ConsisIDConfig):
        return transformer.prepare(words, latents, image)
    hidden = [torch.empty(1, 577, config.vit_dim, device="meta")] * config.scales
    face = transformer.read_face(torch.empty(1, config.id_dim, device="meta"), hidden)
    return transformer.prepare(words, latents, image, face=face)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_counts_equal_those_of_the_running_transformer(name: str) -> None:
    model = shallow(get_model(name))
    size, text = default_size(model), max(model.text_tokens)
    for layout, rank in LAYOUTS:
        counted = run(model, size, text, layout, rank)
        place = Coordinates(layout, rank)
        said = cost.forward(model, video_tokens(model, size), text, place)
        assert said.matmul + said.attention == counted.flops, (layout, rank)
        assert said.all_to_all == counted.bytes["ulysses"], (layout, rank)
        assert said.ring == counted.bytes["ring"], (layout, rank)


def test_an_empty_negative_prompt_is_counted_without_text() -> None:
    model = shallow(get_model("mochi"))
    size = Size(848, 480, 163, 64)
    counted = run(model, size, 0, Layout(ring=3, ulysses=2), 5)
    said = cost.forward(model, video_tokens(model, size), 0, Coordinates(Layout(1, 3, 2), 5))
    assert (said.matmul + said.attention, said.all_to_all) == (counted.flops, counted.bytes["ulysses"])


@pytest.mark.parametrize("name", ["mochi", "cogvideox-1.5-5b"])
def test_guidance_and_the_last_gather_send_what_is_said(name: str) -> None:
    model = get_model(name)
    size, layout, rank = default_size(model), Layout(cfg=2, ring=2, ulysses=2), 5
    mesh = as_rank(layout, rank)
    sp = SequenceParallel(mesh)
    lengths = sp.lengths(video_tokens(model, size))
    shard = torch.empty(1, lengths[sp.rank], model.patch_dim, device="meta")
    with counting() as counts:
        register(counts, mesh)
        Guidance(mesh.cfg)(lambda branch: shard, 4.5)
        sp.gather(shard, lengths)
    sent = cost.sent(model, replace(size, num_steps=1), Coordinates(Layout(2, 2, 2), rank))
    assert sent.cfg == counts.bytes["cfg"]
    assert sent.gather == counts.bytes["sequence"]


def test_a_generation_sends_every_steps_bytes() -> None:
    model = get_model("mochi")
    size, place = Size(848, 480, 49, 64), Coordinates(Layout(1, 2, 3), 4)
    passes = [cost.forward(model, video_tokens(model, size), text, place) for text in model.text_tokens]
    sent = cost.sent(model, size, place)
    assert sent.all_to_all == 64 * sum(p.all_to_all for p in passes)
    assert sent.total == sent.all_to_all + sent.ring + sent.gather
    assert cost.sent(model, replace(size, guided=False), place).ring == 64 * passes[0].ring


@pytest.mark.parametrize("latents", [1, 4, 5, 13])
@pytest.mark.slow
def test_cogvideoxs_decoder_computes_what_is_said(latents: int) -> None:
    model = get_model("cogvideox-5b")
    decoder = on_meta(CogVideoXDecoder)
    z = torch.empty(1, 16, latents, 6, 8, device="meta")
    with counting() as counts:
        decode_all(decoder, z)
    size = Size(64, 48, 4 * latents - 3, 1)
    assert decoding(model, size).flops == counts.flops


def decode_all(decoder: CogVideoXDecoder, z: torch.Tensor) -> None:
    """All chunks in order, as `common.decode` runs them on one rank."""
    link = LocalLink()
    parts = spans(decoder.chunks(z.shape[2], max(decoder.chunk_choices)))
    for k, part in enumerate(parts):
        decoder(z[:, :, part], CausalStream(link, first=k == 0, last=k == len(parts) - 1))


@pytest.mark.parametrize(("name", "latents"), [("mochi", 9), ("mochi", 28), ("cogvideox-5b", 13), ("cogvideox-5b", 10)])
@pytest.mark.slow
def test_memory_of_decoding_is_what_the_decoders_hold(name: str, latents: int) -> None:
    model = get_model(name)
    decoder = on_meta(MochiDecoder if name == "mochi" else CogVideoXDecoder).to(torch.bfloat16)
    size = Size(720, 480, model.frame_step * (latents - 1) + 1, 1)
    channels = 12 if name == "mochi" else 16
    plan = DecodePlan("exact", max(decoder.chunk_choices))
    counted = decode_memory(decoder, (channels, latents, 60, 90), plan)
    assert decoding(model, size).peak == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("name", ["mochi", "cogvideox-2b", "cogvideox-1.5-5b"])
def test_memory_of_sampling_is_what_a_block_holds(name: str) -> None:
    model = get_model(name)
    size = default_size(model)
    for layout in (Layout(), Layout(ulysses=2), Layout(ring=2), Layout(ring=2, ulysses=2)):
        held = run(shallow(model, 2), size, max(model.text_tokens), layout, 0).held  # type: ignore[attr-defined]
        said = memory_gb(model, size, layout, "ours")["sampling"] - GB_RUNTIME - 2 * model.parameters / 1e9
        assert said == pytest.approx(held / 1e9, rel=0.4), layout


def test_mochis_decoder_computes_what_is_said() -> None:
    model = get_model("mochi")
    size = Size(64, 48, 49, 1)
    decoder = on_meta(MochiDecoder, model.config.vae)
    with counting() as counts:
        decoder(torch.empty(1, 12, 9, 6, 8, device="meta"))
    assert decoding(model, size).flops == counts.flops
