"""The newest state of a command's sampling: held in memory that outlives its ranks, now and then written to a file.

A rank writes its part of every step into `Slots`; the process that started it reads them in `Saver`, whatever became
of the rank, and joins the parts. No torch here: a part is a safetensors file in memory, and a shard of a tensor
(1, n, ...) is joined with the others by laying their bytes behind each other.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.system.files import remove_partial, say, write_file
from common.weights.headers import header_of

SHARDED, WHOLE = "tokens.", "whole."
"""What the names of tensors begin with: each rank has a part of its tokens, or all ranks have the same."""
VIEW = "view"
"""In the metadata of a part: how its tokens show a video, as `common.video.previews.View` writes it."""
SLOTS = 3
POLL_SECONDS = 0.2
_HEAD = struct.Struct("<qqqq")
_LENGTH = struct.Struct("<q")


class At(NamedTuple):
    """How far a command is: the index of the video in work, and the steps that are done of it."""

    video: int
    step: int


@dataclass(frozen=True)
class Record:
    """One state."""

    at: At
    steps: int
    """Steps of the whole sampling."""
    parts: tuple[bytes, ...]
    """Each rank's tensors, in the order of their tokens."""


class Slots:
    """The last states of one rank: files without names, one a slot, that the rank writes and its parent reads.

    A rank that writes step i + 3 over step i has been in a collective of step i + 3, so all others have written step
    i + 1 at least: with three slots there is always a step of which every rank's part is there.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        self.descriptors = tuple(descriptors)

    @classmethod
    def create(cls) -> Slots:
        return cls([_nameless() for _ in range(SLOTS)])

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)

    def clear(self) -> None:
        """Hold nothing, for whoever begins with something else."""
        for slot in self.descriptors:
            os.pwrite(slot, _HEAD.pack(-1, -1, -1, -1), 0)

    def write(self, at: At, steps: int, part: bytes) -> None:
        """The part of one step, in the place of that of three steps before. Raises OSError."""
        slot = self.descriptors[at.step % SLOTS]
        os.pwrite(slot, _HEAD.pack(-1, -1, -1, -1), 0)
        _write_all(slot, part, _HEAD.size)
        os.pwrite(slot, _HEAD.pack(*at, steps, len(part)), 0)

    def held(self) -> dict[At, int]:
        """Which states are here whole, with the number of their steps."""
        heads = [self._head(slot) for slot in self.descriptors]
        return {At(*head[:2]): head[2] for head in heads if head[3] >= 0}

    def read(self, at: At, begin: int = 0, size: int | None = None) -> bytes | None:
        """The part of a state, or so many bytes of it from `begin`; None when it is being written over."""
        slot = self.descriptors[at.step % SLOTS]
        head = self._head(slot)
        if head[:2] != at:
            return None
        size = head[3] - begin if size is None else min(size, head[3] - begin)
        part = _read_all(slot, size, _HEAD.size + begin)
        return part if self._head(slot) == head and len(part) == size else None

    def _head(self, slot: int) -> tuple[int, int, int, int]:
        head = os.pread(slot, _HEAD.size, 0)
        return _HEAD.unpack(head) if len(head) == _HEAD.size else (-1, -1, -1, -1)


def newest_at(ranks: Sequence[Slots]) -> tuple[At, int] | None:
    """The newest step of which every rank's part is held, with the number of steps."""
    states = [slots.held() for slots in ranks]
    common = set(states[0]).intersection(*states[1:])
    return (at := max(common), states[0][at])[:2] if common else None


def newest(ranks: Sequence[Slots]) -> Record | None:
    """The newest state of which every rank's part is held."""
    for _ in range(SLOTS):
        state = newest_at(ranks)
        if state is None:
            return None
        parts = [slots.read(state[0]) for slots in ranks]
        if all(part is not None for part in parts):
            return Record(*state, tuple(part or b"" for part in parts))
    return None


