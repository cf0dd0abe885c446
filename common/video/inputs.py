"""Pictures and videos that a generation starts from, as pixels the autoencoder takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from common.registry.checks import Rules
from common.video.files import read_frames
from common.video.pictures import as_rgb, fit_picture, misfit, read_image

Picture: TypeAlias = "str | Path | np.ndarray | Tensor | PIL.Image.Image"
Clip: TypeAlias = "str | Path | np.ndarray | Tensor"
Note: TypeAlias = "Callable[[str], None] | None"


def image_frames(
    image: Picture, height: int, width: int, fit: str = "crop", note: Note = None, rules: Rules | None = None
) -> Tensor:
    """A picture in the video's size: (1, height, width, 3) uint8.

    image: a file, a PIL image, or (H, W, 3) uint8. Raises ValueError when it is none of them.
    fit: as of `common.video.pictures.fit_picture`. note: told once what that did, where the shape is another, and by
    `rules` which size would have avoided it.
    """
    return _resized([as_array(image)], "image", height, width, fit, note, rules)


def as_array(image: Picture) -> np.ndarray:
    """A picture in its own size, (H, W, 3) uint8 where it is one. ValueError for a file that cannot be read."""
    if isinstance(image, (str, Path)):
        image = read_image(image)
    return as_rgb(image) if isinstance(image, PIL.Image.Image) else np.asarray(image)


def video_frames(
    video: Clip,
    height: int,
    width: int,
    num_frames: int,
    fit: str = "crop",
    note: Note = None,
    rules: Rules | None = None,
) -> Tensor:
    """The first `num_frames` frames of a video in a size: (num_frames, height, width, 3) uint8.

    video: a file, or (T, H, W, 3) uint8. Raises ValueError when it is neither or too short. fit, note, rules: as of
    `image_frames`.
    """
    is_file = isinstance(video, (str, Path))
    # Of a file each frame is resized as it comes, so that memory does not grow with its size.
    frames = read_frames(video, num_frames) if isinstance(video, (str, Path)) else np.asarray(video)[:num_frames]
    resized = _resized(frames, "video", height, width, fit, note, rules)
    if len(resized) < num_frames:
        what = video if is_file else "the video"
        raise ValueError(f"{what} has {len(resized)} frames, fewer than the {num_frames} of num_frames")
    return resized


def _resized(
    frames: Iterable[np.ndarray], what: str, height: int, width: int, fit: str, note: Note, rules: Rules | None
) -> Tensor:
    resized: list[np.ndarray] = []
    for frame in frames:
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8 or 0 in frame.shape:
            each, shape = ("", "(H, W, 3)") if what == "image" else ("each frame of ", "(T, H, W, 3)")
            problem = f"{each}the {what} is {frame.dtype} of shape {list(frame.shape)}"
            raise ValueError(f"{problem}; expected uint8 {shape}")
        picture, remark = fit_picture(frame, height, width, fit)
        if remark and note is not None and not resized:
            note(f"the {what} is {remark}{_better(frame.shape[:2], height, width, rules)}")
        resized.append(picture)
    return torch.from_numpy(np.stack(resized)) if resized else torch.empty(0, height, width, 3, dtype=torch.uint8)


def _better(shape: tuple[int, ...], height: int, width: int, rules: Rules | None) -> str:
    """A size of the model that fits a picture (H, W) better by far, as one asks for it; empty where there is none."""
    if rules is None:
        return ""
    other = rules.size_like(shape, height, width)
    excess = misfit(shape, *other)
    if 2 * excess >= misfit(shape, height, width):
        return ""
    return f"; with --width {other[1]} --height {other[0]}: {excess:.1%}"


def pixels(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames (T, H, W, 3) uint8 -> (1, 3, T, H, W) in [-1, 1]."""
    return (frames.to(dtype) / 255 * 2 - 1).permute(3, 0, 1, 2)[None]
