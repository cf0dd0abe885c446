"""CogVideoX's autoencoder against diffusers', its chunks over ranks, and its memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideox_xdit.config import VAEConfig
from cogvideox_xdit.vae import CogVideoXDecoder, CogVideoXEncoder, encode
from common.parallel.mesh import Layout, distributed
from common.video.causal import CausalStream, LocalLink, TimeSplit, spans
from common.video.decode import DecodePlan, decode_frames, to_uint8
from common.video.decode_planning import PeakMemory, decode_memory, decode_plans

SMALL = VAEConfig(channels=(8, 8, 12, 16), layers=1, groups=4)
SHAPES = Path(__file__).parent / "data" / "cogvideox_vae_shapes.json"


def reference(dtype: torch.dtype = torch.float64):
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    model = AutoencoderKLCogVideoX(
        block_out_channels=SMALL.channels, layers_per_block=SMALL.layers, norm_num_groups=SMALL.groups
    )
    return model.to(dtype).eval()


def small(part: str, dtype: torch.dtype = torch.float64):
    """Our `decoder` or `encoder` with weights of its own; workers need no diffusers for it."""
    torch.manual_seed(0)
    return (CogVideoXDecoder if part == "decoder" else CogVideoXEncoder)(SMALL).to(dtype).eval()


def copied(part: str, dtype: torch.dtype):
    """Ours with the reference's weights."""
    model = small(part, dtype)
    model.load_state_dict(getattr(reference(dtype), part).state_dict())
    return model


