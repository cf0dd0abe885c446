"""consisid-xdit's own options, and its demo from the portrait to the mp4."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from cogvideox_xdit.config import VAEConfig
from common.parallel.mesh import Mesh
from common.system import environment
from common.system.extras import install
from common.video.decode_video import FrameSink
from common.video.files import read_video
from consisid_xdit import cli, options
from consisid_xdit.fork import FORK
from consisid_xdit.pipeline import ConsisIDPipeline
from tests.helpers import programs
from tests.helpers.programs import frames_of, main

ROOT = Path(__file__).resolve().parents[1]
BASE = ("--demo", "face", "--prompt", "x")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "visible_gpus", lambda: 0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    from PIL import Image

    Image.new("RGB", (20, 30)).save(tmp_path / "me.png")
    return str(tmp_path / "me.png")


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """The json files of a published checkpoint."""
    from cogvideox_xdit.config import VAEConfig, vae_json
    from consisid_xdit.config import PREVIEW, consisid_json

    files = {
        "model_index.json": {"_class_name": "ConsisIDPipeline", "scheduler": ["diffusers", "CogVideoXDDIMScheduler"]},
        "transformer/config.json": consisid_json(PREVIEW),
        "vae/config.json": vae_json(VAEConfig()),
        "scheduler/scheduler_config.json": {"prediction_type": "v_prediction"},
    }
    for name, value in files.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    return str(tmp_path / "model")


read, problems = partial(programs.read, FORK), partial(programs.problems, FORK)


def test_official_defaults(checkpoint: str, picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "missing_packages", list)
    request = read("--model-dir", checkpoint, "--prompt", "x", "--image", picture, "--device", "cuda", "--dry-run")
    video = request.videos[0]
    assert (video.sampling.width, video.sampling.height, video.sampling.num_frames, video.fps) == (720, 480, 49, 8)
    assert (video.sampling.num_steps, video.sampling.cfg_scale, request.runtime.dtype) == (50, 6.0, "bf16")
    assert request.options.dynamic_cfg is False and request.options.scheduler is None


def test_published_layouts_are_accepted(checkpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "who.safetensors").touch()
    monkeypatch.setattr(environment, "visible_gpus", lambda: 6)
    base = ("--model_dir", checkpoint, "--prompt", "x", "--id_embeddings", "who.safetensors")
    found = read(*base, "--ring_degree", "3", "--ulysses_degree", "1", "--cfg_parallel")
    assert found.layout.degrees == (2, 3, 1)
    assert "heads" in problems(*base, "--gpus", "1", "--ulysses-degree", "49")[0]


def test_a_person_is_needed_where_something_is_generated(checkpoint: str, tmp_path: Path) -> None:
    assert any("--image is missing" in p for p in problems("--model-dir", checkpoint, "--prompt", "x"))
    assert read(*BASE).options.image is None
    (tmp_path / "old.safetensors").touch()
    assert read("--model-dir", checkpoint, "--from-latents", "old.safetensors").videos[0].latents is not None


def test_person_options_that_will_not_do(picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "missing_packages", list)
    (tmp_path / "who").touch()
    assert any("exclude each other" in p for p in problems(*BASE, "--image", picture, "--id-embeddings", "who"))
    assert any("no such image file" in p for p in problems(*BASE, "--image", "none.png"))
    (tmp_path / "text.png").write_text("not a picture")
    assert any("not a readable image" in p for p in problems(*BASE, "--image", "text.png"))
    assert any("does not exist" in p for p in problems(*BASE, "--id-embeddings", "none"))
    assert any("--save-id-embeddings" in p for p in problems(*BASE, "--save-id-embeddings", str(tmp_path)))
    assert any("96 x 64 pixels only" in p for p in problems(*BASE, "--width", "64"))
    monkeypatch.setattr(options, "missing_packages", lambda: ["onnxruntime"])
    assert any(install("face") in p for p in problems(*BASE, "--image", picture))
    assert read(*BASE, "--id-embeddings", "who").options.id_embeddings == Path("who")


@pytest.mark.parametrize(("missing", "source"), [([], "portrait.png"), (["onnxruntime"], "identity.safetensors")])
def test_the_demos_person_is_read_once(monkeypatch: pytest.MonkeyPatch, missing: list[str], source: str) -> None:
    monkeypatch.setattr("consisid_xdit.generate.missing_packages", lambda: missing)
    monkeypatch.setattr("consisid_xdit.generate._check_person", lambda *_: None)
    asked: list[object] = []
    seen: list[object] = []

    class Pipe:
        model_dir = Path("demo")
        mesh, config, vae_config = Mesh(), SimpleNamespace(out_channels=16), VAEConfig()

        def check_weights(self, *_: object, **__: object) -> None: ...

        def identify(self, *given: object) -> str:
            asked.append(next(g for g in given if g))
            return "someone"

        def __call__(self, *_: object, identity: object, **__: object) -> str:
            seen.append(identity)
            return "latents"

        def decode(self, latents: object, options: object, frames: FrameSink) -> None:
            frames.begin(1, 8, 8)

    monkeypatch.setattr(ConsisIDPipeline, "from_pretrained", lambda *_, **__: Pipe())
    request = read(*BASE, "--num-videos", "2")
    frames_of(FORK, replace(request, source=replace(request.source, model_dir=Path("demo"))))
    assert seen == ["someone"] * 2 and asked == [Path("demo") / source]


def test_a_wrong_command_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys; from consisid_xdit.fork import FORK; from tests.helpers.programs import main; "
    code += "status = main(FORK, ['--demo', '--num-frames', '7']); print(status, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"], done.stderr


@pytest.mark.slow
def test_the_demo_makes_a_video_and_its_features_make_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = ["--demo", "face", "--device", "cpu", "--num-steps", "1", "--num-frames", "9", "--seed", "3"]
    run = [sys.executable, str(ROOT / "consisid_xdit" / "cli.py"), *given]
    done = subprocess.run(
        [*run, "--output", "a.mp4", "--save-id-embeddings", "who.safetensors"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["settings"]["layout"]["ranks"] == 2 and told["settings"]["num_frames"] == 9
    assert "reading the face" in {stage["name"] for stage in told["stages"]} or not cli.missing_packages()
    assert main(FORK, [*given, "--output", "c.mp4", "--save-id-embeddings", "who.safetensors"]) == 2
    assert "--save-id-embeddings: who.safetensors exists; add --ov" in capsys.readouterr().err
    assert main(FORK, [*given, "--output", "b.mp4", "--id-embeddings", "who.safetensors", "--gpus", "1"]) == 0
    a, b = (read_video(tmp_path / name)[0].astype(int) for name in ("a.mp4", "b.mp4"))
    assert a.shape == b.shape == (9, 64, 96, 3)
    assert abs(a - b).mean() < 1, "one rank and two, photograph and file: the same video"
