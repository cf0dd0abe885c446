"""What the server costs beside the command line with models loaded, and how soon a cancelled job's place is taken.

    python benchmarks/serving.py --jobs 6 --rounds 3

A demo checkpoint on CPU ranks. Sides take turns: the program with a prompt file, the server, and the server without
previews. Each makes one video more than is timed, since the first one loads the models; the others' seconds are those
between two outputs' last writes, which leave out every start. Then a long job is cancelled while another one waits, and
the time from the request to the waiting job's first step is printed beside that of one step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx

from benchmarks import door
from common.run.children import free_port
from xdit_serve.offers import Offer, demos

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "A red ball moves to the right."
SIDES = ("program", "server", "server, no previews")
LONG_STEPS = 1000
CANCEL_AT = 5
SECONDS = 600.0


def parse() -> argparse.Namespace:
    names = [offer.name for offer in demos()]
    parser = door.Parser(__doc__)
    parser.add_argument("--model", choices=names, default=names[0])
    parser.add_argument("--gpus", type=door.whole(64), default=2, help="CPU ranks")
    parser.add_argument("--jobs", type=door.whole(10**4), default=6, help="videos of each side in each round")
    parser.add_argument("--num-steps", type=door.whole(10**4), default=40)
    parser.add_argument("--width", type=door.whole(10**4), default=128, help="pixels")
    parser.add_argument("--height", type=door.whole(10**4), default=128, help="pixels")
    parser.add_argument("--rounds", type=door.whole(10**4), default=3)
    parser.add_argument("--cancels", type=door.whole(10**4), default=5)
    parser.add_argument("--output", type=door.new_file, help="also write the figures here, as JSON")
    return parser.parse_args()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def between(outputs: Sequence[Path]) -> list[float]:
    """Seconds between the last writes of outputs that were made one after another."""
    written = [path.stat().st_mtime for path in outputs]
    return [after - before for before, after in pairwise(written)]


def by_program(offer: Offer, given: argparse.Namespace, folder: Path) -> list[float]:
    """Seconds of each video but the first, made by the program."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        prompts = Path(made, "prompts.txt")
        prompts.write_text(f"{PROMPT}\n" * (given.jobs + 1))
        words = [*offer.weights, "--device=cpu", f"--gpus={given.gpus}", "--seed=0", f"--num-steps={given.num_steps}"]
        words += [f"--width={given.width}", f"--height={given.height}"]
        words += ["--keep-loaded", f"--prompt-file={prompts}", f"--output={made}/v.mp4"]
        command = [sys.executable, "-m", offer.fork.package, *words]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, check=True, env=environment(), **quiet)
        outputs = sorted(Path(made).glob("*.mp4"), key=lambda path: path.stat().st_mtime)
        assert len(outputs) == given.jobs + 1
        return between(outputs)


class Server:
    """The server over the demos, as one client sees it. data: its folder."""

    def __init__(self, offer: Offer, url: str, data: Path, given: argparse.Namespace) -> None:
        self.offer, self.data, self.steps = offer, data, given.num_steps
        self.size = f"{given.width}x{given.height}"
        self.http = httpx.Client(base_url=url, timeout=SECONDS)

    def queue(self, steps: int, previews: bool = True) -> str:
        """A job of so many steps; its name."""
        body = {"model": self.offer.name, "prompt": PROMPT, "seed": 0, "size": self.size, "num_inference_steps": steps}
        answer = self.http.post("/v1/videos", json=body | {"previews": previews}).raise_for_status()
        return str(answer.json()["id"])

    def events(self, job: str) -> Iterator[dict[str, Any]]:
        """What the server says of a job until it ends."""
        with self.http.stream("GET", f"/v1/videos/{job}/events") as answer:
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    def make(self, jobs: int, previews: bool) -> list[float]:
        """Seconds of each video but the first."""
        names = [self.queue(self.steps, previews) for _ in range(jobs + 1)]
        *_, last = self.events(names[-1])
        assert last["status"] == "completed", last
        return between([next(self.data.glob(f"jobs/{name}/*.mp4")) for name in names])

    def cancel(self) -> tuple[float, float]:
        """Seconds from a cancellation to the next job's first step, and of one step of the cancelled job."""
        first, second = self.queue(LONG_STEPS), self.queue(self.steps)
        seen: list[tuple[int, float]] = []
        for told in self.events(first):
            if told.get("stage") == "sampling" and told["step"]:
                seen.append((told["step"], time.perf_counter()))
                if told["step"] > CANCEL_AT and told["step"] > seen[0][0]:
                    break
        asked = time.perf_counter()
        self.http.delete(f"/v1/videos/{first}").raise_for_status()
        for told in self.events(second):
            if told.get("stage") == "sampling" and told["step"]:
                break
        taken = time.perf_counter() - asked
        for _ in self.events(second):
            pass
        (step, then), (later, now) = seen[0], seen[-1]
        return taken, (now - then) / (later - step)


@contextmanager
def serving(offer: Offer, given: argparse.Namespace, folder: Path) -> Iterator[Server]:
    data, port = folder / "data", free_port()
    words = ["--demo", "--device=cpu", f"--gpus={given.gpus}", f"--data-dir={data}", f"--port={port}", "--no-page"]
    command = [sys.executable, "-m", "xdit_serve", *words]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            said = process.stdout.readline().split()
            assert said, (folder / "server.log").read_text()
            yield Server(offer, said[-1], data, given)
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    given = parse()
    offer = next(offer for offer in demos() if offer.name == given.model)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for _ in range(given.rounds):
            seconds["program"] += by_program(offer, given, folder)
            # A server that waits takes no time of the program, but memory: a new one in each round.
            with tempfile.TemporaryDirectory(dir=folder) as own, serving(offer, given, Path(own)) as server:
                seconds["server"] += server.make(given.jobs, True)
                seconds["server, no previews"] += server.make(given.jobs, False)
        base = statistics.median(seconds["program"])
        for side, times in seconds.items():
            median = statistics.median(times)
            print(f"{side:20s} {median:7.3f} s a video, {median / base:.3f} of the program's", flush=True)
        with serving(offer, given, folder) as server:
            server.make(1, True)
            cancels = [server.cancel() for _ in range(given.cancels)]
    taken, step = (statistics.median(one) for one in zip(*cancels))
    most = max(one for one, _ in cancels)
    print(f"cancel to the next job's first step: median {taken:.3f} s, most {most:.3f} s; a step takes {step:.3f} s")
    if given.output is not None:
        given.output.write_text(json.dumps({"seconds": seconds, "cancels": cancels}, indent=1) + "\n")


if __name__ == "__main__":
    main()
