"""Where --output goes: a format by its suffix, settings inside, and nothing that is there is replaced unasked."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.registry.request import WrongUse
from common.run.command_line import parse
from mochi_xdit.fork import FORK
from tests.fake_fork.fork import FORK as FAKE
from tests.fake_fork.options import FakeOptions
from tests.helpers.programs import main
from tests.test_formats import NAMES, inside, read, said

SEED = "7"


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def make(*arguments: str) -> int:
    return main(FAKE, ["--demo", "--device", "cpu", "--gpus", "1", "--seed", SEED, "--num-steps", "1", *arguments])


def problems(*arguments: str) -> list[str]:
    with pytest.raises(WrongUse) as wrong:
        parse(FORK, ["--demo", "--device", "cpu", *arguments])
    return wrong.value.problems


def noise(count: int) -> np.ndarray:
    """The fake fork's frames."""
    return np.random.default_rng(int(SEED)).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", [*NAMES, "v1.0/", "x.png", "x.jpg"])
def test_the_suffix_decides_and_the_settings_are_true(tmp_path, name):
    single = name in ("x.png", "x.jpg")
    count = 1 if single else 7
    lossless = ["--crf", "0"] if Path(name).suffix in (".mp4", ".webm", ".webp", ".png", ".npy") else []
    assert make("--prompt", "a lemon", "--output", name, "--num-frames", str(count), *lossless) == 0
    path = tmp_path / name
    if Path(name).suffix not in (".gif", ".jpg"):
        assert np.array_equal(read(path), noise(count))
    own = "" if path.suffix == ".mp4" else ".frames" if path.is_dir() else path.suffix
    sidecar = path.with_name(f"{path.name if path.is_dir() else path.stem}{own}.json")
    told = json.loads(sidecar.read_text())["settings"]
    assert (told["output"], told["seed"], told["num_frames"], told["crf"]) == (
        str(Path(name)), int(SEED), count, 0 if lossless else None
    )  # fmt: skip
    assert "folder" not in told
    if path.suffix in (".mp4", ".webm"):
        assert json.dumps(told)[:200] in said(path) and "a lemon" in said(path)  # ffmpeg shows no more of it
    elif path.suffix != ".npy":  # which has no place for them
        assert json.loads(inside(path)[1]) == told
    assert len(os.listdir(tmp_path)) == 2


def test_outputs_of_one_stem_have_each_their_own_json(tmp_path):
    names = ("x.mp4", "x.gif", "x.webm", "x")
    for name in names:
        assert make("--output", name, "--num-frames", "7", "--save-latents") == 0
    told = {path.name: json.loads(path.read_text())["settings"]["output"] for path in tmp_path.glob("*.json")}
    assert told == dict(zip(("x.json", "x.gif.json", "x.webm.json", "x.frames.json"), names))
    assert len(list(tmp_path.glob("*.latents.safetensors"))) == len(names)


def test_one_frame_of_webp_is_a_still(tmp_path):
    assert make("--output", "x.webp", "--num-frames", "1") == 0
    assert b"ANIM" not in (tmp_path / "x.webp").read_bytes()
    assert make("--output", "y.webp", "--num-frames", "7") == 0
    assert b"ANIM" in (tmp_path / "y.webp").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--output", "a.avi"), "--output a.avi: nothing is written as .avi; allowed are .mp4 and .webm"),
        (("--output", "a.png"), "holds one frame, not 25"),
        (("--output", "a.gif", "--fps", "60"), "at most 50 frames a second"),
        (("--output", "a.gif", "--crf", "20"), "takes none; choose .mp4 or .webm"),
        (("--output", "a.mp4", "--crf", "52"), "0 (without loss) to 51"),
        (("--output", "frames", "--crf", "17"), "a folder of PNGs, which takes 0"),
        (("--output", ".."), "is a directory"),
        (("--output", "mine"), "the folder holds notes.txt; name a new or an empty one"),
        (("--output", "a-file/"), "a file has this name"),
        (("--output", "no/such/frames/"), "the folder no/such does not exist"),
        (("--save-latents", "--from-latents", "a-file"), "--save-latents keeps what is sampled"),
    ],
)
def test_what_cannot_be_written_is_said_at_the_door(tmp_path, arguments, part):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "a-file").touch()
    assert any(part in line for line in problems("--num-frames", "25", *arguments)), problems(*arguments)


