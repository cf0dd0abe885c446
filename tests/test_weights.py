"""Loading, renaming and saving checkpoints; every way a file can be wrong is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.weights import load as weights
from common.weights.load import (
    CheckpointError,
    Concat,
    Swap,
    check,
    find_files,
    load,
    on_meta,
    open_checkpoint,
    save,
)


class Model(nn.Module):
    """One of each: fused, swapped, exact, a scalar, an integer buffer, a tied pair, an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.gate = nn.Linear(4, 6, bias=False)
        self.frequencies = nn.Parameter(torch.randn(3))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.none = nn.Parameter(torch.zeros(0, 5))
        self.register_buffer("index", torch.arange(3))
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


TABLE = {
    "qkv": Concat(("to.q", "to.k", "to.v")),
    "gate": Swap("ff"),
    "frequencies": "freq",
    "scale": "temperature",
    "none": "nothing",
    "index": "positions",
    "embed": "shared",
    "head": "head",
}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def untied(model: Model) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if name != "head.weight"}


def assert_same(got: nn.Module, want: nn.Module) -> None:
    state = got.state_dict()
    for name, value in want.state_dict().items():
        assert torch.equal(state[name], value.to(state[name].dtype)), name


@pytest.mark.parametrize("rename", [None, TABLE])
@pytest.mark.parametrize("shard_bytes", [None, 1, 100, 10**6])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_round_trip(tmp_path: Path, model: Model, rename, shard_bytes, dtype) -> None:
    files = save(untied(model), tmp_path / "model.safetensors", rename, shard_bytes)
    checkpoint = open_checkpoint(files[-1])
    got = load(on_meta(Model), checkpoint, rename, dtype=dtype, keep_fp32=("frequencies",))
    assert_same(got, model)
    assert got.qkv.weight.dtype == (dtype or torch.float32)
    assert got.frequencies.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.index.dtype == torch.int64
    assert got.head.weight is not None and got.head.weight.data_ptr() == got.embed.weight.data_ptr()
    assert not got.training and not any(p.requires_grad for p in got.parameters())


