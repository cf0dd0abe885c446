"""wan-xdit: its own options and checks, and whole runs of the demos."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from common.memory.choice import estimator
from common.memory.estimate import imagined
from common.run.demo import write_json
from common.video.files import read_video
from common.weights.placement import Placement
from tests.helpers import programs
from tests.helpers.programs import main
from tests.helpers.wan import write_checkpoint
from wan_xdit.checkpoint import DEMO, DEMO_KINDS, NEGATIVE, RULES, SHAKING, TRAINED, demo_rules, find_checkpoint
from wan_xdit.config import OTHERS, T2V_14B, VAE_2_1, TransformerConfig, read_transformer, transformer_json, vae_json
from wan_xdit.demo import (
    SHIPPED,
    TRAINED_VAE,
    demo_checkpoint,
    demo_config,
    is_random,
    model_index,
    trained_config,
)
from wan_xdit.fork import FORK

read, problems = partial(programs.read, FORK), partial(programs.problems, FORK)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folder_of(kind: str, root: Path, config: TransformerConfig) -> Path:
    """The json files of a published checkpoint."""
    experts = 2 if kind.endswith("a14b") else 1
    write_json(root / "model_index.json", model_index(kind, experts))
    for name in ("transformer", "transformer_2")[:experts]:
        write_json(root / name / "config.json", transformer_json(config))
    write_json(root / "vae" / "config.json", vae_json(VAE_2_1))
    return root


@pytest.mark.parametrize(
    ("kind", "size", "steps", "scale"),
    [
        ("t2v-14b", (1280, 720, 81, 16), 50, 5.0),
        ("t2v-a14b", (1280, 720, 81, 16), 40, 4.0),
    ],
)
def test_defaults_are_the_official_ones_of_the_checkpoint(
    kind: str, size: tuple, steps: int, scale: float, tmp_path: Path
) -> None:
    request = read("--model_dir", folder_of(kind, tmp_path, T2V_14B), "--prompt", "x", "--gpus", 1)
    video = request.videos[0]
    assert (video.sampling.width, video.sampling.height, video.sampling.num_frames, video.fps) == size
    assert (video.sampling.num_steps, video.sampling.cfg_scale) == (steps, scale)
    assert video.negative_prompt == NEGATIVE and request.options.solver == "unipc" and request.options.shift is None


def test_shifts_and_scales_are_the_official_ones() -> None:
    small, large = (832, 480), (1280, 720)
    assert [RULES["t2v-14b"].shift_of(*size) for size in (small, large)] == [3.0, 5.0]
    assert RULES["t2v-1.3b"].shift_of(*small) == 5.0 and RULES["t2v-a14b"].shift_of(*small) == 12.0
    rules = RULES["t2v-a14b"]
    # Beside the model's own first scale its own second one; beside another that one; or what is said.
    given = ((4.0, None), (None, None), (6.0, None), (4.0, 2.0))
    assert [rules.scales(*pair) for pair in given] == [(4.0, 3.0), (4.0, 3.0), (6.0, 6.0), (4.0, 2.0)]
    assert RULES["i2v-14b-720p"].negative_prompt == SHAKING + NEGATIVE != RULES["i2v-a14b"].negative_prompt


def test_an_empty_negative_prompt_is_empty(cache: Path) -> None:
    given = ("--dry-run", "wan2.1-t2v-1.3b", "--prompt", "x")
    assert read(*given).videos[0].negative_prompt == NEGATIVE
    assert read(*given, "--negative-prompt", "").videos[0].negative_prompt == ""


def test_a_folders_kind_is_read_from_its_files(tmp_path: Path) -> None:
    assert find_checkpoint(folder_of("t2v-14b", tmp_path / "a", T2V_14B)).kind == "t2v-14b"
    found = find_checkpoint(folder_of("t2v-a14b", tmp_path / "b", T2V_14B))
    assert (found.kind, found.boundary, len(found.experts)) == ("t2v-a14b", 0.875, 2)
    for kind in DEMO_KINDS:
        folder = write_checkpoint(tmp_path / f"Wan-{kind}", kind)
        assert find_checkpoint(folder).kind == kind


def test_what_is_no_checkpoint_is_told_in_a_line(tmp_path: Path) -> None:
    given = ("--prompt", "x", "--gpus", 1)
    assert "no Wan checkpoint" in problems("--model-dir", tmp_path, *given)[0]
    folder = folder_of("t2v-a14b", tmp_path / "two", T2V_14B)
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"boundary_ratio": None})
    assert "boundary_ratio=None; two experts need one between 0 and 1" in problems("--model-dir", folder, *given)[0]
    write_json(folder / "model_index.json", index | {"_class_name": "WanVACEPipeline"})
    assert (
        "Wan model for VACE, which is not supported; use T2V, I2V or TI2V" in problems("--model-dir", folder, *given)[0]
    )
    folder = folder_of("t2v-14b", tmp_path / "one", T2V_14B)
    write_json(folder / "transformer" / "config.json", transformer_json(T2V_14B) | {"in_channels": 20})
    assert "in_channels is 20; known are 16 (text to video) and 36" in problems("--model-dir", folder, *given)[0]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_of_the_family_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match=f"Wan model for {OTHERS[kind]}, which is not supported"):
        read_transformer({"model_type": kind, "dim": 32})


def test_first_and_last_frame_models_are_known_by_their_positions() -> None:
    with pytest.raises(ValueError, match="first and last frame to video, which is not supported"):
        read_transformer(transformer_json(T2V_14B) | {"pos_embed_seq_len": 514})


def test_wrong_values_are_told_at_the_door(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for arguments, part in {
        ("--image", "gone.png"): "--image gone.png: no such image file",
        ("--image", tmp_path / "text.png"): "is not a readable image",
        ("--shift", 0): "--shift 0.0 is not a number above 0",
        ("--cfg-scale-2", -1): "--cfg-scale-2 -1.0 is not a number from 0",
        ("--solver", "ddim"): "'ddim' is not one of",
        ("--fit", "zoom"): "'zoom' is not one of 'crop', 'stretch', 'pad'",
        ("--residual", "fp16"): "'fp16' is not one of",
        ("--num-frames", 10): "--num-frames 10 is not of the form 4k+1; nearest: 9 or 13",
        ("--height", 40): "--height 40 is not a positive multiple of 16; nearest: 32 or 48",
    }.items():
        assert part in "\n".join(problems("--demo", *arguments)), arguments
    assert "multiple of 32" in problems("--demo", "ti2v-5b", "--width", 48)[0]


def test_one_expert_that_is_guided_reads_the_negative_prompt() -> None:
    given = ("--demo", "t2v-a14b", "--device", "cpu", "--gpus", "1", "--negative-prompt", "blurred", "--cfg-scale", "1")
    assert any("--negative-prompt has no effect" in remark for remark in read(*given).remarks)
    assert not read(*given, "--cfg-scale-2", "3").remarks


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    given = ("--device", "cpu", "--output", tmp_path / "a.mp4", "--cfg-scale-2", 3, "--fit", "pad")
    assert list(read("--demo", "t2v-1.3b", *given).remarks) == [
        "--cfg-scale-2 has no effect on this checkpoint, which has one transformer",
        "--fit has no effect without --image",
    ]
    assert not read("--demo", "i2v-a14b", *given).remarks


def test_a_picture_where_none_is_taken_and_the_reverse(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(cache / "a.png")
    assert main(FORK, ["--demo", "t2v-1.3b", "--gpus", "1", "--device", "cpu", "--image", "a.png"]) == 2
    assert "takes no image" in capsys.readouterr().err
    folder = demo_checkpoint("i2v-a14b")
    assert main(FORK, ["--model-dir", str(folder), "--prompt", "x", "--gpus", "1", "--device", "cpu"]) == 2
    assert "makes a video from an image" in capsys.readouterr().err


@pytest.mark.slow
def test_a_demo_starts_from_its_own_picture(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--gpus", "1", "--device", "cpu", "--num-steps", "2", "--seed", "1", "--num-frames", "9"]
    Image.new("RGB", (50, 40)).save(cache / "other.png")
    given = ["--image", "other.png", "--fit", "pad"]
    assert main(FORK, ["--demo", "i2v-14b-480p", *common, *given, "--output", "padded.mp4"]) == 0
    said = "the image is padded from 50x40 to 96x64: 16.7% of the width is black; with --width 80 --height 64: 0.0%"
    assert said in capsys.readouterr().err
    assert json.loads((cache / "padded.json").read_text())["settings"]["fit"] == "pad"
    assert main(FORK, ["--demo", "i2v-14b-480p", *common, "--output", "first.mp4"]) == 0
    assert "the image is" not in capsys.readouterr().err
    report = json.loads((cache / "first.json").read_text())
    assert report["settings"]["demo"] == "i2v-14b-480p" and report["settings"]["residual"] == "fp32"
    frames, fps = read_video(cache / "first.mp4")
    assert frames.shape == (9, 64, 96, 3) and fps == 8


@pytest.mark.slow
def test_both_experts_are_held_in_eight_bits(cache: Path) -> None:
    """Two sets of files are rounded, and the copy runs."""
    source = write_checkpoint(cache / "wan", "t2v-a14b")
    assert main(FORK, ["quantize", "--model-dir", str(source), "--output", "small"]) == 0
    for name in ("transformer", "transformer_2"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (cache / "small" / file).stat().st_size < 0.6 * (source / file).stat().st_size
    common = ["--gpus", "1", "--device", "cpu", "--num-steps", "2", "--width", "32", "--height", "48"]
    given = ["--model-dir", "small", "--prompt", "x", "--num-frames", "5", "--shift", "3", "--dtype", "bf16"]
    assert main(FORK, [*given, *common, "--output", "x.mp4"]) == 0


def test_a_dry_run_counts_every_model(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--dry-run", "wan2.1-t2v-1.3b", "--device", "cuda", "--gpus", "2", "--max-memory", "24"]
    assert main(FORK, line) == 0
    said = capsys.readouterr().out
    assert "832x480, 81 frames, 50 steps" in said and "chosen" in said


def test_where_models_stay_both_experts_are_counted(cache: Path) -> None:
    request = read("--dry-run", "wan2.2-t2v-a14b", "--prompt", "x", "--device", "cpu", "--gpus", 1)
    with imagined(request.layout) as mesh:
        counted = estimator(FORK, request, mesh)
    one = counted.estimate(Placement("stage")).stages
    kept = counted.estimate(Placement("none"), keep=True).stages["sampling"].weights
    assert kept == one["text"].weights + 2 * one["sampling"].weights + one["decode"].weights


def test_keys_and_values_of_the_text_are_counted_where_they_are_kept(cache: Path) -> None:
    """Both branches' of one block after the other: 512 tokens, 1536 channels, 30 blocks, in bf16."""
    request = read("--dry-run", "wan2.1-t2v-1.3b", "--prompt", "x", "--device", "cpu", "--gpus", 1, "--dtype", "bf16")
    with imagined(request.layout) as mesh:
        counted = estimator(FORK, request, mesh)
    kept, streamed = (counted.estimate(Placement(where)).stages["sampling"] for where in ("stage", "block"))
    assert kept.activations - streamed.activations == 2 * 30 * 2 * 512 * 1536 * 2


