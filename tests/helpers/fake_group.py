"""A worker group without ranks: real files and states, and what a prompt tells it to do."""

from __future__ import annotations

import base64
import json
import queue
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg

from common.run.states import At, Record, StateFile
from common.run.unfinished import FORMAT, digest, metadata
from common.system.files import write_file
from common.workers.group import (
    Cancelled,
    Event,
    Failed,
    Finished,
    GroupError,
    Health,
    Job,
    Lost,
    Preview,
    Progress,
    RankHealth,
)

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
"""One pixel."""


class FakeGroup:
    """Makes the file that `content` says, in as many steps as asked, each of `step_seconds`.

    Words in a prompt: `[fail]`, `[wrong]`, `[memory]` end a job so, `[full once]` the first time for a full disk;
    `[lost at 3]` loses the group at step 3, each time that it gets there; `[lost once at 3]` only the first time;
    `[slow 0.2]` makes steps longer; `[play]` makes an mp4.
    """

    def __init__(
        self,
        step_seconds: float = 0.0,
        starts_after: float = 0.0,
        log: Path | None = None,
        devices: Sequence[int] = (0, 1),
    ) -> None:
        self.devices = tuple(devices)
        self.step_seconds, self.starts_after, self.log = step_seconds, starts_after, log
        self.state, self.starts = "stopped", 0
        self.made: list[tuple[str, int]] = []
        """Each job with the step that it began at."""
        self._events: queue.Queue[Event] = queue.Queue()
        self._cancelled: set[str] = set()
        self._once: set[str] = set()
        self._ending = threading.Event()
        self._job: Job | None = None
        self._thread = threading.Thread()

    def start(self) -> None:
        if self._ending.is_set():
            raise GroupError("it was stopped")
        self.state = "starting"
        time.sleep(self.starts_after)
        self.starts += 1
        self.state = "idle"

    def submit(self, job: Job) -> None:
        if self.state != "idle" or job.request.layout.ranks != len(self.devices):
            raise GroupError(f"the group is {self.state}")
        self.state, self._job = "busy", job
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._thread.start()

    def events(self, timeout: float) -> list[Event]:
        found = []
        try:
            found.append(self._events.get(timeout=timeout) if timeout else self._events.get_nowait())
            while True:
                found.append(self._events.get_nowait())
        except queue.Empty:
            return found

    def cancel(self, job: str) -> None:
        self._cancelled.add(job)

    def health(self) -> Health:
        ranks = tuple(RankHealth(0, device, 1 << 30, ("transformer",)) for device in self.devices)
        return Health(self.state, ranks, self._job and self._job.id)

    def stop(self, seconds: float) -> None:
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        self.state = "stopped"

    def _run(self, job: Job) -> None:
        ending = self._made(job)
        self._job = None
        self.state = "lost" if isinstance(ending, Lost) else "idle"
        self._events.put(ending)

    def _made(self, job: Job) -> Event:
        video = job.request.videos[0]
        prompt, steps = video.prompt, video.sampling.num_steps
        begun = int(metadata(job.state)["step"]) if job.state else 0
        self.made.append((job.id, begun))
        if self.log is not None:
            with self.log.open("a") as log:
                log.write(f"{job.id} {begun}\n")
        if "[wrong]" in prompt or "[memory]" in prompt or "[fail]" in prompt:
            return Failed(job.id, "it was told to fail", wrong_use="[wrong]" in prompt, memory="[memory]" in prompt)
        if "[full once]" in prompt and job.id.rpartition(".")[0] not in self._once:
            self._once.add(job.id.rpartition(".")[0])
            return Failed(job.id, "rank 0, writing: no space is left on the disk", disk=True)
        lost = re.search(r"\[lost (once )?at (\d+)\]", prompt)
        slow = re.search(r"\[slow ([\d.]+)\]", prompt)
        each = float(slow[1]) if slow else self.step_seconds
        for step in range(begun, steps):
            if lost and step == int(lost[2]) and not (lost[1] and job.id.rpartition(".")[0] in self._once):
                self._once.add(job.id.rpartition(".")[0])
                return Lost(job.id, "rank 1 was killed by signal 9 (SIGKILL)", (step, steps), 1)
            if job.id in self._cancelled:
                return Cancelled(job.id)
            if self._ending.wait(each):
                return Lost(job.id, "stopped", (step, steps), asked=True)
            self._keep(job, step + 1, steps)
            left = each * (steps - step - 1)
            self._events.put(Progress(job.id, "sampling", step + 1, steps, left))
            self._events.put(Preview(job.id, step + 1, PNG))
        self._events.put(Progress(job.id, "decoding", 1, 2, 0.0, "chunk"))
        write_file(video.output, playable() if "[play]" in prompt else content(video.prompt, video.seed))
        write_file(video.sidecar, json.dumps({"settings": {"seed": video.seed}}).encode())
        if job.keep_state is not None:
            job.keep_state.unlink(missing_ok=True)
        return Finished(job.id, {"sampling": each * steps, "decoding": 0.1}, video.sidecar)

    @staticmethod
    def _keep(job: Job, step: int, steps: int) -> None:
        if job.keep_state is None:
            return
        video = job.request.videos[0]
        known = {
            "format": FORMAT,
            "program": job.request.program,
            "digest": digest(job.request),
            "seed": str(video.seed),
        }
        known |= {"output": video.output.name, "cwd": "/", "arguments": "[]"}
        StateFile(job.keep_state, known).write(Record(At(0, step), steps, ()))


def content(prompt: str, seed: int | None) -> bytes:
    """The bytes of a fake video."""
    return f"a video of {prompt!r}, seed {seed}".encode() * 50


def playable() -> bytes:
    """A video of two seconds that browsers play."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.mp4"
        source = ["-f", "lavfi", "-i", "testsrc=duration=2:size=64x64:rate=8"]
        coded = ["-pix_fmt", "yuv420p", "-movflags", "+faststart", str(file)]
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *coded], check=True)
        return file.read_bytes()
