"""`quantize`: a checkpoint folder in eight bits that every program loads, for every fork."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from cogvideox_xdit.fork import FORK as COGVIDEOX
from cogvideox_xdit.pipeline import CogVideoXPipeline
from common.weights.load import find_files, open_checkpoint, save
from common.weights.placement import has_float8
from consisid_xdit.fork import FORK as CONSISID
from consisid_xdit.pipeline import ConsisIDPipeline
from mochi_xdit.fork import FORK as MOCHI
from mochi_xdit.pipeline import MochiPipeline
from mochi_xdit.weights import transformer_rename
from tests.helpers import cogvideox, consisid, mochi
from tests.helpers.programs import main
from wan_xdit.demo import demo_config, demo_vae, random_checkpoint
from wan_xdit.fork import FORK as WAN
from wan_xdit.pipeline import WanPipeline


def checkpoint(kind: str, folder: Path) -> Path:
    if kind.startswith("mochi"):
        return mochi.write_checkpoint(folder, kind.split("-")[1])
    if kind == "consisid":
        return consisid.write_checkpoint(folder)
    return cogvideox.write_checkpoint(folder, "5b-i2v")


KINDS = {
    "mochi-native": (MOCHI, MochiPipeline),
    "mochi-diffusers": (MOCHI, MochiPipeline),
    "cogvideox": (COGVIDEOX, CogVideoXPipeline),
    "consisid": (CONSISID, ConsisIDPipeline),
}


def others(folder: Path) -> list[Path]:
    """The files that are no transformer's weights."""
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return sorted(f for f in files if f.name != "dit.safetensors" and f.parts[0] != "transformer")


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_holds_what_fp8_would_have_loaded(kind, tmp_path, capsys):
    known, pipeline = KINDS[kind]
    source, copy = checkpoint(kind, tmp_path / "a"), tmp_path / "b"
    assert main(known, ["quantize", "--model-dir", str(source), "--output", str(copy)]) == 0
    said = capsys.readouterr().out
    assert str(copy) in said and " 0.00 " not in said
    made = pipeline.from_pretrained(source, dtype="fp8").load_transformer().state_dict()
    read = pipeline.from_pretrained(copy, dtype="bf16").load_transformer().state_dict()
    assert made.keys() == read.keys()
    for name, tensor in made.items():
        assert tensor.dtype == read[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), read[name].view(torch.uint8)), name
    assert sum(name.endswith("weight_scale") for name in made) >= 4
    assert others(copy) == others(source)
    tokenizer = "tokenizer/spiece.model"
    assert os.path.samefile(source / tokenizer, copy / tokenizer), "the rest takes no room"


def test_every_transformer_that_takes_a_turn_is_rounded(tmp_path):
    kind = "t2v-a14b"
    random_checkpoint(tmp_path / "a", kind, demo_config(kind), demo_vae(kind))
    assert main(WAN, ["quantize", "--model-dir", str(tmp_path / "a"), "--output", str(tmp_path / "b")]) == 0
    given = {"a": "fp8", "b": "bf16"}
    pipes = [WanPipeline.from_pretrained(tmp_path / name, dtype=dtype) for name, dtype in given.items()]
    pipes[1].check_weights()
    for expert in (0, 1):
        made, read = (pipe.load_transformer(expert).state_dict() for pipe in pipes)
        assert made.keys() == read.keys() and sum(name.endswith("weight_scale") for name in made) >= 4
        assert all(torch.equal(made[n].view(torch.uint8), read[n].view(torch.uint8)) for n in made)
    again = ["quantize", "--model-dir", str(tmp_path / "b"), "--output", str(tmp_path / "c")]
    assert main(WAN, again) == 2 and not (tmp_path / "c").exists()


def test_the_matmul_weights_take_half(tmp_path):
    source = mochi.write_checkpoint(tmp_path / "a", "native")
    main(MOCHI, ["quantize", "--model-dir", str(source), "--output", str(tmp_path / "b")])
    before, after = (open_checkpoint(tmp_path / name / "dit.safetensors") for name in "ab")
    assert has_float8(after) and not has_float8(before)
    name = "blocks.0.mlp_x.w1.weight"
    assert after[name].nbytes * 2 == before[name].nbytes // 2, "the small checkpoint is in fp32"
    assert after["blocks.0.mod_x.weight"].dtype == torch.bfloat16
    assert after["pos_frequencies"].dtype == torch.float32


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("a/inside", "lies inside --model-dir"),
        ("full", "exists and is not an empty directory"),
        ("missing/b", "missing"),
    ],
)
def test_bad_folders_are_refused(tmp_path, capsys, output, said):
    source = mochi.write_checkpoint(tmp_path / "a", "native")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(MOCHI, ["quantize", "--model_dir", str(source), "--output", str(tmp_path / output)]) == 2
    assert said in capsys.readouterr().err


