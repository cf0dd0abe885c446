"""Mochi's autoencoder: native goldens, diffusers as a witness, streaming and ranks against one full decode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from common.parallel.mesh import Layout, distributed
from common.video.causal import CausalStream, LocalLink, TimeSplit, spans
from common.video.decode import DecodePlan, decode_frames, to_uint8
from common.video.decode_planning import decode_memory, decode_plans
from common.weights.load import Concat
from mochi_xdit.config import MochiVAEConfig
from mochi_xdit.vae import (
    MochiDecoder,
    MochiEncoder,
    fourier_features,
    normalize,
)
from mochi_xdit.weights import decoder_rename, encoder_rename

GOLDEN = Path(__file__).parent / "data" / "mochi_decoder_tiny.safetensors"
TINY = MochiVAEConfig(
    decoder_channels=(4, 8, 8, 12), encoder_channels=(8, 8, 16, 16), layers=(1,) * 5, groups=4, head_dim=4
)
# diffusers fixes 32 groups and heads of 32 channels.
WIDE = MochiVAEConfig(decoder_channels=(32, 32, 64, 64), encoder_channels=(32, 64, 64, 96), layers=(1, 1, 2, 1, 1))


def decoder(config: MochiVAEConfig = TINY, dtype: torch.dtype = torch.float64) -> MochiDecoder:
    torch.manual_seed(0)
    return MochiDecoder(config).to(dtype).eval()


def latents(frames: int, height: int = 2, width: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(1, 12, frames, height, width, generator=generator, dtype=torch.float64).to(dtype)


def test_golden_of_the_native_decoder():
    with safe_open(GOLDEN, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers = json.loads(file.metadata()["config"])
        groups = int(file.metadata()["groupnorm_groups"])
    weights = {name[2:]: tensor for name, tensor in stored.items() if name.startswith("w.")}
    config = MochiVAEConfig(
        decoder_channels=tuple(numbers["base_channels"] * m for m in numbers["channel_multipliers"]),
        layers=tuple(numbers["num_res_blocks"]),
        temporal=tuple(numbers["temporal_expansions"]),
        spatial=tuple(numbers["spatial_expansions"]),
        groups=groups,
    )
    model = MochiDecoder(config)
    model.load_state_dict(weights)
    inner = {}
    for i in (1, 2):
        model.blocks[i].register_forward_hook(lambda _m, _i, out, i=i: inner.update({i: out}))
    with torch.no_grad():
        video = model(stored["in.latent"])
    assert (video - stored["out.video"]).abs().max() <= 1e-5
    assert all((inner[i] - stored[f"mid.block{i}"]).abs().max() <= 1e-5 for i in (1, 2))


def chunked(model: MochiDecoder, z: Tensor, lengths: list[int]) -> Tensor:
    link, last = LocalLink(), len(lengths) - 1
    parts = [model(z[:, :, p], CausalStream(link, k == 0, k == last)) for k, p in enumerate(spans(lengths))]
    assert [p.shape[2] for p in parts] == [model.num_frames(n, k == 0) for k, n in enumerate(lengths)]
    return torch.cat(parts, 2)


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
def test_streaming_equals_one_full_decode(frames):
    model, z = decoder(), latents(frames)
    with torch.no_grad():
        whole = model(z)
        assert whole.shape == (1, 3, 6 * (frames - 1) + 1, 16, 24)
        for chunk in {1, 2, 3, frames}:
            assert (chunked(model, z, model.chunks(frames, chunk)) - whole).abs().max() <= 1e-10
        if frames == 7:
            assert (chunked(model, z, [1, 3, 1, 2]) - whole).abs().max() <= 1e-10


def test_28_latents_are_163_frames_whatever_the_chunk():
    model, z = decoder(dtype=torch.float32), latents(28, 1, 1, torch.float32)
    pieces = [list(decode_frames(model, z, DecodePlan("exact", chunk))) for chunk in (1, 3, 5, 28)]
    assert [len(p) for p in pieces] == [28, 10, 6, 1]
    assert pieces[0][0].shape == (1, 8, 8, 3) and pieces[1][0].shape == (13, 8, 8, 3)
    videos = [torch.cat(p) for p in pieces]
    assert all(v.shape == (163, 8, 8, 3) for v in videos)
    assert all((v.int() - videos[0].int()).abs().max() <= 1 for v in videos)


@pytest.mark.parametrize("latent_frames, chunk", [(28, 3), (28, 40), (5, 2), (1, 1), (7, 1)])
def test_chunks_are_even_and_add_up(latent_frames, chunk):
    lengths = decoder().chunks(latent_frames, chunk)
    assert sum(lengths) == latent_frames and max(lengths) <= chunk and max(lengths) - min(lengths) <= 1


def dealt(ranks: int, cases: list[tuple[int, int]]) -> list[tuple[list[tuple[int, Tensor]], Tensor | None]]:
    mesh = distributed(Layout(ulysses=ranks))
    split, model, results = TimeSplit(mesh.world), decoder(), []
    for frames, chunk in cases:
        kept: list[Tensor] = []
        hook = model.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out.clone()))
        pieces = list(decode_frames(model, latents(frames), DecodePlan("exact", chunk), split))
        hook.remove()
        mine = [(mesh.world.rank + i * ranks, out) for i, out in enumerate(kept)]
        results.append((mine, torch.cat(pieces) if mesh.is_main else None))
    return results


CASES = [(1, 1), (2, 1), (7, 1), (7, 3), (11, 2)]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_time_split_over_ranks_equals_one_full_decode(run_ranks, ranks):
    by_rank = run_ranks(ranks, dealt, ranks, CASES)
    for case, (frames, chunk) in enumerate(CASES):
        with torch.no_grad():
            whole = decoder()(decoder().denormalize(latents(frames)))
        chunks = dict(pair for results in by_rank for pair in results[case][0])
        assert sorted(chunks) == list(range(-(-frames // chunk))), "a chunk was decoded twice or not at all"
        assert (torch.cat([chunks[k] for k in sorted(chunks)], 2) - whole).abs().max() <= 1e-10
        video = by_rank[0][case][1]
        assert (video.int() - to_uint8(whole[0]).int()).abs().max() <= 1
        assert all(results[case][1] is None for results in by_rank[1:])


def theirs(table: dict, weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our weights under diffusers' names."""
    renamed = {}
    for ours, other in table.items():
        for suffix in (".weight", ".bias"):
            if ours + suffix not in weights:
                continue
            names = other.names if isinstance(other, Concat) else (other,)
            for name, part in zip(names, weights[ours + suffix].chunk(len(names))):
                renamed[name.removeprefix(prefix) + suffix] = part
    return renamed