class Saver:
    """Writes the newest state to a file: when a video begins, when its last step is done, and in between now and then.

    write: makes the file of a record, see `StateFile.write`. every: seconds between two of the steps in between. tell:
    gets a line for the user where that fails.
    """

    def __init__(
        self,
        ranks: Sequence[Slots],
        write: Callable[[Record], None],
        every: float,
        tell: Callable[[str], None] = lambda text: say(f"warning: {text}"),
    ) -> None:
        self.ranks, self._write, self.every, self._tell = ranks, write, every, tell
        self._saved: tuple[At, int] | None = None
        self._last = time.monotonic()
        self._warned = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._end.is_set()

    def close(self, finished: bool) -> tuple[At, int] | None:
        """Stop; unless all is finished write what is newest.

        Returns what the file holds now, with the number of steps; None where nothing was written.
        """
        self._end.set()
        self._thread.join()
        if not finished:
            self._save()
        return self._saved

    def _run(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            state = newest_at(self.ranks)
            if state is None or state == self._saved:
                continue
            at, steps = state
            another = self._saved is None or self._saved[0].video != at.video
            if another or at.step == steps or time.monotonic() - self._last >= self.every:
                self._save()

    def _save(self) -> None:
        """A disk that is full stops no sampling: it is said once, and tried again."""
        record = newest(self.ranks)
        if record is None or (record.at, record.steps) == self._saved:
            return
        self._last = time.monotonic()
        try:
            self._write(record)
            self._saved = record.at, record.steps
        except OSError as error:
            if not self._warned:
                self._tell(f"the state of the sampling is not saved: {error}")
            self._warned = True


@dataclass(frozen=True)
class StateFile:
    """The file of one command's state."""

    path: Path
    identity: Mapping[str, str]
    """What identifies the command, written with every state."""

    def write(self, record: Record) -> None:
        """Whole or not at all. Raises WriteError."""
        at = {"video": str(record.at.video), "step": str(record.at.step), "steps": str(record.steps)}
        write_file(self.path, join(record.parts, {**self.identity, **at}))

    def remove(self) -> None:
        """The file, and what a run that was killed while it wrote has left of one; never raises."""
        remove_partial(self.path)
        with suppress(OSError):
            self.path.unlink()


def join(parts: Sequence[bytes], metadata: Mapping[str, str]) -> bytes:
    """One safetensors file of all ranks' parts: shards behind each other along their tokens, the rest as rank 0 has it.

    parts: safetensors files of tensors (1, n, ...) named SHARDED + ..., and of any shape named WHOLE + ....
    """
    rank_tensors = [_tensors(part) for part in parts if part]
    tensors: dict[str, tuple[str, list[int], int]] = {}
    data: list[bytes] = []
    for name, (dtype, shape, raw) in (rank_tensors[0] if rank_tensors else {}).items():
        pieces = [raw]
        if name.startswith(SHARDED):
            assert shape[0] == 1, "tokens of more than one sample are not joined by their bytes"
            pieces = [part[name][2] for part in rank_tensors]
            shape = [1, sum(part[name][1][1] for part in rank_tensors), *shape[2:]]
        tensors[name] = dtype, shape, sum(map(len, pieces))
        data += pieces
    return b"".join((header_of(tensors, metadata), *data))


def _tensors(part: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of the tensors of a safetensors file, in the order that they lie there."""
    start = _LENGTH.size + _LENGTH.unpack(part[: _LENGTH.size])[0]
    header = json.loads(part[_LENGTH.size : start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda one: one[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        assert (end - begin) % max(1, math.prod(entry["shape"])) == 0
        tensors[name] = (entry["dtype"], entry["shape"], part[start + begin : start + end])
    return tensors


def _nameless() -> int:
    """The descriptor of a file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("xdit-state")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _read_all(descriptor: int, size: int, offset: int) -> bytes:
    pieces = []
    while size > 0:
        piece = os.pread(descriptor, size, offset)
        if not piece:
            break
        pieces.append(piece)
        size, offset = size - len(piece), offset + len(piece)
    return b"".join(pieces)
