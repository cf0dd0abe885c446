"""`--from-latents`: what a file says of its latents stands, and one command goes on with an interrupted decode."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cogvideox_xdit.config import VAEConfig
from cogvideox_xdit.fork import FORK as COGVIDEOX
from common.parallel.mesh import Mesh
from common.registry.forks import Fork
from common.registry.request import Request, WrongUse, settings
from common.run.command_line import parse
from common.run.outputs import Output
from common.run.pipeline import Pipeline
from common.system.progress import Report
from common.video.files import read_video
from common.video.latents import save_latents
from mochi_xdit.config import MochiVAEConfig
from mochi_xdit.fork import FORK as MOCHI
from tests.helpers.programs import main

HERE = ("--demo", "--device", "cpu")
SMALL = ("--width", "32", "--height", "32", "--num-frames", "7", "--num-steps", "2", "--seed", "3")
LATENTS = torch.zeros(1, 12, 2, 4, 4)
MADE = ("--prompt", "a red circle", *SMALL, "--cfg-scale", "2.5", "--threshold-noise", "0.05", "--dtype", "fp32")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def output_of(request: Request) -> Output:
    return Output(request.videos[0], request, Mesh(), Report())


@pytest.fixture
def latents(folder: Path) -> str:
    """A file as a run leaves it."""
    output_of(parse(MOCHI, [*HERE, *MADE, "--gpus", "1", "--output", "made.mp4"])).keep(LATENTS, MochiVAEConfig())
    return "made.latents.safetensors"


def test_latents_are_for_whom_the_users_mask_says(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        save_latents("made.safetensors", LATENTS, {"model": "mochi"})
    finally:
        os.umask(before)
    assert Path("made.safetensors").stat().st_mode & 0o777 == 0o640


def problems(fork: Fork, *arguments: str) -> list[str]:
    with pytest.raises(WrongUse) as wrong:
        parse(fork, [*HERE, *arguments])
    return wrong.value.problems


def test_every_setting_comes_from_the_file(latents: str) -> None:
    decode = ("--vae-chunk", "1", "--fps", "9", "--gpus", "2", "--dtype", "bf16")
    request = parse(MOCHI, [*HERE, "--from-latents", latents, *decode])
    (video,) = request.videos
    assert (video.prompt, video.seed, video.fps) == ("a red circle", 3, 9)
    assert vars(video.sampling) == {"width": 32, "height": 32, "num_frames": 7, "num_steps": 2, "cfg_scale": 2.5}
    told = json.loads(json.dumps(settings(request, video)))
    assert (told["prompt"], told["seed"], told["threshold_noise"]) == ("a red circle", 3, 0.05)
    assert (told["dtype"], told["ranks"]) == ("fp32", 1)
    assert (told["vae_chunk"], told["fps"], told["latents"], told["output"]) == (1, 9, latents, "demo.mp4")
    assert (told["decoding"]["dtype"], told["decoding"]["ranks"]) == ("bf16", 2)


def test_what_contradicts_the_latents_is_refused_by_name(latents: str) -> None:
    again = ("--from-latents", latents)
    assert parse(MOCHI, [*HERE, *MADE, *again]).videos[0].seed == 3  # the same command once more
    found = problems(MOCHI, *again, "--seed", "4", "--num-steps", "20", "--linear-steps", "1", "--prompt", "a box")
    assert len(found) == 4 and all("made.latents.safetensors was made with" in line for line in found)
    told = "\n".join(found)
    for part in ("--seed 4", "--num-steps 20", "with 2;", "--linear-steps 1", "with None;", "leave --prompt out"):
        assert part in told


def test_latents_of_another_model_are_refused(latents: str) -> None:
    (line,) = problems(COGVIDEOX, "--from-latents", latents)
    assert line == f"--from-latents {latents} holds latents of Mochi 1; decode them with mochi-xdit"
    save_latents("made.safetensors", LATENTS, {"model": "mochi", "prompt": "x", "seed": 5})
    assert "decode them with mochi-xdit" in problems(COGVIDEOX, "--from-latents", "made.safetensors")[0]
    other = parse(COGVIDEOX, [*HERE, "--seed", "1", "--output", "5b.mp4"])
    output_of(other).keep(torch.zeros(1, 16, 2, 4, 4), VAEConfig())
    output = output_of(parse(COGVIDEOX, [*HERE, "--from-latents", "5b.latents.safetensors"]))
    kept = output.kept(16, VAEConfig())
    assert kept is not None and kept.shape == (1, 16, 2, 4, 4)
    with pytest.raises(WrongUse, match=r"scaling_factor is 1.15258426 there, 0.7 here.*made with: --demo shapes"):
        output.kept(16, VAEConfig(scaling_factor=0.7))


@pytest.mark.parametrize("told", [{"prompt": "x", "seed": "5"}, {}])
def test_what_a_file_does_not_say_is_not_made_up(told: dict[str, str]) -> None:
    save_latents("made.safetensors", LATENTS, told)
    request = parse(MOCHI, [*HERE, "--from-latents", "made.safetensors", "--cfg-scale", "2"])
    said = settings(request, request.videos[0])
    assert (said["prompt"], said["seed"]) == (("x", 5) if told else (None, None))
    assert said["num_steps"] is said["dtype"] is None and said["cfg_scale"] == 2


@pytest.mark.parametrize("bad", ["[1]", "{", '{"width": "8"}', '{"seed": -1}', '{"prompt": 3}', '{"num_steps": true}'])
def test_settings_that_no_program_writes_are_refused(bad: str) -> None:
    save_file({"latents": LATENTS}, "made.safetensors", {"settings": bad})
    assert "holds settings that no program writes" in problems(MOCHI, "--from-latents", "made.safetensors")[0]


def stopped_by(number: int) -> Any:
    def decode(*_: object) -> None:
        os.kill(os.getpid(), number)

    return decode


def broken(*_: object) -> None:
    raise FloatingPointError("the decoder made NaN")


ENDINGS = [(stopped_by(signal.SIGINT), 130), (stopped_by(signal.SIGTERM), 143), (broken, 1)]


@pytest.mark.parametrize("decode, status", ENDINGS, ids=["ctrl-c", "sigterm", "nan"])
def test_a_decode_that_ends_early_says_how_to_go_on(folder: Path, monkeypatch, capsys, decode, status) -> None:
    monkeypatch.setattr(Pipeline, "decode", decode)
    own = ("--dtype", "fp32", "--vae-chunk", "1", "--no-compile-dynamic")
    prompts = folder / "my prompts.txt"
    prompts.write_text("a red circle\n")
    given = (*HERE, "--gpus", "1", *SMALL, *own, "--threshold-noise", "0.05", "--output", "an out.mp4")
    assert main(MOCHI, [*given, "--prompt-file", str(prompts)]) == status
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: " if status == 1 else "interrupted; ") and "finished latents are kept" in line
    program, *again = shlex.split(line.partition("go on with: ")[2])
    assert program == "mochi-xdit" and again[-1] == "an out.latents.safetensors"
    assert sorted(os.listdir(folder)) == ["an out.latents.safetensors", "my prompts.txt"]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main(MOCHI, again) == 0
    told = json.loads((folder / "an out.json").read_text())["settings"]
    frames, tags = read_video("an out.mp4")[0], read_tags(folder / "an out.mp4")
    assert (told["prompt"], told["seed"], told["num_steps"], told["threshold_noise"]) == ("a red circle", 3, 2, 0.05)
    assert tags == told and (folder / "an out.latents.safetensors").exists()
    if status == 130:
        assert main(MOCHI, [*given[:-1], "whole.mp4", "--prompt", "a red circle"]) == 0
        assert np.array_equal(read_video("whole.mp4")[0], frames)
        whole = json.loads((folder / "whole.json").read_text())["settings"]
        same = whole.keys() - {"output", "latents"}
        assert {name: told[name] for name in same} == {name: whole[name] for name in same}


def read_tags(path: Path) -> dict[str, Any]:
    """The settings in an mp4's comment."""
    import re

    return json.loads(re.search(rb'\{"[^\x00]*\}', path.read_bytes())[0])  # type: ignore[index]
