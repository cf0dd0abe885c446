"""cogvideox-xdit: its own options and checks, and whole runs of the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from cogvideox_xdit import CogVideoXPipeline
from cogvideox_xdit.config import CONFIGS, VAEConfig, transformer_json, vae_json
from cogvideox_xdit.demo import demo_checkpoint, demo_config, model_index, scheduler_json
from cogvideox_xdit.fork import FORK
from common.run.demo import write_json
from common.video.files import read_video
from common.video.formats import write_frames
from tests.helpers import programs
from tests.helpers.cogvideox import write_checkpoint
from tests.helpers.programs import frames_of, main

read, problems = partial(programs.read, FORK), partial(programs.problems, FORK)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folder_of(kind: str, root: Path) -> Path:
    """The json files of a published checkpoint."""
    pipeline = "CogVideoXImageToVideoPipeline" if CONFIGS[kind].image_channels else "CogVideoXPipeline"
    write_json(root / "model_index.json", model_index(pipeline, "CogVideoXTransformer3DModel"))
    write_json(root / "transformer" / "config.json", transformer_json(CONFIGS[kind]))
    write_json(root / "vae" / "config.json", vae_json(VAEConfig()))
    write_json(root / "scheduler" / "scheduler_config.json", scheduler_json(kind))
    return root


def test_a_scale_that_is_no_guidance_gives_no_ranks_to_it() -> None:
    for scale, degree in ((6.0, 2), (1.0, 1), (0.5, 1)):
        request = read("--demo", "2b", "--cfg-scale", scale, "--device", "cpu", "--gpus", 2)
        assert request.layout.cfg == degree


@pytest.mark.parametrize("kind", ["2b", "5b"])
@pytest.mark.slow
def test_python_and_the_command_line_make_the_same_video(kind: str, tmp_path: Path) -> None:
    """With what nobody said: size, steps and guidance are the checkpoint's, the dtype is the CPU's."""
    folder = write_checkpoint(tmp_path / "model", kind)
    where = ("--model-dir", folder, "--device", "cpu", "--gpus", 1, "--output", tmp_path / "x.mp4")
    request = read(*where, "--prompt", "a red boat", "--seed", 3)
    (made,) = frames_of(FORK, request)
    pipe = CogVideoXPipeline.from_pretrained(folder)
    assert request.runtime.dtype == "fp32" and pipe.dtype == torch.float32
    assert torch.equal(pipe("a red boat", seed=3), made)


@pytest.mark.parametrize("kind", CONFIGS)
def test_defaults_are_the_official_ones_of_the_checkpoint(kind: str, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    start = ("--image", tmp_path / "a.png") if kind.endswith("i2v") else ()
    on_gpus = ("--gpus", 1, "--device", "cuda", "--dry-run")
    request = read("--model_dir", folder_of(kind, tmp_path), "--prompt", "x", *on_gpus, *start)
    video = request.videos[0]
    size = (video.sampling.width, video.sampling.height, video.sampling.num_frames, video.fps)
    assert size == ((1360, 768, 81, 16) if kind.startswith("1.5") else (720, 480, 49, 8))
    assert (video.sampling.num_steps, video.sampling.cfg_scale) == (50, 6.0)
    assert request.runtime.dtype == ("fp16" if kind == "2b" else "bf16")
    assert request.options.strength == 0.8 and request.options.dynamic_cfg is False


def test_sizes_without_a_published_limit_and_the_one_that_has_it(tmp_path: Path) -> None:
    folder = folder_of("2b", tmp_path / "2b")
    given = ("--prompt", "x", "--device", "cpu", "--gpus", 7, "--ulysses-degree", 7)
    request = read("--model-dir", folder, *given, "--width", 496, "--height", 272, "--num-frames", 16)
    assert request.layout.degrees == (1, 1, 7)
    assert problems("--model-dir", folder, *given, "--num-frames", 21)[0].endswith("nearest: 17 or 24")
    image = folder_of("5b-i2v", tmp_path / "5b-i2v")
    assert "720 x 480 pixels only" in problems("--model-dir", image, *given, "--width", 480, "--height", 720)[0]


def test_the_300_x_300_of_some_1_5_folders_is_no_video_size(tmp_path: Path) -> None:
    folder = folder_of("1.5", tmp_path)
    raw = transformer_json(CONFIGS["1.5"]) | {"sample_height": 300, "sample_width": 300}
    write_json(folder / "transformer" / "config.json", raw)
    video = read("--model-dir", folder, "--prompt", "x", "--gpus", 1).videos[0]
    assert (video.sampling.width, video.sampling.height) == (1360, 768)


def test_bad_images_videos_and_strengths_are_told_at_the_door(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.png").write_text("no picture")
    write_frames(tmp_path / "short.mp4", np.zeros((12, 32, 32, 3), np.uint8), 8)
    for arguments, part in {
        ("--image", "gone.png"): "--image gone.png: no such image file",
        ("--image", tmp_path / "text.png"): "is not a readable image",
        ("--video", tmp_path / "empty.mp4"): "empty.mp4 is not a readable video (the file is empty)",
        ("--video", tmp_path / "text.png"): "is not a readable video",
        ("--video", tmp_path / "short.mp4"): "has 12 frames, fewer than --num-frames 17; --num-frames 9 would do",
        ("--video", "a.mp4", "--image", "b.png"): "exclude each other",
        ("--strength", 0): "--strength 0.0 must be above 0",
        ("--video", "gone.mp4", "--strength", 0.05, "--num-steps", 10): "leaves no step",
        ("--scheduler", "euler"): "'euler' is not one of",
    }.items():
        assert part in "\n".join(problems("--demo", *arguments)), arguments


def test_options_of_a_start_that_is_not_given_are_said_to_do_nothing(tmp_path: Path) -> None:
    write_frames(tmp_path / "long.mp4", np.zeros((17, 64, 64, 3), np.uint8), 8)
    given = ("--device", "cpu", "--output", tmp_path / "a.mp4", "--strength", 0.8, "--fit", "pad")
    strength, fit = "--strength has no effect without --video", "--fit has no effect without --image or --video"
    for start, said in (
        (("--demo",), [strength, fit]),
        (("--demo", "5b-i2v"), [strength]),
        (("--demo", "--video", tmp_path / "long.mp4"), []),
    ):
        assert list(read(*start, *given).remarks) == said
    assert not read("--demo", *given[:4]).remarks, "of defaults nothing is said"


def test_a_config_that_names_something_unknown_is_wrong_use(tmp_path: Path) -> None:
    folder = folder_of("5b", tmp_path)
    raw = transformer_json(CONFIGS["5b"]) | {"camera_control": "v2"}
    write_json(folder / "transformer" / "config.json", raw)
    assert "camera_control='v2'" in problems("--model-dir", folder, "--prompt", "x")[0]


@pytest.mark.slow
def test_an_image_for_a_text_checkpoint_and_the_reverse(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(cache / "a.png")
    assert main(FORK, ["--demo", "--gpus", "1", "--device", "cpu", "--image", "a.png"]) == 2
    assert "takes no image" in capsys.readouterr().err
    folder = demo_checkpoint("1.5-i2v")
    assert main(FORK, ["--model-dir", str(folder), "--prompt", "x", "--gpus", "1", "--device", "cpu"]) == 2
    assert "makes a video from an image" in capsys.readouterr().err


@pytest.mark.slow
def test_a_demo_starts_from_its_own_picture_and_its_video_can_be_made_anew(cache: Path) -> None:
    common = ["--gpus", "1", "--device", "cpu", "--num-steps", "2", "--seed", "1", "--num-frames", "9"]
    assert main(FORK, ["--demo", "5b-i2v", *common, "--output", "first.mp4"]) == 0
    report = json.loads((cache / "first.json").read_text())
    assert report["settings"]["demo"] == "5b-i2v" and report["settings"]["num_frames"] == 9
    again = ["--video", "first.mp4", "--strength", "0.5", "--scheduler", "dpm", "--dynamic-cfg"]
    assert main(FORK, ["--demo", "5b", *common, *again, "--output", "second.mp4"]) == 0
    frames, fps = read_video(cache / "second.mp4")
    assert frames.shape == (9, 64, 96, 3) and fps == 8
    assert [stage["steps"] for stage in json.loads((cache / "second.json").read_text())["stages"] if "steps" in stage]


@pytest.mark.slow
def test_ranks_are_started_and_make_one_video(cache: Path) -> None:
    command = [sys.executable, "-m", "cogvideox_xdit", "--demo", "1.5", "--device", "cpu", "--num-steps", "2"]
    command += ["--ulysses_degree", "3", "--no-cfg-parallel", "--num-frames", "9", "--output", str(cache / "out.mp4")]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert imageio_ffmpeg.count_frames_and_secs(str(cache / "out.mp4"))[0] == 9


def test_demo_checkpoints_have_every_published_trait() -> None:
    for kind, config in CONFIGS.items():
        small = demo_config(kind)
        traits = ("rotary", "learned", "patch_time", "in_channels", "out_channels", "patch_size")
        assert all(getattr(small, name) == getattr(config, name) for name in traits)
        assert bool(small.ofs_dim) == bool(config.ofs_dim)
    with pytest.raises(ValueError, match="no demo called '3b'; cogvideox-xdit has shapes, 2b, 5b"):
        demo_checkpoint("3b")
