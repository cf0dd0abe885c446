"""The demo checkpoint's common part: reproducible, complete or absent, safe when asked for twice."""

import dataclasses
import threading

import pytest
import torch

from common.run.demo import made_once, write_text_encoder
from common.system.files import cache_home
from common.text.encoder import encode
from common.text.t5 import EncoderFiles
from common.video.decode import decode_frames
from common.weights.load import load, on_meta
from mochi_xdit.demo import SHIPPED, demo_checkpoint, demo_config, random_checkpoint
from mochi_xdit.vae import MochiDecoder, MochiEncoder
from mochi_xdit.weights import find_decoder, find_encoder, load_transformer
from tests.helpers.mochi import denoise

CAPTIONS = [f"A {c} {s}." for c in ("red", "green", "blue") for s in ("circle", "square")]


def test_the_text_encoder_is_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        write_text_encoder(tmp_path / name, CAPTIONS, seed=3, d_model=16, heads=2, d_kv=8, d_ff=16)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    write_text_encoder(tmp_path / "c", CAPTIONS, seed=4, d_model=16, heads=2, d_kv=8, d_ff=16)
    weights = "text_encoder/model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() != (tmp_path / "c" / weights).read_bytes()


def test_a_folder_is_made_once_and_only_whole(tmp_path):
    target, gate, made = tmp_path / "deep" / "checkpoint", threading.Barrier(3), []

    def make(folder):
        gate.wait(10)
        (folder / "file").write_text("whole")
        made.append(folder)

    threads = [threading.Thread(target=made_once, args=(target, make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3 and (target / "file").read_text() == "whole"
    assert [p.name for p in target.parent.iterdir()] == ["checkpoint"]
    assert made_once(target, None) == target


def test_a_failed_making_leaves_nothing(tmp_path):
    def make(folder):
        (folder / "half").touch()
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        made_once(tmp_path / "checkpoint", make)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
        made_once(tmp_path / "file" / "checkpoint", make)


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "xdit"
    assert cache_home("/x").as_posix() == "/x"


def test_mochis_random_checkpoint_loads_strictly_and_runs(tmp_path):
    folder = demo_checkpoint(cache_dir=tmp_path) if not SHIPPED.is_dir() else tmp_path / "random"
    if SHIPPED.is_dir():
        random_checkpoint(folder)
    again = tmp_path / "again"
    random_checkpoint(again)
    for name in ("transformer", "vae"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (folder / file).read_bytes() == (again / file).read_bytes()
    transformer = load_transformer(folder, dtype=torch.float32)
    config = demo_config()
    assert transformer.config == dataclasses.replace(config, vae=transformer.config.vae)
    text = encode(["A red circle."], EncoderFiles.find(folder), 64)
    latents = torch.randn(1, 12, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    out = denoise(transformer, latents, torch.tensor([500.0]), text.features, text.mask)
    assert out.shape == latents.shape and out.isfinite().all() and out.std() > 0.01
    other = denoise(transformer, latents, torch.tensor([500.0]))
    assert (out - other).abs().max() > 1e-3

    part = find_decoder(folder)
    decoder = load(on_meta(MochiDecoder, part.config), part.open(), part.rename, "cpu", torch.float32)
    frames = torch.cat([f for f in decode_frames(decoder, latents) if f is not None])
    assert frames.shape == (7, 64, 64, 3) and frames.float().std() > 1
    part = find_encoder(folder)
    encoder = load(on_meta(MochiEncoder, part.config), part.open(), part.rename, "cpu", torch.float32)
    assert encoder(torch.zeros(1, 3, 7, 64, 64))[0].shape == latents.shape


def test_an_unknown_demo_is_named():
    with pytest.raises(ValueError, match="no demo called 'huge'"):
        demo_checkpoint("huge")


def test_diffusers_reads_the_same_folder(tmp_path):
    from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

    random_checkpoint(tmp_path)
    ours = load_transformer(tmp_path, dtype=torch.float32)
    theirs = MochiTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    z, text = torch.randn(1, 12, 2, 8, 8, generator=generator), torch.randn(1, 9, 64, generator=generator)
    with torch.no_grad():
        expected = theirs(z, text, torch.tensor([300.0]), torch.ones(1, 9), return_dict=False)[0]
    assert (denoise(ours, z, torch.tensor([300.0]), text) - expected).abs().max() < 1e-4
    AutoencoderKLMochi.from_pretrained(tmp_path / "vae")
