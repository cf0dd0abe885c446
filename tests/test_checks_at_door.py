"""What a checkpoint's headers show is told before anything loads: decoder, encoder and text encoder like the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideox_xdit.pipeline import CogVideoXPipeline
from common.text.encoder import FeatureCache, encode
from common.text.t5 import EncoderFiles, check_t5
from common.weights.checkpoint import CheckpointError
from consisid_xdit.pipeline import ConsisIDPipeline
from mochi_xdit.fork import FORK as MOCHI
from mochi_xdit.pipeline import MochiPipeline
from tests.fuzz.headers import joined, split
from tests.helpers import cogvideox, consisid, mochi
from tests.helpers.programs import main

KINDS: dict[str, tuple[Callable[[Path], Path], type]] = {
    "mochi": (lambda folder: mochi.write_checkpoint(folder, "diffusers"), MochiPipeline),
    "cogvideox": (lambda folder: cogvideox.write_checkpoint(folder, "5b-i2v"), CogVideoXPipeline),
    "consisid": (consisid.write_checkpoint, ConsisIDPipeline),
}
SAME_SIZE = {"F32": "I32", "BF16": "I16", "F16": "I16"}


def lose(header: dict, name: str) -> None:
    header["unknown"] = header.pop(name)


def whole_numbers(header: dict, name: str) -> None:
    header[name]["dtype"] = SAME_SIZE[header[name]["dtype"]]


def reshape(header: dict, name: str) -> None:
    header[name]["shape"] = [1, *header[name]["shape"]]


def spoil(folder: Path, prefix: str, change: Callable[[dict, str], None]) -> tuple[Path, str]:
    """Change one tensor whose name starts with `prefix` in a folder's header; returns file and name."""
    for path in sorted(folder.glob("*.safetensors")):
        header, data = split(path.read_bytes())
        if names := [name for name in sorted(header) if name.startswith(prefix) and name != "__metadata__"]:
            change(header, names[0])
            path.write_bytes(joined(json.dumps(header).encode(), data))
            return path, names[0]
    raise AssertionError(f"no tensor {prefix} in {folder}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, (make, _) in KINDS.items()}


@pytest.mark.parametrize("change", [lose, whole_numbers, reshape])
@pytest.mark.parametrize("part", ["transformer", "vae/decoder.", "vae/encoder.", "text_encoder"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_part_is_compared_with_its_model(folders, kind, part, change):
    folder, pipeline = folders[kind], KINDS[kind][1]
    where, _, prefix = part.partition("/")
    files = {path: path.read_bytes() for path in (folder / where).glob("*.safetensors")}
    pipe, frames = pipeline(folder, dtype="fp32"), kind != "mochi"
    pipe.check_weights(frames=frames)
    path, name = spoil(folder / where, prefix, change)
    try:
        if prefix == "encoder.":
            pipe.check_weights(frames=False)
        if prefix == "encoder." and not frames:
            return  # this model starts from no picture
        with pytest.raises(CheckpointError) as error:
            pipe.check_weights(frames=frames)
        assert name.removeprefix(prefix).rpartition(".")[0] in str(error.value)
        assert str(path.parent) in str(error.value)
        if part in ("transformer", "text_encoder"):
            pipe.check_weights(sample=False)
    finally:
        for path, content in files.items():
            path.write_bytes(content)


def test_a_command_ends_before_it_samples(folders, tmp_path, capsys):
    folder = tmp_path / "m"
    shutil.copytree(folders["mochi"], folder)
    path, _ = spoil(folder / "vae", "decoder.", lose)
    sizes = ["--width", "32", "--height", "32", "--num-frames", "7", "--num-steps", "1"]
    where = ["--model-dir", str(folder), "--output", str(tmp_path / "a.mp4")]
    command = [*where, "--prompt", "a", "--device", "cpu", "--gpus", "1", "--dtype", "fp32", *sizes]
    assert main(MOCHI, command) == 1
    said = capsys.readouterr().err
    assert "error: opening the checkpoint" in said and str(path) in said and "sampling" not in said


def test_an_encoder_of_another_width_is_refused(folders):
    files = EncoderFiles.find(folders["mochi"])
    check_t5(files, mochi.TINY.text_dim)
    with pytest.raises(CheckpointError, match="d_model=32; the model takes features of 4096"):
        check_t5(files, 4096)


@pytest.mark.parametrize("kind", [torch.int8, torch.int16])
def test_a_text_encoder_in_whole_numbers_is_refused(folders, tmp_path, kind):
    shutil.copytree(folders["mochi"], tmp_path / "m")
    path = tmp_path / "m" / "text_encoder" / "model.safetensors"
    state = load_file(path)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save_file(state | {name: state[name].to(kind)}, path)
    with pytest.raises(CheckpointError, match=f"tensor {name} has dtype") as error:
        encode(["a"], EncoderFiles.find(tmp_path / "m"), 8)
    assert str(path) in str(error.value)
    save_file(state | {f"{name.removesuffix('weight')}scale_weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="scale_weight is unknown to the T5 encoder"):
        encode(["a"], EncoderFiles.find(tmp_path / "m"), 8)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_text_encoder_in_float8_is_widened(folders, tmp_path, scale):
    shutil.copytree(folders["mochi"], tmp_path / "m")
    path = tmp_path / "m" / "text_encoder" / "model.safetensors"
    state = load_file(path)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    rounded = state[name].to(torch.float8_e4m3fn)
    save_file(state | {name: (rounded.float() * (scale or 1)).to(state[name].dtype)}, path)
    (expected,) = encode(["a"], EncoderFiles.find(tmp_path / "m"), 8).features
    scales = {} if scale is None else {f"{name.removesuffix('weight')}scale_weight": torch.tensor([scale])}
    save_file(state | {name: rounded} | scales, path)
    (features,) = encode(["a"], EncoderFiles.find(tmp_path / "m"), 8).features
    assert torch.equal(features, expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_layers", "2"), ("num_layers", 10**9), ("d_model", None), ("d_kv", 10**30), ("feed_forward_proj", "x")],
)
def test_numbers_of_a_text_encoder(folders, tmp_path, key, value):
    shutil.copytree(folders["mochi"], tmp_path / "m")
    path = tmp_path / "m" / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError) as error:
        check_t5(EncoderFiles.find(tmp_path / "m"))
    assert str(path.parent) in str(error.value)


def test_a_pickled_encoder_of_the_old_format_loads(folders, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(folders["mochi"], folder)
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    expected = encode(["a red ball"], EncoderFiles.find(folder), 8, dtype=torch.float32).features
    path.unlink()
    for zipped in (False, True):
        torch.save(state, path.with_name("pytorch_model.bin"), _use_new_zipfile_serialization=zipped)
        assert torch.equal(encode(["a red ball"], EncoderFiles.find(folder), 8, dtype=torch.float32).features, expected)


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(3, 32),
        torch.zeros(2, 5),
        torch.tensor(1.0),
        torch.zeros(0),
        torch.full((2, 32), float("nan")),
        torch.zeros(2, 32, dtype=torch.int64),
        torch.zeros(1, 2, 32),
    ],
)
def test_a_cached_file_of_anything_else_counts_as_unknown(folders, tmp_path, rows):
    cache = FeatureCache(tmp_path, EncoderFiles.find(folders["mochi"]), "fp32")
    good = torch.randn(2, 32)
    cache.put([5, 1], good)
    assert torch.equal(cache.get([5, 1]), good)
    (path,) = tmp_path.iterdir()
    save_file({"features": rows}, path)
    assert cache.get([5, 1]) is None
    path.write_bytes(path.read_bytes()[:50])
    assert cache.get([5, 1]) is None
