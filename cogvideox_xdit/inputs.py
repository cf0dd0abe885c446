"""Pictures and videos that a generation starts from, as pixels the autoencoder takes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from common.video import as_rgb, read_frames, read_image

Picture: TypeAlias = "str | Path | np.ndarray | Tensor | PIL.Image.Image"
Clip: TypeAlias = "str | Path | np.ndarray | Tensor"


def image_frames(image: Picture, height: int, width: int) -> Tensor:
    """A picture stretched to the video's size: (1, height, width, 3) uint8.

    image: a file, a PIL image, or (H, W, 3) uint8. Raises ValueError when it is none of them.
    """
    if isinstance(image, (str, Path)):
        image = read_image(image)
    array = as_rgb(image) if isinstance(image, PIL.Image.Image) else np.asarray(image)
    return _resized([array], "image", height, width)


def video_frames(video: Clip, height: int, width: int, num_frames: int) -> Tensor:
    """The first `num_frames` frames of a video stretched to a size: (num_frames, height, width, 3) uint8.

    video: a file, or (T, H, W, 3) uint8. Raises ValueError when it is neither or too short.
    """
    named = isinstance(video, (str, Path))
    # Of a file each frame is stretched as it comes, so that memory does not grow with its size.
    frames = read_frames(video, num_frames) if isinstance(video, (str, Path)) else np.asarray(video)[:num_frames]
    resized = _resized(frames, "video", height, width)
    if len(resized) < num_frames:
        what = video if named else "the video"
        raise ValueError(f"{what} has {len(resized)} frames, fewer than the {num_frames} of num_frames")
    return resized


def _resized(frames: Iterable[np.ndarray], what: str, height: int, width: int) -> Tensor:
    """Stretched without regard to its shape, with the filter of the reference pipelines."""
    filtered = []
    for frame in frames:
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8 or 0 in frame.shape:
            each, shape = ("", "(H, W, 3)") if what == "image" else ("each frame of ", "(T, H, W, 3)")
            said = f"{each}the {what} is {frame.dtype} of shape {list(frame.shape)}"
            raise ValueError(f"{said}; expected uint8 {shape}")
        picture = PIL.Image.fromarray(np.ascontiguousarray(frame))
        filtered.append(np.asarray(picture.resize((width, height), PIL.Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(filtered)) if filtered else torch.empty(0, height, width, 3, dtype=torch.uint8)


def pixels(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames (T, H, W, 3) uint8 -> (1, 3, T, H, W) in [-1, 1]."""
    return (frames.to(dtype) / 255 * 2 - 1).permute(3, 0, 1, 2)[None]
