"""Where a run is: one `Report` per rank, handed to the pipeline, feeds the screen, the launcher and the json.

A pipeline says only this:

    with report.stage("loading transformer"):
        ...
    with report.stage("sampling", total=num_steps) as step:      # where == "sampling step 1/64", then 2/64, ...
        for ...:
            ...
            step()                                               # one more is done
    with report.stage("decoding", total=chunks, unit="chunk") as step: ...
    with report.loading("loading transformer") as progress:      # progress(bytes done, bytes in all), see weights.load
        load(..., progress=progress)
    report.note("prompt: 31 of 256 tokens")                      # rank 0 only; warn() the same, marked as a warning

`Report()` is silent and still measures, so it is the right default for library use. Stages may nest.
Names in use: "loading text encoder", "encoding", "loading transformer", "sampling", "loading decoder", "decoding",
"writing". Failures are told with them: "rank 1, sampling step 3/64: ...".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

BYTE = "byte"
STEP = "step"
"""The unit of a stage whose steps all ranks take together."""
PLAIN_LINE_SECONDS = 10.0  # without a terminal, a running stage prints at most this often


@dataclass(frozen=True)
class StageRecord:
    """What one finished stage cost. `peak_bytes`: device memory on a GPU, resident memory of the process on a CPU."""

    name: str
    seconds: float
    peak_bytes: int
    steps: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


class _Active:
    def __init__(self, name: str, total: int | None, unit: str, quiet: bool, done: int = 0) -> None:
        self.name, self.total, self.unit, self.quiet = name, total, unit, quiet
        self.done = self.before = done
        self.started = time.perf_counter()
        self.first_done = 0.0
        self.last_line = self.started
        self.peak_bytes = 0
        self.task: TaskID | None = None

    @property
    def where(self) -> str:
        if self.total is None:
            return self.name
        if self.unit == BYTE:
            return f"{self.name}, {100 * self.done // max(self.total, 1)} %"
        return f"{self.name} {self.unit} {min(self.done + 1, self.total)}/{self.total}"

    @property
    def pace(self) -> float | None:
        """Seconds per step. The first one, which warms up kernels and allocators, counts only while it is alone."""
        now = time.perf_counter()
        own = self.done - self.before
        if own > 1:
            return (now - self.first_done) / (own - 1)
        return now - self.started if own == 1 else None

    @property
    def speed(self) -> str:
        pace = self.pace
        if self.unit == BYTE and self.total is not None:
            rate = self.done / (time.perf_counter() - self.started)
            return f"{self.done / 2**30:.1f} of {self.total / 2**30:.1f} GiB, {rate / 2**30:.2f} GiB/s"
        if pace is None or self.total is None:
            return ""
        remaining = pace * (self.total - self.done)
        return f"{self.done}/{self.total}, {pace:.2f} s/{self.unit}, {_clock(remaining)} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("speed", ""))


class Report:
    """One rank's account of where it is.

    console: where rank 0 shows progress; None shows nothing.
    tell: called with `where` at every change; the launcher passes a pipe to the parent.
    device: a `torch.device`; a CUDA device is synchronised at the ends of stages and at steps, so that times and
        bars count finished work, and its peak memory is what is recorded.
    """

    def __init__(
        self, console: Console | None = None, tell: Callable[[str], None] | None = None, device: Any = None
    ) -> None:
        self.console = console
        self.records: list[StageRecord] = []
        self.about = ""  # what the stages are about, such as "video 2 of 3"; goes in front of `where`
        self._report = tell
        self._stack: list[_Active] = []
        self._last = "starting"
        self._failed: str | None = None
        self._warned: set[str] = set()
        self._progress: Progress | None = None
        self.device = device
        self.pause: Callable[[], None] = lambda: None
        """Called where all ranks of a run are together: when a stage that counts begins, after each of its steps where
        they are taken together, and between chunks of a decode. It may raise `common.system.stopping.Abandoned`, in all
        of them alike."""

    @property
    def where(self) -> str:
        """The innermost running stage, or the one that ran last; after a failure, where it failed."""
        if self._failed is not None:
            return self._failed
        where = self._stack[-1].where if self._stack else self._last
        return f"{self.about}, {where}" if self.about else where

    @property
    def standing(self) -> tuple[str, str, int, int] | None:
        """The innermost running stage: its name, the unit that it counts, how many are done, of how many (0: none)."""
        if not self._stack:
            return None
        active = self._stack[-1]
        return active.name, active.unit, active.done, active.total or 0

    @property
    def _on_gpu(self) -> bool:
        return getattr(self.device, "type", None) == "cuda"

    @contextmanager
    def stage(
        self, name: str, total: int | None = None, unit: str = STEP, quiet: bool = False, done: int = 0
    ) -> Iterator[Callable[..., None]]:
        """Run a stage; yields `step(count=1)`, to be called as units get done when `total` is given.

        done: units that another run has done already. quiet: not shown and not kept in `records`; where the run is, is
        told all the same.
        """
        self._failed = None
        self._fold_peak()
        active = _Active(name, total, unit, quiet, done)
        self._stack.append(active)
        self._tell(self.where)
        self._open(active)

        def step(count: int = 1) -> None:
            self._step(active, count)

        try:
            if total is not None:
                self.pause()
            yield step
            self._synchronize()
        except BaseException:
            self._failed = self.where  # the innermost; whoever prints it does so outside of every stage
            self._close(active, failed=True)
            self._stack.pop()
            raise
        self._fold_peak()
        self._close(active, failed=False)
        self._stack.pop()
        self._last = self._stack[-1].where if self._stack else f"after {name}"
        self._tell(self.where)

    @contextmanager
    def loading(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A stage that counts bytes: yields `progress(done, total)`, which `common.weights.load.load` can call."""
        with self.stage(name, unit=BYTE) as step:
            active = self._stack[-1]

            def progress(done: int, total: int) -> None:
                active.total = total
                step(done - active.done)

            yield progress

    def note(self, text: str) -> None:
        """A line for the user; rank 0 only."""
        self._say(text, warning=False)

    def warn(self, text: str) -> None:
        """A line for the user that begins with "warning:"; rank 0 only, and once: some are told before the work and
        found again where they come true."""
        if text not in self._warned:
            self._warned.add(text)
            self._say(text, warning=True)

    def _say(self, text: str, warning: bool) -> None:
        """A screen that has gone, or a log file on a full disk, stops nothing: the line is dropped."""
        if self.console is not None:
            markup = "[yellow]warning:[/yellow] " * warning + escape(text)
            with suppress(OSError):
                self.console.print(markup, highlight=False, soft_wrap=True)

    def _tell(self, where: str) -> None:
        if self._report is not None:
            self._report(where)

    def _synchronize(self) -> None:
        if self._on_gpu:
            import torch

            torch.cuda.synchronize(self.device)

    def _fold_peak(self) -> None:
        """Close one span of memory measurement: its peak belongs to every stage that is running."""
        peak = self._peak_since_last()
        for active in self._stack:
            active.peak_bytes = max(active.peak_bytes, peak)

    def _peak_since_last(self) -> int:
        if self._on_gpu:
            import torch

            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        return _peak_resident_bytes()

    def _step(self, active: _Active, count: int) -> None:
        counted = active.unit != BYTE  # bytes come in thousands of small pieces: nothing waits for each of them
        if counted:
            self._synchronize()
        now = time.perf_counter()
        before = active.where
        if active.done == active.before:
            active.first_done = now
        active.done += count
        if active.where != before:
            self._tell(self.where)
        if self._progress is not None and active.task is not None:
            completed, total = active.done, active.total
            self._progress.update(active.task, completed=completed, total=total, refresh=counted, speed=active.speed)
        elif self.console is not None and active.total and now - active.last_line >= PLAIN_LINE_SECONDS:
            active.last_line = now
            self.note(f"{active.name} {active.speed}")
        if active.unit == STEP:
            self.pause()

    def _open(self, active: _Active) -> None:
        if self.console is None or active.quiet:
            return
        if not self.console.is_terminal:
            self.note(f"{active.name} ...")
            return
        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), _Speed())
            self._progress = Progress(*columns, console=self.console, transient=True, refresh_per_second=4)
            self._progress.start()
        active.task = self._progress.add_task(active.name, total=active.total, completed=active.done, speed="")

    def _close(self, active: _Active, failed: bool) -> None:
        seconds = time.perf_counter() - active.started
        if self._progress is not None and active.task is not None:
            self._progress.remove_task(active.task)
            if len(self._stack) == 1:
                self._progress.stop()
                self._progress = None
        if failed or active.quiet:
            return
        counted = active.total is not None and active.unit != BYTE
        steps = active.done - active.before if counted else None
        self.records.append(StageRecord(active.name, seconds, active.peak_bytes, steps))
        pace = f" ({active.pace:.2f} s/{active.unit})" if counted and active.pace else ""
        self.note(f"{active.name}: {seconds:.1f} s{pace}, peak {active.peak_bytes / 2**30:.2f} GiB")


def _peak_resident_bytes() -> int:
    """Peak resident memory since the last call where Linux lets it be reset, else since the process began."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the present size
    return int(peak.split()[1]) * 1024 if peak else 0
