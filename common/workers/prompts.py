"""`--replicas N`, `--ray-address`: the videos of one command, made by worker groups. No torch here.

The command's state file says which videos are whole; beside each video that is being made lies a state of its own. So
the same command goes on, with as many replicas as it then has.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from common.registry.request import Request
from common.run.states import At, Record, StateFile
from common.run.unfinished import digest, remove_states, state_file, state_path
from common.system.files import WriteError, say, shown, tell
from common.system.stopping import Stopped
from common.workers.group import Event, Failed, Finished, GroupError, Job, Note
from common.workers.making import Groups
from common.workers.orders import Maker
from common.workers.work import identity_of, with_state

STOP_SECONDS = 5.0


def run(maker: Maker, request: Request, arguments: Sequence[str]) -> int:
    """Make the videos that are left; the exit status: 0 all are made, 1 some are not, 2 wrong use, or 128 + signal.

    request: with its seeds, its digest and what is whole. arguments: the command's, for its state file. To be called
    inside `common.system.stopping.stoppable`.
    """
    queue = _Queue(request, arguments)
    runtime, ranks = request.runtime, request.layout.ranks
    groups = Groups(
        ranks,
        request.replicas,
        request.on_cpu,
        request.ray_address,
        runtime.keep_loaded,
        request.timeout,
        request.debug,
        (maker,),
    )
    try:
        groups.check()
    except GroupError as error:
        say(f"error: --ray-address: {shown(str(error))}")
        return 2
    replicas = groups.at_work(queue.take, queue.hear)
    for remark in request.remarks:
        say(remark)
    kind = "1 rank" if ranks == 1 else f"{ranks} ranks"
    count = "1 replica" if request.replicas == 1 else f"{request.replicas} replicas"
    say(f"{count} of {kind} on {runtime.device}: {request.layout}")
    status = 0
    try:
        queue.save()
        replicas.start()
        replicas.finish()
    except Stopped as stop:
        status = stop.status
    except (GroupError, WriteError) as error:
        say(f"error: {shown(str(error))}")
        status = 1
    finally:
        replicas.stop(STOP_SECONDS)
    return queue.close(status)


class _Queue:
    """The videos of a command on their way through the replicas. Called by several threads."""

    def __init__(self, request: Request, arguments: Sequence[str]) -> None:
        self.request, self._arguments = request, arguments
        self._lock = threading.Lock()
        self._waiting = deque(request.left)
        self._remaining = set(request.left)
        self.status = 0

    def take(self, timeout: float) -> Job | None:
        """For `Replicas`."""
        with self._lock:
            if not self._waiting or self.status == 2:
                return None
            return self._job(self._waiting.popleft())

    def _job(self, index: int) -> Job:
        video = self.request.videos[index]
        alone = replace(self.request, videos=(video,), output=video.output, replicas=1, ray_address=None)
        request = replace(alone, remarks=(), unfinished=None, slots=())
        job = with_state(Job(str(index), request, None, state_path(video.output, video.folder)))
        unfinished = self.request.unfinished
        if job.state is None and unfinished is not None and unfinished.video == index and unfinished.step:
            # One group made it when the command was interrupted, and the state is in the command's own file.
            file = StateFile(_path(job), identity_of(replace(request, digest=digest(request))))
            with suppress(OSError):  # without room for it the video begins anew
                file.write(Record(At(0, unfinished.step), unfinished.steps, (unfinished.path.read_bytes(),)))
                job = with_state(job)
        return job

    def hear(self, replica: int, event: Event) -> None:
        """For `Replicas`."""
        with self._lock:
            index = int(event.job or 0)
            about = f"video {index + 1} of {len(self.request.videos)}"
            if isinstance(event, Note):
                say(f"{'warning: ' if event.warning else ''}{about}: {shown(event.text)}")
            elif isinstance(event, Finished):
                self._remaining.discard(index)
                try:
                    self._save()
                except OSError as error:  # the next one may find room
                    say(f"warning: which videos are whole is not saved: {error}")
                tell(shown(self.request.videos[index].output))
            elif isinstance(event, Failed):
                if not (event.wrong_use and self.status == 2):
                    say(f"error: {about}: {shown(event.message)}")
                self.status = max(self.status, 2 if event.wrong_use else 1)

    def save(self) -> None:
        """Write which videos are whole into the command's state file. Raises WriteError."""
        with self._lock:
            self._save()

    def _save(self) -> None:
        if not self._remaining:
            return
        first = min(self._remaining)
        whole = frozenset(range(first, len(self.request.videos))) - self._remaining
        record = Record(At(first, 0), self.request.videos[first].sampling.num_steps, ())
        metadata = {**self._file.identity, "done": ",".join(map(str, sorted(whole)))}
        replace(self._file, identity=metadata).write(record)

    @property
    def _file(self) -> StateFile:
        return state_file(self.request, self._arguments)

    def close(self, status: int) -> int:
        """After the last group is gone: what is left of the states, and the last line for the user."""
        status, count = status or self.status, len(self.request.videos)
        if not self._remaining:
            remove_states(self.request, self._file)
            return status
        num_done = count - len(self._remaining)
        rest = [self.request.videos[index] for index in self._remaining]
        resumable = num_done or any(state_path(video.output, video.folder).exists() for video in rest)
        if not resumable:
            remove_states(self.request, self._file)
        summary = f"{num_done} of {count} videos are made"
        hint = f": the same command goes on, or --resume {shown(self._file.path)}" if resumable else ""
        say(f"{'interrupted' if status > 2 else 'error'}: {summary}{hint}")
        return status or 1


def _path(job: Job) -> Path:
    assert job.keep_state is not None
    return job.keep_state