def test_the_trained_demo_comes_with_the_package_and_takes_a_picture(cache: Path) -> None:
    Image.new("RGB", (8, 8)).save(cache / "a.png")
    request = read("--demo", "--device", "cpu", "--gpus", 1, "--image", "a.png")
    assert request.source.demo == TRAINED and demo_checkpoint(TRAINED) == SHIPPED and not is_random(SHIPPED)
    files = find_checkpoint(SHIPPED)
    files.check_task(image=True)
    files.check_task(image=False)
    assert files.config == trained_config() and files.vae_config == TRAINED_VAE and files.kind == "ti2v-5b"
    rules = files.rules
    assert (DEMO.heads, DEMO.size_multiple, DEMO.frame_step) == (rules.heads, rules.size_multiple, rules.frame_step)
    assert DEMO.shift == rules.shift and DEMO.dtype == "bf16"
    video = request.videos[0]
    assert (video.sampling.width, video.sampling.height, video.sampling.num_frames) == (64, 64, 13)
    assert video.negative_prompt == "" and problems("--demo", "--width", 40)


def test_demos_have_the_traits_of_their_kinds() -> None:
    for kind in DEMO_KINDS:
        config, rules = demo_config(kind), demo_rules(kind)
        assert rules.heads == config.heads and bool(config.image_channels) == kind.startswith("i2v")
        assert rules.boundary == RULES[kind].boundary and rules.shift == RULES[kind].shift
    with pytest.raises(ValueError, match=r"no demo called '3b'; wan-xdit has shapes, t2v-1\.3b"):
        demo_checkpoint("3b")
