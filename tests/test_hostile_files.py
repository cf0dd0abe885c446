"""Files that lie, are damaged or were made to harm: one line with the file's name, in bounded time and memory."""

from __future__ import annotations

import itertools
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideox_xdit import config as cogvideox
from cogvideox_xdit.config import CONFIGS, read_checkpoint, transformer_json, vae_json
from cogvideox_xdit.demo import model_index, scheduler_json
from cogvideox_xdit.fork import FORK as COGVIDEOX
from common.weights.checkpoint import CheckpointError, load_pickle, open_checkpoint, read_index
from common.weights.headers import read_header
from common.weights.schema import read_object
from consisid_xdit.config import PREVIEW, consisid_json, read_consisid
from mochi_xdit.config import read_config
from mochi_xdit.fork import FORK as MOCHI
from tests.fuzz.documents import absurd, mutated
from tests.fuzz.headers import joined, mutated_file
from tests.helpers import cogvideox as tiny_cogvideox
from tests.helpers import mochi
from tests.helpers.programs import main
from xdit_doctor.cli import checkpoint

CASES = int(os.environ.get("FUZZ_CASES", "300"))
"""Random cases of each kind; set it higher for a longer search."""


def refused(read: Callable[[], Any], path: Path) -> bool:
    """Whether `read` refuses a file; whatever it raises is one printable line that names the file."""
    try:
        read()
    except CheckpointError as error:
        said = str(error)
        assert str(path) in said and len(said) < 1500 and said.isprintable(), ascii(said[:500])
        return True
    return False


