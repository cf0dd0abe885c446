"""The server's jobs on disk: nothing lost, nothing twice, nothing half, whenever a server ends."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.fake_group import FakeGroup
from xdit_serve import dispatch
from xdit_serve.dispatch import Dispatcher, Keeping
from xdit_serve.metrics import Metrics
from xdit_serve.offers import demos
from xdit_serve.records import JobSpec
from xdit_serve.store import STATE, QueueFull, Store, StoreError, new_id

FOREVER = {"oldest": 0.0, "most_bytes": float("inf")}


def wanted(owner: str = "a", kind: str = "video", name: str | None = None) -> JobSpec:
    return JobSpec(name or new_id(kind), owner, kind, "m", ("--prompt=x",), {"prompt": "x"}, "video.mp4")


def queue(store: Store, count: int = 1, owner: str = "a") -> list[str]:
    found = []
    for _ in range(count):
        job = wanted(owner)
        store.make_folder(job.id)
        store.admit([job], 1000)
        found.append(job.id)
    return found


def make(store: Store, job: str, size: int = 10) -> None:
    """What the ranks leave of a job that ends well."""
    output = store.output_of(store.get(job))
    output.write_bytes(bytes(size))
    output.with_suffix(".json").write_text("{}")


def test_jobs_are_taken_in_order_and_end_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    jobs = queue(store, 3)
    first = store.take()
    assert (first.id, first.status, first.arguments) == (jobs[0], "in_progress", ("--prompt=x",))
    assert store.place(store.get(jobs[2])) == 1
    store.give_back(first.id)
    assert [store.take().id for _ in range(3)] == jobs and store.take() is None
    make(store, jobs[0])
    assert store.complete(jobs[0], {"sampling": 1.5}) and store.fail(jobs[1], "failed", "why")
    done, failed = store.get(jobs[0]), store.get(jobs[1])
    assert (done.status, done.nbytes, done.seconds) == ("completed", 12, {"sampling": 1.5})
    assert (failed.status, failed.code, failed.message) == ("failed", "failed", "why")
    assert store.counts() == {"completed": 1, "failed": 1, "in_progress": 1}


def test_a_queue_takes_all_or_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.admit([wanted(), wanted()], most=3)
    with pytest.raises(QueueFull, match="2 jobs wait"):
        store.admit([wanted(), wanted()], most=3)
    assert store.counts() == {"queued": 2}


def test_a_start_goes_on_from_what_was_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    done, finished, running, waiting, dropped = queue(store, 5)
    for _ in range(3):
        store.take()
    for job in (done, finished):
        make(store, job)
    store.complete(done, {})
    folder = store.folder_of(running)
    (folder / STATE).write_bytes(b"state")
    (folder / "input.png").write_bytes(b"picture")
    (folder / ".video.x.partial.mp4").write_bytes(b"half")
    (store.make_folder("video_of_nobody") / "input.png").write_bytes(b"never let in")
    store.take()
    store.take()
    assert store.delete(dropped)  # it runs: the ranks have to let it go
    store.close()  # as a kill: nothing else was said to the store

    store = Store(tmp_path)
    assert [store.get(job).status for job in (done, finished, running, waiting)] == [
        *["completed"] * 2,
        *["queued"] * 2,
    ]
    assert store.get(dropped) is None and not store.folder_of(dropped).exists()
    assert not (tmp_path / "jobs" / "video_of_nobody").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["input.png", STATE]
    assert store.take().id == running  # before what came later


KILLED = """
import sys
from pathlib import Path
from xdit_serve.store import Store
from tests.test_serve_store import make, wanted
store = Store(Path(sys.argv[1]))
while True:
    job = wanted()
    store.make_folder(job.id)
    store.admit([job], 10**6)
    print("in", job.id, flush=True)
    taken = store.take()
    make(store, taken.id)
    store.complete(taken.id, {})
    print("done", taken.id, flush=True)