def latents(frames: int, height: int = 3, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(1, 16, frames, height, width, generator=generator, dtype=torch.float64).to(dtype)


def video(frames: int, height: int = 24, width: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return (torch.rand(1, 3, frames, height, width, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


def streamed(model: CogVideoXDecoder, z: Tensor) -> Tensor:
    link, lengths = LocalLink(), model.chunks(z.shape[2])
    last = len(lengths) - 1
    parts = [model(z[:, :, p], CausalStream(link, k == 0, k == last)) for k, p in enumerate(spans(lengths))]
    assert [p.shape[2] for p in parts] == [model.num_frames(n, k == 0) for k, n in enumerate(lengths)]
    return torch.cat(parts, 2)


@pytest.mark.parametrize("frames, expected", [(1, 1), (2, 8), (3, 9), (5, 17), (6, 24), (13, 49)])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_decoder_equals_diffusers(frames, expected, dtype, limit):
    z = latents(frames, 2 if frames > 5 else 3, dtype=dtype)
    with torch.no_grad():
        ours, theirs = streamed(copied("decoder", dtype), z), reference(dtype).decode(z).sample
    assert ours.shape == theirs.shape and ours.shape[2] == expected
    assert (ours - theirs).abs().max() <= limit * max(1, theirs.abs().max().item())


@pytest.mark.parametrize("frames, expected", [(1, 1), (5, 2), (8, 2), (9, 3), (17, 5), (49, 13)])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_encoder_equals_diffusers(frames, expected, dtype, limit):
    x = video(frames, 16 if frames > 9 else 24, 24, dtype)
    mean, logvar = encode(copied("encoder", dtype), x)
    with torch.no_grad():
        theirs = reference(dtype).encode(x).latent_dist
    assert mean.shape == theirs.mean.shape and mean.shape[2] == expected
    assert (mean - theirs.mean).abs().max() <= limit * max(1, theirs.mean.abs().max().item())
    assert (logvar - theirs.logvar).abs().max() <= limit * max(1, theirs.logvar.abs().max().item())


def test_frames_are_those_of_the_reference_pipeline():
    from diffusers.video_processor import VideoProcessor

    z = latents(3, dtype=torch.float32)
    with torch.no_grad():
        pixels = reference(torch.float32).decode(z / SMALL.scaling_factor).sample
    images = VideoProcessor(vae_scale_factor=8).postprocess_video(pixels, output_type="pil")[0]
    theirs = torch.stack([torch.tensor(list(image.tobytes())).view(24, 40, 3) for image in images])
    ours = torch.cat(list(decode_frames(copied("decoder", torch.float32), z)))
    assert ours.shape == (9, 24, 40, 3)
    assert (ours.int() - theirs).abs().max() <= 1 and (ours.int() != theirs).float().mean() < 1e-3


def test_the_chunks_are_part_of_the_model():
    model = small("decoder")
    assert model.chunks(13) == [3, 2, 2, 2, 2, 2] and model.chunks(22) == [2] * 11
    assert model.chunks(1) == [1] and model.chunks(13, chunk=5) == model.chunks(13)
    assert small("encoder").chunks(49) == [9, 8, 8, 8, 8, 8] and small("encoder").chunks(5) == [5]
    z = latents(7)
    with torch.no_grad():
        assert (model(z) - streamed(model, z)).abs().max() > 1e-3, "one full decode is known to differ"
    assert {plan.chunk for plan in decode_plans(model, (16, 13, 30, 45), ranks=13)} == {2}
    with pytest.raises(ValueError, match="part of this model"):
        decode_plans(model, (16, 13, 30, 45), chunk=1)


def test_pictures_are_convolved_in_parts_of_the_video(monkeypatch):
    model, encoder, z, x = small("decoder"), small("encoder"), latents(5), video(9, 16, 16)
    with torch.no_grad():
        whole, moments = streamed(model, z), encoder(x)
        monkeypatch.setattr("cogvideox_xdit.vae.LARGEST_CONVOLUTION", 1)
        assert (streamed(model, z) - whole).abs().max() <= 1e-12
        assert (encoder(x) - moments).abs().max() <= 1e-12


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that a convolution of pictures reads or writes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "conv2d" or (name == "convolution" and args[1].ndim == 4):
            self.elements = max(self.elements, args[0].numel(), out.numel())
        return out


def test_no_convolution_of_pictures_is_too_large_for_32_bits():
    """At 1360 x 768 a first chunk of nine frames was 2.4e9 elements in one call."""
    with torch.device("meta"), torch.inference_mode():
        model = CogVideoXDecoder().to(torch.bfloat16)
        with Largest() as largest:
            model(torch.empty(1, 16, 3, 96, 170, dtype=torch.bfloat16), CausalStream())
    assert 256 * 768 * 1360 <= largest.elements < 2**31


def test_clamped_log_variance():
    model = small("encoder")
    with torch.no_grad():
        model.conv_out.conv.bias[16:] = 100
    assert encode(model, video(1))[1].max() == 20


COUNTS = (1, 2, 5, 8)


def dealt(ranks: int) -> list[tuple[dict[int, Tensor], Tensor | None]]:
    mesh = distributed(Layout(ulysses=ranks))
    split, model, results = TimeSplit(mesh.world), small("decoder"), []
    for frames in COUNTS:
        kept: list[Tensor] = []
        hook = model.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out.clone()))
        z = latents(frames) * SMALL.scaling_factor  # of the transformer's space
        pieces = list(decode_frames(model, z, DecodePlan("exact", 2), split))
        hook.remove()
        mine = {mesh.world.rank + i * ranks: out for i, out in enumerate(kept)}
        results.append((mine, torch.cat(pieces) if mesh.is_main else None))
    return results


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.slow
def test_decode_over_ranks_equals_one_process(run_ranks, ranks):
    model, by_rank = small("decoder"), run_ranks(ranks, dealt, ranks)
    for case, frames in enumerate(COUNTS):
        with torch.no_grad():
            whole = streamed(model, latents(frames))
        chunks = {k: chunk for results in by_rank for k, chunk in results[case][0].items()}
        assert sum(len(results[case][0]) for results in by_rank) == len(chunks) == max(frames // 2, 1)
        assert (torch.cat([chunks[k] for k in sorted(chunks)], 2) - whole).abs().max() <= 1e-10
        assert (by_rank[0][case][1].int() - to_uint8(whole[0], "nearest").int()).abs().max() <= 1


def encoded(ranks: int) -> list[tuple[Tensor, Tensor]]:
    mesh = distributed(Layout(ulysses=ranks))
    split, model = TimeSplit(mesh.world), small("encoder")
    return [encode(model, video(frames, 16, 16), split) for frames in (1, 9, 33)]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_encode_over_ranks_equals_one_process_on_every_rank(run_ranks, ranks):
    model = small("encoder")
    expected = [encode(model, video(frames, 16, 16)) for frames in (1, 9, 33)]
    for results in run_ranks(ranks, encoded, ranks):
        for (mean, logvar), (alone_mean, alone_logvar) in zip(results, expected):
            assert (mean - alone_mean).abs().max() <= 1e-10 and (logvar - alone_logvar).abs().max() <= 1e-10


@pytest.mark.parametrize("size", [(3, 5), (7, 11), (13, 9)])
@pytest.mark.slow
def test_tiles_fit_every_size(size):
    model, z = small("decoder", torch.float32), latents(3, *size, torch.float32)
    exact = torch.cat(list(decode_frames(model, z)))
    assert exact.shape == (9, 8 * size[0], 8 * size[1], 3)
    ours = torch.cat(list(decode_frames(model, z, DecodePlan("tiled", 2, (6, 6), 2))))
    alone = torch.cat(list(decode_frames(model, z, DecodePlan("tiled", 2, (13, 11), 2))))
    assert ours.shape == exact.shape and (alone.int() - exact.int()).abs().max() <= 1
    assert (ours.float() - exact.float()).abs().mean() < 0.3 * exact.float().std()


@pytest.mark.slow
def test_tiles_come_closer_with_their_size_and_overlap():
    model, z = small("decoder", torch.float32), latents(3, 24, 24, torch.float32)
    exact = torch.cat(list(decode_frames(model, z))).float()
    errors = []
    for limit, overlap in (((12, 12), 0), ((12, 12), 4), ((18, 18), 4)):
        ours = torch.cat(list(decode_frames(model, z, DecodePlan("tiled", 2, limit, overlap)))).float()
        errors.append((ours - exact).abs().mean().item() / exact.std().item())
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.8 * errors[1] and errors[2] < 0.1


def tiled(ranks: int) -> Tensor:
    mesh = distributed(Layout(ulysses=ranks))
    plan = DecodePlan("tiled", 2, (6, 6), 2)
    pieces = list(decode_frames(small("decoder"), latents(5, 7, 11), plan, TimeSplit(mesh.world)))
    return torch.cat(pieces) if mesh.is_main else torch.empty(0)


def test_tiles_over_ranks_are_the_same_to_the_bit(run_ranks):
    alone = torch.cat(list(decode_frames(small("decoder"), latents(5, 7, 11), DecodePlan("tiled", 2, (6, 6), 2))))
    assert torch.equal(run_ranks(3, tiled, 3)[0], alone)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_video():
    """21 latent frames are 81 frames, 41 are 161."""
    model, peaks = small("decoder", torch.float32), {}
    for frames in (9, 21, 41):
        z = latents(frames, 2, 2, torch.float32)
        with PeakMemory() as counter:
            for _ in decode_frames(model, z):
                pass
        peaks[frames] = counter.peak - z.nbytes  # the latents in the decoder's own space
    assert peaks[9] == peaks[21] == peaks[41]
    shapes = [(16, frames, 60, 90) for frames in (5, 21, 41)]
    assert len({decode_memory(model, shape, DecodePlan("exact", 2)) for shape in shapes}) == 1


@pytest.mark.slow
def test_the_full_model_has_the_official_names_and_fits_by_plan():
    with torch.device("meta"):
        model, encoder = CogVideoXDecoder().to(torch.bfloat16), CogVideoXEncoder()
    names = {
        f"{part}.{name}": list(weight.shape)
        for part, module in (("decoder", model), ("encoder", encoder))
        for name, weight in module.state_dict().items()
    }
    assert names == json.loads(SHAPES.read_text())
    assert decode_memory(model, (16, 13, 60, 90), DecodePlan("exact", 2)) < 8 * 2**30
    assert min(decode_memory(model, (16, 22, 96, 170), p) for p in decode_plans(model, (16, 22, 96, 170))) < 2**30