def test_what_is_no_checkpoint_or_in_float8_already_is_refused(tmp_path, capsys):
    source, copy = mochi.write_checkpoint(tmp_path / "a", "native"), tmp_path / "b"
    assert main(MOCHI, ["quantize", "--model-dir", str(source), "--output", str(copy)]) == 0
    assert main(MOCHI, ["quantize", "--model-dir", str(copy), "--output", str(tmp_path / "c")]) == 2
    assert "is in float8 already" in capsys.readouterr().err
    assert main(COGVIDEOX, ["quantize", "--model-dir", str(source), "--output", str(tmp_path / "c")]) == 2
    assert main(MOCHI, ["quantize", "--model-dir", str(tmp_path / "no"), "--output", str(tmp_path / "c")]) == 2
    assert main(MOCHI, ["quantize"]) == 2
    assert not (tmp_path / "c").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
    source = mochi.write_checkpoint(tmp_path / "a", "native")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.run.quantize._link", full)
    assert quantize(source, tmp_path / "b") == 1
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a"]


def quantize(source: Path, output: Path) -> int:
    return main(MOCHI, ["quantize", "--model-dir", str(source), "--output", str(output)])


def test_what_lies_behind_linked_folders_comes_along(tmp_path):
    source, store = mochi.write_checkpoint(tmp_path / "a", "diffusers"), tmp_path / "store"
    store.mkdir()
    for name in ("transformer", "text_encoder", "tokenizer"):
        (source / name).rename(store / name)
        (source / name).symlink_to(store / name)
    (store / "tokenizer" / "up").symlink_to(source)
    assert quantize(source, tmp_path / "b") == 0
    files = {p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert {"transformer/config.json", "text_encoder/config.json", "tokenizer/spiece.model"} <= files
    assert not any("up" in name for name in files), "a link to a folder above is not followed"
    MochiPipeline.from_pretrained(tmp_path / "b").load_transformer()


def test_a_link_to_nothing_is_refused_before_the_work(tmp_path, capsys):
    source = mochi.write_checkpoint(tmp_path / "a", "diffusers")
    (source / "README.md").symlink_to("../blobs/gone")
    assert quantize(source, tmp_path / "b") == 2
    assert f"{source / 'README.md'} is a link to ../blobs/gone, which does not exist" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_shards_of_a_half_precision_file_are_found(tmp_path, monkeypatch, variant):
    source = mochi.write_checkpoint(tmp_path / "a", "diffusers")
    folder, stem = source / "transformer", "diffusion_pytorch_model"
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    state = {name: tensor.bfloat16() for name, tensor in mochi.build()[0].state_dict().items()}
    save(state, folder / f"{stem}.{variant}.safetensors", transformer_rename(mochi.TINY))
    monkeypatch.setattr("common.run.quantize.SHARD_BYTES", 50_000)
    assert quantize(source, tmp_path / "b") == 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert has_float8(open_checkpoint(find_files(tmp_path / "b" / "transformer", stem, dtype)))


def test_an_empty_folder_is_taken_and_another_runs_copy_is_not(tmp_path, capsys, monkeypatch):
    source, output = mochi.write_checkpoint(tmp_path / "a", "native"), tmp_path / "b"
    output.mkdir()
    assert quantize(source, output) == 0
    assert (output / "dit.safetensors").is_file()
    later = tmp_path / "c"

    def overtaken(*args: object) -> None:
        later.mkdir(exist_ok=True)
        (later / "theirs").touch()

    monkeypatch.setattr("common.run.quantize._link", overtaken)
    assert quantize(source, later) == 1
    assert f"{later}: another run has made it meanwhile" in capsys.readouterr().err
    assert os.listdir(later) == ["theirs"] and sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_a_second_signal_while_the_first_is_obeyed_leaves_nothing(tmp_path, monkeypatch):
    source, removed = mochi.write_checkpoint(tmp_path / "a", "native"), []
    remove = shutil.rmtree

    def interrupted(path: Path, **options: bool) -> None:
        removed.append(path)
        if len(removed) == 1:
            signal.raise_signal(signal.SIGINT)
        remove(path, **options)

    monkeypatch.setattr("common.run.quantize._link", lambda *args: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("shutil.rmtree", interrupted)
    assert quantize(source, tmp_path / "b") == 130
    assert os.listdir(tmp_path) == ["a"] and len(removed) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_and_the_command_can_be_repeated(tmp_path, monkeypatch, number):
    source = mochi.write_checkpoint(tmp_path / "a", "native")
    with monkeypatch.context() as patch:
        patch.setattr("common.run.quantize._link", lambda *args: signal.raise_signal(number))
        assert quantize(source, tmp_path / "b") == 128 + number
    assert os.listdir(tmp_path) == ["a"]
    assert quantize(source, tmp_path / "b") == 0
