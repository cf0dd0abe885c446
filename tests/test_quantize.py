"""`quantize`: a checkpoint folder in eight bits that every program loads, for the three forks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cogvideox_xdit.cli import PROGRAM as COGVIDEOX
from cogvideox_xdit.pipeline import CogVideoXPipeline
from common import program
from common.placement import has_float8
from common.weights import open_checkpoint
from consisid_xdit.cli import PROGRAM as CONSISID
from consisid_xdit.pipeline import ConsisIDPipeline
from mochi_xdit.cli import PROGRAM as MOCHI
from mochi_xdit.pipeline import MochiPipeline
from tests import cogvideox, consisid, mochi


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
    assert program.main(known, ["quantize", "--model-dir", str(source), "--output", str(copy)]) == 0
    assert str(copy) in capsys.readouterr().out
    made = pipeline.from_pretrained(source, dtype="fp8")._load_transformer().state_dict()
    read = pipeline.from_pretrained(copy)._load_transformer().state_dict()
    assert made.keys() == read.keys()
    for name, tensor in made.items():
        assert tensor.dtype == read[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), read[name].view(torch.uint8)), name
    assert sum(name.endswith("weight_scale") for name in made) >= 4
    assert others(copy) == others(source)
    tokenizer = "tokenizer/spiece.model"
    assert os.path.samefile(source / tokenizer, copy / tokenizer), "the rest takes no room"


def test_the_matmul_weights_take_half(tmp_path):
    source = mochi.write_checkpoint(tmp_path / "a", "native")
    program.main(MOCHI, ["quantize", "--model-dir", str(source), "--output", str(tmp_path / "b")])
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
    assert program.main(MOCHI, ["quantize", "--model_dir", str(source), "--output", str(tmp_path / output)]) == 2
    assert said in capsys.readouterr().err


def test_what_is_no_checkpoint_or_in_float8_already_is_refused(tmp_path, capsys):
    source, copy = mochi.write_checkpoint(tmp_path / "a", "native"), tmp_path / "b"
    assert program.main(MOCHI, ["quantize", "--model-dir", str(source), "--output", str(copy)]) == 0
    assert program.main(MOCHI, ["quantize", "--model-dir", str(copy), "--output", str(tmp_path / "c")]) == 2
    assert "is in float8 already" in capsys.readouterr().err
    assert program.main(COGVIDEOX, ["quantize", "--model-dir", str(source), "--output", str(tmp_path / "c")]) == 2
    assert program.main(MOCHI, ["quantize", "--model-dir", str(tmp_path / "no"), "--output", str(tmp_path / "c")]) == 2
    assert program.main(MOCHI, ["quantize"]) == 2
    assert not (tmp_path / "c").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
    source = mochi.write_checkpoint(tmp_path / "a", "native")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.quantize._link", full)
    assert program.main(MOCHI, ["quantize", "--model-dir", str(source), "--output", str(tmp_path / "b")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
