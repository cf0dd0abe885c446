"""Jobs on disk: an SQLite database and a folder of files for each job, under one data folder that one server owns.

What a client is told is on disk before it is told. Whenever the server ends, the next start goes on from what is there:
queued jobs are queued, what was running comes before them with its last saved state, finished jobs are served.

    DATA/server.lock  DATA/jobs.sqlite3  DATA/jobs/ID/{input.png, video.mp4, video.json, state.safetensors}
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from common.registry.request import beside
from common.system.files import reason, shown, size_of
from xdit_serve.records import JobSpec, Record

VERSION = 1
BUSY_SECONDS = 2.0
STATE = "state.safetensors"
"""The newest state of a job's sampling, in its folder."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, kind TEXT NOT NULL, model TEXT NOT NULL,
    arguments TEXT NOT NULL, shown TEXT NOT NULL, output TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'queued', cancelled INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL, started REAL, completed REAL,
    code TEXT, message TEXT, nbytes INTEGER NOT NULL DEFAULT 0, seconds TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX IF NOT EXISTS by_status ON jobs (status, number);
CREATE INDEX IF NOT EXISTS by_owner ON jobs (owner, kind, number);
"""


class StoreError(RuntimeError):
    """The data folder does not take or give what it should; one line. It may do so again later."""


class QueueFull(RuntimeError):
    """As many jobs wait as may; waiting: how many."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"the queue is full: {waiting} jobs wait; try again later")
        self.waiting = waiting


@contextmanager
def _told() -> Iterator[None]:
    """What SQLite and the file system raise, as StoreError."""
    try:
        yield
    except sqlite3.Error as error:
        message = str(error)
        if "locked" in message or "busy" in message:
            message = "another program holds a lock on it"
        elif "full" in message:
            message = "no space is left on the disk"
        raise StoreError(f"the database of jobs cannot be used: {message}") from error
    except OSError as error:
        raise StoreError(f"the data folder cannot be used: {reason(error)}") from error