def test_small_pieces(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor larger than the buffer goes through it in several pieces."""
    save(untied(model), tmp_path / "a.safetensors", TABLE)
    monkeypatch.setattr(weights, "_STAGING_BYTES", 20)
    got = load(on_meta(Model), open_checkpoint(tmp_path / "a.safetensors"), TABLE, dtype=torch.float64)
    assert_same(got, model)


def test_the_library_reads_what_we_write(tmp_path: Path, model: Model) -> None:
    (file,) = save(untied(model), tmp_path / "a.safetensors", TABLE, metadata={"made": "by hand"})
    got = load_file(file)
    q, k, v = model.qkv.weight.chunk(3)
    assert torch.equal(got["to.q.weight"], q) and torch.equal(got["to.k.weight"], k)
    assert torch.equal(got["to.v.weight"], v)
    assert torch.equal(got["ff.weight"], model.gate.weight.roll(3, 0))
    assert open_checkpoint(file).metadata == {"format": "pt", "made": "by hand"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int32, torch.bool)
    tensors = {f"t{i}": torch.randn(3, i + 1).to(kind) for i, kind in enumerate(kinds)}
    save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        got = checkpoint.tensor(name)
        assert got.dtype == tensor.dtype
        assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))
    assert checkpoint.nbytes == sum(t.numel() * t.dtype.itemsize for t in tensors.values())


def test_odd_offsets_are_read(tmp_path: Path) -> None:
    """Other writers may leave tensors at any byte."""
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    data = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert open_checkpoint(tmp_path / "a.safetensors").tensor("b").tolist() == [1.5, -2.0]


def test_mapped_tensors_are_private(tmp_path: Path, model: Model) -> None:
    file = tmp_path / "a.safetensors"
    save(untied(model), file)
    before = file.read_bytes()
    one = load(on_meta(Model), open_checkpoint(file))
    two = load(on_meta(Model), open_checkpoint(file))
    one.qkv.weight.data.zero_()
    assert_same(two, model)
    assert file.read_bytes() == before


def test_progress_counts_every_byte(tmp_path: Path, model: Model) -> None:
    (file,) = save(untied(model), tmp_path / "a.safetensors", TABLE)
    seen: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(file)
    load(on_meta(Model), checkpoint, TABLE, dtype=torch.bfloat16, progress=lambda *now: seen.append(now))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (checkpoint.nbytes, checkpoint.nbytes)


def test_select(tmp_path: Path) -> None:
    save({"vae.a": torch.ones(2), "vae.b": torch.ones(1), "x": torch.ones(1)}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert set(checkpoint.select("vae.")) == {"vae.a", "vae.b"}
    assert checkpoint.select("vae.", strip=True).tensor("b").tolist() == [1.0]


def refused(tmp_path: Path, state: dict[str, Tensor], **kwargs) -> str:
    (file,) = save(state, tmp_path / "bad.safetensors")
    fresh = on_meta(Model)
    with pytest.raises(CheckpointError) as at_the_door:
        check(fresh, open_checkpoint(file), **kwargs)
    with pytest.raises(CheckpointError) as error:
        load(fresh, open_checkpoint(file), **kwargs)
    message = str(error.value)
    assert message == str(at_the_door.value)
    assert "\n" not in message and "bad.safetensors" in message
    assert all(p.is_meta for p in fresh.parameters()), "something was loaded before the check was over"
    return message


def test_missing_and_unexpected_tensors(tmp_path: Path, model: Model) -> None:
    state = untied(model)
    del state["gate.weight"]
    state["extra"] = torch.ones(1)
    message = refused(tmp_path, state)
    assert "missing tensor gate.weight; unexpected tensor extra" in message
    for name in ("qkv.bias", "scale", "index"):
        del state[name]
    message = refused(tmp_path, state, ignore=["ext*"])
    assert "missing tensors" in message and "and 1 more" in message and "unexpected tensor" not in message


def test_ignored_leftovers(tmp_path: Path, model: Model) -> None:
    save(untied(model) | {"ema.a": torch.ones(1)}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert_same(load(on_meta(Model), checkpoint, ignore=["ema.*"]), model)
    with pytest.raises(CheckpointError, match=r"unexpected tensor ema\.a"):
        load(on_meta(Model), checkpoint)


def test_wrong_shape(tmp_path: Path, model: Model) -> None:
    state = untied(model) | {"gate.weight": torch.ones(5, 4)}
    assert "tensor gate.weight has shape [5, 4], expected [6, 4]" in refused(tmp_path, state)


def test_wrong_shape_of_a_fused_part(tmp_path: Path, model: Model) -> None:
    (file,) = save(untied(model), tmp_path / "a.safetensors", TABLE)
    save(load_file(file) | {"to.k.bias": torch.ones(5)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b.safetensors: tensor to.k.bias has shape \[5\], expected \[4\]"):
        load(on_meta(Model), open_checkpoint(tmp_path / "b.safetensors"), TABLE)


def test_wrong_dtype(tmp_path: Path, model: Model) -> None:
    state = untied(model)
    message = refused(tmp_path, state | {"qkv.weight": torch.ones(12, 4, dtype=torch.int64)})
    assert "tensor qkv.weight has dtype I64, expected F64, F32, F16, BF16" in message
    message = refused(tmp_path, state | {"qkv.weight": torch.ones(12, 4).to(torch.float8_e4m3fn)})
    assert "tensor qkv.weight has dtype F8_E4M3" in message
    assert "tensor index has dtype F32, expected I64" in refused(tmp_path, state | {"index": torch.ones(3)})


@pytest.mark.parametrize("keep", [0.999, 0.7, 0.02])
def test_truncated_file(tmp_path: Path, model: Model, keep: float) -> None:
    (file,) = save(untied(model), tmp_path / "a.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(
        CheckpointError, match=r"a.safetensors: truncated file, (tensor [\w.]+ ends at|\d+ bytes end inside)"
    ):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\x80\x02}q\x00(X", "not a safetensors file"),
        (b"PK\x03\x04" + bytes(200), "not a safetensors file"),
        (b"<!DOCTYPE html><html>" + b" " * 200, "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ((20).to_bytes(8, "little") + b"{" * 30, "header is no JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a safetensors file"),
        ((13).to_bytes(8, "little") + b'{"a":{"b":1}}', "bad entry for tensor a"),
    ],
)
def test_not_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(file)
    assert str(file) in str(error.value)


def test_header_that_contradicts_itself(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]},"b":{"dtype":"Q4","shape":[1],"data_offsets":[8,9]}}'
    )
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(20))
    with pytest.raises(CheckpointError, match="tensor a takes 8 bytes, its shape and dtype say 12"):
        open_checkpoint(file)
    header = header.replace(b"[0,8]", b"[0,12]")
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(20))
    with pytest.raises(CheckpointError, match="tensor b has the unknown dtype Q4"):
        open_checkpoint(file)


def test_missing_files_and_shards(tmp_path: Path, model: Model) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors: no such file"):
        open_checkpoint(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="a directory"):
        open_checkpoint(tmp_path)
    *shards, index = save(untied(model), tmp_path / "m.safetensors", shard_bytes=100)
    gone = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{index.name}: shard {shards[1].name} is missing"):
        open_checkpoint(index)
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match="is also in"):
        open_checkpoint(index)
    shards[1].write_bytes(gone)
    placed = json.loads(index.read_text())
    placed["weight_map"]["ghost"] = shards[0].name
    index.write_text(json.dumps(placed))
    with pytest.raises(CheckpointError, match=rf"{shards[0].name}: tensor ghost is missing, but .*{index.name}"):
        open_checkpoint(index)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not an index of weights"):
        open_checkpoint(index)


def test_several_files_are_one_checkpoint(tmp_path: Path, model: Model) -> None:
    shards = save(untied(model), tmp_path / "m.safetensors", shard_bytes=100)[:-1]
    assert_same(load(on_meta(Model), open_checkpoint(shards)), model)


def test_find_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        find_files(tmp_path, "model")
    (tmp_path / "model.bf16.safetensors").touch()
    assert find_files(tmp_path, "model").name == "model.bf16.safetensors"
    (tmp_path / "model.safetensors.index.json").touch()
    assert find_files(tmp_path, "model").name == "model.safetensors.index.json"
    assert find_files(tmp_path, "model", torch.bfloat16).name == "model.bf16.safetensors"
    (tmp_path / "model.safetensors.index.bf16.json").touch()
    assert find_files(tmp_path, "model", torch.bfloat16).name == "model.safetensors.index.bf16.json"


def test_a_failed_save_leaves_nothing(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    save(untied(model), file)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save({"x": torch.ones(1)}, file)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_two_writers_of_one_file_do_not_spoil_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writes while the other is half way through, then both finish: what lies there is one of them, whole."""
    path, replace = tmp_path / "x.safetensors", os.replace
    contents = [torch.full((1000,), float(i)) for i in range(2)]

    def second_writer(*names: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        partials = [p.read_bytes() for p in tmp_path.iterdir()]
        save({"a": contents[1]}, path)
        assert torch.equal(load_file(path)["a"], contents[1])
        assert [p.read_bytes() for p in tmp_path.iterdir() if p != path] == partials
        replace(*names)

    monkeypatch.setattr(os, "replace", second_writer)
    save({"a": contents[0]}, path)
    assert torch.equal(load_file(path)["a"], contents[0]) and os.listdir(tmp_path) == [path.name]


def test_table_must_cover_the_module(tmp_path: Path, model: Model) -> None:
    with pytest.raises(CheckpointError, match=r"no entry for gate\.weight"):
        save(untied(model), tmp_path / "a.safetensors", {k: v for k, v in TABLE.items() if k != "gate"})


@pytest.mark.gpu
def test_towards_a_gpu(tmp_path: Path, model: Model) -> None:
    save(untied(model), tmp_path / "a.safetensors", TABLE)
    got = load(on_meta(Model), open_checkpoint(tmp_path / "a.safetensors"), TABLE, device="cuda", dtype=torch.bfloat16)
    assert got.qkv.weight.is_cuda
    assert_same(got.cpu(), model)
