"""Frames to one output that appears under its name only when it is complete: a picture, a folder of pictures, numbers.

Frames are (T, H, W, 3) uint8. What ffmpeg writes is `common.video.files.VideoFile`; `common.video.formats` chooses by
suffix.
"""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from common.system.files import Partial, PartialFolder, WriteError, resolved, shown, write_file, writing
from common.video.formats import FRAME_NAME, FRAME_NAMES
from common.video.pictures import encode_picture

if TYPE_CHECKING:
    from torch import Tensor

NPY_HEADER_BYTES = 128
Self = TypeVar("Self", bound="FrameWriter")


class FrameWriter:
    """What all outputs have in common; a json beside one is written with it.

        with VideoFile(path, fps=30) as file:    # or another of the writers
            file.add(frames)                     # (t, H, W, 3) uint8, array or tensor, as often as needed
            file.finish()                        # or finish(json_path, report)

    Leaving without `finish` removes what was written. Raises OSError when the output cannot be written, ValueError for
    frames that are no uint8 pictures or not all of one size. A subclass says how: `_begin(height, width)` at the first
    frame, `_write` for each, `_end` after the last, `_leave` in any case.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.partial = self._partial()
        self.size: tuple[int, ...] = ()
        self.count = 0
        self.closed = False

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave()
        self.partial.__exit__(None, None, None)

    def add(self, frames: np.ndarray | Tensor) -> None:
        pictures = np.asarray(frames)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise ValueError(f"frames are {pictures.dtype} {pictures.shape}; needed are uint8 (T, H, W, 3)")
        size = pictures.shape[1:3]
        if self.size and size != self.size:
            raise ValueError(f"frames of {size[1]}x{size[0]} in a video of {self.size[1]}x{self.size[0]}")
        with writing(self.path):
            if not self.size:
                self.size = size
                self._begin(*size)
            for picture in pictures:  # one at a time: no second copy of the video
                self._write(picture)
                self.count += 1

    def close(self) -> None:
        """No more frames: the output is complete, but still under its temporary name."""
        if not self.count:
            raise ValueError(f"no frames for {shown(self.path)}")
        with writing(self.path):
            self._end()
        self.closed = True

    def finish(self, sidecar: str | Path | None = None, report: dict[str, Any] | None = None) -> None:
        """Complete the output, and the json `sidecar` with it; both get their names now.

        Raises OSError, which says so when only the json is missing: a video that is complete is not thrown away.
        """
        if not self.closed:
            self.close()
        if sidecar is not None:
            try:
                write_json(Path(sidecar), report or {})
            except OSError as error:
                self.partial.commit()
                raise WriteError(f"{error}; the video itself is complete: {shown(self.path)}") from None
        self.partial.commit()

    def _partial(self) -> Partial:
        return Partial(self.path)

    def _begin(self, height: int, width: int) -> None:
        pass

    def _write(self, picture: np.ndarray) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        pass

    def _leave(self) -> None:
        pass


class PictureFile(FrameWriter):
    """One frame as a picture of the format that the suffix names, see `common.video.pictures.write_picture`."""

    def __init__(self, path: str | Path, title: str = "", comment: str = "") -> None:
        super().__init__(path)
        self.title, self.comment = title, comment

    def _write(self, picture: np.ndarray) -> None:
        if self.count:
            raise ValueError(f"{shown(self.path)} holds one picture; several frames need a video or a folder")
        self.partial.name.write_bytes(encode_picture(picture, self.path.suffix.lower(), self.title, self.comment))


class FrameFolder(FrameWriter):
    """A folder of PNGs, frame-000000.png and so on, title and comment in each.

    A folder that is there already is replaced when it is empty or holds such frames alone.
    """

    def __init__(self, path: str | Path, title: str = "", comment: str = "") -> None:
        super().__init__(resolved(Path(path)))
        self.title, self.comment = title, comment

    def _partial(self) -> Partial:
        return PartialFolder(self.path, FRAME_NAMES)

    def _write(self, picture: np.ndarray) -> None:
        name = self.partial.name / FRAME_NAME.format(self.count)
        name.write_bytes(encode_picture(picture, ".png", self.title, self.comment))


class ArrayFile(FrameWriter):
    """All frames as one array (T, H, W, 3) uint8: .npy, or .safetensors with a tensor named `frames`.

    The numbers are the frames' own, nothing is rounded or scaled. safetensors has title, comment and fps as metadata;
    npy has no place for them. The header needs the number of frames, so its place is kept free until the last.
    """

    def __init__(self, path: str | Path, fps: float, title: str = "", comment: str = "") -> None:
        super().__init__(path)
        self.metadata = {"title": title, "comment": comment, "fps": str(fps)}
        self.file: IO[bytes] | None = None

    def _begin(self, height: int, width: int) -> None:
        self.file = self.partial.name.open("wb")
        self.file.write(bytes(len(self._header())))

    def _write(self, picture: np.ndarray) -> None:
        assert self.file is not None
        self.file.write(np.ascontiguousarray(picture).data)

    def _end(self) -> None:
        assert self.file is not None
        self.file.seek(0)
        self.file.write(self._header())
        self.file.close()

    def _leave(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # the last bytes, on a full disk; the file is removed
                self.file.close()

    def _header(self) -> bytes:
        """Of the frames there are: as long for none as for many."""
        shape = (self.count, *self.size, 3)
        return npy_header(shape) if self.path.suffix.lower() == ".npy" else safetensors_header(shape, self.metadata)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Of a uint8 array, version 1.0 of numpy's format, padded to NPY_HEADER_BYTES."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    text = buffer.getvalue()[10:].rstrip()
    return (
        np.lib.format.magic(1, 0)
        + (NPY_HEADER_BYTES - 10).to_bytes(2, "little")
        + text.ljust(NPY_HEADER_BYTES - 11)
        + b"\n"
    )


def safetensors_header(shape: tuple[int, ...], metadata: dict[str, str]) -> bytes:
    """Of one uint8 tensor `frames`: its length in 8 bytes, then json, padded for any number of frames."""
    count, *picture = shape
    end = count * int(np.prod(picture))
    tensor = {"dtype": "U8", "shape": list(shape), "data_offsets": [0, end]}
    text = json.dumps({"__metadata__": metadata, "frames": tensor}).encode()
    size = len(text) - len(f"{count}{end}") + 40  # two numbers of up to 20 digits
    size += -size % 8
    return size.to_bytes(8, "little") + text.ljust(size)


def write_json(path: Path, value: Any) -> None:
    """Write a json file, whole or not at all. A path's bytes outside UTF-8 become json's own escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_file(path, text.encode("utf-8", "backslashreplace"))
