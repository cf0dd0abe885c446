"""xdit-serve as a program: what it refuses before it starts, and Mochi's demo end to end, killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest

from common.video.files import read_video
from tests.conftest import Serve
from tests.helpers.fake_server import ROOT, Served, served

DEMO = ("--demo", "--device", "cpu", "--port", "0")


def run(*arguments: str, folder: Path, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The program's end. code: runs in its process before it."""
    program = f"import sys; {code}\nfrom xdit_serve.cli import main\nsys.exit(main(sys.argv[1:]))"
    variables = {name: value for name, value in os.environ.items() if name != "XDIT_API_KEY"} | environment
    command = [sys.executable, "-c", program, *arguments]
    variables["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)


def test_help_imports_nothing_large(tmp_path: Path) -> None:
    code = "import atexit; atexit.register(lambda: print('imported', sorted(sys.modules)))"
    done = run("--help", folder=tmp_path, code=code)
    said, _, modules = done.stdout.partition("imported")
    assert done.returncode == 0 and "--keep-gb" in said
    assert not [name for name in ("torch", "fastapi", "uvicorn", "numpy") if f"'{name}'" in modules]


def test_a_missing_extra_is_one_line_that_installs_it(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'uvicorn' else f(n, *a)"
    )
    done = run(*DEMO, folder=tmp_path, code=code)
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert "uvicorn is not installed" in done.stderr and "[serve]" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ((), {}, "nothing to serve: give --model-dir FOLDER, or --demo"),
        (("--model-dir", "none"), {}, "--model-dir none"),
        ((*DEMO, "--host", "0.0.0.0"), {}, "lets others connect: give --api-key-file FILE or XDIT_API_KEY"),
        ((*DEMO, "--host", "::"), {}, "lets others connect"),
        ((*DEMO, "--api-key-file", "none"), {}, "--api-key-file none: no such file or directory"),
        ((*DEMO, "--host", "0.0.0.0"), {"XDIT_API_KEY": "short"}, "XDIT_API_KEY: key 1 is not 8 to 512"),
        ((*DEMO, "--gpus", "3", "--replicas", "2"), {}, "--replicas 2 does not divide --gpus 3; choose of 1, 3"),
        ((*DEMO, "--keep-gb", "nan"), {}, "--keep-gb nan is not a number above 0"),
        ((*DEMO, "--", "--dtype", "fp7"), {}, "mochi-demo: Invalid value for '--dtype'"),
        ((*DEMO, "--", "--no-such"), {}, "mochi-demo: no such option: --no-such"),
        ((*DEMO, "--port", "70000"), {}, "70000 is not in the range"),
        ((*DEMO, "--ray-address", "auto"), {}, "say with --gpus how many"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    tmp_path: Path, serve: Serve, arguments: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    done = serve(*arguments, **environment)
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = run("--demo", "--device", "cpu", "--port", port, folder=tmp_path)
    assert done.returncode == 2 and f"--port {port}: address already in use" in done.stderr.lower()


def demo(folder: Path) -> tuple[str, ...]:
    own = ("--save-every", "0.1", "--data-dir", str(folder), "--", "--dtype", "fp32")
    return (sys.executable, "-m", "xdit_serve", *DEMO, *own)


def ready(server: Served) -> httpx.Client:
    http = httpx.Client(base_url=server.url, timeout=120)
    end = time.monotonic() + 120
    while http.get("/health").status_code != 200:
        assert time.monotonic() < end, server.said
        time.sleep(0.1)
    return http


def frames(folder: Path, content: bytes) -> np.ndarray:
    (folder / "video.mp4").write_bytes(content)
    return read_video(folder / "video.mp4")[0].astype(int)


@pytest.mark.slow
def test_a_demo_that_is_killed_goes_on_and_is_the_same_video(tmp_path: Path) -> None:
    data = tmp_path / "data"
    body = {"model": "mochi-demo", "prompt": "A small blue square moves to the left.", "seed": 3, "size": "32x32"}
    body |= {"num_inference_steps": 150}
    with served(data, command=demo(data)) as server, closing(ready(server)) as http:
        whole = http.post("/v1/videos/sync", json=body)
        assert whole.status_code == 200, whole.text
        job, deleted = (http.post("/v1/videos", json=body).json()["id"] for _ in range(2))
        http.delete(f"/v1/videos/{job}")  # while it runs, or before
        assert http.get(f"/v1/videos/{job}").status_code == 404
        http.delete(f"/v1/videos/{deleted}")
        job = http.post("/v1/videos", json=body).json()["id"]
        state = data / "jobs" / job / "state.safetensors"
        end = time.monotonic() + 60
        while not state.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        server.end(signal.SIGKILL)
    with served(data, command=demo(data)) as server, closing(ready(server)) as http:
        end = time.monotonic() + 60
        while (told := http.get(f"/v1/videos/{job}").json())["status"] in ("queued", "in_progress"):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert told["status"] == "completed", told
        again = http.get(f"/v1/videos/{job}/content").content
        assert np.abs(frames(tmp_path, whole.content) - frames(tmp_path, again)).max() <= 1
        assert {path.name for path in data.glob("jobs/*/*")} == {"video.mp4", "video.json"}
        sidecar = json.loads((data / "jobs" / job / "video.json").read_text())
        assert sidecar["settings"]["seed"] == 3 and sidecar["settings"]["ranks"] == 2
        assert server.end() == 0
