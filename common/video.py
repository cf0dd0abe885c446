"""Video files: frames to mp4 through a pipe to ffmpeg, and images and videos to frames. Frames are (T, H, W, 3) uint8.

ffmpeg comes with imageio-ffmpeg; nothing has to be installed on the system.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from common.files import Partial, WriteError, absence, as_argument, shown

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

OUTPUT = "file:output"
CRF = 17  # x264's constant rate factor: visually without loss
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
VIDEO_FORMATS = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v"),
    *("flv", "gif", "apng", "ogg", "asf", "mxf", "nut", "ivf", "h264", "hevc", "av1", "obu", "yuv4mpegpipe"),
)
"""ffmpeg's names of the containers that are read: none of them names other files that ffmpeg would open."""
MAX_PIXELS = 1 << 27
"""Of a picture: more than the largest camera's, 400 MB as RGB."""
MAX_TAG_BYTES = 60_000  # one command line argument may hold 128 KiB


class VideoFile:
    """An mp4 (H.264, yuv420p) that appears under its name only when it is complete, a json beside it likewise.

    with VideoFile(path, fps=30, title=prompt) as file:
        file.add(frames)                     # (t, H, W, 3) uint8, array or tensor, as often as needed
        file.finish()                        # or finish(json_path, report)

    Leaving without `finish` removes what was written. Odd sizes grow by one repeated row or column: yuv420p has no odd
    sizes. Raises OSError when the file cannot be written, ValueError for frames that are no uint8 pictures.
    """

    def __init__(self, path: str | Path, fps: float, title: str = "", comment: str = "") -> None:
        self.path, self.fps = Path(path), fps
        self.tags = {"title": title, "comment": comment}
        self.partial = Partial(self.path)
        self.process: subprocess.Popen[bytes] | None = None
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the file is left
        self.size: tuple[int, ...] = ()

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process is not None:
            with suppress(OSError):
                self.process.kill()
            self.process.wait()
            with suppress(OSError):
                if self.process.stdin:
                    self.process.stdin.close()
        self.log.close()
        self.partial.__exit__(None, None, None)

    def add(self, frames: np.ndarray | Tensor) -> None:
        pictures = np.asarray(frames)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise ValueError(f"frames are {pictures.dtype} {pictures.shape}; needed are uint8 (T, H, W, 3)")
        _, height, width, _ = pictures.shape
        if self.process is None:
            self.size = (height, width)
            self.process = self._start(height + height % 2, width + width % 2)
        if (height, width) != self.size:
            raise ValueError(f"frames of {width}x{height} in a video of {self.size[1]}x{self.size[0]}")
        assert self.process.stdin is not None
        try:
            for picture in pictures:  # one at a time: no second copy of the video
                padded = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                self.process.stdin.write(np.ascontiguousarray(padded).data)
        except BrokenPipeError:
            raise self._failure() from None

    def close(self) -> None:
        """No more frames: wait for ffmpeg. The mp4 is complete, but still under its temporary name."""
        if self.process is None:
            raise ValueError(f"no frames for {self.path}")
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            raise self._failure() from None
        if self.process.wait() != 0:
            raise self._failure()

    def finish(self, sidecar: str | Path | None = None, report: dict[str, Any] | None = None) -> None:
        """Complete the mp4, and the json `sidecar` with it; both get their names now.

        Raises OSError, which says so when only the json is missing: a video that is complete is not thrown away.
        """
        if self.process is None or self.process.returncode is None:
            self.close()
        if sidecar is not None:
            try:
                write_json(Path(sidecar), report or {})
            except OSError as error:
                self.partial.commit()
                raise WriteError(f"{error}; the video itself is complete: {shown(self.path)}") from None
        self.partial.commit()

    def _start(self, height: int, width: int) -> subprocess.Popen[bytes]:
        import ffmpeg

        tags = {
            f"metadata:g:{i}": f"{key}={text.encode(errors='backslashreplace')[:MAX_TAG_BYTES].decode(errors='ignore')}"
            for i, (key, text) in enumerate(self.tags.items())
            if text
        }
        source = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", framerate=self.fps)
        # Untagged video is guessed to be BT.601 or BT.709 by its size; say which it is.
        stream = source.output(
            OUTPUT,
            format="mp4",
            vcodec="libx264",
            pix_fmt="yuv420p",
            crf=CRF,
            vf="scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709",
            colorspace="bt709",
            color_primaries="bt709",
            color_trc="bt709",
            movflags="+faststart",
            **tags,
        )
        command = stream.global_args("-loglevel", "error").overwrite_output().compile(cmd=_ffmpeg())
        # Put in here, since ffmpeg-python takes no path with bytes outside UTF-8. A path has the locale's bytes.
        output = b"file:" + os.fsencode(self.partial.name)
        command = [output if word == OUTPUT else as_argument(word) for word in command]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.log)

    def _failure(self) -> OSError:
        assert self.process is not None
        self.process.wait()
        self.log.seek(0)
        said = " ".join(self.log.read().decode(errors="replace").split())
        if "no space left" in said.lower():
            return WriteError(f"cannot write {shown(self.path)}: no space left on the disk")
        return WriteError(
            f"cannot write {shown(self.path)}: ffmpeg ended with status {self.process.returncode}: {said[-300:]}"
        )