"""


def test_nothing_that_was_said_is_lost_when_it_is_killed(tmp_path: Path) -> None:
    said: list[list[str]] = []
    for lines in (3, 8, 14, 21):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            said += [process.stdout.readline().split() for _ in range(lines)]
            process.send_signal(signal.SIGKILL)
            said += [line.split() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    store = Store(tmp_path)
    assert len(said) >= 46
    for what, job in said:
        record = store.get(job)
        assert record is not None and (what == "in" or record.status == "completed"), (what, job)
    assert len({job for what, job in said if what == "done"}) == sum(what == "done" for what, _ in said)
    assert {path.name for path in store.jobs.iterdir()} == {record.id for record in store.list(None, limit=10**6)}


def test_one_server_owns_a_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="belongs to a server that runs; give --data-dir another"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as base:
        base.execute("PRAGMA user_version=7")
    with pytest.raises(StoreError, match="another version"):
        Store(tmp_path)


def test_a_job_whose_turn_comes_on_a_full_disk_waits_and_is_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, offer = Store(tmp_path), demos()[0]
    job = JobSpec(new_id("video"), "a", "video", offer.name, ("--prompt=x",), {"prompt": "x"}, "video.mp4")
    store.make_folder(job.id)
    store.admit([job], 1000)
    own = ("--device=cpu", "--gpus=2")
    dispatcher = Dispatcher(store, [offer], own, lambda take, tell: FakeGroup(), Keeping(1, 1), Metrics())
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(dispatch, "ROOM_SECONDS", 0.0)
    for name in ("write_bytes", "mkdir"):  # of the door, and of the store
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, mock.Mock(side_effect=full))
            assert dispatcher.take(0) is None
        assert store.get(job.id).status == "queued", name
    taken = dispatcher.take(0)
    assert taken is not None and taken.request.videos[0].prompt == "x"


def test_a_locked_or_full_disk_is_told_and_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdit_serve.store.BUSY_SECONDS", 0.05)
    store = Store(tmp_path)
    (job,) = queue(store)
    other = sqlite3.connect(tmp_path / "jobs.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="another program holds a lock"):
        store.admit([wanted()], 10)
    assert store.get(job).status == "queued"  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count={pages}")  # what SQLite says of a disk that is full
    with pytest.raises(StoreError, match="no space is left"):
        for _ in range(100):
            store.admit([wanted()], 1000)
    store._writer.execute("PRAGMA max_page_count=1000000")
    assert store.take().id == job and len(queue(store, 2)) == 2


def test_deleting_takes_the_files_when_nobody_writes_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    waiting, running, done = queue(store, 3)
    assert not store.delete(waiting) and not store.folder_of(waiting).exists()
    assert store.take().id == running and store.delete(running)
    assert store.get(running) is None and store.list(None) == [store.get(done)]
    assert store.folder_of(running).exists()
    make_files = store.folder_of(running) / "video.mp4"
    make_files.write_bytes(b"x")
    assert not store.complete(running, {}) and not store.folder_of(running).exists()
    store.take()
    make(store, done)
    store.complete(done, {})
    assert not store.delete(done) and store.counts() == {} and os.listdir(store.jobs) == []


def test_lists_by_owner_from_a_place_in_either_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mine, theirs = queue(store, 5), queue(store, 2, "b")
    assert [job.id for job in store.list("a")] == mine[::-1]
    assert [job.id for job in store.list("a", newest=False, limit=2)] == mine[:2]
    after = store.get(mine[3]).number
    assert [job.id for job in store.list("a", after=after)] == mine[:3][::-1]
    assert [job.id for job in store.list("a", after=after, newest=False)] == mine[4:]
    assert store.get(theirs[0], "a") is None and store.get(theirs[0], "b").id == theirs[0]
    assert store.list(None, kind="image") == []


def test_ended_jobs_go_by_age_and_by_size(tmp_path: Path) -> None:
    store = Store(tmp_path)
    jobs = queue(store, 4)
    for job in jobs[:3]:
        store.take()
        make(store, job, 1000)
        store.complete(job, {})
    assert store.retire(**FOREVER) == []
    assert store.retire(0.0, 2500) == jobs[:1] and not store.folder_of(jobs[0]).exists()
    assert sorted(store.retire(store.get(jobs[2]).completed + 1, float("inf"))) == sorted(jobs[1:3])
    assert [job.id for job in store.list(None)] == jobs[3:]
