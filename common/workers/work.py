"""One job under way, as the process sees it that watches over the ranks: its state, its progress, its end. No torch."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.registry.forks import Fork
from common.registry.request import Request, Unfinished
from common.run.states import Record, Saver, Slots, StateFile, newest_at
from common.run.unfinished import FORMAT, digest, metadata
from common.system.failure import NO_SPACE, Failure, verdict
from common.system.files import remove_partial, shown
from common.video.previews import read_sums
from common.workers.group import Cancelled, Event, Failed, Finished, GroupError, Job, Lost, Note, Preview, Progress
from common.workers.orders import Maker, Order
from common.workers.pace import Durations, Pace, kind_of
from common.workers.previews import Previews, colours_file

Emit = Callable[[Event], None]


def prepared(job: Job, ranks: int, on_cpu: bool, slots: Sequence[Slots], fork: Fork) -> Request:
    """The job's request as the ranks run it: with its digest, its slots, and where it goes on. GroupError says why not.

    slots: of each rank of the group, or of rank 0 alone. fork: whose job it is.
    """
    request = job.request
    if len(request.videos) != 1 or request.videos[0].seed is None:
        raise GroupError("a job is one video, with a seed")
    if request.layout.ranks != ranks:
        raise GroupError(f"the layout {request.layout} is for {request.layout.ranks} ranks, and the group has {ranks}")
    if request.on_cpu != on_cpu:
        raise GroupError(f"the job is for {request.runtime.device}, and the group's ranks are not")
    request = replace(request, digest=digest(request), unfinished=None)
    if job.state is not None:
        request = replace(request, unfinished=_begun(job.state, request))
    of_tokens = slots[: request.layout.sequence] if len(slots) == ranks else slots[:1]
    colours = colours_file(request, fork) if job.previews and request.sampled else None
    return replace(request, slots=tuple(one.descriptors for one in of_tokens), colours=colours)


def identity_of(request: Request) -> dict[str, str]:
    """What identifies a job in its state. request: with its digest."""
    identity = {"format": FORMAT, "program": request.program, "digest": request.digest}
    return identity | {"seed": str(request.videos[0].seed), "output": request.output.name}


def with_state(job: Job) -> Job:
    """The job, going on from the file of its `keep_state` where that is a state of it."""
    if job.keep_state is None or not job.keep_state.exists():
        return job
    try:
        fits = metadata(job.keep_state)["digest"] == digest(job.request)
    except ValueError:
        fits = False
    return replace(job, state=job.keep_state) if fits else job


def _begun(path: Path, request: Request) -> Unfinished:
    try:
        header = metadata(path)
    except ValueError as error:
        raise GroupError(str(error)) from None
    if header["digest"] != request.digest:
        raise GroupError(f"{shown(path)} is the state of another video")
    return Unfinished(path, 0, int(header["step"]), int(header["steps"]), int(header["seed"]))


class Work:
    """One job under way. request: from `prepared`. number: of the order, see `common.workers.orders.Order`."""

    def __init__(
        self, job: Job, request: Request, slots: Sequence[Slots], durations: Durations, emit: Emit, number: int
    ) -> None:
        self.job, self.request, self.number, self._emit = job, request, number, emit
        self._durations, self._kind = durations, kind_of(request)
        self._pace = Pace(durations.of(self._kind))
        self.stage = "starting"
        self.seconds: dict[int, Mapping[str, float]] = {}
        self.endings: dict[int, str] = {}
        self._slots = slots[: len(request.slots)]
        for one in slots:
            one.clear()
        self._file = _state_file(job, request)
        self._saver = None
        if self._file is not None and request.sampled:
            self._saver = Saver(self._slots, self._write, request.save_every, lambda text: self.note(text, True))
        self._previews = self._begin_previews()

    def _begin_previews(self) -> Previews | None:
        sums = None if self.request.colours is None else read_sums(self.request.colours)
        if sums is None or not self._slots:
            return None

        def show(step: int, png: bytes) -> None:
            self._emit(Preview(self.job.id, step, png))

        return Previews(self._slots, sums.map(), show, lambda text: self.note(text, True))

    def order(self, maker: Maker, fresh: bool, keep: bool) -> Order:
        """For every rank."""
        return Order(self.job.id, self.number, fresh, *maker.where, pickle.dumps(self.request), keep)

    def _write(self, record: Record) -> None:
        assert self._file is not None
        self._file.write(record)

    @property
    def at(self) -> tuple[int, int] | None:
        """(steps done, steps) of the newest state."""
        state = newest_at(self._slots) if self._slots else None
        if state is not None:
            return state[0].step, state[1]
        unfinished = self.request.unfinished
        return None if unfinished is None else (unfinished.step, unfinished.steps)

    def heard(self, rank: int, message: Mapping[str, Any]) -> None:
        """Take in what a rank has said."""
        if message.get("at") is not None:
            name, unit, done, total = message["at"]
            self.stage = name
            seconds_left = self._pace.left(name, unit, done, total)
            if self._pace.is_due(name, unit, done, total):
                self._emit(Progress(self.job.id, name, done, total, seconds_left, unit))
        elif "note" in message:
            self.note(message["note"], message["warning"])
        elif "ended" in message and message["job"] == self.job.id:
            self.endings[rank] = message["ended"]
            self.seconds[rank] = message["seconds"]

    def note(self, text: str, warning: bool = False) -> None:
        self._emit(Note(self.job.id, text, warning))

    def end(self, failures: Sequence[Failure]) -> bool:
        """All ranks have ended the job and live; whether they are in step with each other."""
        kinds = set(self.endings.values())
        if kinds == {"finished"}:
            self._close(True)
            self._durations.learn(self._kind, self.seconds[0])
            self._emit(Finished(self.job.id, self.seconds[0], self.request.videos[0].sidecar))
            return True
        if kinds == {"cancelled"}:
            self._close(True, preview=False)
            self._tidy(latents=True)
            self._emit(Cancelled(self.job.id))
            return True
        at = self.at
        self._close(False)
        self._tidy()
        status, message = verdict(failures, []) if failures else (1, "the ranks did not end alike")
        memory = any("out of memory" in failure.message for failure in failures)
        disk = any(NO_SPACE in failure.message for failure in failures)
        self._emit(Failed(self.job.id, message, status == 2, memory, disk, at))
        return False

    def lost(self, message: str, device: int | None, asked: bool = False) -> None:
        """The ranks are gone."""
        at = self.at
        self._close(False)
        self._tidy()
        self._emit(Lost(self.job.id, message, at, device, asked))

    def _close(self, done: bool, preview: bool = True) -> None:
        """What is newest goes to the file; or where all is done, the file goes. preview: the last one is shown then."""
        if self._previews is not None:
            self._previews.close(done and preview)
        if self._saver is not None:
            self._saver.close(done)
        if done and self._file is not None:
            self._file.remove()

    def _tidy(self, latents: bool = False) -> None:
        """Remove what is half written. latents: whole ones too."""
        video = self.request.videos[0]
        for path in (video.output, *video.beside, *video.latents_files):
            remove_partial(path)
        for path in video.latents_files if latents else ():
            if path != video.latents:  # the user's own
                with suppress(OSError):
                    path.unlink()


def _state_file(job: Job, request: Request) -> StateFile | None:
    if job.keep_state is None:
        return None
    return StateFile(job.keep_state, identity_of(request))


def blamed(failures: Sequence[Failure], ended: Sequence[int], silent: Sequence[int]) -> int | None:
    """The rank whose device is to be suspected: one alone that ended by itself, said nothing, or had a CUDA error."""
    late = any(failure.late for failure in failures)
    broken = [failure.rank for failure in failures if "cuda error" in failure.message.lower()]
    for suspects in (ended, broken, silent if late or not failures else ()):
        if len(suspects) == 1:
            return suspects[0]
    return None
