"""Groups of resident ranks: real processes, the small checkpoints, and what goes wrong with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.registry.layout import Layout
from common.run.unfinished import metadata
from common.system.failure import NO_ANSWER, Failure
from common.workers.group import Cancelled, Failed, Finished, GroupError, Lost, Preview, Progress
from common.workers.local import LocalGroup
from common.workers.orders import Hello, Leave, Maker, Order, maker_of
from common.workers.pace import DUE_SECONDS, Pace
from common.workers.resident import Resident, _Told
from common.workers.watched import Ranks, Seat
from mochi_xdit.fork import FORK as MOCHI
from tests.fake_fork.fork import FORK as FAKE
from tests.helpers.workers import SMALL, alone, at_step, ended, job, levels_apart, likeness, run, running, until

ROOT = Path(__file__).resolve().parents[1]
MAKERS = (Maker(FAKE),)


@pytest.fixture(scope="module")
def started() -> Iterator[LocalGroup]:
    group = LocalGroup([0, 1], on_cpu=True, timeout=120, makers=MAKERS)
    yield group
    group.stop(0)


@pytest.fixture
def group(started: LocalGroup) -> LocalGroup:
    """As the test before has left it, where that is alive: a start is what takes longest."""
    if started.health().state != "idle":
        started.start()
    return started


def mochi(folder: Path, name: str, *arguments: object, ranks: int = 2):
    return job(folder, MOCHI, name, "--dtype", "fp32", "--prompt", "a red ball", *SMALL, *arguments, ranks=ranks)


def fake(folder: Path, name: str, *arguments: object, ranks: int = 2):
    return job(folder, FAKE, name, *arguments, ranks=ranks)


@pytest.mark.slow
def test_jobs_share_what_is_loaded_and_a_cancelled_one_leaves_nothing(group, tmp_path):
    before = group.health().loadings
    first = mochi(tmp_path, "first", "--num-steps", 3)
    expected = alone(MOCHI, first.request)
    end, events = run(group, replace(first, previews=True))
    previews = [event for event in events if isinstance(event, Preview)]
    assert previews and previews[-1].step == 3 and likeness(previews[-1].png, expected[len(expected) // 2]) > 0.8
    assert isinstance(end, Finished) and end.sidecar.exists() and not first.keep_state.exists()
    steps = [e.step for e in events if isinstance(e, Progress) and e.stage == "sampling"]
    assert steps[-1] == 3 and steps == sorted(steps) and {e.job for e in events} == {"first"}
    assert levels_apart(first, expected) <= 1
    loaded, before = group.health(), before + 3
    assert loaded.loadings == before and loaded.state == "idle"
    assert set(loaded.ranks[0].models) == {"text encoder", "transformer", "decoder"} and loaded.ranks[1].memory > 0

    long = mochi(tmp_path, "long", "--num-steps", 400)
    group.submit(long)
    until(group, at_step(2))
    group.cancel("another"), group.cancel("long")
    events = until(group, ended)
    assert isinstance(events[-1], Cancelled)
    # Asked at one place and answered at the next, MOST_PLACES apart at most; some go by before the ranks hear of it.
    assert max((e.step for e in events if isinstance(e, Progress)), default=2) < 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.npy", "first.npy.json"]

    again = mochi(tmp_path, "again", "--num-steps", 3)
    end, events = run(group, again)
    assert isinstance(end, Finished) and levels_apart(again, expected) <= 1
    assert not any(isinstance(event, Preview) for event in events)
    assert group.health().loadings == before

    # Another layout on the same ranks, then another program.
    pids = [rank.pid for rank in group.health().ranks]
    other = mochi(tmp_path, "other", "--num-steps", 3, "--ulysses-degree", 2)
    assert other.request.layout != again.request.layout
    assert isinstance(run(group, other)[0], Finished) and levels_apart(other, expected) <= 1
    assert group.health().loadings == before + 3
    hidden = ("--overlap-groups", 2, "--interleave-branches")
    grouped = mochi(tmp_path, "grouped", "--num-steps", 3, "--ulysses-degree", 2, *hidden)
    assert isinstance(run(group, grouped)[0], Finished) and levels_apart(grouped, expected) <= 1
    assert isinstance(run(group, fake(tmp_path, "fake"))[0], Finished)
    assert [rank.pid for rank in group.health().ranks] == pids and group.health().loadings == before + 3


@pytest.mark.slow
def test_a_cancelled_decode_leaves_the_ranks_in_step(group, tmp_path):
    size, before = ("--num-steps", 1, "--num-frames", 61, "--vae-chunk", 1), group.health().loadings
    short = mochi(tmp_path, "short", "--num-steps", 2, "--vae-chunk", 1)
    expected = alone(MOCHI, short.request)
    group.submit(mochi(tmp_path, "long", *size, "--width", 64, "--height", 64))
    until(group, lambda e: isinstance(e, Progress) and e.stage == "decoding" and e.step >= 2)
    group.cancel("long")
    events = until(group, ended)
    assert isinstance(events[-1], Cancelled) and not list(tmp_path.iterdir())
    end, _ = run(group, short)
    assert isinstance(end, Finished) and levels_apart(short, expected) <= 1
    assert group.health().loadings == before + 3


def test_what_a_rank_is_asked_to_leave_too_late_is_not_its_next_job(monkeypatch):
    """The others may have left before it hears of that, and a job may be given again."""
    order = Order("same", 2, False, "", "", "", b"", True)
    resident, begun = Resident(SimpleNamespace(rank=0), Hello((), True, 1.0), lambda message, surely=False: None), []
    monkeypatch.setattr(resident, "_meet", lambda: None)
    monkeypatch.setattr(resident, "_run", lambda order: begun.append(order.job in resident._cancelled_jobs))
    assert resident.serve([Leave("same"), order]) == 0
    assert begun == [False] and resident._cancelled_jobs == set()


@pytest.mark.slow
def test_what_goes_wrong_on_all_ranks_leaves_them_alive(group, tmp_path):
    pids = [rank.pid for rank in group.health().ranks]
    end, _ = run(group, mochi(tmp_path, "wrong", "--attention", "sdpa", "--vae", "exact", "--max-memory", "0.001"))
    assert isinstance(end, Failed) and end.wrong_use and "not enough memory" in end.message
    assert isinstance(run(group, fake(tmp_path, "v"))[0], Finished)
    assert [rank.pid for rank in group.health().ranks] == pids


@pytest.mark.slow
def test_a_killed_rank_costs_a_step_and_other_ranks_go_on(group, tmp_path):
    work = mochi(tmp_path, "v", "--num-steps", 40)
    expected = alone(MOCHI, work.request)
    group.submit(work)
    until(group, at_step(5))
    pids = [rank.pid for rank in group.health().ranks]
    os.kill(pids[1], signal.SIGKILL)
    end = until(group, ended)[-1]
    assert isinstance(end, Lost) and end.device == 1 and "rank 1" in end.message and "SIGKILL" in end.message
    assert end.at is not None and end.at[0] >= 4 and end.at[1] == 40 and not running(pids)
    assert int(metadata(work.keep_state)["step"]) == end.at[0] and group.health().state == "lost"
    with pytest.raises(GroupError, match="lost"):
        group.submit(work)

    fewer = LocalGroup([0], on_cpu=True, timeout=120)
    fewer.start()
    try:
        with pytest.raises(GroupError, match="2 ranks, and the group has 1"):
            fewer.submit(work)
        rest = replace(work, request=replace(work.request, layout=Layout()), state=work.keep_state)
        end, events = run(fewer, rest)
        assert isinstance(end, Finished), end
        assert min(e.step for e in events if isinstance(e, Progress) and e.stage == "sampling") >= 4
        assert levels_apart(work, expected) <= 1 and not work.keep_state.exists()
        (alive,) = fewer.health().ranks
        fewer.stop(20)
        assert not running([alive.pid]) and fewer.health().state == "stopped" and fewer.events(0) == []
    finally:
        fewer.stop(0)


@pytest.mark.slow
def test_a_rank_that_stops_is_found_and_named(group, tmp_path):
    pids = [rank.pid for rank in group.health().ranks]
    end, _ = run(group, fake(tmp_path, "v", "--fault", "stop@1", "--timeout", "6"))
    assert isinstance(end, Lost) and end.device == 1 and "did not answer" in end.message and not running(pids)
    group.start()
    end, _ = run(group, fake(tmp_path, "v", "--fault", "raise@1"))
    assert isinstance(end, Lost) and "tensor x of file y is missing" in end.message and end.device is None
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_ranks_end_with_their_parent(tmp_path):
    code = """