@pytest.mark.parametrize("name", ["x.mp4", "x.png", "x", "v1.0/"])
def test_nothing_is_replaced_unasked(tmp_path, capsys, name):
    line = ("--output", name, "--num-frames", "1")
    assert make(*line) == 0
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert make(*line) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and f"error: --output: {Path(name)} and " in told[0] and "add --overwrite" in told[0]
    assert {path: path.stat() for path in tmp_path.rglob("*")} == before
    assert make(*line, "--overwrite") == 0
    assert all(path.stat() != before.get(path) for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("there", ["x.json", "x-2.mp4", "x-3.json"])
def test_every_output_of_a_command_is_looked_at(tmp_path, capsys, there):
    (tmp_path / there).write_text("mine")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    more = ("--prompt-file", "prompts.txt") if "-" in there else ()
    assert make("--output", "x.mp4", *more) == 2
    assert f"error: --output: {there} exists; add --overwrite" in capsys.readouterr().err
    assert (tmp_path / there).read_text() == "mine" and not list(tmp_path.glob("x-1*"))


def test_many_that_are_there_are_counted(tmp_path, capsys):
    for i in range(1, 10):
        (tmp_path / f"x-{i}.mp4").touch()
    assert make("--output", "x.mp4", "--num-videos", "9") == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 6 and told[-1] == "error: --output: 4 more of these videos exist"


def test_a_dry_run_names_what_a_run_would_refuse(tmp_path, capsys):
    line = ["--dry-run", "--demo", "--device", "cpu", "--gpus", "1", "--num-frames", "7"]
    (tmp_path / "x.mp4").touch()
    for more, told in (((), True), (("--overwrite",), False), (("--output", "y.mp4"), False)):
        assert main(FORK, [*line, "--output", "x.mp4", *more]) == 0
        out = capsys.readouterr().out
        assert ("note        a run would be refused: --output: x.mp4 exists; add --overwrite" in out) == told


def test_a_forks_own_files_are_not_replaced_unasked(tmp_path, monkeypatch, capsys):
    class Writing(FakeOptions):
        written = property(lambda self: {"--pids": Path(self.pids)})

    def run(*more: str) -> int:
        return main(
            replace(FAKE, options=Writing), ["--demo", "--device", "cpu", "--gpus", "1", "--pids", "who", *more]
        )

    assert run("--output", "x.mp4") == 0
    before = (tmp_path / "who").read_bytes()
    capsys.readouterr()
    assert run("--output", "y.mp4") == 2
    assert capsys.readouterr().err == (
        "error: --pids: who exists; add --overwrite to replace it, or give another name\n"
    )
    assert (tmp_path / "who").read_bytes() == before and not (tmp_path / "y.mp4").exists()
    assert run("--output", "y.mp4", "--overwrite") == 0


def test_an_empty_folder_and_an_unfinished_runs_latents_are_no_outputs(tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames.frames.latents.safetensors").write_bytes(b"kept")
    assert make("--output", "frames") == 0
    assert len(os.listdir(tmp_path / "frames")) == 7


def test_latents_stay_when_they_are_to_be_kept(tmp_path, capsys):
    for name, more in {"x.mp4": ("--save-latents",), "y.mp4": ()}.items():
        assert make("--output", name, *more) == 0
    assert (tmp_path / "x.latents.safetensors").read_bytes() == b"latents"
    assert not (tmp_path / "y.latents.safetensors").exists()
    assert "latents: x.latents.safetensors" in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text())["settings"]["save_latents"] is True
