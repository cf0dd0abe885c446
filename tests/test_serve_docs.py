"""What docs/serving.md says to clients: its curl lines and its Python run, against the server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fake_group import content
from tests.helpers.fake_server import Served, served

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("docs") / "data", "--step-seconds", "0.1") as server:
        yield server


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_lines_with_curl(server: Served, tmp_path: Path) -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("curl ")]
    assert len(lines) >= 8
    job, said = "", []
    for line in lines:
        answer = run(shlex.split(line.replace(URL, server.url).replace("VIDEO_ID", job)), tmp_path)
        said.append(answer)
        if not job and '"object": "video"' in answer:
            job = json.loads(answer)["id"]
    first = json.loads(said[1])
    assert (first["prompt"], first["seed"], first["status"]) == (json.loads(said[4])["prompt"], 1, "queued")
    assert json.loads(said[2])["num_inference_steps"] == 10
    assert "event: completed" in said[5] and said[5].count("event: progress") >= 1
    assert (tmp_path / "circle.mp4").read_bytes() == content(first["prompt"], 1)
    assert json.loads(said[7])["deleted"] and (tmp_path / "now.mp4").read_bytes().startswith(b"a video of 'A big red")


def test_the_python(server: Served, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    said = run([sys.executable, "-W", "ignore", "-c", program.replace(URL, server.url)], tmp_path)
    assert said == "completed None\n" and (tmp_path / "circle.mp4").stat().st_size > 0
