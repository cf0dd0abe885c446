"""Wan's autoencoders against the original code's tensors; streamed, over ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from common.video.causal import CausalStream, LocalLink, spans
from common.weights.load import load, on_meta, open_checkpoint, save
from wan_xdit.config import VAE_2_2, VAEConfig
from wan_xdit.vae import WanDecoder, WanEncoder, fold, unfold
from wan_xdit.weights import LAYOUTS, decoder_table, encoder_table

DATA = Path(__file__).parent / "data"
GOLDENS = ("wan21_vae_tiny", "wan22_vae_tiny")


def golden(name):
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        values = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    later = "dec_dim" in values
    config = VAEConfig(
        width=values["dim"],
        decoder_width=values.get("dec_dim", values["dim"]),
        latent_channels=values["z_dim"],
        multiples=tuple(values["dim_mult"]),
        depth=values["num_res_blocks"],
        temporal=tuple(values["temperal_downsample"]),
        fold=2 if later else 1,
        shortcuts=later,
    )
    return config, tensors


HALVES = {
    WanDecoder: (decoder_table, ("encoder.*", "conv1.*", "quant_conv.*")),
    WanEncoder: (encoder_table, ("decoder.*", "conv2.*", "post_quant_conv.*")),
}


def halves(config, file, layout="original"):
    """Decoder and encoder of a file that holds both."""
    checkpoint = open_checkpoint(file)
    return [
        load(on_meta(build, config), checkpoint, table(config, layout), ignore=ignore)
        for build, (table, ignore) in HALVES.items()
    ]


def write(file, tensors):
    save({key[2:]: tensor for key, tensor in tensors.items() if key.startswith("w.")}, file)
    return file


def rewritten(config, modules, file, layout):
    """Decoder and encoder, saved and loaded in another layout."""
    parts = []
    for module in modules:
        save(module.state_dict(), file, HALVES[type(module)][0](config, layout))
        parts.append(
            load(on_meta(type(module), config), open_checkpoint(file), HALVES[type(module)][0](config, layout))
        )
    return parts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GOLDENS)
def test_the_original_codes_tensors(name, layout, tmp_path):
    config, tensors = golden(name)
    modules = halves(config, write(tmp_path / "vae.safetensors", tensors))
    decoder, encoder = (
        modules if layout == "original" else rewritten(config, modules, tmp_path / "x.safetensors", layout)
    )
    # In fp64, since the tensors are fp32 and rounded by up to 8e-6 themselves.
    with torch.no_grad():
        frames = decoder.double()(tensors["in.latent"].double())
        means = encoder.double()(tensors["in.video"].double()).chunk(2, dim=1)[0]
    torch.testing.assert_close(frames, tensors["out.video"].double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(means, tensors["out.mu"].double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GOLDENS)
def test_diffusers_decodes_and_encodes_the_same(name, tmp_path, monkeypatch):
    from diffusers import AutoencoderKLWan

    # It enlarges pictures in fp32, also in fp64: not in this test.
    monkeypatch.setattr(torch.Tensor, "float", lambda self, *args, **kwargs: self.double())

    config, tensors = golden(name)
    later = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12} if config.shortcuts else {}
    theirs = AutoencoderKLWan(
        base_dim=config.width,
        decoder_base_dim=config.decoder_width,
        z_dim=config.latent_channels,
        dim_mult=list(config.multiples),
        num_res_blocks=config.depth,
        temperal_downsample=list(config.temporal),
        **later,
    ).double()
    decoder, encoder = (m.double() for m in halves(config, write(tmp_path / "vae.safetensors", tensors)))
    state = {}
    for module, (table, _) in zip((decoder, encoder), HALVES.values()):
        save(module.state_dict(), tmp_path / "half.safetensors", table(config, "diffusers"))
        state |= load_file(tmp_path / "half.safetensors")
    theirs.load_state_dict(state)
    draw = torch.Generator().manual_seed(2)
    z = torch.randn(1, config.latent_channels, 3, 2, 3, generator=draw, dtype=torch.float64)
    x = torch.rand(1, 3, 9, 2 * config.space, config.space, generator=draw, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(decoder(z).clamp(-1, 1), theirs.decode(z).sample, atol=1e-10, rtol=1e-10)
        moments = theirs.encode(x).latent_dist.parameters
        torch.testing.assert_close(encoder(x)[:, : config.latent_channels], moments[:, : config.latent_channels])


def test_names_of_true_size_are_the_checkpoints():
    shapes = json.loads((DATA / "wan_vae_shapes.json").read_text())
    for known, config in (("wan2.1 vae", VAEConfig()), ("wan2.2 vae (ti2v-5b)", VAE_2_2)):
        found = {}
        for build, (table, _) in HALVES.items():
            names = table(config, "diffusers")
            for name, slot in on_meta(build, config).state_dict().items():
                owner, _, leaf = name.rpartition(".")
                found[f"{names[owner]}.{leaf}"] = list(slot.shape)
        assert found == shapes[known]["tensors"]


def streamed(module, x, lengths):
    link, parts = LocalLink(), spans(lengths)
    with torch.no_grad():
        made = [module(x[:, :, part], CausalStream(link, k == 0, k == len(parts) - 1)) for k, part in enumerate(parts)]
    return torch.cat(made, dim=2)


@pytest.mark.parametrize("lengths", [[1] * 7, [3, 2, 2], [2, 5], [1, 6], [4, 3]])
@pytest.mark.parametrize("name", GOLDENS)
def test_any_chunks_decode_the_same(name, lengths, tmp_path):
    config, tensors = golden(name)
    decoder = halves(config, write(tmp_path / "vae.safetensors", tensors))[0].double()
    z = torch.randn(1, config.latent_channels, 7, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        whole = decoder(z)
    assert whole.shape == (1, 3, 25, 3 * config.space, 2 * config.space)
    torch.testing.assert_close(streamed(decoder, z, lengths), whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("lengths", [[1, 4, 4, 4], [5, 4, 4], [9, 4], [5, 8]])
@pytest.mark.parametrize("name", GOLDENS)
def test_any_chunks_encode_the_same(name, lengths, tmp_path):
    config, tensors = golden(name)
    encoder = halves(config, write(tmp_path / "vae.safetensors", tensors))[1].double()
    shape = (1, 3, 13, 2 * config.space, config.space)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        whole = encoder(x)
    torch.testing.assert_close(streamed(encoder, x, lengths), whole, atol=1e-10, rtol=1e-10)
    assert encoder.chunks(13) == [5, 4, 4]
    assert encoder.chunks(1) == [1]


def test_folding_is_undone():
    x = torch.arange(2 * 3 * 2 * 4 * 6.0).view(2, 3, 2, 4, 6)
    assert torch.equal(unfold(fold(x, 2), 2), x)
    assert fold(x, 2).shape == (2, 12, 2, 2, 3)