def write_json(path: Path, value: Any) -> None:
    """Write a json file, whole or not at all. A path's bytes outside UTF-8 become json's own escapes."""
    with Partial(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        partial.name.write_bytes(text.encode("utf-8", "backslashreplace"))
        partial.commit()


def read_image(path: str | Path) -> np.ndarray:
    """A picture file as (H, W, 3) uint8, upright as its EXIF data say, on white where it is transparent.

    Raises ValueError when it cannot be read, is not of IMAGE_FORMATS, is too large, or holds floating point numbers.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of a size that is bounded here
            with Image.open(path, formats=_image_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS // 10**6} million pixels")
                return as_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image file") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not a readable image (none of {', '.join(IMAGE_FORMATS)})") from None
    except Exception as error:  # decoders raise whatever comes to them
        raise ValueError(f"{path} is not a readable image ({_one_line(error)})") from None


def _image_formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def as_rgb(image: Image.Image) -> np.ndarray:
    """A PIL image as (H, W, 3) uint8, upright, on white where it is transparent; ValueError for one in floats."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise ValueError("floating point numbers have no agreed white; save it in 8 or 16 bits")
    if upright.mode.startswith("I"):  # 16 bits of grey, which PIL would clip instead of scale
        deep = np.asarray(upright).astype(np.int64)
        if deep.min() < 0 or deep.max() > 0xFFFF:
            raise ValueError("more than 16 bits of grey; save it in 8 or 16 bits")
        return np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if upright.has_transparency_data:
        colours = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return np.asarray(upright.convert("RGB"))


def read_video(path: str | Path, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """The first frames of a video file, (T, H, W, 3) uint8, and its frames per second. Errors as of `read_frames`."""
    with _decoder(Path(path)) as (fps, frames):
        return np.stack(list(islice(frames, max_frames))), fps


def read_frames(path: str | Path, max_frames: int | None = None) -> Iterator[np.ndarray]:
    """The first frames of a video file, each (H, W, 3) uint8 when its turn comes: only one is in memory.

    Raises ValueError when the file is missing, is no video of VIDEO_FORMATS, is too large, or holds no frame. The name
    is that of a file, whatever it looks like, and no other file is opened that this one names.
    """
    with _decoder(Path(path)) as (_, frames):
        yield from islice(frames, max_frames)


@contextmanager
def _decoder(path: Path) -> Iterator[tuple[float, Iterator[np.ndarray]]]:
    """A video's frames per second and its frames."""
    import imageio_ffmpeg

    _ffmpeg()
    if problem := absence(path, "file"):
        raise ValueError(problem)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is not a readable video (the file is empty)")
    only = {"protocol_whitelist": "file", "format_whitelist": ",".join(VIDEO_FORMATS), "max_pixels": str(MAX_PIXELS)}
    options = [word for name, value in only.items() for word in (f"-{name}", value)]
    reader = imageio_ffmpeg.read_frames(f"file:{path}", pix_fmt="rgb24", input_params=options)
    try:
        info = next(reader)
        width, height = info["size"]
        if width * height > MAX_PIXELS:
            raise OSError(f"{width}x{height} is more than {MAX_PIXELS // 10**6} million pixels")
        first = next(reader, None)
        if first is None:
            raise ValueError(f"{path} holds no video frames")
        shape = (height, width, 3)
        yield info["fps"], (np.frombuffer(data, np.uint8).reshape(shape) for data in chain((first,), reader))
    except (OSError, RuntimeError, StopIteration, IndexError, KeyError) as error:
        said = _one_line(error)
        if "not on whitelist" in said.lower():
            said = "of a format that is not read here; mp4, mov, mkv, webm, avi and their like are"
        raise ValueError(f"{path} is not a readable video ({said[-200:]})") from None
    finally:
        reader.close()


def _one_line(error: BaseException) -> str:
    said = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(said.split()) or type(error).__name__


def _ffmpeg() -> str:
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise OSError("no ffmpeg: reinstall imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to an ffmpeg program") from None
