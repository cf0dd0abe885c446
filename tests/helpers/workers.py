"""Jobs for worker groups, and what came of them. The ranks are real, the models small."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from common.parallel.mesh import Mesh
from common.registry.forks import Fork
from common.registry.request import Request
from common.system.progress import Report
from common.workers.group import ENDINGS, Event, Job, Progress, WorkerGroup
from tests.helpers.programs import read

SMALL = ("--width", "32", "--height", "32", "--num-frames", "13")
SECONDS = 120.0


def job(folder: Path, fork: Fork, name: str, *arguments: object, ranks: int = 2) -> Job:
    """A video of the fork's demo as numbers, on CPU ranks, with a state beside it that is always fresh."""
    given = ("--demo", "--device", "cpu", "--gpus", ranks, "--seed", "3", "--save-every", "0", "--timeout", "120")
    request = read(fork, *given, "--output", folder / f"{name}.npy", *arguments)
    return Job(name, request, keep_state=folder / f"{name}.state")


def until(group: WorkerGroup, stop: Callable[[Event], bool]) -> list[Event]:
    """What happens until something does."""
    events: list[Event] = []
    end = time.monotonic() + SECONDS
    while not any(map(stop, events)):
        assert time.monotonic() < end, events
        events += group.events(1.0)
    return events


def ended(event: Event) -> bool:
    return isinstance(event, ENDINGS)


def run(group: WorkerGroup, job: Job) -> tuple[Event, list[Event]]:
    """Submit a job; how it ended, and all that happened."""
    group.submit(job)
    events = until(group, ended)
    return events[-1], events


def at_step(step: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Progress) and event.stage == "sampling" and event.step >= step


def alone(fork: Fork, request: Request) -> np.ndarray:
    """The frames of a request, made by this process alone; its output is left out again."""
    output = request.videos[0].output.with_name("alone.npy")
    video = replace(request.videos[0], output=output)
    source = replace(request.source, model_dir=fork.demo_folder())
    request = replace(request, videos=(video,), output=output, source=source)
    fork.module("generate").generate(request, Mesh(), Report())
    frames = np.load(output)
    for path in (output, video.sidecar):
        path.unlink()
    return frames


def levels_apart(job: Job, frames: np.ndarray) -> int:
    """The largest difference in grey levels between a job's video and other frames."""
    made = np.load(job.request.videos[0].output)
    assert made.shape == frames.shape and len(np.unique(made)) > 8
    return int(np.abs(made.astype(int) - frames.astype(int)).max())


def likeness(png: bytes, frame: np.ndarray) -> float:
    """The correlation of a small picture with a frame (H, W, 3) that is brought to its size."""
    picture = np.asarray(Image.open(io.BytesIO(png)))
    height, width, _ = picture.shape
    cells = frame.reshape(height, frame.shape[0] // height, width, frame.shape[1] // width, 3)
    return float(np.corrcoef(picture.ravel(), cells.mean(axis=(1, 3)).ravel())[0, 1])


def running(pids: list[int]) -> list[int]:
    """Those of the processes that still run."""
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
