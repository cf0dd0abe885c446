"""A server under many clients: jobs queued at once, all made, in order for each client; memory flat, answers quick.

    python -m tests.soak.serving --jobs 500 --clients 20                     # over a group without ranks
    python -m tests.soak.serving --jobs 40 --clients 8 --demo                # Mochi's demo on two CPU ranks
    python -m tests.soak.serving --jobs 100 --kills 15                       # and the server killed now and then

Prints the resident memory at a tenth of the jobs and at the end, and how long GET took while jobs ran; exit status 1 if
a job was lost, made out of order or otherwise than its seed says.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil

from tests.helpers.fake_group import content
from tests.helpers.fake_server import Served, served

PORT = 20_000
DEMO = ("--demo", "--gpus", "2", "--device", "cpu", "--save-every", "2")


class Soak:
    """One soak: clients queue, the server is watched and perhaps killed, what came out is compared."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.folder, self.given = folder, given
        self.made: list[list[str]] = [[] for _ in range(given.clients)]
        self.seeds: dict[str, int] = {}
        self.seconds: list[float] = []
        self.memory: dict[int, int] = {}
        self._held = ExitStack()
        self._port = random.SystemRandom().randrange(PORT, PORT + 9000)
        self.server = self.start()

    def start(self) -> Served:
        data = self.folder / "data"
        if self.given.demo:
            command = [sys.executable, "-m", "xdit_serve", *DEMO, "--data-dir", str(data), "--port", str(self._port)]
            return self._held.enter_context(served(data, command=command))
        steps = ("--step-seconds", str(self.given.step_seconds), "--port", str(self._port))
        return self._held.enter_context(served(data, *steps))

    def queue(self, client: int) -> None:
        """One client's jobs, one after another; a server that is away is waited for."""
        count = self.given.jobs // self.given.clients
        with httpx.Client(base_url=self.server.url, timeout=30) as http:
            for i in range(count):
                seed = 1000 * client + i
                body = {"prompt": "a ball", "model": "mochi-demo", "seed": seed, "num_inference_steps": 4}
                while True:
                    try:
                        answer = http.post("/v1/videos", json=body)
                    except httpx.HTTPError:
                        time.sleep(0.2)
                        continue
                    if answer.status_code == 200:
                        break
                    time.sleep(0.5)
                job = answer.json()["id"]
                self.made[client].append(job)
                self.seeds[job] = seed

    def watch(self) -> None:
        """Until all jobs have ended: ask, take times, note memory, kill."""
        kills = sorted(random.random() for _ in range(self.given.kills))
        with httpx.Client(base_url=self.server.url, timeout=30) as http:
            while True:
                done = self._done(http)
                if done is None:
                    time.sleep(0.2)
                    continue
                self.memory.setdefault(done, psutil.Process(self.server.process.pid).memory_info().rss)
                if done >= self.given.jobs // self.given.clients * self.given.clients:
                    return
                if kills and done >= kills[0] * self.given.jobs:
                    kills.pop(0)
                    self.server.end(signal.SIGKILL)
                    self.server = self.start()
                time.sleep(0.05)

    def _done(self, http: httpx.Client) -> int | None:
        try:
            known = [jobs[-1] for jobs in self.made if jobs]
            if known:
                began = time.perf_counter()
                http.get(f"/v1/videos/{random.choice(known)}").raise_for_status()
                self.seconds.append(time.perf_counter() - began)
            text = http.get("/metrics").text
        except httpx.HTTPError:
            return None
        ended = [
            line.split()[-1]
            for line in text.splitlines()
            if line.startswith(('xdit_jobs{status="c', 'xdit_jobs{status="f'))
        ]
        return int(sum(map(float, ended)))

    def wrong(self) -> list[str]:
        """What is not as it should be, once all is done."""
        found = []
        with httpx.Client(base_url=self.server.url, timeout=60) as http:
            for jobs in self.made:
                told = [http.get(f"/v1/videos/{job}").json() for job in jobs]
                found += [
                    f"{one['id']}: {one['status']} {one['error']}" for one in told if one["status"] != "completed"
                ]
                ends = [one["completed_at"] or 0 for one in told]
                if ends != sorted(ends):
                    found.append("a client's jobs were not made in their order")
                for job in jobs if not self.given.demo else ():
                    if http.get(f"/v1/videos/{job}/content").content != content("a ball", self.seeds[job]):
                        found.append(f"{job} is not what its seed makes")
        left = [
            str(path)
            for path in (self.folder / "data" / "jobs").glob("*/*")
            if path.name.startswith(".") or "state" in path.name
        ]
        return found + [f"left behind: {path}" for path in left]

    def close(self) -> None:
        self._held.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--step-seconds", type=float, default=0.01)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--demo", action="store_true")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), given)
        try:
            began = time.monotonic()
            clients = [threading.Thread(target=soak.queue, args=(i,)) for i in range(given.clients)]
            for thread in clients:
                thread.start()
            soak.watch()
            for thread in clients:
                thread.join()
            seconds = time.monotonic() - began
            wrong = soak.wrong()
        finally:
            soak.close()
    times = sorted(soak.seconds)
    early = min(soak.memory, key=lambda done: abs(done - given.jobs // 10))
    late = max(soak.memory)
    print(f"{len(soak.seeds)} jobs by {given.clients} clients in {seconds:.0f} s, {len(wrong)} wrong")
    first, last = (f"{soak.memory[done] / 2**20:.0f} MiB after {done} jobs" for done in (early, late))
    print(f"resident memory {first}, {last}")
    p50, p95 = (f"{times[len(times) * part // 100] * 1e3:.1f} ms" for part in (50, 95))
    print(f"GET of a job, asked {len(times)} times: p50 {p50}, p95 {p95}")
    for line in wrong:
        print(line)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
