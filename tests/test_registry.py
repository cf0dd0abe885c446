"""Forks register themselves: what others know of them they know from there."""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from common.registry import forks as registry
from common.registry.forks import fork_of, forks, get_model, model_names, models
from common.registry.layout import Coordinates, Layout
from common.registry.request import Source
from planner import cost, get_profile, plan
from planner.cli import command
from planner.layouts import choose_layout
from tests.helpers.hub import Hub, download, there
from tests.helpers.outside import install

ROOT = Path(__file__).resolve().parents[1]
OURS = ("common", "planner", "xdit_doctor", "xdit_download", "xdit_serve", "benchmarks", *registry.HERE)


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from common import launch` and `from common.run.launch import Link` alike.
            inside = (ROOT / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if inside else {node.module}
    return {name for name in found if name.split(".")[0] in OURS}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("**/*.py" if folder == "common" else "*.py"))


def test_the_planner_knows_the_registry_and_layouts_only() -> None:
    for path in files("planner"):
        outside = {name for name in imports(path) if not name.startswith("planner")}
        assert outside <= {"common.registry.forks", "common.registry.layout"}, path.name


def test_only_the_run_code_asks_the_planner() -> None:
    users = {path.name for path in files("common") if any(n.startswith("planner") for n in imports(path))}
    assert users == {"degrees.py"}
    above = {"planner", "xdit_doctor", "xdit_download", "xdit_serve"}
    for fork in forks():
        for path in files(fork.package):
            assert not above.intersection(name.split(".")[0] for name in imports(path)), path


@pytest.mark.parametrize("folder", ["common", "planner", "xdit_doctor", "xdit_download", "xdit_serve", "benchmarks"])
def test_shared_code_imports_no_fork(folder: str) -> None:
    packages = {fork.package for fork in forks()}
    for path in files(folder):
        assert not packages.intersection(name.split(".")[0] for name in imports(path)), path


def words(path: Path) -> Iterator[str]:
    """Names and strings of a file; its docstrings and comments may give examples."""
    source = path.read_text()
    examples = {
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME or (token.type != tokenize.COMMENT and token.start[0] not in examples):
            yield token.string.lower()


@pytest.mark.parametrize("folder", ["common", "planner", "xdit_doctor", "xdit_download", "xdit_serve", "benchmarks"])
def test_shared_code_names_no_model(folder: str) -> None:
    for path in files(folder):
        allowed = registry.HERE if path.name == "forks.py" else ()
        # As a word: "wanted" names no Wan.
        names = re.compile("|".join(rf"(?<![a-z]){fork.name}(?![a-z])" for fork in forks()))
        named = [w for w in words(path) if names.search(w) and w.strip('"') not in allowed]
        assert not named, path


def test_every_fork_says_what_others_ask_for() -> None:
    assert len(set(model_names())) == len(models()) >= 7
    for fork in forks():
        assert (
            callable(fork.module("generate").generate) and fork.demos and fork.rules(Source()) is fork.models[0].rules
        )
        for model in fork.models:
            assert not model.problems(model.default_size) and model.files and fork_of(model) is fork
            assert model.latents.tokens(model.default_size)[0] > 0 and model.demo is not None
            assert get_model(model.title.upper()) is get_model(model.name.replace("-", "_")) is model


def test_every_pipeline_is_called_with_the_same_words() -> None:
    """What is said of one in README and docs, and what benchmarks call all of them with."""
    words = {"prompt", "negative_prompt", "height", "width", "num_frames", "num_steps", "cfg_scale", "seed", "latents"}
    words |= {"output", "decode", "latents_file", "keeper", "num_inference_steps", "guidance_scale"}
    for fork in forks():
        taken = inspect.signature(fork.pipeline_class().__call__).parameters
        assert not words - taken.keys(), (fork.name, words - taken.keys())


def test_the_program_and_the_planner_admit_the_same_sizes() -> None:
    for fork in forks():
        for model in fork.models:
            rules = fork.rules(Source(official=model.name))
            assert replace(rules, dtype=model.rules.dtype) == model.rules


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fork that some package elsewhere has registered."""
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    registry.forks.cache_clear()
    yield
    registry.forks.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_xdit"]:
        del sys.modules[name]


@pytest.mark.usefixtures("toy")
def test_a_fork_from_outside_is_planned() -> None:
    assert {"toy-picture", "toy-video", "toy-sound"} <= set(model_names())
    for name in ("toy-picture", "toy-video", "toy-sound"):
        model = get_model(name)
        found = plan(model, model.default_size, 4, get_profile("h100"))
        assert found.best.sent.total > 0 and found.single.sent.total == 0
        assert found.best.total < found.single.total or name == "toy-picture"  # too small for its overheads
        assert all(one.layout.cfg == 1 for one in found.layouts) == (name == "toy-picture")
        assert choose_layout(name, None, 2, "h100")[0].ranks == 2
    shown = CliRunner().invoke(command, ["--model", "toy_video", "--gpu", "l40", "--gpus", "2", "--json"])
    assert shown.exit_code == 0 and len(json.loads(shown.stdout)) == 3, shown.output
    refused = CliRunner().invoke(command, ["--model", "toy-picture", "--gpu", "l40", "--num-frames", "9"])
    assert "the toy makes a picture" in refused.output and refused.exit_code == 2


@pytest.mark.usefixtures("toy")
def test_costs_of_streams_stacks_and_cross_attention_add_up() -> None:
    """Against sums written out; even shards, so that a rank has an equal part of everything but `once`."""
    w, block = 512, 24 * 512 * 512
    picture = get_model("toy-picture")
    tokens = 64 * 64 + 256
    double, single = cost.passes(picture, picture.default_size, Coordinates(Layout(ulysses=4), 1))
    assert double.matmul == 10**6 + tokens // 4 * 2 * block and single.matmul == tokens // 4 * 4 * block
    assert double.attention == 2 * 4 * w * tokens**2 // 4
    assert single.all_to_all == 4 * 4 * (tokens // 4) * w * 3 // 4 * 2  # q, k, v and the output, in bf16
    video = get_model("toy-video")
    n = 21 * 30 * 52
    alone = cost.passes(video, video.default_size, Coordinates(Layout(), 0))
    assert len(alone) == 2 and alone[0] == alone[1]
    assert alone[0].matmul == n * 6 * (block + 4 * w * w) and alone[0].attention == 6 * 4 * w * (n * n + n * 512)
    sound = get_model("toy-sound")
    heard = sum(p.matmul for p in cost.passes(sound, sound.default_size, Coordinates(Layout(cfg=2), 0)))
    assert heard == 49 * 22 * 40 * (6 * block + 4 * 4 * w * w) + 402 * 4 * block // 4
    sent = cost.sent(sound, replace(sound.default_size, num_steps=1), Coordinates(Layout(cfg=2), 0))
    assert sent.total == 4 * (49 * 22 * 40 * 64 + 402 * 128)


def test_a_fork_from_outside_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    install(tmp_path / "site")
    hub.repos = {"toys/video": {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"#"}}
    here = f"sys.path[:0] = [{str(tmp_path / 'site')!r}]"
    done = download(hub.url, "Toy_Video", "--dir", tmp_path / "there", before=here)
    assert done.returncode == 0, done.stderr
    assert there(tmp_path / "there") == {"config.json": b"{}", "model.safetensors": b"weights"}
    assert "toy-video: 2 files, 9 bytes" in done.stdout and "MIT" in done.stdout


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("toy = toy_xdit.nowhere:FORK", "No module named 'toy_xdit.nowhere'"),
        ("toy = toy_xdit.fork:WIDTH", "it is a int, not a Fork"),
    ],
)
def test_a_broken_registration_is_told_and_left_out(tmp_path: Path, entry: str, told: str) -> None:
    install(tmp_path, entry)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]\n"
    code += "from common.registry.forks import model_names; print(*model_names()); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stdout.split() == [*model_names(), "False"]
