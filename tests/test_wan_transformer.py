"""Wan's transformer against the original code's tensors and against diffusers, on any layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from common.parallel.mesh import Layout, distributed
from common.parallel.usp import SequenceParallel
from common.run.demo import fill
from common.weights.float8 import Float8Linear
from common.weights.load import load, on_meta, open_checkpoint, save
from common.weights.placement import Placement, place
from wan_xdit.config import TransformerConfig, read_transformer
from wan_xdit.transformer import WanTransformer, pack, sinusoid, unpack
from wan_xdit.weights import LAYOUTS, fp32_names, rename_table

DATA = Path(__file__).parent / "data"
GOLDENS = ("wan21_t2v_tiny", "wan21_i2v_tiny", "wan22_ti2v_tiny")
TINY = TransformerConfig(width=60, heads=5, layers=2, ffn=72, in_channels=4, out_channels=4, text_dim=24)
IMAGE = TransformerConfig(
    width=60, heads=5, layers=2, ffn=72, in_channels=9, out_channels=4, text_dim=24, image_width=16
)


def made(config, seed):
    model = WanTransformer(config)
    fill(model, seed)
    return model


def denoise(model, latents, text, t, beside=None, image=None, keep=True):
    """One prediction for full latents (B, C, T, H, W), the same on every rank."""
    size, patch, sp = tuple(latents.shape[2:]), model.config.patch, model.sp
    cond = model.prepare(text, size, beside, image, keep)
    tokens = pack(latents, patch)
    if isinstance(t, torch.Tensor) and t.ndim == 2:
        t = sp.shard(t)
    out = model(sp.shard(tokens), t, cond)
    return unpack(sp.gather(out, sp.lengths(tokens.shape[1])), size, patch)


def golden(name):
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        return config, {key: file.get_tensor(key) for key in list(file.keys())}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GOLDENS)
def test_the_original_codes_tensors(name, layout, tmp_path):
    values, tensors = golden(name)
    if "w.img_emb.proj.0.weight" in tensors:
        values["image_dim"] = tensors["w.img_emb.proj.0.weight"].shape[0]
    config = read_transformer(values)
    file = tmp_path / "model.safetensors"
    original = {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("w.")}
    save(original, file)
    model = load(on_meta(WanTransformer, config), open_checkpoint(file), rename_table(config, "original"))
    if layout == "diffusers":
        save(model.state_dict(), file, rename_table(config, layout))
        model = load(on_meta(WanTransformer, config), open_checkpoint(file), rename_table(config, layout))
    noise, beside = tensors["in.x"][None], tensors.get("in.y")
    image = tensors.get("in.clip_fea", tensors.get("in.clip"))
    with torch.no_grad():
        text, times = tensors["in.text"][None], tensors.get("in.t_per_token", tensors["in.t"].reshape(1))
        out = denoise(model, noise, text, times, None if beside is None else beside[None], image)
    torch.testing.assert_close(out[0], tensors["out"], atol=1e-5, rtol=1e-5)


def test_matmul_weights_in_eight_bits(tmp_path):
    """The same as with these weights widened again: rounding them is all that differs."""
    model = made(IMAGE, 4)
    save(model.state_dict(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    small = place(on_meta(WanTransformer, IMAGE), checkpoint, placement=Placement(float8=True))
    for name, layer in small.named_modules():
        if isinstance(layer, Float8Linear):
            wide = layer.weight.float() * layer.weight_scale
            model.get_submodule(name).weight.data = wide
    draw = torch.Generator().manual_seed(5)
    latents, text = torch.randn(1, 4, 2, 4, 6, generator=draw), torch.randn(1, 7, 24, generator=draw)
    beside, image = torch.randn(1, 5, 2, 4, 6, generator=draw), torch.randn(1, 9, 16, generator=draw)
    with torch.no_grad():
        one, other = (denoise(m, latents, text, 500.0, beside, image) for m in (small, model))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def oracle(config, dtype):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_width,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.time_width,
        ffn_dim=config.ffn,
        num_layers=config.layers,
        image_dim=config.image_width,
        added_kv_proj_dim=config.width if config.image_width else None,
    ).to(dtype)
    # Its angles are products in fp32, off by 4e-5 at t = 700; the original's, and ours, are in fp64.
    model.condition_embedder.timesteps_proj.forward = lambda t: sinusoid(t, config.time_width).to(dtype)
    return model


def test_the_times_sinusoid_is_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 1.0, 31.0, 999.0])
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoid(t, 256).float(), theirs, atol=1e-4, rtol=0)


def inputs(config, dtype, size=(3, 6, 10), batch=1):
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn(batch, config.out_channels, *size, generator=draw, dtype=torch.float64).to(dtype)
    text = torch.randn(batch, 7, config.text_dim, generator=draw, dtype=torch.float64).to(dtype)
    beside = image = None
    if config.image_channels:
        beside = torch.randn(batch, config.image_channels, *size, generator=draw, dtype=torch.float64).to(dtype)
    if config.image_width:
        shape = (batch, config.image_tokens, config.image_width)
        image = torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
    return latents, text, beside, image


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("config", [TINY, IMAGE], ids=["text", "image"])
def test_diffusers_predicts_the_same(config, dtype, tolerance, tmp_path, monkeypatch):
    lift_precision(monkeypatch, dtype)
    model = made(config, 3).to(dtype)
    save(model.state_dict(), tmp_path / "x.safetensors", rename_table(config, "diffusers"))
    reference = load(oracle(config, dtype), open_checkpoint(tmp_path / "x.safetensors"), dtype=dtype)
    latents, text, beside, image = inputs(config, dtype, batch=2)
    padded = torch.nn.functional.pad(text, (0, 0, 0, config.text_length - text.shape[1]))
    whole = latents if beside is None else torch.cat((latents, beside), 1)
    times = torch.tensor([700.0, 31.0])
    with torch.no_grad():
        theirs = reference(whole, times, padded, image, return_dict=False)[0]
        ours = denoise(model, latents, text, times, beside, image)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def lift_precision(monkeypatch, dtype):
    """diffusers rounds norms and the time's sinusoid to fp32 also in fp64: not in this test."""
    if dtype == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", lambda self, *args, **kwargs: self.double())


