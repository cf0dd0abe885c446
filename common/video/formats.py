"""What a name's suffix stands for: the formats that frames are written in, what each allows, and its writer.

The checks are for the door and load nothing; numpy, PIL and ffmpeg come with the first writer.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.system.files import folder_problem, shown, writing_problem

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from common.video.files import Audio
    from common.video.writers import FrameWriter


@dataclass(frozen=True)
class Format:
    """What may be asked of a format."""

    crf: range
    """The numbers of quality it knows, 0 without loss; empty: it always loses."""
    max_side: int
    """The longest side, in pixels."""
    max_fps: float = math.inf
    sound: bool = False
    single: bool = False
    """It holds one frame."""


FOLDER = ""
"""The suffix of a name without one: a folder of PNGs."""
FRAME_NAME, FRAME_NAMES = "frame-{:06d}.png", re.compile(r"frame-\d{6,}\.png")
_LOSSLESS, _LOSSY = range(1), range(0)
FORMATS = {
    ".mp4": Format(range(52), 16384, sound=True),
    ".webm": Format(range(64), 65535, sound=True),
    ".gif": Format(_LOSSY, 65535, max_fps=50),  # a frame lasts 1/100 s or longer, and players slow down at 1/100
    ".webp": Format(_LOSSLESS, 16383, max_fps=1000),
    ".png": Format(_LOSSLESS, 65535, single=True),
    ".jpg": Format(_LOSSY, 65500, single=True),
    ".jpeg": Format(_LOSSY, 65500, single=True),
    ".npy": Format(_LOSSLESS, 1 << 31),
    ".safetensors": Format(_LOSSLESS, 1 << 31),
    FOLDER: Format(_LOSSLESS, 65535),
}
ALLOWED = (
    ".mp4 and .webm (videos), .gif and .webp (animations), .png and .jpg (one frame), .npy and .safetensors (numbers), "
    "and a name without a suffix, or with a slash at its end, for a folder of PNGs"
)


def suffix_of(path: str | Path) -> str:
    """The key of FORMATS for a name, FOLDER for one without a suffix or with a slash at its end.

    A Path does not keep that slash. Raises ValueError for an unknown suffix, with what is allowed.
    """
    if str(path).endswith(("/", os.sep)):
        return FOLDER
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{shown(path)}: nothing is written as {shown(suffix)}; allowed are {ALLOWED}")
    return suffix


def output_problem(
    path: str | Path,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    crf: int | None = None,
    sound: bool = False,
) -> str | None:
    """Why these frames cannot go to this name, by its format alone; None when they can. None: not known, or default.

    size: height, width in pixels. The name begins the text: an option's name may precede it.
    """
    try:
        suffix = suffix_of(path)
    except ValueError as error:
        return str(error)
    format, name = FORMATS[suffix], shown(path)
    kind = suffix or "a folder of PNGs"
    if format.single and num_frames is not None and num_frames > 1:
        return f"{name}: {kind} holds one frame, not {num_frames}; choose a name without a suffix for a folder of PNGs"
    if size is not None and max(size) > format.max_side:
        return f"{name}: {kind} holds at most {format.max_side} pixels a side, not {size[1]}x{size[0]}"
    if fps is not None and fps > format.max_fps:
        return f"{name}: {kind} shows at most {format.max_fps} frames a second, not {fps}; choose .mp4"
    if sound and not format.sound:
        return f"{name}: {kind} holds no sound; choose {' or '.join(s for s, f in FORMATS.items() if f.sound)}"
    if crf is not None and crf not in format.crf:
        return f"{name}: crf {crf} is not for {kind}, which {_qualities(format)}"
    return None


def destination_problem(path: str | Path) -> str | None:
    """Why nothing can be written at a name of a known suffix; None when it can. Leaves nothing behind.

    A folder of frames may be replaced, and a file; a folder that holds something else may not.
    """
    return folder_problem(Path(path), FRAME_NAMES) if suffix_of(path) == FOLDER else writing_problem(Path(path))


def _qualities(format: Format) -> str:
    if len(format.crf) > 1:
        return f"takes 0 (without loss) to {format.crf[-1]} (smallest)"
    return "takes 0 (without loss) or none" if format.crf else "takes none; choose .mp4 or .webm"


def open_writer(
    path: str | Path,
    fps: float,
    title: str = "",
    comment: str = "",
    audio: Audio | None = None,
    crf: int | None = None,
) -> FrameWriter:
    """The writer of frames to `path`, by its suffix; see `FrameWriter` for its use and `VideoFile` for audio and crf.

    crf 0 writes without loss: the frames read back are those given, bit for bit. Raises ValueError, see
    `output_problem`, and WriteError when nothing can be written there.
    """
    if problem := output_problem(path, fps=fps, crf=crf, sound=audio is not None):
        raise ValueError(problem)
    from common.video.files import VideoFile
    from common.video.writers import ArrayFile, FrameFolder, PictureFile

    suffix = suffix_of(path)
    if suffix == FOLDER:
        return FrameFolder(path, title, comment)
    if FORMATS[suffix].single:
        return PictureFile(path, title, comment)
    if suffix in (".npy", ".safetensors"):
        return ArrayFile(path, fps, title, comment)
    return VideoFile(path, fps, title, comment, audio, crf)


def write_frames(
    path: str | Path,
    frames: np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
    fps: float,
    title: str = "",
    comment: str = "",
    audio: Audio | None = None,
    crf: int | None = None,
) -> None:
    """Frames (T, H, W, 3) uint8, or an iterable of such chunks, to a file or a folder by suffix; see `open_writer`."""
    chunks: Any = [frames] if hasattr(frames, "shape") else frames
    with open_writer(path, fps, title, comment, audio, crf) as file:
        for chunk in chunks:
            file.add(chunk)
        file.finish()
