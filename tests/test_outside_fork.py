"""The fork of docs/adding-a-fork.md, installed outside of the repository, does what those inside do."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from common.weights.load import open_checkpoint
from common.weights.placement import has_float8
from tests.helpers.fake_server import served
from tools.docs import outside_fork as page

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "outside_fork" / "toy_xdit"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `sys.path` with the package and the metadata that an installation leaves."""
    site = tmp_path_factory.mktemp("elsewhere") / "site"
    shutil.copytree(FOLDER, site / "toy_xdit", ignore=shutil.ignore_patterns("__pycache__"))
    about = site / "toy_xdit-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-xdit\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[xdit_zoo.forks]\ntoy = toy_xdit.fork:FORK\n")
    return site


def run(site: Path, module: str, *arguments: str) -> str:
    """What a program prints, run in the folder beside the package."""
    environment = os.environ | {"PYTHONPATH": f"{site}:{ROOT}", "XDG_CACHE_HOME": str(site.parent / "cache")}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=site.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(site: Path) -> Path:
    """The picture of one rank, seed 3."""
    return generate(site, "one.png", "--gpus", "1")


def levels(picture: bytes | Path) -> np.ndarray:
    return np.asarray(Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture))).astype(int)


def generate(site: Path, output: str, *arguments: str) -> Path:
    run(site, "toy_xdit", "--demo", "--device", "cpu", "--dtype", "fp32", "--seed", "3", "--output", output, *arguments)
    return site.parent / output


@pytest.mark.slow
def test_two_ranks_make_the_same_picture(site: Path, whole: Path) -> None:
    expected = levels(whole)
    assert expected.shape == (64, 64, 3) and expected.std() > 5
    inside = json.loads(Image.open(whole).text["Comment"])
    assert inside["seed"] == 3 and inside == json.loads(whole.with_suffix(".png.json").read_text())["settings"]
    split = generate(site, "two.png", "--gpus", "2", "--ulysses-degree", "2", "--no-cfg-parallel")
    assert np.abs(levels(split) - expected).max() <= 1


@pytest.mark.slow
def test_the_server_makes_its_pictures(
    site: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(site.parent / "cache"))
    serve = (sys.executable, "-m", "xdit_serve", "--demo", "--device", "cpu", "--gpus", "2", "--port", "0")
    command = (*serve, "--no-page", "--data-dir", str(tmp_path / "data"), "--", "--dtype", "fp32")
    with served(tmp_path / "data", command=command) as server:
        api = openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", timeout=120, max_retries=0)
        asked = {"model": "toy-demo", "prompt": "a bell", "size": "64x64", "extra_body": {"seed": 3}}
        made = api.images.generate(**asked, n=2, response_format="b64_json").data
        first, second = (levels(base64.b64decode(one.b64_json)) for one in made)
        assert np.abs(first - levels(whole)).max() <= 1 and np.abs(second - first).max() > 1
        (other,) = api.images.generate(**asked | {"extra_body": {"seed": 4}}, response_format="url").data
        assert np.array_equal(levels(httpx.get(other.url).content), second)
        for call, place in ((api.videos.create, "/v1/images/generations"), (api.images.generate, "/v1/videos")):
            name = "mochi-demo" if place == "/v1/videos" else "toy-demo"
            with pytest.raises(openai.APIStatusError, match=place):
                call(model=name, prompt="a bell")


@pytest.mark.slow
def test_a_video_has_sound(site: Path) -> None:
    from common.video.files import _ffmpeg, read_video

    video = generate(site, "sound.mp4", "--gpus", "2", "--ring-degree", "2", "--num-frames", "6")
    assert read_video(video)[0].shape == (6, 64, 64, 3)
    sound = [_ffmpeg(), "-v", "error", "-i", str(video), "-f", "f32le", "-ac", "1", "-"]
    samples = np.frombuffer(subprocess.run(sound, capture_output=True, check=True).stdout, np.float32)
    assert len(samples) >= 5500 and samples.std() > 0.01  # 6 frames of 8 a second, 8000 samples a second


@pytest.mark.slow
def test_it_is_planned_and_rounded(site: Path) -> None:
    said = run(site, "toy_xdit", "--demo", "--dry-run", "--device", "cpu", "--gpus", "2", "--dtype", "bf16")
    assert "text 56.4 KiB" in said  # 28,864 numbers of the Llama in two bytes each
    planned = json.loads(run(site, "planner.cli", "--model", "toy", "--gpu", "h100", "--gpus", "2", "--json"))
    assert len(planned) >= 2
    demo = site.parent / "cache" / "xdit" / "toy-demo-1"
    run(site, "toy_xdit", "quantize", "--model-dir", str(demo), "--output", "small")
    for name in ("transformer", "transformer_2"):
        assert has_float8(open_checkpoint(site.parent / "small" / name / "model.safetensors"))


COUNTED = """
import torch
from dataclasses import replace
from torch.utils.flop_counter import FlopCounterMode
from common.memory.estimate import FUSED, Traffic, imagined
from common.registry.forks import get_model
from common.registry.layout import Coordinates, Layout
from planner import cost
from toy_xdit.sampling import LLAMA, workload
from toy_xdit.text import new_llama

def numbers(module):
    return sum(parameter.numel() for parameter in module.parameters())

model = get_model("toy")
for size in (model.default_size, replace(model.default_size, num_frames=6)):
    for layout, rank in ((Layout(), 0), (Layout(ulysses=3), 2), (Layout(ring=2), 1)):
        with imagined(layout, rank) as mesh, torch.inference_mode():
            work = workload(model, size, mesh)
            transformer, counters = work.transformer.to(torch.bfloat16), []
            def before(*_):
                counters[:] = [FlopCounterMode(display=False, custom_mapping=FUSED), Traffic(mesh)]
                [counter.__enter__() for counter in counters]
            transformer.register_forward_pre_hook(before)
            def after(*_):
                [counter.__exit__(None, None, None) for counter in counters[::-1]]
            transformer.register_forward_hook(after)
            work.step(transformer)
        (said,) = cost.passes(model, size, Coordinates(layout, rank))
        assert counters[0].get_total_flops() == said.matmul + said.attention, (size, layout)
        assert (counters[1].sent["ulysses"], counters[1].sent["ring"]) == (said.all_to_all, said.ring), (size, layout)
stated = (model.parameters, model.text[0].parameters, model.decoder.parameters)
assert (numbers(work.transformer), numbers(new_llama(LLAMA)), numbers(work.decoder)) == stated, stated
"""


@pytest.mark.slow
def test_what_it_says_of_itself_is_what_runs(site: Path) -> None:
    (site.parent / "counted.py").write_text(COUNTED)
    run(site, "counted")


def test_the_page_shows_the_files_as_they_are() -> None:
    text = page.TARGET.read_text(encoding="utf-8")
    assert page.shown(text) == text, "run python -m tools.docs.outside_fork"
    assert page.names(text) == {path.name for path in FOLDER.glob("*.py")}