def test_keys_and_values_that_are_not_kept_change_nothing():
    model = made(IMAGE, 4).double()
    latents, text, beside, image = inputs(IMAGE, torch.float64)
    with torch.no_grad():
        kept, anew = (denoise(model, latents, text, 500.0, beside, image, keep) for keep in (True, False))
    assert torch.equal(kept, anew)


def test_every_gradient_flows():
    model = made(IMAGE, 4)
    latents, text, beside, image = inputs(IMAGE, torch.float32)
    denoise(model, latents, text, 500.0, beside, image).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def on_rank(layout, config, state, given, t):
    with distributed(layout) as mesh:
        model = WanTransformer(config, SequenceParallel(mesh)).double()
        model.load_state_dict(state)
        with torch.no_grad():
            return denoise(model, *given[:2], t, *given[2:])


LAYOUT_CASES = [(1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 5), (5, 1), (2, 4), (8, 1)]


@pytest.mark.parametrize("ring, ulysses", LAYOUT_CASES)
def test_any_layout_predicts_the_same(run_ranks, ring, ulysses):
    config = IMAGE if ring == 2 else TINY
    model = made(config, 6).double()
    given = inputs(config, torch.float64, size=(3, 6, 10))  # 45 tokens of 5 heads
    tokens = 45
    times = torch.full((1, tokens), 800.0, dtype=torch.float64)
    times[:, :15] = 0
    with torch.no_grad():
        expected = denoise(model, *given[:2], times, *given[2:])
    outs = run_ranks(ring * ulysses, on_rank, Layout(1, ring, ulysses), config, model.state_dict(), given, times)
    for out in outs:
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)


def test_names_of_true_size_are_the_checkpoints():
    from wan_xdit import config as configs

    shapes = json.loads((DATA / "wan_transformer_shapes.json").read_text())
    known = {
        "wan2.1-t2v-1.3b": configs.T2V_1_3B,
        "wan2.1-t2v-14b (and each expert of wan2.2-t2v-a14b)": configs.T2V_14B,
        "wan2.1-i2v-14b": configs.I2V_14B,
        "wan2.2-i2v-a14b (each expert)": configs.I2V_A14B,
        "wan2.2-ti2v-5b": configs.TI2V_5B,
    }
    assert set(shapes) == set(known)
    for name, config in known.items():
        model = on_meta(WanTransformer, config)
        assert read_transformer(shapes[name]["config"]) == config
        assert sum(p.numel() for p in model.parameters()) == shapes[name]["parameters"]
        assert set(fp32_names(config)) <= set(model.state_dict())