@contextmanager
def little_memory(room: int = 512 << 20) -> Iterator[None]:
    """No more than `room` bytes beyond what is mapped now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def tiny_file(path: Path) -> bytes:
    from common.weights.load import save

    save({"a.weight": torch.ones(2, 2), "b": torch.zeros(3, dtype=torch.bfloat16)}, path)
    return path.read_bytes()


def test_mutated_safetensors_are_read_or_refused_in_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    content = tiny_file(path)
    outcomes = set()
    with little_memory():
        for variant in itertools.islice(mutated_file(content, seed=1), 5 * CASES):
            path.write_bytes(variant)

            def read() -> None:
                checkpoint = open_checkpoint(path)
                for name in checkpoint:
                    checkpoint.tensor(name).float().sum()

            outcomes.add(refused(read, path))
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":"abc"}',
        b'{"__metadata__":[1]}',
        b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"a":{"dtype":"F32","shape":[0,4611686018427387904,4611686018427387904],"data_offsets":[0,0]}}',
    ],
)
def test_crafted_headers(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(joined(header, bytes(8)))
    assert refused(lambda: open_checkpoint(path), path)


def test_a_header_of_no_length_and_what_is_no_plain_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(8) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4))
    assert refused(lambda: read_header(path), path)
    path.unlink()
    os.mkfifo(path)
    assert refused(lambda: read_header(path), path), "a pipe is not waited for"
    with path.with_name("sparse").open("wb") as file:
        file.write((1 << 40).to_bytes(8, "little") + b"{")
        file.truncate(1 << 41)
    with little_memory():
        assert refused(lambda: read_header(path.with_name("sparse")), path.with_name("sparse"))


@pytest.mark.parametrize("outside", ["../b.safetensors", "/b.safetensors", "x/../../b.safetensors", "", ".", "a\0"])
def test_an_index_does_not_leave_its_folder(tmp_path, outside):
    tiny_file(tmp_path / "b.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": outside}}))
    assert refused(lambda: open_checkpoint(index), index)


def test_links_of_a_hub_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    tiny_file(tmp_path / "blobs" / "0123")
    (tmp_path / "model" / "m.safetensors").symlink_to("../blobs/0123")
    index = tmp_path / "blobs" / "4567"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(("a.weight", "b"), "m.safetensors")}))
    (tmp_path / "model" / "m.safetensors.index.json").symlink_to(index)
    assert len(open_checkpoint(tmp_path / "model" / "m.safetensors.index.json")) == 2


@pytest.mark.parametrize("placed", [[], {}, None, {"a": 1}, {"a": ["b"]}, "abc", {"a": {"b": "c"}}])
def test_indexes_of_another_kind(tmp_path, placed):
    index = tmp_path / "m.safetensors.index.json"
    for content in ({"weight_map": placed}, placed):
        index.write_text(json.dumps(content))
        assert refused(lambda: read_index(index), index)
    index.write_text("[" * 100_000)
    assert refused(lambda: read_index(index), index)


def mochi_folder(folder: Path) -> dict[str, dict]:
    return {"transformer/config.json": mochi.transformer_json(), "vae/config.json": mochi.vae_json()}


def cogvideox_folder(folder: Path) -> dict[str, dict]:
    return {
        "transformer/config.json": transformer_json(CONFIGS["5b"]),
        "vae/config.json": vae_json(cogvideox.VAEConfig()),
        "scheduler/scheduler_config.json": scheduler_json("5b"),
        "model_index.json": model_index("CogVideoXPipeline", "CogVideoXTransformer3DModel"),
    }


def consisid_folder(folder: Path) -> dict[str, dict]:
    return cogvideox_folder(folder) | {
        "transformer/config.json": consisid_json(PREVIEW),
        "model_index.json": model_index("ConsisIDPipeline", "ConsisIDTransformer3DModel"),
    }


FOLDERS = {
    "mochi": (mochi_folder, read_config),
    "cogvideox": (cogvideox_folder, read_checkpoint),
    "consisid": (consisid_folder, read_consisid),
}


def write_folder(kind: str, folder: Path) -> tuple[dict[str, dict], Callable[[Path], Any]]:
    make, read = FOLDERS[kind]
    documents = make(folder)
    for name, raw in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(raw))
    read(folder)
    return documents, read


@pytest.mark.parametrize("kind", FOLDERS)
def test_no_value_of_a_config_ends_in_anything_but_a_line(tmp_path, kind):
    documents, read = write_folder(kind, tmp_path)
    with little_memory():
        for name, raw in documents.items():
            whole = (tmp_path / name).read_bytes()
            variants = [v for key in raw for v in absurd(raw, key)]
            for variant in [*variants, *itertools.islice(mutated(raw, seed=2), CASES)]:
                (tmp_path / name).write_bytes(variant)
                refused(lambda: read(tmp_path), tmp_path)
            (tmp_path / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("kind", "name", "key", "value"),
    [
        ("mochi", "transformer/config.json", "num_layers", 10**9),
        ("mochi", "transformer/config.json", "num_layers", "4"),
        ("mochi", "transformer/config.json", "patch_size", 64),
        ("mochi", "transformer/config.json", "num_attention_heads", 10**30),
        ("mochi", "vae/config.json", "spatial_expansions", [1]),
        ("mochi", "vae/config.json", "latents_mean", [0.0]),
        ("mochi", "vae/config.json", "encoder_block_out_channels", 7),
        ("cogvideox", "transformer/config.json", "num_layers", 10**9),
        ("cogvideox", "transformer/config.json", "attention_head_dim", 10**11),
        ("cogvideox", "transformer/config.json", "spatial_interpolation_scale", 10**30),
        ("cogvideox", "vae/config.json", "block_out_channels", [10**30]),
        ("cogvideox", "scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
        ("consisid", "transformer/config.json", "LFE_depth", 10**9),
        ("consisid", "transformer/config.json", "LFE_output_dim", [2048]),
    ],
)
def test_the_line_names_file_and_key(tmp_path, kind, name, key, value):
    documents, read = write_folder(kind, tmp_path)
    (tmp_path / name).write_text(json.dumps(documents[name] | {key: value}))
    with pytest.raises(CheckpointError) as error:
        read(tmp_path)
    assert str(tmp_path / name) in str(error.value) and key in str(error.value)


def test_json_that_is_too_large_or_too_deep(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with little_memory():
        assert refused(lambda: read_object(path), path)
    for text in (
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": Infinity}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        "[]",
    ):
        path.write_text(text)
        assert refused(lambda: read_object(path), path)


class Harm:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, zipped):
    path, marker = tmp_path / "pytorch_model.bin", tmp_path / "done"
    torch.save({"a": Harm(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"holds code .*not loaded") as error:
        load_pickle(path)
    assert str(path) in str(error.value) and "weights_only" not in str(error.value) and not marker.exists()


def test_pickles_of_the_old_format_load_and_damaged_ones_do_not(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for zipped in (True, False):
        torch.save({"a": torch.arange(4)}, path, _use_new_zipfile_serialization=zipped)
        assert torch.equal(load_pickle(path)["a"], torch.arange(4))
        whole = path.read_bytes()
        for cut in (0, 3, 20, len(whole) // 2, len(whole) - 3):
            path.write_bytes(whole[:cut])
            assert refused(lambda: load_pickle(path), path)


@pytest.mark.parametrize(
    ("kind", "name", "key", "value"),
    [
        ("mochi", "transformer/config.json", "num_layers", "4"),
        ("mochi", "transformer/config.json", "in_channels", []),
        ("mochi", "transformer/config.json", "num_attention_heads", 10**30),
        ("mochi", "vae/config.json", "temporal_expansions", [1]),
        ("cogvideox", "transformer/config.json", "max_text_seq_length", 10**11),
        ("cogvideox", "transformer/config.json", "num_layers", 10**9),
    ],
)
def test_dry_runs_and_quantize_say_the_same_line(tmp_path, capsys, kind, name, key, value):
    known, write = (MOCHI, mochi_checkpoint) if kind == "mochi" else (COGVIDEOX, cogvideox_checkpoint)
    folder = write(tmp_path / "m")
    raw = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(raw | {key: value}))
    where = ["--model-dir", str(folder)]
    run = [*where, "--prompt", "x", "--device", "cpu", "--gpus", "1", "--output", str(tmp_path / "a.mp4"), "--dry-run"]
    for command in (run, ["quantize", *where, "--output", str(tmp_path / "q")]):
        assert main(known, command) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
        assert str(folder / name) in said and key in said


def mochi_checkpoint(folder: Path) -> Path:
    return mochi.write_checkpoint(folder, "diffusers")


def cogvideox_checkpoint(folder: Path) -> Path:
    return tiny_cogvideox.write_checkpoint(folder, "5b")


def test_an_unforeseen_error_of_a_dry_run_is_one_line(tmp_path, capsys, monkeypatch):
    def fails(*args: object) -> int:
        raise OverflowError("int too big to convert")

    monkeypatch.setattr("common.run.dry_run.run", fails)
    assert main(MOCHI, ["--dry-run", "--device", "cpu", "--gpus", "1"]) == 1
    assert capsys.readouterr().err == "error: int too big to convert\n"


def test_the_doctor_names_what_is_wrong_with_a_folder(tmp_path):
    tiny_file(tmp_path / "good.safetensors")
    bad = (tmp_path / "a.safetensors", tmp_path / "m.safetensors.index.json", tmp_path / "model_index.json")
    bad[0].write_bytes(joined(b'{"__metadata__":[1]}', b""))
    bad[1].write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    bad[2].write_text("[" * 100_000)
    problems = checkpoint(tmp_path)["problems"]
    assert len(problems) == 3 and all(any(str(path) in said for said in problems) for path in bad)
