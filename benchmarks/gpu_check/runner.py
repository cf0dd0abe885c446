"""Runs parts one after another, each in a process of its own and within its time; ranks are processes of a part's.

A part is a list of cells, each one result. A result is on disk before the next cell begins, so that a run that was cut
off, by its time or by hand, goes on with the first cell that has none. Nothing that fails in a part stops the others.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.machine import Machine
from common.registry.layout import Layout
from common.run.children import free_port
from common.system import environment
from common.system.files import cache_home
from common.system.host import allocator_default

SECONDS = 480.0
"""Of one part in one go."""
Say = Callable[[str], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    key: str
    measure: Callable[[], Row] | None = None
    """() -> figures, called in the part's process."""
    skip: str = ""
    """Why it cannot run here."""


@dataclass(frozen=True)
class Part:
    """Measurements that share a process."""

    name: str
    title: str
    """For the summary."""
    cells: Callable[[Machine], list[Cell]]
    """(machine) -> what is measured, made in the part's own process."""
    seconds: float = SECONDS


@dataclass
class Kept:
    """The results of one part, in a file of its own: `rows` by cell, and `state`: started, finished, or why not."""

    path: Path
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, part: str) -> Kept:
        path = folder / f"{part}.json"
        data: dict[str, Any] = {"part": part, "state": "", "rows": {}}
        with suppress(OSError, ValueError):  # a file that is not readable is measured again
            data |= json.loads(path.read_text(encoding="utf-8"))
        return cls(path, data)

    @property
    def rows(self) -> dict[str, Row]:
        return self.data["rows"]

    @property
    def finished(self) -> bool:
        return self.data["state"] == "finished"

    def write(self, state: str, **rows: Row) -> None:
        self.data["state"] = state
        self.rows.update(rows)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def run(part: Part, machine: Machine, folder: Path, again: bool, say: Say) -> Kept:
    """The part's results, measured unless they are there. again: from the beginning, and what is there is dropped."""
    kept = Kept.read(folder, part.name)
    if again:
        kept.data["rows"] = {}
    elif kept.finished:
        say(f"{part.name:24} finished before")
        return kept
    started = time.monotonic()
    kept.write("started")
    log = folder / "logs" / f"{part.name}.log"
    log.parent.mkdir(exist_ok=True)
    # In the cache and not in /tmp, which may be memory.
    cache_home().mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=cache_home()))
    arguments = (part, replace(machine, scratch=scratch), folder, log)
    process = machine.processes.Process(target=_part, args=arguments)  # type: ignore[attr-defined]
    process.start()
    try:
        process.join(part.seconds)
    finally:
        late = process.is_alive()
        with suppress(ProcessLookupError):  # it leads a group: what it has started ends with it
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        shutil.rmtree(scratch, ignore_errors=True)
    kept = Kept.read(folder, part.name)
    if not kept.finished:
        _cut_off(kept, late, process.exitcode, part.seconds)
    failed = sum("error" in row for row in kept.rows.values())
    took = f"{time.monotonic() - started:.0f} s, {len(kept.rows)} results" + (f", {failed} failed" if failed else "")
    say(f"{part.name:24} {kept.data['state']} ({took})")
    return kept


def _cut_off(kept: Kept, late: bool, status: int | None, seconds: float) -> None:
    """The cell that had the whole time for itself will not do with it next time either: that is its result."""
    why = f"cut off after {seconds:.0f} s" if late else f"ended with status {status}"
    running, alone = kept.data.pop("running", None), kept.data.pop("first", None)
    rows = {running: {"error": why, "given_up": True}} if running is not None and (running == alone or not late) else {}
    kept.write(f"{why}; the same command goes on from there", **rows)


def _part(part: Part, machine: Machine, folder: Path, log: Path) -> None:
    """The part's own process; what it and its ranks print goes to its log."""
    with suppress(PermissionError):  # already a leader
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with log.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    kept = Kept.read(folder, part.name)
    try:
        cells = part.cells(machine)
    except Exception as error:
        traceback.print_exc()
        kept.write("finished", all=_error(error))
        return
    first = None
    for cell in cells:
        old = kept.rows.get(cell.key)
        if old is not None and ("error" not in old or "given_up" in old):
            continue
        first = first or cell.key
        kept.data |= {"running": cell.key, "first": first}
        kept.write("started")
        kept.write("started", **{cell.key: _row(cell)})
    for name in ("running", "first"):
        kept.data.pop(name, None)
    kept.data |= {"date": datetime.date.today().isoformat()}
    kept.write("finished")


def _row(cell: Cell) -> Row:
    if cell.skip or cell.measure is None:
        return {"skipped": cell.skip}
    started = time.monotonic()
    try:
        row = cell.measure()
    except Exception as error:
        traceback.print_exc()
        row = _error(error)
    return row | {"took_s": round(time.monotonic() - started, 1)}


def _error(error: Exception) -> Row:
    return {"error": f"{type(error).__name__}: {error}"[:600]}


class RankError(RuntimeError):
    """What went wrong on a rank, in one line."""


def on_ranks(
    machine: Machine,
    function: Callable[..., Any],
    *arguments: Any,
    layout: Layout | None = None,
    seconds: float = SECONDS,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """What `function(mesh, *arguments)` returns on rank 0 of new processes in a layout; one rank by default.

    environment: of the ranks, beside what the launcher sets. RankError when a rank fails, ends, or takes longer.
    """
    layout = layout or Layout()
    port, ranks, processes = free_port(), [], []
    for rank in range(layout.ranks):
        mine, theirs = machine.processes.Pipe(duplex=False)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(layout.ranks)}
        place |= {"LOCAL_WORLD_SIZE": str(layout.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        place |= environment or {}
        process = machine.processes.Process(  # type: ignore[attr-defined]
            target=_rank, args=(theirs, place, layout, machine.device, seconds, function, arguments)
        )
        process.start()
        theirs.close()
        processes.append(process)
        ranks.append(mine)
    try:
        return _first(ranks, time.monotonic() + seconds, seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _first(pipes: list[Connection], end: float, seconds: float) -> Any:
    """Rank 0's answer once all ranks have answered; the first error before that."""
    answers: dict[int, Any] = {}
    while len(answers) < len(pipes):
        ready = wait([pipe for i, pipe in enumerate(pipes) if i not in answers], max(0.0, end - time.monotonic()))
        if not ready:
            raise RankError(f"no answer within {seconds:.0f} s")
        for rank in (i for i, pipe in enumerate(pipes) if pipe in ready):
            try:
                ok, answers[rank] = pipes[rank].recv()
            except EOFError:
                raise RankError(f"rank {rank} ended without a word; see the log") from None
            if not ok:
                raise RankError(f"rank {rank}: {answers[rank]}")
    return answers[0]


def _rank(
    pipe: Connection,
    place: dict[str, str],
    layout: Layout,
    device: str,
    seconds: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= allocator_default(os.environ | place) | place  # before CUDA is first used
    import torch

    from common.parallel.mesh import distributed

    if device == "cpu":
        torch.set_num_threads(max(1, environment.cores() // layout.ranks))
    try:
        mesh = distributed(layout, device, timeout=seconds)
        answer = (True, function(mesh, *arguments))
    except BaseException as error:
        traceback.print_exc()
        answer = (False, f"{type(error).__name__}: {error}"[:600])
    # Nothing is torn down: that would wait for the others. The parent ends the process when it has every answer.
    pipe.send(answer if layout.ranks == 1 or place["RANK"] == "0" or not answer[0] else (True, None))
    pipe.close()
    signal.pause()
