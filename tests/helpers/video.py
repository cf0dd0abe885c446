"""Frames to a file, as a generation writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from common.video import VideoFile


def write_video(path: str | Path, frames: np.ndarray | Tensor | Iterable[np.ndarray | Tensor], fps: float) -> None:
    """Frames (T, H, W, 3), or an iterable of such chunks, to an mp4; see `VideoFile` for what it raises."""
    chunks: Any = [frames] if hasattr(frames, "shape") else frames
    with VideoFile(path, fps) as file:
        for chunk in chunks:
            file.add(chunk)
        file.finish()
