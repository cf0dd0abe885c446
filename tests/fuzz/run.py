"""Runs hostile commands, each in a forked process with bounded time and memory, and judges how they ended."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.cases import Case, make

SECONDS = 90  # on a machine that does other things, too; what hangs never ends
ADDRESS_SPACE = 12 << 30
RESIDENT = 3 << 30
STATUSES = (0, 1, 2, 130)
PROGRAMS = ("mochi_xdit.cli", "cogvideox_xdit.cli", "consisid_xdit.cli", "planner.cli")


@dataclass(frozen=True)
class Outcome:
    """How a case ended. problem: what is wrong with that; empty when nothing is."""

    case: Case
    status: int | None  # None: it had to be killed
    seconds: float
    resident: int  # bytes at most
    errors: str
    problem: str


def prepare() -> None:
    """Import once what every forked case would import."""
    for name in (*PROGRAMS, "torch", "transformers.models.t5.modeling_t5", "common.run.dry_run"):
        importlib.import_module(name)
    for name in ("mochi_xdit.pipeline", "cogvideox_xdit.pipeline", "consisid_xdit.pipeline"):
        importlib.import_module(name)
    gc.freeze()  # a case that looks through all that would copy it


def outcomes(area: str, seeds: Iterator[int] | range) -> Iterator[Outcome]:
    """The outcome of each seed's case, one after another."""
    for seed in seeds:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            yield run(make(area, seed, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def run(case: Case) -> Outcome:
    """One case in a process of its own, which is forked from this one."""
    screen, errors = case.folder / ".stdout", case.folder / ".stderr"
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(case, screen, errors)
    status, used = _wait(child, started + SECONDS)
    text = errors.read_text(encoding="utf-8", errors="replace") if errors.exists() else ""
    seconds, resident = time.monotonic() - started, used.ru_maxrss * 1024
    return Outcome(case, status, seconds, resident, text, _problem(case, status, text, resident))


def _become(case: Case, screen: Path, errors: Path) -> None:
    """In the child: take the case's place and environment, run its command, leave with its status."""
    status = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        for number, path in ((1, screen), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (
            os.fdopen(1, "w", closefd=False),
            os.fdopen(2, "w", errors="backslashreplace", closefd=False),
        )
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        os.chdir(case.folder)
        for name, value in case.environment.items():
            os.environb[name.encode()] = value.encode(errors="surrogateescape")
        sys.argv = [case.program, *case.arguments]
        importlib.import_module(case.program).main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _wait(child: int, deadline: float) -> tuple[int | None, resource.struct_rusage]:
    while True:
        ended, code, used = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(code), used
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            return None, os.wait4(child, 0)[2]
        time.sleep(0.01)


def _problem(case: Case, status: int | None, errors: str, resident: int) -> str:
    if status is None:
        return f"no end within {SECONDS} s"
    if "Traceback (most recent call last)" in errors:
        return "a traceback"
    if status not in STATUSES:
        return f"status {status}"
    if resident > RESIDENT:
        return f"{resident / 2**30:.1f} GiB of memory"
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    if status in (1, 2) and not lines:
        return f"status {status} without a line that begins with error:"
    if status == 0 and lines:
        return "an error, but status 0"
    if status and case.culprit and not any(case.culprit in line for line in lines):
        return f"no line names {case.culprit}"
    if any(re.search(r"[\x00-\x08\x0b-\x1f\x7f]", line) for line in lines):
        return "a control character in a message"
    return ""
