"""Video files: frames to mp4, webm, gif and webp through a pipe to ffmpeg, and back. Frames are (T, H, W, 3) uint8.

ffmpeg comes with imageio-ffmpeg; nothing has to be installed on the system.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from common.system.files import Partial, WriteError, absence, as_argument, reason, shown
from common.video.metadata import exif, truncated, with_gif_comment, with_webp_exif
from common.video.pictures import MAX_PIXELS, QUALITY, one_line
from common.video.writers import FrameWriter

if TYPE_CHECKING:
    from torch import Tensor

INPUT, OUTPUT = "file:input", "file:output"
VIDEO_FORMATS = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v"),
    *("flv", "gif", "apng", "ogg", "asf", "mxf", "nut", "ivf", "h264", "hevc", "av1", "obu", "yuv4mpegpipe"),
)
"""ffmpeg's names of the containers that are read: none of them names other files that ffmpeg would open."""
MAX_TAG_BYTES = 60_000  # one command line argument may hold 128 KiB
MAX_CHANNELS = 2
SOUND_BITRATE = "192k"
# Untagged video is guessed to be BT.601 or BT.709 by its size; say which it is.
_YUV = {
    "pix_fmt": "yuv420p",
    "vf": "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709",
    "colorspace": "bt709",
    "color_primaries": "bt709",
    "color_trc": "bt709",
}
_VP9 = {"vcodec": "libvpx-vp9", "row-mt": 1, "deadline": "good", "video_bitrate": 0}


@dataclass(frozen=True)
class Container:
    """How ffmpeg writes a kind of file: its muxer with options, and those of the encoder with loss and without."""

    muxer: Mapping[str, Any]
    lossy: Mapping[str, Any]
    lossless: Mapping[str, Any] | None = None
    even: bool = False
    """Whether the lossy pictures need even sizes."""
    sound: str | None = None
    """The encoder of sound, where there can be any."""
    seal: Callable[[bytes, str, str], bytes] | None = None
    """(the file, title, comment) -> the file with them, where ffmpeg writes none."""


MP4 = Container(
    {"format": "mp4", "movflags": "+faststart"},
    # crf: x264's constant rate factor; at 17 the eye sees no loss.
    {"vcodec": "libx264", "crf": 17, **_YUV},
    {"vcodec": "libx264rgb", "crf": 0, "pix_fmt": "rgb24"},
    even=True,
    sound="aac",
)
CONTAINERS = {
    ".mp4": MP4,
    ".webm": Container(
        {"format": "webm"},
        {**_VP9, "crf": 20, "cpu-used": 2, **_YUV},
        {**_VP9, "lossless": 1, "cpu-used": 4, "pix_fmt": "gbrp"},
        sound="libopus",
    ),
    ".gif": Container(
        {"format": "gif"},
        # One palette for all frames: with one for each, what stands still would flicker.
        {"vf": "split[a][b];[a]palettegen[palette];[b][palette]paletteuse=diff_mode=rectangle"},
        seal=lambda gif, title, comment: with_gif_comment(gif, comment or title),
    ),
    ".webp": Container(
        {"format": "webp", "loop": 0},
        {"vcodec": "libwebp_anim", "pix_fmt": "bgra", "quality": QUALITY},
        {"vcodec": "libwebp_anim", "pix_fmt": "bgra", "lossless": 1},
        seal=lambda webp, title, comment: with_webp_exif(webp, exif(title, comment)),
    ),
}
"""By suffix. Any other is written as mp4."""


@dataclass(frozen=True, eq=False)
class Audio:
    """Sound beside frames.

    Raises ValueError for what is no sound. What lies outside of [-1, 1] is clipped when it is written.
    """

    samples: np.ndarray | Tensor = field(repr=False)
    """(channels, n) floats in [-1, 1], one or two channels."""
    rate: int
    """Samples a second."""

    def __post_init__(self) -> None:
        samples = np.asarray(self.samples)
        if samples.ndim != 2 or not np.issubdtype(samples.dtype, np.floating) or 0 in samples.shape:
            raise ValueError(f"the sound is {samples.dtype} {samples.shape}; needed are floats (channels, n)")
        if samples.shape[0] > MAX_CHANNELS:
            raise ValueError(f"the sound has {samples.shape[0]} channels; at most {MAX_CHANNELS}, as (channels, n)")
        if not 8_000 <= self.rate <= 192_000:
            raise ValueError(f"the sound has {self.rate} samples a second; from 8000 to 192000 are allowed")
        if not np.isfinite(samples).all():
            raise ValueError("the sound contains NaN or infinity")

    def lasting(self, seconds: float) -> np.ndarray:
        """(n, channels) 32 bit floats of just this duration: cut, or followed by silence."""
        count = max(1, round(seconds * self.rate))
        samples = np.asarray(self.samples)[:, :count].clip(-1, 1).astype("<f4")
        return np.pad(samples, ((0, 0), (0, count - samples.shape[1]))).T