class Store:
    """The jobs of one data folder. All methods may be called from any thread and raise StoreError."""

    def __init__(self, folder: Path) -> None:
        """Take the folder, made where it is missing, and bring what a server that was killed left into order."""
        self.folder, self.jobs = folder, folder / "jobs"
        with _told():
            self.jobs.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise StoreError(f"{shown(folder)} belongs to a server that runs; give --data-dir another") from None
        try:
            self._open(folder / "jobs.sqlite3")
            self._recover()
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self, path: Path) -> None:
        self._writing, self._reading = threading.RLock(), threading.RLock()
        with _told():
            self._writer, self._reader = (
                sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
                for _ in range(2)
            )
            version = self._writer.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise StoreError(f"{shown(path)} is of another version of this program; give --data-dir another folder")
            os.chmod(path, 0o600)
            self._writer.execute("PRAGMA journal_mode=WAL")
            # What was said to a client must outlive a power cut; a commit takes one flush of the log.
            self._writer.execute("PRAGMA synchronous=FULL")
            self._writer.executescript(SCHEMA)
            self._writer.execute(f"PRAGMA user_version={VERSION}")
            self._reader.row_factory = self._writer.row_factory = sqlite3.Row

    def close(self) -> None:
        """Give the folder back. Nothing is lost without it."""
        with self._writing, self._reading:
            self._reader.close()
            self._writer.close()
            with suppress(OSError):
                os.close(self._lock)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._writing, _told():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
                raise

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._reading, _told():
            return self._reader.execute(query, values).fetchall()

    # Files

    def folder_of(self, job: str) -> Path:
        return self.jobs / job

    def output_of(self, job: JobSpec) -> Path:
        return self.folder_of(job.id) / job.output

    def sidecar_of(self, job: JobSpec) -> Path:
        return beside(self.output_of(job), False, ".json")

    def make_folder(self, job: str) -> Path:
        """A job's folder, made unless it is there, for its files to be written before it is let in."""
        with _told():
            folder = self.folder_of(job)
            folder.mkdir(mode=0o700, exist_ok=True)
            return folder

    def drop_folder(self, job: str) -> None:
        """Remove a job's files; never raises, the next start removes what is left."""
        shutil.rmtree(self.folder_of(job), ignore_errors=True)

    def flush(self, job: str) -> None:
        """A job's files and their names to the disk."""
        with _told():
            folder = self.folder_of(job)
            for path in (*folder.iterdir(), folder, self.jobs):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def _recover(self) -> None:
        """Of what a killed server left: half files go, what had ended has ended, the rest waits again."""
        with self._transaction() as base:
            base.execute("DELETE FROM jobs WHERE cancelled")
            for row in base.execute("SELECT * FROM jobs WHERE status='in_progress'").fetchall():
                job = _record(row)
                sidecar = self.sidecar_of(job)
                # The json is written after the output has its name.
                if self.output_of(job).is_file() and sidecar.is_file():
                    self._complete(base, job, {}, sidecar.stat().st_mtime)
                else:
                    base.execute("UPDATE jobs SET status='queued' WHERE id=?", (job.id,))
        records = {row["id"]: _record(row) for row in self._read("SELECT * FROM jobs")}
        with _told():
            for path in self.jobs.iterdir():
                if path.name not in records:
                    _remove(path)
                else:
                    self._tidy(records[path.name])

    def _tidy(self, job: Record) -> None:
        """Remove what belongs to work that nobody goes on with; never raises."""
        keep = {job.output, self.sidecar_of(job).name} if job.ended else set()
        with suppress(OSError):
            for path in self.folder_of(job.id).iterdir():
                half = path.name.startswith(".")
                if half or (job.ended and path.name not in keep and not path.name.startswith("input.")):
                    _remove(path)

    # Jobs

    def admit(self, jobs: Sequence[JobSpec], most: int) -> list[Record]:
        """Queue these jobs, all or none; they are on disk when this returns. Raises QueueFull.

        most: how many may wait at once.
        """
        with self._transaction() as base:
            waiting = base.execute("SELECT count(*) FROM jobs WHERE status='queued'").fetchone()[0]
            if waiting + len(jobs) > most:
                raise QueueFull(waiting)
            now = time.time()
            columns = "id, owner, kind, model, arguments, shown, output, created"
            for job in jobs:
                values = (job.id, job.owner, job.kind, job.model, json.dumps(job.arguments), json.dumps(job.shown))
                base.execute(f"INSERT INTO jobs ({columns}) VALUES (?,?,?,?,?,?,?,?)", (*values, job.output, now))
        return [record for record in (self.get(job.id) for job in jobs) if record is not None]

    def take(self) -> Record | None:
        """The first job that waits, which is in progress from now on; None where none does."""
        if not self._read("SELECT 1 FROM jobs WHERE status='queued' LIMIT 1"):
            return None
        with self._transaction() as base:
            row = base.execute("SELECT * FROM jobs WHERE status='queued' ORDER BY number LIMIT 1").fetchone()
            if row is None:
                return None
            base.execute(
                "UPDATE jobs SET status='in_progress', started=coalesce(started, ?) WHERE id=?",
                (time.time(), row["id"]),
            )
        return self._get(row["id"])

    def give_back(self, job: str) -> None:
        """It waits again, before those that came later; a cancelled one goes."""
        with self._transaction() as base:
            base.execute("UPDATE jobs SET status='queued' WHERE id=? AND status='in_progress'", (job,))
            gone = base.execute("DELETE FROM jobs WHERE id=? AND cancelled", (job,)).rowcount
        if gone:
            self.drop_folder(job)

    def complete(self, job: str, seconds: Mapping[str, float]) -> bool:
        """Its output is whole. False for one that was cancelled meanwhile, which goes with its files."""
        with self._transaction() as base:
            row = base.execute("SELECT * FROM jobs WHERE id=?", (job,)).fetchone()
            if row is None or row["cancelled"]:
                base.execute("DELETE FROM jobs WHERE id=?", (job,))
                done = False
            else:
                self._complete(base, _record(row), seconds, time.time())
                done = True
        if not done:
            self.drop_folder(job)
        elif (record := self._get(job)) is not None:
            self._tidy(record)
        return done

    def _complete(self, base: sqlite3.Connection, job: Record, seconds: Mapping[str, float], when: float) -> None:
        files = [self.output_of(job), self.sidecar_of(job)]
        files += self.folder_of(job.id).glob("input.*")
        base.execute(
            "UPDATE jobs SET status='completed', completed=?, nbytes=?, seconds=? WHERE id=?",
            (when, sum(map(size_of, files)), json.dumps(dict(seconds)), job.id),
        )

    def fail(self, job: str, code: str, message: str) -> bool:
        """It cannot be made. False for one that was cancelled meanwhile, which goes with its files."""
        with self._transaction() as base:
            gone = base.execute("DELETE FROM jobs WHERE id=? AND cancelled", (job,)).rowcount
            base.execute(
                "UPDATE jobs SET status='failed', completed=?, code=?, message=? WHERE id=?",
                (time.time(), code, message, job),
            )
        if gone:
            self.drop_folder(job)
        elif (record := self._get(job)) is not None:
            self._tidy(record)
        return not gone

    def delete(self, job: str) -> bool:
        """Nobody sees it any more. True where ranks have to let it go before its files can: tell them."""
        with self._transaction() as base:
            base.execute("UPDATE jobs SET cancelled=1 WHERE id=? AND status='in_progress'", (job,))
            gone = base.execute("DELETE FROM jobs WHERE id=? AND status!='in_progress'", (job,)).rowcount
        if gone:
            self.drop_folder(job)
        return not gone

    def retire(self, oldest: float, most_bytes: float) -> list[str]:
        """Remove ended jobs that ended before `oldest`, and the first to end of those that take more than this.

        Returns their ids.
        """
        rows = self._read(
            "SELECT id, completed, nbytes FROM jobs WHERE status IN ('completed','failed') "
            "ORDER BY completed DESC, number DESC"
        )
        ids, total = [], 0
        for row in rows:
            total += row["nbytes"]
            if row["completed"] < oldest or total > most_bytes:
                ids.append(row["id"])
        for job in ids:
            self.delete(job)
        return ids

    # Questions

    def _get(self, job: str) -> Record | None:
        rows = self._read("SELECT * FROM jobs WHERE id=?", (job,))
        return _record(rows[0]) if rows else None

    def get(self, job: str, owner: str | None = None) -> Record | None:
        """A job, of this owner alone where one is given; None for one that is not there or was deleted."""
        record = self._get(job)
        return None if record is None or record.cancelled or owner not in (None, record.owner) else record

    def list(
        self, owner: str | None, kind: str = "video", after: int | None = None, limit: int = 20, newest: bool = True
    ) -> list[Record]:
        """Up to `limit` jobs behind the one of number `after`, the newest first or last. owner: as for `get`."""
        where, values = ["kind=?", "NOT cancelled"], [kind]
        if owner is not None:
            where, values = [*where, "owner=?"], [*values, owner]
        if after is not None:
            where, values = [*where, "number < ?" if newest else "number > ?"], [*values, after]  # type: ignore[list-item]
        order = "DESC" if newest else "ASC"
        query = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY number {order} LIMIT ?"
        return [_record(row) for row in self._read(query, (*values, limit))]

    def place(self, job: Record) -> int:
        """How many jobs come before this one that waits."""
        query = "SELECT count(*) FROM jobs WHERE status='queued' AND number < ?"
        return int(self._read(query, (job.number,))[0][0])

    def counts(self) -> dict[str, int]:
        """How many jobs are in each status."""
        return {row[0]: row[1] for row in self._read("SELECT status, count(*) FROM jobs GROUP BY status")}


def new_id(kind: str) -> str:
    """Of a job; nobody can guess it."""
    return f"{kind}_{secrets.token_hex(16)}"


def _record(row: sqlite3.Row) -> Record:
    names = {one.name for one in fields(Record)}
    values = {name: row[name] for name in row.keys() if name in names}  # noqa: SIM118
    values |= {name: json.loads(row[name]) for name in ("shown", "seconds")}
    values |= {"arguments": tuple(json.loads(row["arguments"])), "cancelled": bool(row["cancelled"])}
    return Record(**values)


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
