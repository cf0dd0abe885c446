"""Signals at random moments of Mochi's demo, on one rank and on three: what is left behind, and how it ended.

    python -m tests.soak.signals --moments 200 --seed 1

Prints one line for each moment with something wrong, then how many ended in which way; exit status 1 if any was wrong.
`tests/test_signals.py` tries a few of these moments.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from mochi_xdit.fork import FORK
from tests.helpers import programs

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
SMALL = ("--width", "32", "--height", "32", "--num-frames", "13", "--num-steps", "2", "--seed", "3", "--device", "cpu")
MARK = "XDIT_SOAK"
GRACE_SECONDS = 10.0
LONGEST_SECONDS = 180.0


@dataclass(frozen=True)
class Moment:
    """A signal, the seconds after the start at which it is sent, and the number of ranks."""

    number: signal.Signals
    seconds: float
    ranks: int


def draw(seed: int, longest: dict[int, float]) -> Moment:
    """The moment of a seed. longest: how many seconds a whole run takes, for each number of ranks."""
    chance = random.Random(seed)
    ranks = chance.choice(sorted(longest))
    return Moment(chance.choice(SIGNALS), chance.uniform(0, longest[ranks]), ranks)


def start(folder: Path, ranks: int, mark: str) -> subprocess.Popen[str]:
    """The demo, whose processes all carry `mark` in their environment and keep temporary files in `folder`/tmp."""
    (folder / "tmp").mkdir()
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp"), MARK: mark}
    command = [sys.executable, "-m", "mochi_xdit", "--demo", *SMALL, "--gpus", str(ranks)]
    return subprocess.Popen(
        [*command, "--output", str(folder / "v.mp4")],
        env=settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def whole_run(folder: Path, ranks: int) -> float:
    """Seconds of a run that nobody stops."""
    began = time.monotonic()
    process = start(folder, ranks, str(folder))
    _, told = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 0, told
    return time.monotonic() - began


def try_moment(moment: Moment, folder: Path) -> tuple[int, list[str]]:
    """Exit status of the run that got the signal, and what was wrong with how it ended or with what it left."""
    shared = set(os.listdir("/dev/shm"))
    process = start(folder, moment.ranks, str(folder))
    try:
        time.sleep(moment.seconds)
        process.send_signal(moment.number)
        _, told = process.communicate(timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1, ["did not end"]
    problems = _ending(moment, process.returncode, told)
    if left := _eventually_none(lambda: _processes(str(folder))):
        problems.append(f"processes left: {left}")
    if left := _eventually_none(lambda: _mine(set(os.listdir("/dev/shm")) - shared)):
        problems.append(f"shared memory left: {left}")
    return process.returncode, problems + _files(folder, process.returncode)


def _ending(moment: Moment, status: int, told: str) -> list[str]:
    """Python ignores SIGPIPE. A signal in Python's own first milliseconds kills it as it does any program."""
    allowed = (0, -moment.number) if moment.number == signal.SIGPIPE else (0, 128 + moment.number, -moment.number)
    problems = [] if status in allowed else [f"exit status {status}"]
    if status != -moment.number and ("Traceback" in told or "error:" in told):
        problems.append(f"told {told[-400:]!r}")
    return problems


def _files(folder: Path, status: int) -> list[str]:
    names = set(os.listdir(folder)) - {"tmp"}
    whole, latents, state = {"v.mp4", "v.json"}, folder / "v.latents.safetensors", folder / "v.state.safetensors"
    problems = [f"left {name}" for name in sorted(names - whole - {latents.name, state.name})]
    # PyTorch keeps a cache of its own there, after every run.
    temporary = [name for name in os.listdir(folder / "tmp") if not name.startswith("torchinductor_")]
    problems += [f"left in the temporary folder: {name}" for name in temporary]
    if status == 0 and names != whole:
        problems.append(f"ended well with {sorted(names)}")
    if state.exists() and (_again(folder, "v.mp4", *SMALL) != 0 or state.exists()):
        problems.append("what is kept of the sampling is not gone on with")
    decode = ("--device", "cpu", "--from-latents", str(latents))
    if latents.exists() and _again(folder, "again.mp4", *decode) != 0:
        problems.append("the latents that were kept do not decode")
    return problems


def _again(folder: Path, output: str, *arguments: str) -> int:
    return programs.main(FORK, ["--demo", "--gpus", "1", *arguments, "--output", str(folder / output)])


def _processes(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def _mine(names: set[str]) -> list[str]:
    """Those in /dev/shm that no running process maps: other programs of this machine have theirs there, too."""
    found = []
    for name in names:
        maps = subprocess.run(
            ["sh", "-c", f"grep -l /dev/shm/{name} /proc/[0-9]*/maps"], capture_output=True, text=True
        )
        if not maps.stdout and os.path.exists(f"/dev/shm/{name}"):
            found.append(name)
    return found


def _eventually_none(look):
    end = time.monotonic() + GRACE_SECONDS
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    ended: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        longest = {}
        for ranks in (1, 3):
            (Path(folder) / f"whole-{ranks}").mkdir()
            longest[ranks] = whole_run(Path(folder) / f"whole-{ranks}", ranks)
        for seed in range(asked.seed, asked.seed + asked.moments):
            moment, own = draw(seed, longest), Path(folder) / str(seed)
            own.mkdir()
            status, problems = try_moment(moment, own)
            kept = " with latents kept" if (own / "v.latents.safetensors").exists() else ""
            ended[f"{moment.ranks} ranks, {moment.number.name}: status {status}{kept}"] += 1
            for problem in problems:
                wrong += 1
                print(f"seed {seed}, {moment}: {problem}", flush=True)
    for how, count in sorted(ended.items()):
        print(f"{count:5} {how}")
    print(f"{sum(ended.values())} moments, {wrong} wrong; a whole run took {longest} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