class VideoFile(FrameWriter):
    """Frames to the kind of video file that the suffix names, mp4 for any that is not in CONTAINERS; see `FrameWriter`.

    mp4 is H.264 and yuv420p, which every player takes. Odd sizes grow by one repeated row or column there: yuv420p has
    no odd sizes in H.264. webm is VP9, the one that every browser takes. gif has one palette for all frames, which
    ffmpeg holds in memory while it makes it. webp is a still for one frame; of equal frames in a row it has one that
    lasts longer. gif and webp repeat for ever.

    crf: the encoder's constant rate factor, 1 (best) to 51 in mp4 and to 63 in webm; None: 17 and 20, which look like
    the frames. 0: without loss, as RGB, since 8 bits of YUV do not hold all its colours; in webp as well. What is built
    on ffmpeg (mpv, VLC) plays these; phones and most browsers have no decoder for such an mp4 (H.264 High 4:4:4
    Predictive). gif has no quality, webp 0 alone.

    audio: in mp4 (AAC) and webm (Opus). It lasts as long as the frames do: what is longer is cut, what is shorter is
    followed by silence. It is added when the frames are complete, so that both files are on the disk for a while.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        title: str = "",
        comment: str = "",
        audio: Audio | None = None,
        crf: int | None = None,
    ) -> None:
        suffix = Path(path).suffix.lower()
        self.container = CONTAINERS.get(suffix, MP4)
        self.encoder = _encoder(self.container, suffix, crf)
        if audio is not None and self.container.sound is None:
            raise ValueError(f"{shown(path)}: {suffix} holds no sound; choose .mp4 or .webm")
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the file is left
        super().__init__(path)
        self.fps, self.audio = fps, audio
        self.tags = {"title": title, "comment": comment}
        self.process: subprocess.Popen[bytes] | None = None

    def _leave(self) -> None:
        if self.process is not None:
            with suppress(OSError):
                self.process.kill()
            self.process.wait()
            with suppress(OSError):
                if self.process.stdin:
                    self.process.stdin.close()
        self.log.close()

    def _begin(self, height: int, width: int) -> None:
        even = self.container.even and self.encoder["pix_fmt"] == "yuv420p"
        self.padding = ((0, height % 2), (0, width % 2), (0, 0)) if even else ((0, 0),) * 3
        self.process = self._start(height + self.padding[0][1], width + self.padding[1][1])

    def _write(self, picture: np.ndarray) -> None:
        self._send(np.pad(picture, self.padding, mode="edge"))

    def _end(self) -> None:
        self._finish_process()
        if self.audio is not None:
            self._add_sound(self.audio.lasting(self.count / self.fps))
        if self.container.seal is not None and any(self.tags.values()):
            content = self.container.seal(self.partial.name.read_bytes(), *self.tags.values())
            self.partial.name.write_bytes(content)

    def _add_sound(self, samples: np.ndarray) -> None:
        """The complete video once more, its pictures copied, with sound: its duration is known only now."""
        import ffmpeg

        silent, self.partial = self.partial, Partial(self.path)
        try:
            assert self.audio is not None
            channels = samples.shape[1]
            sound = ffmpeg.input("pipe:", format="f32le", ar=self.audio.rate, ac=channels)
            video = ffmpeg.input(INPUT).video
            options = {"vcodec": "copy", "acodec": self.container.sound, "audio_bitrate": SOUND_BITRATE}
            output = ffmpeg.output(video, sound.audio, OUTPUT, **options, **self.container.muxer)
            self.process = self._run(output, {INPUT: silent.name})
            self._send(samples)
            self._finish_process()
        finally:
            silent.__exit__(None, None, None)

    def _start(self, height: int, width: int) -> subprocess.Popen[bytes]:
        import ffmpeg

        tags = {
            f"metadata:g:{i}": f"{key}={truncated(text, MAX_TAG_BYTES)}"
            for i, (key, text) in enumerate(self.tags.items())
            if text
        }
        source = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", framerate=self.fps)
        return self._run(source.output(OUTPUT, **self.encoder, **self.container.muxer, **tags), {})

    def _run(self, output: Any, inputs: Mapping[str, Path]) -> subprocess.Popen[bytes]:
        command = output.global_args("-loglevel", "error").overwrite_output().compile(cmd=_ffmpeg())
        # Put in here, since ffmpeg-python takes no path with bytes outside UTF-8. A path has the locale's bytes.
        names = {name: b"file:" + os.fsencode(path) for name, path in (*inputs.items(), (OUTPUT, self.partial.name))}
        command = [names.get(word) or as_argument(word) for word in command]
        try:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.log)
        except OSError as error:
            raise WriteError(f"cannot start {shown(os.fsdecode(command[0]))}: {reason(error)}") from None

    def _send(self, data: np.ndarray) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(np.ascontiguousarray(data).data)
        except BrokenPipeError:
            raise self._failure() from None

    def _finish_process(self) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            raise self._failure() from None
        if self.process.wait() != 0:
            raise self._failure()

    def _failure(self) -> OSError:
        assert self.process is not None
        self.process.wait()
        self.log.seek(0)
        message = " ".join(self.log.read().decode(errors="replace").split())
        if "no space left" in message.lower():
            return WriteError(f"cannot write {shown(self.path)}: no space left on the disk")
        return WriteError(
            f"cannot write {shown(self.path)}: ffmpeg ended with status {self.process.returncode}: {message[-300:]}"
        )


def _encoder(container: Container, suffix: str, crf: int | None) -> dict[str, Any]:
    """The encoder's options for a quality; ValueError for one that it has not."""
    if crf is None:
        return dict(container.lossy)
    if crf == 0 and container.lossless is not None:
        return dict(container.lossless)
    if crf > 0 and "crf" in container.lossy:
        return {**container.lossy, "crf": crf}
    raise ValueError(f"crf {crf} is none that {suffix} knows")


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
        message = one_line(error)
        if "not on whitelist" in message.lower():
            message = "of a format that is not read here; mp4, mov, mkv, webm, avi and their like are"
        raise ValueError(f"{path} is not a readable video ({message[-200:]})") from None
    finally:
        reader.close()


def _ffmpeg() -> str:
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise OSError("no ffmpeg: reinstall imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to an ffmpeg program") from None
