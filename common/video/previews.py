"""Small pictures of latents, without a decoder: a linear map from their channels to colours. No torch here.

The map is fitted to videos that were decoded: each place of the latents becomes CELL x CELL pixels, which is less than
a decoder makes of it and all that a small picture needs. What is kept of those videos are the sums of the least-squares
problem, a few kilobytes, to which the next video adds its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.system.files import write_file
from common.video.pictures import encode_picture

if TYPE_CHECKING:
    from torch import Tensor

CELL = 4
"""Pixels of a picture to a place of the latents, in both directions, where they are few."""
MOST_SIDE = 256
"""Pixels of a picture's longer side, where the latents themselves are not longer."""
ENOUGH_VIDEOS = 8
"""From so many one learns; the next ones would change little."""
MOST_FRAMES, MOST_PLACES = 5, 16384
"""Of a video: latent frames that are learned from, and places in each."""
RIDGE = 1e-4
"""How much, relative to the variance of a channel, speaks for no influence: of few colours little can be learned."""


Levels = tuple[float, float, float, float]
"""Of the video and of noise before a step, and of both after it."""


def flow_levels(sigmas: Sequence[float]) -> tuple[Levels, ...]:
    """Of flow matching, whose sample at noise level s is (1 - s) video + s noise. sigmas: one more than steps."""
    return tuple((1 - s, s, 1 - s_next, s_next) for s, s_next in pairwise(sigmas))


@dataclass(frozen=True)
class View:
    """How the tokens of a state show a video."""

    size: tuple[int, int, int]
    """Latent frames, rows, columns."""
    patch: tuple[int, int, int]
    """The patch of a token: latent frames, rows, columns."""
    order: str = "ctyx"
    """The axes inside a token, slowest first: c channels, t frames, y rows, x columns."""
    clean: tuple[str, ...] = ()
    """Names of tensors beside `z` that are an estimate of the video, the best first; a state need not have them."""
    levels: tuple[Levels, ...] = ()
    """Of each step, how much of the video and how much noise is in the tokens before it and after it, for solvers that
    draw no noise and keep no estimate."""

    @cached_property
    def text(self) -> str:
        """For `read`. Every state has it, and it takes as long as a small step where there are many levels."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def read(cls, text: str) -> View:
        """The reverse of `text`."""
        fields = json.loads(text)
        size, patch, clean = (tuple(fields.pop(name)) for name in ("size", "patch", "clean"))
        levels = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in fields.pop("levels"))
        return cls(size=size, patch=patch, clean=clean, levels=levels, **fields)

    @property
    def middle(self) -> slice:
        """The tokens that have the middle one of the frames."""
        count = self.size[1] // self.patch[1] * (self.size[2] // self.patch[2])
        first = self.size[0] // 2 // self.patch[0] * count
        return slice(first, first + count)

    def middle_frame(self, tokens: np.ndarray) -> np.ndarray:
        """The middle frame (h, w, C) of its tokens (n, W)."""
        _, height, width = self.size
        pt, ph, pw = self.patch
        lengths = {"c": tokens.shape[1] // (pt * ph * pw), "t": pt, "y": ph, "x": pw}
        split = tokens.reshape(height // ph, width // pw, *(lengths[axis] for axis in self.order))
        places = {axis: 2 + place for place, axis in enumerate(self.order)}
        split = split.transpose(places["t"], 0, places["y"], 1, places["x"], places["c"])
        return split[self.size[0] // 2 % pt].reshape(height, width, -1)

    def estimated(self, before: np.ndarray, after: np.ndarray, step: int) -> np.ndarray | None:
        """The video that both states before and after step `step` (from 1) are on the way to: x = a video + b noise.

        None where the two say nothing of it.
        """
        a, b, a_next, b_next = self.levels[step - 1]
        determinant = b * a_next - b_next * a
        if abs(determinant) < 1e-9:
            return None
        return (b * after.astype(np.float64) - b_next * before) / determinant


@dataclass(frozen=True)
class Sums:
    """What was learned: videos, and per row of a place's channels with a 1 behind them, the means of their products."""

    videos: int
    own: np.ndarray
    """(C + 1, C + 1), with each other."""
    colours: np.ndarray
    """(C + 1, CELL, CELL, 3), with the pixels, 0 to 1."""

    def __add__(self, other: Sums) -> Sums:
        videos = self.videos + other.videos
        mine, theirs = self.videos / videos, other.videos / videos
        return Sums(videos, mine * self.own + theirs * other.own, mine * self.colours + theirs * other.colours)

    def map(self) -> Colours:
        channels = len(self.own) - 1
        variance = np.diag(self.own)[:channels] - self.own[channels, :channels] ** 2
        # Not for the last one: that of a video without any colours is its colour.
        ridge = np.diag([*(RIDGE * np.maximum(variance, 0) + 1e-8), 0.0])
        weights = np.linalg.solve(self.own + ridge, self.colours.reshape(channels + 1, -1))
        return Colours(weights.reshape(self.colours.shape))


