"""Faults while a server makes videos: it, a rank or its disk goes, the database is locked, a client leaves.

    python -m tests.soak.faults --jobs 100 --faults 50 --seed 1

Mochi's demo on two CPU ranks. The disk is one of 256 MiB in memory, mounted for this, which only root can do: without,
it is not filled. Prints what was done and what came of it; exit status 1 unless every video is there and is the one of
its seed, and nothing else is left: no process, no temporary or half file.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil

from common.run.children import free_port
from common.video.files import read_video
from common.video.formats import write_frames
from mochi_xdit.fork import FORK
from tests.helpers.fake_server import Served, served
from tests.helpers.programs import frames_of, read

PROMPT = "A small blue square moves to the left."
SIZE, FRAMES, STEPS = 32, 13, 12
TIMEOUT = 10
SERVE = ("--demo", "--gpus", "2", "--device", "cpu", "--save-every", "0.2", "--timeout", str(TIMEOUT), "--no-page")
DISK = "256m"
HELD_SECONDS = 4.0  # longer than the server waits for a lock
LONGEST_SECONDS = 200.0
SEEDS = 5
LOSSLESS = 0
"""crf: otherwise one grey level that rounding moves is made many."""


class Run:
    """One server under faults, in `folder`; the data on a disk of its own."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.data, self.chance = folder, folder / "disk" / "data", chance
        self.jobs: dict[str, int] = {}
        self.ended: set[str] = set()
        self.done = Counter[str]()
        self.port = free_port()
        self._held = served(self.data, command=self._command())
        self.server: Served = self._held.__enter__()
        self.kinds = ["kill server", "kill rank", "stop rank", "lock database", "leave upload"]
        self.kinds += ["fill disk"] if os.geteuid() == 0 else []

    def _command(self) -> list[str]:
        own = ["--data-dir", str(self.data), "--port", str(self.port)]
        return [sys.executable, "-m", "xdit_serve", *SERVE, *own, "--", "--dtype", "fp32"]

    def ask(self, count: int) -> None:
        """Queue jobs one after another, each until the server has taken it. A lost answer may mean a job more."""
        with httpx.Client(base_url=self.server.url, timeout=30) as http:
            for i in range(count):
                body = {"model": "mochi-demo", "prompt": PROMPT, "size": f"{SIZE}x{SIZE}", "num_frames": FRAMES}
                body |= {"seed": i % SEEDS, "num_inference_steps": STEPS, "crf": LOSSLESS}
                while True:
                    with suppress(httpx.HTTPError):
                        answer = http.post("/v1/videos", json=body)
                        if answer.status_code == 200:
                            break
                        assert answer.status_code in (429, 503), answer.text
                    time.sleep(0.3)
                self.jobs[answer.json()["id"]] = i % SEEDS

    def look(self, http: httpx.Client) -> None:
        """Which jobs have ended; they are made in their order."""
        with suppress(httpx.HTTPError, KeyError, ValueError):
            for job in [job for job in list(self.jobs) if job not in self.ended]:
                if http.get(f"/v1/videos/{job}").json()["status"] not in ("completed", "failed"):
                    return
                self.ended.add(job)

    def watch(self, jobs: int, faults: int) -> None:
        """Until all jobs have ended, with faults spread over them."""
        due = sorted(self.chance.uniform(0.2, jobs - 0.5) for _ in range(faults))
        kinds = [self.kinds[i % len(self.kinds)] for i in range(faults)]
        self.chance.shuffle(kinds)
        seen, changed = 0, time.monotonic()
        with httpx.Client(base_url=self.server.url, timeout=30) as http:
            while seen < jobs:
                time.sleep(self.chance.uniform(0.05, 0.5))
                self.look(http)
                if len(self.ended) > seen:
                    seen, changed = len(self.ended), time.monotonic()
                assert time.monotonic() - changed < LONGEST_SECONDS, self._stuck(http)
                if due and seen >= due[0] - 1:
                    due.pop(0)
                    self.fault(kinds.pop())

    def _stuck(self, http: httpx.Client) -> str:
        job = next(job for job in self.jobs if job not in self.ended)
        lines = [line for line in self.server.said.splitlines() if '"method": "GET"' not in line]
        told = [http.get(path).text for path in (f"/v1/videos/{job}", "/health")]
        return "\n".join(["no job ends any more", *told, *lines[-20:], *map(str, self.done.items())])

    def fault(self, kind: str) -> None:
        print(f"{len(self.ended)} jobs made: {kind}", flush=True)
        self.done[kind] += 1
        {
            "kill server": self.kill_server,
            "kill rank": lambda: self.signal_rank(signal.SIGKILL),
            "stop rank": lambda: self.signal_rank(signal.SIGSTOP),
            "lock database": self.lock_database,
            "leave upload": self.leave_upload,
            "fill disk": self.fill_disk,
        }[kind]()

    def kill_server(self) -> None:
        self.server.end(signal.SIGKILL)
        self._held.__exit__(None, None, None)
        self._held = served(self.data, command=self._command())
        self.server = self._held.__enter__()

    def ranks(self) -> list[psutil.Process]:
        found = []
        with suppress(psutil.Error):
            for process in psutil.Process(self.server.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if "LOCAL_RANK" in process.environ():
                        found.append(process)
        return found

    def signal_rank(self, number: signal.Signals) -> None:
        with suppress(psutil.Error, IndexError):
            self.chance.choice(self.ranks()).send_signal(number)

    def lock_database(self) -> None:
        other = sqlite3.connect(self.data / "jobs.sqlite3", timeout=30, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        time.sleep(HELD_SECONDS)
        other.close()

    def leave_upload(self) -> None:
        head = f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Length: 1000000\r\n"
        kind = "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        part = '--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a.png"\r\n\r\n'
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as other:
            other.sendall((head + kind + part).encode() + bytes(100_000))

    def fill_disk(self) -> None:
        path = self.data.parent / "filling"
        with suppress(OSError), path.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(HELD_SECONDS)
        path.unlink()

    def wrong(self, references: dict[int, np.ndarray]) -> list[str]:
        """What is not as it should be, once all is done. A level that rounding moves may be three in a video."""
        found = []
        with httpx.Client(base_url=self.server.url, timeout=60) as http:
            for job, seed in self.jobs.items():
                told = http.get(f"/v1/videos/{job}").json()
                if told["status"] != "completed":
                    found.append(f"{job}: {told['status']} {told['error']}")
                    continue
                (self.folder / "video.mp4").write_bytes(http.get(f"/v1/videos/{job}/content").content)
                made = read_video(self.folder / "video.mp4")[0].astype(int)
                if made.shape != references[seed].shape or np.abs(made - references[seed]).max() > 3:
                    found.append(f"{job} is not what seed {seed} makes")
        return found

    def left(self) -> list[str]:
        """What the server leaves when it has ended: nothing but its database, its lock and its videos."""
        processes = self.ranks()
        status = self.server.end()
        self._held.__exit__(None, None, None)
        found = [f"the server ended with status {status}"] if status else []
        found += [f"process {one.pid} runs on" for one in psutil.wait_procs(processes, timeout=10)[1]]
        kept = {"jobs", "server.lock", "jobs.sqlite3"}
        found += [f"left: {path.name}" for path in self.data.iterdir() if path.name not in kept]
        for path in self.data.glob("jobs/*/*"):
            if path.name not in ("video.mp4", "video.json"):
                found.append(f"left: {path.relative_to(self.data)}")
        return found


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """A small one at `folder`/disk, where it can be mounted."""
    place = folder / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "xdit-soak", str(place)], check=True)
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def references(folder: Path) -> dict[int, np.ndarray]:
    """The coded video of each seed, made by this process alone."""
    found = {}
    size = ("--width", SIZE, "--height", SIZE, "--num-frames", FRAMES, "--num-steps", STEPS)
    for seed in range(SEEDS):
        given = ("--demo", "--device", "cpu", "--gpus", 1, "--dtype", "fp32", "--prompt", PROMPT, "--seed", seed)
        request = read(FORK, *given, *size, "--output", folder / "x.mp4")
        request = replace(request, source=replace(request.source, model_dir=FORK.demo_folder()))
        (frames,) = frames_of(FORK, request)
        write_frames(folder / "x.mp4", frames, request.videos[0].fps, crf=LOSSLESS)
        found[seed] = read_video(folder / "x.mp4")[0].astype(int)
        (folder / "x.mp4").unlink()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name, disk(folder := Path(name)):
        expected = references(folder)
        run = Run(folder, random.Random(given.seed))
        began = time.monotonic()
        asking = threading.Thread(target=run.ask, args=(given.jobs,))
        asking.start()
        try:
            run.watch(given.jobs, given.faults)
            asking.join()
            wrong = run.wrong(expected)
        finally:
            wrong_left = run.left()
        said = ", ".join(f"{kind} {count}" for kind, count in sorted(run.done.items()))
        print(f"{len(run.jobs)} jobs, {sum(run.done.values())} faults ({said}) in {time.monotonic() - began:.0f} s")
        for line in wrong + wrong_left:
            print(line)
    return bool(wrong or wrong_left)


if __name__ == "__main__":
    sys.exit(main())
