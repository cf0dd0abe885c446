"""Wan's autoencoders against the original code's tensors; streamed, over ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from common.vae import CausalStream, LocalLink, spans
from wan_xdit.config import VAEConfig
from wan_xdit.vae import WanDecoder, WanEncoder, fold, unfold
from wan_xdit.weights import vae_tables

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


def filled(module, table, tensors):
    """The module with the original's weights; their trailing dimensions of 1 are ours without."""
    state = {}
    for name, slot in module.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        state[name] = tensors[f"w.{table[owner]}.{leaf}"].view(slot.shape)
    module.load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize("name", GOLDENS)
def test_the_original_codes_tensors(name):
    config, tensors = golden(name)
    decoder_table, encoder_table = vae_tables(config)
    decoder, encoder = (
        filled(WanDecoder(config), decoder_table, tensors),
        filled(WanEncoder(config), encoder_table, tensors),
    )
    with torch.no_grad():
        frames = decoder(tensors["in.latent"])
        means = encoder(tensors["in.video"]).chunk(2, dim=1)[0]
    torch.testing.assert_close(frames, tensors["out.video"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(means, tensors["out.mu"], atol=1e-5, rtol=1e-5)


def streamed(module, x, lengths):
    link, parts = LocalLink(), spans(lengths)
    with torch.no_grad():
        made = [module(x[:, :, part], CausalStream(link, k == 0, k == len(parts) - 1)) for k, part in enumerate(parts)]
    return torch.cat(made, dim=2)


@pytest.mark.parametrize("lengths", [[1] * 7, [3, 2, 2], [2, 5], [1, 6], [4, 3]])
@pytest.mark.parametrize("name", GOLDENS)
def test_any_chunks_decode_the_same(name, lengths):
    config, tensors = golden(name)
    decoder = filled(WanDecoder(config), vae_tables(config)[0], tensors).double()
    z = torch.randn(1, config.latent_channels, 7, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        whole = decoder(z)
    assert whole.shape == (1, 3, 25, 3 * config.space, 2 * config.space)
    torch.testing.assert_close(streamed(decoder, z, lengths), whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("lengths", [[1, 4, 4, 4], [5, 4, 4], [9, 4], [5, 8]])
@pytest.mark.parametrize("name", GOLDENS)
def test_any_chunks_encode_the_same(name, lengths):
    config, tensors = golden(name)
    encoder = filled(WanEncoder(config), vae_tables(config)[1], tensors).double()
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
