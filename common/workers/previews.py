"""Previews of a job under way, made beside it: by the process that holds the states which its ranks leave. No torch.

Nothing waits for one, and the ranks know nothing of them. From the newest state come the tokens of one frame, from
those, or from what changed in the last step, an estimate of what the frame will be, and from that a picture, by the
colours that were learned of the decoder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.registry.forks import Fork
from common.registry.request import Request
from common.run.states import SHARDED, VIEW, At, Slots, newest_at
from common.run.unfinished import weights_of
from common.system.files import cache_home
from common.video.previews import Colours, View

PAUSE_SECONDS = 0.5
SHARE = 0.01
"""Of the time of one core: how much they may take."""
POLL_SECONDS = 0.2
_DTYPES: Mapping[str, np.dtype] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


def colours_file(request: Request, fork: Fork) -> Path:
    """Where the colours of a request's decoder are, or are learned: beside the demo that comes with the fork's package,
    else in the user's cache, under a digest of the names and sizes of the checkpoint's files."""
    name = request.source.demo
    if name is not None and name == next(iter(fork.demos), None):
        spec = importlib.util.find_spec(fork.package)
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).parent / "demo_data" / "previews" / "colours.safetensors"
            if path.is_file():
                return path
    key = json.dumps([request.program, name, request.source.model_dir and weights_of(request.source.model_dir)])
    return cache_home() / "previews" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


class Previews:
    """A thread that shows the newest state now and then, until it is closed. ranks: of all tokens, in their order.

    show: gets the steps that are done and a PNG. fail: gets a line when there will be no more of them.
    """

    def __init__(
        self,
        ranks: Sequence[Slots],
        colours: Colours,
        show: Callable[[int, bytes], None],
        fail: Callable[[str], None],
    ) -> None:
        self._ranks, self._colours, self._show, self._fail = ranks, colours, show, fail
        self._last_at: At | None = None
        self._not_before = 0.0
        self._end = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="previews", daemon=True)
        self._thread.start()

    def close(self, finished: bool) -> None:
        """None comes afterwards. finished: the last step is shown first, if it was not."""
        self._finished = finished
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._end.wait(POLL_SECONDS):
                if time.monotonic() >= self._not_before:
                    self._look()
            if self._finished:
                self._look()
        except Exception as error:  # whatever it is, the video is made without
            self._fail(f"there are no more previews: {error}")

    def _look(self) -> None:
        state = newest_at(self._ranks)
        if state is None or state[0] == self._last_at or state[0].step == 0:
            return
        before = time.thread_time()
        frame = frame_of(self._ranks, *state)
        if frame is not None:
            self._show(state[0].step, self._colours.png(frame))
            self._last_at = state[0]
        duration = time.thread_time() - before
        self._not_before = time.monotonic() + max(PAUSE_SECONDS, duration / SHARE)


def frame_of(ranks: Sequence[Slots], at: At, steps: int) -> np.ndarray | None:
    """An estimate of the middle frame's latents (h, w, C) by the state `at` of `steps`; None where none can be made."""
    parts = [_Part.open(one, at) for one in ranks]
    held_parts = [part for part in parts if part is not None]
    if len(held_parts) < len(ranks) or (view := held_parts[0].view) is None:
        return None
    clean = [name for name in view.clean if SHARDED + name in held_parts[0].tensors]
    tokens: np.ndarray | None
    if at.step == steps or clean:
        tokens = _middle(held_parts, view, "z" if at.step == steps else clean[0])
    else:
        earlier = [_Part.open(one, At(at.video, at.step - 1)) for one in ranks]
        before = _middle([part for part in earlier if part is not None and part.tensors], view, "z")
        after = _middle(held_parts, view, "z")
        if before is None or after is None or before.shape != after.shape or not view.levels:
            return None
        tokens = view.estimated(before, after, at.step)
    return None if tokens is None else view.middle_frame(tokens)


class _Part:
    """One rank's part of a state, of which only what is wanted is read."""

    def __init__(self, slots: Slots, at: At, start: int, header: dict) -> None:
        self._slots, self._at, self._start = slots, at, start
        text = header.pop("__metadata__", {}).get(VIEW)
        self.view = None if text is None else View.read(text)
        self.tensors = header

    @classmethod
    def open(cls, slots: Slots, at: At) -> _Part | None:
        """None where it is not held any more, or has nothing in it."""
        length = slots.read(at, 0, 8)
        if not length:
            return None
        start = 8 + int.from_bytes(length, "little")
        header = slots.read(at, 8, start - 8)
        return None if header is None else cls(slots, at, start, json.loads(header))

    def count(self, name: str) -> int:
        """Of this rank's tokens."""
        return self.tensors[SHARDED + name]["shape"][1]

    def tokens(self, name: str, first: int, last: int) -> np.ndarray | None:
        """Of this rank's tokens those from `first` to before `last`, (n, W)."""
        entry = self.tensors[SHARDED + name]
        dtype, width = _DTYPES[entry["dtype"]], entry["shape"][2]
        row = width * dtype.itemsize
        data = self._slots.read(self._at, self._start + entry["data_offsets"][0] + first * row, (last - first) * row)
        return None if data is None else np.frombuffer(data, dtype).reshape(-1, width)


def _middle(parts: Sequence[_Part], view: View, name: str) -> np.ndarray | None:
    """The tokens (n, W) of all ranks that have the middle frame; None where not all are held."""
    middle, begin, pieces = view.middle, 0, []
    for part in parts:
        end = begin + part.count(name)
        first, last = max(middle.start, begin), min(middle.stop, end)
        if first < last:
            tokens = part.tokens(name, first - begin, last - begin)
            if tokens is None:
                return None
            pieces.append(tokens)
        begin = end
    return np.concatenate(pieces) if sum(map(len, pieces)) == middle.stop - middle.start else None