@dataclass(frozen=True)
class Colours:
    """A linear map."""

    weights: np.ndarray
    """(C + 1, CELL, CELL, 3), the last row the colour of no latents; colours are 0 to 1."""

    def picture(self, latents: np.ndarray) -> np.ndarray:
        """Of one frame (h, w, C): uint8 (H, W, 3), as many pixels to a place as MOST_SIDE admits. ValueError for
        latents of other channels."""
        height, width, channels = latents.shape
        if channels != len(self.weights) - 1:
            raise ValueError(f"the latents have {channels} channels, the colours were learned for another number")
        cell = CELL
        while cell > 1 and cell * max(height, width) > MOST_SIDE:
            cell //= 2
        of = CELL // cell
        weights = self.weights.reshape(-1, cell, of, cell, of, 3).mean(axis=(2, 4)).astype(np.float32)
        pixels = np.tensordot(latents.astype(np.float32), weights[:-1], 1) + weights[-1]  # h w y x 3
        pixels = pixels.transpose(0, 2, 1, 3, 4).reshape(height * cell, width * cell, 3)
        return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)

    def png(self, latents: np.ndarray) -> bytes:
        """`picture` as a file."""
        return encode_picture(self.picture(latents), ".png")


class Lesson:
    """What one video teaches, its frames given as they are decoded.

    latents: (1, C, T, h, w). count, height, width: of the frames, (T - 1) k + 1 of them.
    """

    def __init__(self, latents: Tensor | np.ndarray, count: int, height: int, width: int) -> None:
        _, channels, length, rows, columns = latents.shape
        self.latents, self._num_frames, self._places = latents, 0, 0
        self._own, self._colours = np.zeros((channels + 1, channels + 1)), np.zeros((channels + 1, CELL * CELL * 3))
        # A first one of several is made of one frame and the others of more: no preview shows it.
        indices = np.unique(np.linspace(min(1, length - 1), length - 1, MOST_FRAMES).round().astype(int)).tolist()
        each = (count - 1) // max(1, length - 1)
        lie_over = height % (CELL * rows) == 0 and width % (CELL * columns) == 0
        self._indices = {t * each: t for t in indices} if lie_over else {}

    def add(self, frames: Tensor | np.ndarray) -> None:
        """The next ones: uint8 (F, H, W, 3)."""
        for place, t in self._indices.items():
            if self._num_frames <= place < self._num_frames + len(frames):
                self._look(_host(frames[place - self._num_frames]), _host(self.latents[0, :, t]))
        self._num_frames += len(frames)

    def _look(self, frame: np.ndarray, latents: np.ndarray) -> None:
        channels, height, width = latents.shape
        every = -(-height * width // MOST_PLACES)
        cells = frame.reshape(height, CELL, frame.shape[0] // height // CELL, width, CELL, -1, 3)
        means = cells.mean(axis=(2, 5), dtype=np.float32).transpose(0, 2, 1, 3, 4)
        y = means.reshape(height * width, -1)[::every] / 255
        x = np.ones((height * width, channels + 1))
        x[:, :-1] = latents.reshape(channels, -1).T
        x = x[::every]
        self._own += x.T @ x
        self._colours += x.T @ y
        self._places += len(x)

    def sums(self) -> Sums | None:
        """None where the frames do not lie over the latents."""
        if not self._places:
            return None
        colours = (self._colours / self._places).reshape(-1, CELL, CELL, 3)
        return Sums(1, self._own / self._places, colours)


def sums_of(latents: Tensor | np.ndarray, frames: Tensor | np.ndarray) -> Sums | None:
    """What a whole video teaches, see `Lesson`."""
    count, height, width = frames.shape[:3]
    lesson = Lesson(latents, count, height, width)
    lesson.add(frames)
    return lesson.sums()


def _host(values: Tensor | np.ndarray) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def read_sums(path: Path) -> Sums | None:
    """What is in a file of `learn`; None where it is not there, or is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(path.read_bytes())
        sums = Sums(int(tensors["videos"]), *(tensors[name].astype(np.float64) for name in ("own", "colours")))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    rows = len(sums.own)
    whole = sums.own.shape == (rows, rows) and sums.colours.shape == (rows, CELL, CELL, 3) and sums.videos > 0
    return sums if whole and all(np.isfinite(part).all() for part in (sums.own, sums.colours)) else None


def write_sums(path: Path, sums: Sums) -> None:
    """Whole or not at all. Raises OSError."""
    from safetensors.numpy import save

    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"own": sums.own.astype(np.float32), "colours": np.ascontiguousarray(sums.colours, dtype=np.float32)}
    write_file(path, save({"videos": np.array(sums.videos), **parts}))


def learn(path: Path, sums: Sums | None) -> None:
    """Add what a video taught to a file, unless that has seen enough of them. Raises OSError."""
    old = read_sums(path)
    if sums is None or (old is not None and (old.videos >= ENOUGH_VIDEOS or len(old.own) != len(sums.own))):
        return
    write_sums(path, sums if old is None else old + sums)