import sys, time
from common.workers.local import LocalGroup
group = LocalGroup([0, 1], on_cpu=True)
group.start()
print(*(rank.pid for rank in group.health().ranks), flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2 and running(pids) == pids
    process.kill()
    process.wait()
    for _ in range(100):
        if not running(pids):
            return
        signal.sigtimedwait([], 0.1)
    raise AssertionError(f"{running(pids)} run on")


class Silent(Ranks):
    def ended(self) -> dict[int, Failure | None]:
        return {}


@pytest.mark.parametrize("own", [False, True])
def test_ranks_that_failed_because_of_each_other_are_lost(monkeypatch, own):
    """Nobody has a cause: that is not the job's, which goes on with other ranks."""
    monkeypatch.setattr("common.workers.watched.ECHO_SECONDS", -1.0)
    ended: list[list[Failure]] = []
    work = SimpleNamespace(job=SimpleNamespace(id="v"), endings={})
    work.heard = lambda rank, message: work.endings.setdefault(rank, message["ended"])
    work.end = lambda failures: ended.append(failures) or False
    ranks = Silent(LocalGroup([0, 1], on_cpu=True), ())
    ranks.seats, ranks.work = [Seat(0, ready=True), Seat(1, ready=True)], work
    for seat in ranks.seats:
        echo = not (own and seat.rank)
        failure = Failure(seat.rank, "starting", NO_ANSWER if echo else "it burns", secondary=echo, late=echo)
        ranks.take(seat, {"failure": failure.as_dict()})
        ranks.take(seat, {"ended": "failed", "job": "v", "seconds": {}})
    assert (ranks.work is None) == bool(ended) == own
    assert ranks._over() != own and (own or NO_ANSWER in ranks.reason)


def test_a_group_wants_devices():
    for devices in ([], [1, 1]):
        with pytest.raises(GroupError, match="at least one device, and each once"):
            LocalGroup(devices, on_cpu=True)


def test_programs_are_known_by_name():
    assert maker_of("mochi-xdit").where == ("mochi_xdit", "mochi_xdit.generate", "generate")
    assert maker_of("fake-xdit", MAKERS).fork is FAKE
    with pytest.raises(ValueError, match="no fork here is 'x'; there are mochi-xdit"):
        maker_of("x")


def test_seconds_left_follow_the_steps_and_the_job_before():
    now = 0.0
    pace = Pace({"encoding": 2.0, "sampling": 40.0, "decoding": 8.0}, lambda: now)
    assert pace.left("starting", "step", 0, 0) == 50.0
    assert pace.left("encoding", "step", 0, 0) == 50.0
    now = 1.0
    assert pace.left("sampling", "step", 0, 10) == 48.0
    now = 4.0
    assert pace.left("sampling", "step", 1, 10) == 27.0 + 8.0
    now = 6.0
    assert pace.left("sampling", "step", 2, 10) == 16.0 + 8.0
    assert Pace({}, lambda: now).left("sampling", "step", 0, 10) is None


def test_short_steps_are_not_told_of_one_by_one():
    now = 0.0
    pace = Pace({}, lambda: now)
    told = []
    for done in range(101):
        told += [done] if pace.is_due("sampling", "step", done, 100) else []
        now += DUE_SECONDS / 10
    assert told[0] == 0 and told[-1] == 100 and 10 <= len(told) <= 12
    assert pace.is_due("decoding", "chunk", 0, 3) and not pace.is_due("decoding", "chunk", 1, 3)
    now += DUE_SECONDS
    assert pace.is_due("decoding", "chunk", 1, 3)


def test_a_rank_says_a_warning_once():
    lines: list[dict] = []
    report = _Told(lambda line, surely=False: lines.append(line), speaks=True)
    for _ in range(2):
        report.warn("it is tight")
        report.note("it is done")
    note = {"note": "it is done", "warning": False}
    assert lines == [{"note": "it is tight", "warning": True}, note, note]
