"""Faults at random moments of many jobs on several worker groups: every video must be its seed's, and nothing left.

    python -m tests.soak.groups --jobs 100 --faults 50 --seed 1

A rank is killed or stopped, or a job is cancelled, at a moment of its sampling; the faults are spread over the jobs. A
job meets another one only after it went on from the last: three losses at one step would end it, as they should. Prints
a line for each fault and for each thing that is wrong, and figures at the end; exit status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from common.workers.group import Cancelled, Event, Failed, Finished, Job, Lost, Note, Progress
from common.workers.local import LocalGroup
from common.workers.replicas import Replicas
from mochi_xdit.fork import FORK
from tests.helpers.workers import SMALL, alone, job, levels_apart

SEEDS = 4
STEPS = 30
TIMEOUT = 30.0
"""Seconds until a stopped rank is noticed."""
FAULTS = ("kill", "stop", "cancel")


@dataclass
class Soak:
    """One run of it. Called by the replicas' threads and by the one that makes the faults."""

    folder: Path
    jobs: int
    chance: random.Random
    lock: threading.Lock = field(default_factory=threading.Lock)
    taken: dict[str, Job] = field(default_factory=dict)
    ended: dict[str, Event] = field(default_factory=dict)
    steps: Counter[str] = field(default_factory=Counter)
    cancelled: set[str] = field(default_factory=set)
    restarts: int = 0
    met: dict[str, int] = field(default_factory=dict)
    """The step at which a job met its last fault."""

    def __post_init__(self) -> None:
        self.waiting = deque(range(self.jobs))

    def make(self, number: int, ranks: int = 2) -> Job:
        prompt, seed = ("a red ball", "a blue box")[number % 2], number % SEEDS
        options = ("--dtype", "fp32", "--prompt", prompt, "--seed", seed, "--num-steps", STEPS, "--timeout", TIMEOUT)
        return job(self.folder, FORK, f"job{number}", *SMALL, *options, ranks=ranks)

    def take(self, timeout: float) -> Job | None:
        with self.lock:
            if not self.waiting:
                return None
            made = self.make(self.waiting.popleft())
            self.taken[made.id] = made
            return made

    def hear(self, replica: int, event: Event) -> None:
        with self.lock:
            if isinstance(event, Progress) and event.stage == "sampling":
                self.steps[event.job] = event.step
            elif isinstance(event, Note) and event.warning:
                self.restarts += 1
            elif isinstance(event, (Finished, Cancelled, Failed, Lost)) and event.job is not None:
                if event.job in self.ended:
                    print(f"wrong: {event.job} ended twice: {self.ended[event.job]}, {event}", flush=True)
                self.ended[event.job] = event

    def fault(self, replicas: Replicas) -> str | None:
        """One more; None where nothing runs that one could be done to."""
        kind = self.chance.choice(FAULTS)
        with self.lock:
            went_on = {name for name, step in self.steps.items() if step > self.met.get(name, 0)}
            ripe = went_on - self.ended.keys() - self.cancelled
        groups = [one for one in replicas.health() if one.state == "busy" and one.job in ripe]
        if not groups:
            return None
        group = self.chance.choice(groups)
        assert group.job is not None
        self.met[group.job] = self.steps[group.job]
        if kind == "cancel":
            with self.lock:
                self.cancelled.add(group.job)
            replicas.cancel(group.job)
            return f"cancelled {group.job}"
        pid = self.chance.choice(group.ranks).pid
        try:
            os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        except ProcessLookupError:
            return None
        return f"{kind} of process {pid} under {group.job} at step {self.steps[group.job or '']}"


def references(soak: Soak) -> dict[int, object]:
    return {number: alone(FORK, soak.make(number).request) for number in range(min(SEEDS, soak.jobs))}


def wrong(soak: Soak, expected: dict[int, object], before: set[int]) -> list[str]:
    """What is not as it should be after the last job."""
    found = []
    for name, made in soak.taken.items():
        end, number = soak.ended.get(name), int(name.removeprefix("job"))
        if isinstance(end, Cancelled) and name in soak.cancelled:
            continue
        if not isinstance(end, Finished):
            found.append(f"{name}: {end}")
        elif (apart := levels_apart(made, expected[number % SEEDS])) > 1:  # type: ignore[arg-type]
            found.append(f"{name}: {apart} grey levels from its seed's video")
    if len(soak.ended) != soak.jobs:
        found.append(f"{len(soak.ended)} of {soak.jobs} jobs ended")
    finished = {name for name, end in soak.ended.items() if isinstance(end, Finished)}
    whole = {f"{name}.{kind}" for name in finished for kind in ("npy", "json")}
    if left := sorted(set(os.listdir(soak.folder)) - whole):
        found.append(f"files left: {left}")
    children = {child.pid for child in psutil.Process().children(recursive=True)} - before
    return [*found, f"processes left: {sorted(children)}"] if children else found


def run(folder: Path, jobs: int, faults: int, seed: int, groups: int = 2, ranks: int = 2) -> tuple[list[str], str]:
    """What was wrong, and a line of figures."""
    soak = Soak(folder, jobs, random.Random(seed))
    expected = references(soak)
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def make(devices) -> LocalGroup:
        return LocalGroup(devices, on_cpu=True, timeout=TIMEOUT, share=groups)

    devices = [range(i * ranks, (i + 1) * ranks) for i in range(groups)]
    replicas = Replicas(make, devices, soak.take, soak.hear)
    began, done = time.monotonic(), 0
    replicas.start()
    finishing = threading.Thread(target=replicas.finish)
    finishing.start()
    while finishing.is_alive() and done < faults:
        time.sleep(soak.chance.uniform(0.05, 0.5))
        if len(soak.ended) * faults >= (done - 1) * jobs and (said := soak.fault(replicas)) is not None:
            done += 1
            print(said, flush=True)
    finishing.join()
    left_out = sum(len(one.more["left_out"]) for one in replicas.health())
    replicas.stop(10)
    ends = Counter(type(end).__name__ for end in soak.ended.values())
    memory = psutil.Process().memory_info().rss / 2**20
    figures = f"{done} faults, {dict(ends)}, {soak.restarts} restarts, {left_out} devices left out at the end"
    return wrong(soak, expected, before), f"{figures}, {time.monotonic() - began:.0f} s, {memory:.0f} MiB here"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--faults", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problems, figures = run(Path(folder), given.jobs, given.faults, given.seed)
    for problem in problems:
        print(f"wrong: {problem}")
    print(figures)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