def test_diffusers_decoder_from_where_its_first_frames_have_died_out():
    from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiDecoder3D

    model = decoder(WIDE)
    reference = MochiDecoder3D(12, 3, WIDE.decoder_channels, WIDE.layers, WIDE.temporal, WIDE.spatial).double()
    reference.load_state_dict(theirs(decoder_rename(WIDE), model.state_dict(), "decoder."))
    z = latents(7)
    with torch.no_grad():
        ours, other = model(z), reference(z)[0][:, :, 5:]
    error = (ours - other).abs().amax((0, 1, 3, 4))
    assert len(error) == 37
    assert error[0] > 1e-3, "the two decoders are known to differ in the first frames"
    assert error[26:].max() <= 1e-10


@pytest.mark.parametrize("frames", [1, 13])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_encoder_equals_diffusers(frames, dtype, limit):
    from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiEncoder3D

    torch.manual_seed(1)
    model = MochiEncoder(WIDE).to(dtype)
    reference = MochiEncoder3D(15, 12, WIDE.encoder_channels, WIDE.layers, WIDE.temporal, WIDE.spatial, WIDE.attention)
    reference = reference.to(dtype)
    reference.load_state_dict(theirs(encoder_rename(WIDE), model.state_dict(), "encoder."))
    x = torch.rand(2, 3, frames, 24, 16, dtype=dtype) * 2 - 1
    # Its Fourier features are always fp32 and the angles reach 800: compared apart, they cost less than 1e-4.
    features = fourier_features(x, (6, 7))
    assert (reference.fourier_features(x) - features).abs().max() <= 1e-4
    reference.fourier_features = nn.Identity()
    other = reference(features)[0]
    mean, logvar = model(x)
    assert mean.shape == (2, 12, (frames - 1) // 6 + 1, 3, 2)
    assert (torch.cat([mean, logvar], 1) - other).abs().max() <= limit * max(1, other.abs().max().item())


def test_encoder_attention_in_slices_is_the_same(monkeypatch):
    torch.manual_seed(1)
    model, x = MochiEncoder(TINY), torch.rand(1, 3, 7, 16, 16)
    whole = model(x)[0]
    monkeypatch.setattr("mochi_xdit.vae.ATTENTION_ROWS", 5)
    assert torch.allclose(model(x)[0], whole, atol=1e-6)


def test_encoder_and_decoder_train_together():
    torch.manual_seed(0)
    encoder, model = MochiEncoder(TINY), decoder(dtype=torch.float32)
    x = torch.rand(1, 3, 7, 16, 16) * 2 - 1
    mean, logvar = encoder(x)
    video = model(mean + torch.randn_like(mean) * (0.5 * logvar).exp())
    assert video.shape == x.shape
    (video - x).square().mean().backward()
    for name, parameter in [*encoder.named_parameters(), *model.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert encoder.layers[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [(2, 3), (6, 10), (7, 11), (13, 9)])
def test_tiles_fit_every_size(size):
    model, z = decoder(dtype=torch.float32), latents(3, *size, torch.float32)
    exact = torch.cat(list(decode_frames(model, z)))
    assert exact.shape == (13, 8 * size[0], 8 * size[1], 3)
    ours = torch.cat(list(decode_frames(model, z, DecodePlan("tiled", 2, (6, 6), 2))))
    alone = torch.cat(list(decode_frames(model, z, DecodePlan("tiled", 2, (13, 11), 2))))
    assert ours.shape == exact.shape
    assert (alone.int() - exact.int()).abs().max() <= 1
    # Group statistics are a tile's own, so no pixel is exact; random weights make this the worst case.
    assert (ours.float() - exact.float()).abs().mean() < 0.3 * exact.float().std()


@pytest.mark.slow
def test_tiles_come_closer_with_their_size_and_overlap():
    model, z = decoder(dtype=torch.float32), latents(3, 24, 24, torch.float32)
    exact = torch.cat(list(decode_frames(model, z))).float()
    errors = []
    for limit, overlap in (((12, 12), 0), ((12, 12), 4), ((18, 18), 4)):
        ours = torch.cat(list(decode_frames(model, z, DecodePlan("tiled", 2, limit, overlap)))).float()
        errors.append((ours - exact).abs().mean().item() / exact.std().item())
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.8 * errors[1] and errors[2] < 0.1


def tiled(ranks: int) -> Tensor:
    mesh = distributed(Layout(ulysses=ranks))
    plan = DecodePlan("tiled", 1, (6, 6), 2)
    pieces = list(decode_frames(decoder(), latents(3, 7, 11), plan, TimeSplit(mesh.world)))
    return torch.cat(pieces) if mesh.is_main else torch.empty(0)


def test_tiles_over_ranks_are_the_same_to_the_bit(run_ranks):
    alone = torch.cat(list(decode_frames(decoder(), latents(3, 7, 11), DecodePlan("tiled", 1, (6, 6), 2))))
    for ranks in (2, 3):
        assert torch.equal(run_ranks(ranks, tiled, ranks)[0], alone)


def test_latent_statistics_there_and_back():
    z = latents(2)
    assert torch.allclose(normalize(decoder().denormalize(z), TINY), z, rtol=0, atol=1e-12)
    v = decoder().denormalize(torch.zeros_like(z))
    assert v[0, 3, 0, 0, 0].item() == pytest.approx(-0.05565264470995561)
    assert (decoder().denormalize(z) - v)[0, 7, 1, 1, 2] == pytest.approx(1.3720942357788521 * z[0, 7, 1, 1, 2].item())
    first = next(decode_frames(decoder(), z, DecodePlan("exact", 1)))
    with torch.no_grad():
        assert torch.equal(first, to_uint8(decoder()(decoder().denormalize(z))[0, :, :1]))


@pytest.mark.slow
def test_the_full_model_has_the_official_names_and_fits_by_plan():
    with torch.device("meta"):
        model, encoder = MochiDecoder().to(torch.bfloat16), MochiEncoder()
    assert len(model.state_dict()) == 162 and sum(p.numel() for p in model.parameters()) == 362_526_595
    assert len(encoder.state_dict()) == 243 and sum(p.numel() for p in encoder.parameters()) == 97_222_016
    shape = (12, 28, 60, 106)
    needs = {str(p): decode_memory(model, shape, p) / 2**30 for p in decode_plans(model, shape)}
    assert needs["exact, 1 latent frame at a time"] < 7
    # The same for one second and for ten: streaming does not remember the video.
    plan = DecodePlan("exact", 1)
    assert decode_memory(model, (12, 300, 60, 106), plan) == decode_memory(model, shape, plan)
    assert min(needs.values()) < 1
