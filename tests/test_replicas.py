"""Several groups over one source of jobs, and `--replicas`: what is lost starts again, and nothing is made twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from common.registry.checks import Ranks
from common.run.degrees import share_out
from common.run.unfinished import metadata
from common.workers.group import (
    Cancelled,
    Event,
    Failed,
    Finished,
    GroupError,
    Health,
    Job,
    Lost,
    Note,
)
from common.workers.replicas import Replicas, fitted
from mochi_xdit.fork import FORK as MOCHI
from planner import get_model, get_profile, plan
from planner.layouts import throughput
from tests.helpers.programs import main, problems, read
from tests.helpers.workers import SMALL

ROOT = Path(__file__).resolve().parents[1]


class Scripted:
    """A group without ranks: each job ends as its script says, in as many attempts as it has lines."""

    def __init__(self, devices: Sequence[int], script: dict[str, list[Event]], log: list[tuple]) -> None:
        self.devices, self.script, self.log = tuple(devices), script, log
        self.pending: deque[Event] = deque()
        self.running: str | None = None

    def start(self) -> None:
        self.log.append(("start", self.devices))
        if ("start", self.devices) in self.script:
            raise GroupError("no such device", self.script[("start", self.devices)])  # type: ignore[index]

    def submit(self, job: Job) -> None:
        self.log.append(("submit", job.id, self.devices, job.request.layout.ranks, job.state))
        lines = self.script.get(job.id, [])
        self.running = job.id
        if lines != ["never"]:
            self.pending.append(lines.pop(0) if lines else Finished(job.id, {}, Path()))

    def events(self, timeout: float) -> list[Event]:
        if not self.pending:
            time.sleep(min(timeout, 0.01))
            return []
        return [self.pending.popleft()]

    def cancel(self, job: str) -> None:
        self.pending.append(Cancelled(job))

    def health(self) -> Health:
        return Health("idle")

    def stop(self, seconds: float) -> None:
        self.log.append(("stop", self.devices))
        if self.running and self.script.get(self.running) == ["never"]:
            self.pending.append(Lost(self.running, "the group was stopped", asked=True))


def scripted(
    tmp_path: Path, script: dict, devices: Sequence[Sequence[int]], *names: str
) -> tuple[Replicas, list, list]:
    """Replicas over scripted groups with a job of each name, not started; what was done, and what was told."""
    request = read(
        MOCHI, "--demo", "--device", "cpu", "--gpus", len(devices[0]), "--seed", 1, "--output", tmp_path / "x.mp4"
    )
    jobs = deque(Job(name, request, keep_state=tmp_path / f"{name}.state") for name in names)
    log: list[tuple] = []
    told: list[Event] = []
    take = lambda timeout: jobs.popleft() if jobs else None  # noqa: E731
    replicas = Replicas(lambda own: Scripted(own, script, log), devices, take, lambda number, event: told.append(event))
    return replicas, log, told


def test_a_lost_job_goes_on_and_a_device_that_fails_twice_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("common.workers.replicas.WAIT_SECONDS", (0.0, 0.0))
    lost = [Lost("a", "rank 1 died", (step, 9), device=5) for step in (2, 4)]
    replicas, log, told = scripted(tmp_path, {"a": list(lost)}, [(4, 5)], "a", "b")
    replicas.start()
    assert replicas.finish() == []
    submitted = [entry[1:4] for entry in log if entry[0] == "submit"]
    assert submitted == [("a", (4, 5), 2), ("a", (4, 5), 2), ("a", (4,), 1), ("b", (4,), 1)]
    assert [type(event) for event in told] == [Note, Note, Finished, Finished]
    assert replicas.health()[0].more == {"restarts": 2, "left_out": [5]}
    replicas.stop(0)


def test_three_losses_at_one_step_are_the_jobs_own_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("common.workers.replicas.WAIT_SECONDS", (0.0,))
    lost = [Lost("a", "it burns", at) for at in ((1, 9), (2, 9), (2, 9), (2, 9))]
    replicas, _, told = scripted(tmp_path, {"a": list(lost)}, [(0, 1)], "a", "b")
    replicas.start()
    assert replicas.finish() == []
    endings = [event for event in told if not isinstance(event, Note)]
    assert (
        isinstance(endings[0], Failed) and endings[0].message == "its ranks were lost 3 times at step 2 of 9: it burns"
    )
    assert isinstance(endings[1], Finished) and len(told) == 5
    replicas.stop(0)


def test_a_job_goes_to_another_group_where_its_own_does_not_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("common.workers.replicas.WAIT_SECONDS", (0.0,))
    replicas, log, told = scripted(tmp_path, {"a": [Lost("a", "gone", None, device=None)]}, [(0,), (1,)], "a")
    replicas.start()
    assert replicas.finish() == []
    assert [type(event) for event in told] == [Note, Finished]
    replicas.stop(0)

    script: dict = {"a": [Lost("a", "gone", None, device=0)], ("start", (1,)): 1}
    replicas, log, told = scripted(tmp_path, script, [(1,)], "a")
    with pytest.raises(GroupError, match="no such device"):
        replicas.start()
    assert log[-1] == ("stop", (1,)) and told == []


def test_cancel_and_stop_end_what_runs(tmp_path):
    replicas, _, told = scripted(tmp_path, {"a": ["never"], "b": ["never"]}, [(0,), (1,)], "a", "b")
    replicas.start()
    waited = time.monotonic() + 20
    while not all(one.job for one in replicas.groups):
        assert time.monotonic() < waited
        time.sleep(0.01)
    replicas.cancel("a")
    while not told:
        assert time.monotonic() < waited
        time.sleep(0.01)
    replicas.stop(0)
    assert told == [Cancelled("a"), Lost("b", "the group was stopped", asked=True)]


def test_a_layout_is_found_for_what_is_left(tmp_path):
    request = read(MOCHI, "--demo", "--device", "cpu", "--gpus", 4, "--output", tmp_path / "x.mp4")
    assert fitted(request, 4) is request
    assert [fitted(request, ranks).layout.degrees for ranks in (3, 2, 1)] == [(1, 3, 1), (2, 1, 1), (1, 1, 1)]


def test_replicas_that_do_not_fit_are_refused_in_words(tmp_path):
    def found(*arguments: object) -> list[str]:
        (tmp_path / "two").write_text("a\nb\n")
        given = ("--demo", "--device", "cpu", "--prompt-file", tmp_path / "two", "--output", tmp_path / "x.mp4")
        return problems(MOCHI, *given, *arguments)

    assert found("--replicas", 0)[0] == "--replicas 0 is not a positive number; at least 1"
    assert "but 2 videos are to be made" in found("--replicas", 3, "--gpus", 3)[0]
    assert found("--replicas", 2, "--gpus", 3) == ["--replicas 2 does not divide 3 ranks (--gpus is 3); choose of 1, 3"]
    assert "--ring-degree 3 = 3 ranks, but --gpus is 4, and each of 2 replicas has 2 of them" in "".join(
        found("--replicas", 2, "--gpus", 4, "--ring-degree", 3)
    ).replace("--ulysses-degree 1 x ", "")
    (tmp_path / "two").write_text("a\nb\n")
    given = ("--demo", "--device", "cpu", "--prompt-file", tmp_path / "two", "--output", tmp_path / "x.mp4")
    request = read(MOCHI, *given, "--replicas", 2, "--ring-degree", 3)
    assert (request.replicas, request.layout.ranks) == (2, 3)
    asked = share_out(Ranks(4, "4 run"), 2, 9, False, ((), 1, True, None, None, None, "cuda", None))
    assert "under torchrun" in asked[2][0]


def test_the_planner_advises_groups_by_the_number_of_videos():
    whole = plan(get_model("mochi"), get_model("mochi").default_size, 8, get_profile("h100"))
    replicas, best = throughput(whole)
    assert replicas * best.layout.ranks == 8 and replicas / best.total >= 1 / whole.best.total
    assert throughput(whole, 1) == (1, whole.best)
    few = throughput(whole, 2)
    assert few[0] in (1, 2) and -(-2 // few[0]) * few[1].total <= 2 * whole.best.total


@pytest.mark.slow
def test_a_killed_prompt_file_goes_on_with_other_replicas(tmp_path, monkeypatch):
    """A rank is killed, and then the program with all its ranks; nothing is made twice, and all is as it should be."""
    (tmp_path / "prompts").write_text("a red ball\na blue box\na green star\n")
    program = [sys.executable, "-m", "mochi_xdit"]
    command = [*program, "--demo", "--device", "cpu", "--seed", "3", "--dtype", "fp32", *SMALL, "--save-every", "0"]
    command += ["--prompt-file", "prompts", "--num-steps", "60"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    where = {"cwd": tmp_path, "text": True, "env": settings}
    first = [*command, "--output", "x.npy", "--replicas", "2", "--gpus", "2"]
    with subprocess.Popen(first, stderr=subprocess.PIPE, **where) as process:
        states, end = [tmp_path / f"x-{i}.npy.state.safetensors" for i in (1, 2, 3)], time.monotonic() + 120

        def steps(path: Path) -> int:
            return int(metadata(path)["step"]) if path.exists() else 0

        while min(map(steps, states[:2])) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        os.kill(psutil.Process(process.pid).children()[0].pid, signal.SIGKILL)
        while not (tmp_path / "x-1.npy").exists() and not (tmp_path / "x-2.npy").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        while not any(map(steps, states)) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("x-*.npy")}
    assert metadata(tmp_path / "x.npy.state.safetensors")["digest"]
    again = [*command, "--output", "x.npy", "--replicas", "3"]
    rest = subprocess.run(again, capture_output=True, timeout=120, **where)
    assert rest.returncode == 0, rest.stderr
    assert "going on with an interrupted run" in rest.stderr
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in done} == done
    names = sorted(path.name for path in tmp_path.glob("*x*") if path.name != "prompts")
    assert names == [f"x-{i}.{kind}" for i in (1, 2, 3) for kind in ("npy", "npy.json")]
    assert set(rest.stdout.split()) >= {f"x-{i}.npy" for i in (1, 2, 3)} - set(done)
    monkeypatch.chdir(tmp_path)
    assert main(MOCHI, [*command[len(program) :], "--output", "y.npy", "--gpus", "1"]) == 0
    for i in (1, 2, 3):
        ours, theirs = (np.load(tmp_path / f"{name}-{i}.npy").astype(int) for name in "xy")
        assert np.abs(ours - theirs).max() <= 1
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("y", ".y")))
    assert left == [name.replace("x", "y") for name in names]
