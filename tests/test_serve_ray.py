"""The server over Ray: a cluster of two nodes on this machine, asked by HTTP, and one node goes in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from common.video.files import read_video
from common.video.formats import write_frames
from mochi_xdit.fork import FORK
from tests.conftest import Serve
from tests.helpers.clusters import needs_ray, one_node
from tests.helpers.fake_server import Served, served
from tests.helpers.programs import frames_of, read
from tests.test_serve_cli import ready, run

PROMPT = "A small blue square moves to the left."
SIZE, FRAMES, LOSSLESS = 32, 13, 0
SERVE = ("--demo", "--device", "cpu", "--port", "0", "--no-page")


def command(address: str, data: Path) -> list[str]:
    own = ("--ray-address", address, "--gpus", "2", "--save-every", "0.2", "--data-dir", str(data))
    return [sys.executable, "-m", "xdit_serve", *SERVE, *own, "--", "--dtype", "fp32"]


def body(seed: int, steps: int) -> dict[str, object]:
    size = {"size": f"{SIZE}x{SIZE}", "num_frames": FRAMES, "crf": LOSSLESS}
    return {"model": "mochi-demo", "prompt": PROMPT, "seed": seed, "num_inference_steps": steps, **size}


def reference(folder: Path, seed: int, steps: int) -> np.ndarray:
    """The coded video that this process makes alone."""
    given = ("--demo", "--device", "cpu", "--gpus", 1, "--dtype", "fp32", "--prompt", PROMPT, "--seed", seed)
    size = ("--width", SIZE, "--height", SIZE, "--num-frames", FRAMES, "--num-steps", steps)
    request = read(FORK, *given, *size, "--output", folder / "alone.mp4")
    source = replace(request.source, model_dir=FORK.demo_folder())
    (frames,) = frames_of(FORK, replace(request, source=source))
    write_frames(folder / "alone.mp4", frames, request.videos[0].fps, crf=LOSSLESS)
    return read_video(folder / "alone.mp4")[0].astype(int)


def levels_apart(http: httpx.Client, job: str, folder: Path, expected: np.ndarray) -> int:
    (folder / "made.mp4").write_bytes(http.get(f"/v1/videos/{job}/content").content)
    made = read_video(folder / "made.mp4")[0].astype(int)
    assert made.shape == expected.shape and len(np.unique(made)) > 8
    return int(np.abs(made - expected).max())


def until(http: httpx.Client, job: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    end = time.monotonic() + 180
    while not true(told := http.get(f"/v1/videos/{job}").json()):
        assert time.monotonic() < end and told["status"] != "failed", told
        time.sleep(0.02)
    return told


def queue(http: httpx.Client, seed: int, steps: int) -> str:
    answer = http.post("/v1/videos", json=body(seed, steps))
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def sampling(step: int) -> Callable[[dict[str, Any]], bool]:
    return lambda told: told.get("stage") == "sampling" and told["step"] >= step


def whole(told: dict[str, Any]) -> bool:
    return told["status"] == "completed"


def figure(http: httpx.Client, name: str) -> float:
    """Of `/metrics`; 0 where it is not there."""
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[-1]) if lines else 0.0


def actors() -> list[psutil.Process]:
    """Ranks of the cluster, whose nodes are this process's."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RankActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def steps_told(server: Served, job: str) -> list[int]:
    """Of the events of a job, until its end. Comments among them keep a connection that says nothing open."""
    with httpx.stream("GET", f"{server.url}/v1/videos/{job}/events", timeout=180) as stream:
        lines = [line for line in stream.iter_lines() if line and not line.startswith(":")]
    assert lines[-2] == "event: completed", lines[-2:]
    told = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    return [one["step"] for one in told if one.get("stage") == "sampling"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: connection refused; start one with `ray start --head`"),
        ("nonsense", "no Ray cluster at 'nonsense': that is no HOST:PORT"),
        ("127.0.0.1:port", "that is no HOST:PORT"),
        ("nowhere.invalid:6379", "no Ray cluster at nowhere.invalid:6379: "),
    ],
)
def test_an_address_without_a_cluster_is_told_at_once(serve: Serve, address: str, said: str) -> None:
    needs_ray()
    refused(serve(*SERVE, "--gpus", "2", "--ray-address", address), said)
    refused(serve(*SERVE, "--gpus", "2", "--ray-address", "auto", RAY_ADDRESS=address), said)


def test_without_ray_the_extra_is_named(tmp_path: Path) -> None:
    done = run(*SERVE, "--gpus", "2", "--ray-address", "auto", folder=tmp_path, code="sys.modules['ray'] = None")
    refused(done, "worker groups on Ray need the package ray: ")
    assert '".[ray]"' in done.stderr


def refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith("error: --ray-address: ") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_node_goes_while_the_server_makes_a_video(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with one_node() as cluster:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        asked = ("--gpus", "3", "--ray-address", cluster.address)
        few_cpus = f"the Ray cluster at {cluster.address} has 2 CPUs for 3 ranks; ask for fewer with --gpus"
        refused(run(*SERVE, *asked, folder=tmp_path), few_cpus)
        few, many = reference(tmp_path, 3, 12), reference(tmp_path, 4, 150)
        with served(data, command=command(cluster.address, data)) as server, closing(ready(server)) as http:
            assert http.get("/health").json()["groups"] == [{"state": "idle", "ranks": 2}]
            first = queue(http, 3, 12)
            steps = steps_told(server, first)
            assert steps == sorted(steps) and steps[-1] == 12
            assert levels_apart(http, first, tmp_path, few) <= 1

            left, after = queue(http, 5, 400), queue(http, 3, 12)
            until(http, left, sampling(1))
            http.delete(f"/v1/videos/{left}")
            until(http, after, whole)
            assert http.get(f"/v1/videos/{left}").status_code == 404
            assert f"{after}: loading" not in server.said and f"{first}: loading transformer" in server.said

            job = queue(http, 4, 150)
            until(http, job, sampling(5))
            cluster.remove_node(second)
            until(http, job, whole)
            assert f"{job}: warning: the ranks were lost after step" in server.said
            assert json.loads((data / "jobs" / job / "video.json").read_text())["settings"]["ranks"] == 1
            assert levels_apart(http, job, tmp_path, many) <= 1
            again = queue(http, 3, 12)
            until(http, again, whole)
            assert levels_apart(http, again, tmp_path, few) <= 1
            health = http.get("/health").json()
            assert health == {"status": "ready", "groups": [{"state": "idle", "ranks": 1}]}
            assert figure(http, 'xdit_restarts{group="0"}') == 1 == len(actors())
            assert figure(http, 'xdit_jobs{status="completed"}') == 4

            kept = queue(http, 5, 400)
            until(http, kept, sampling(1))
            assert server.end(signal.SIGTERM) == 0
        assert not psutil.wait_procs(actors(), timeout=10)[1]
    assert "Traceback" not in server.said and "SIGTERM" not in server.said
    assert {path.name for path in data.iterdir()} == {"jobs", "jobs.sqlite3", "server.lock"}
    files = {str(path.relative_to(data / "jobs")) for path in data.glob("jobs/*/*")}
    made = {f"{one}/video.{kind}" for one in (first, after, job, again) for kind in ("mp4", "json")}
    assert files == made | {f"{kept}/state.safetensors"}
