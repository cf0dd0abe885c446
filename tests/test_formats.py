"""What is written by suffix, read back by others' readers: frames, quality, sound, settings inside, and failures."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from common.system.files import PartialFolder, remove_partial
from common.video.files import Audio, VideoFile, _ffmpeg, read_video
from common.video.formats import (
    FORMATS,
    FRAME_NAMES,
    destination_problem,
    open_writer,
    output_problem,
    suffix_of,
    write_frames,
)
from common.video.metadata import with_webp_exif
from common.video.pictures import read_image, write_picture
from common.video.writers import FrameFolder

TITLE, COMMENT = "a lemon; 50% =\nKreis \u2013 龙", json.dumps({"seed": 7, "prompt": "é"}, ensure_ascii=False)
NAMES = ["x.mp4", "x.webm", "x.gif", "x.webp", "x.npy", "x.safetensors", "x"]


def noise(count: int, height: int = 31, width: int = 45) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def ramp(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture that changes in space and time and survives compression."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([20 + 10 * t, 40 + y * 2, 60 + x * 2], -1).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    """All frames, by a reader that is not ours."""
    if path.is_dir():
        return np.stack([np.asarray(Image.open(name)) for name in sorted(path.iterdir())])
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return file.get_tensor("frames")
    if path.suffix in (".mp4", ".webm"):
        return read_video(path)[0]
    with Image.open(path) as image:
        frames = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def said(path: Path) -> str:
    """What ffmpeg tells about a file."""
    return subprocess.run([_ffmpeg(), "-i", str(path)], capture_output=True).stderr.decode()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "x.gif"])
def test_quality_0_is_without_loss(tmp_path, name):
    frames = noise(5)
    write_frames(tmp_path / name, (torch.from_numpy(part) for part in (frames[:2], frames[2:])), 24, crf=0)
    assert np.array_equal(read(tmp_path / name), frames)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", NAMES[:4])
def test_what_loses_stays_close(tmp_path, name):
    frames = ramp(6)
    write_frames(tmp_path / name, frames, 25)
    back = read(tmp_path / name)
    assert back.shape == frames.shape and np.abs(back.astype(int) - frames).mean() < (6 if name == "x.gif" else 4)
    assert ", 25 fps" in said(tmp_path / name) or name == "x.webp"


@pytest.mark.parametrize("name", ["x.mp4", "x.webm"])
def test_a_higher_crf_is_smaller(tmp_path, name):
    sizes = []
    for crf in (None, 5, 45):
        write_frames(tmp_path / name, noise(4, 64, 64), 8, crf=crf)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[1] > sizes[0] > sizes[2]
    codec = {"x.mp4": "h264", "x.webm": "vp9"}[name]
    assert codec in said(tmp_path / name) and "yuv420p(tv, bt709" in said(tmp_path / name)


def test_one_frame_of_webp_is_a_still_and_several_an_animation(tmp_path):
    path = tmp_path / "x.webp"
    for count, lossless in ((1, 0), (1, None), (3, None), (3, 0)):
        write_frames(path, noise(count), 10, TITLE, COMMENT, crf=lossless)
        with Image.open(path) as image:
            assert (image.n_frames, image.is_animated) == (count, count > 1)
            if count > 1:
                assert image.info["loop"] == 0
                image.seek(1)
                image.load()
                assert image.info["duration"] == 100
        assert np.array_equal(read(path), noise(count)) == (lossless == 0)


def test_a_gif_lasts_as_long_as_it_should(tmp_path):
    write_frames(tmp_path / "x.gif", noise(30, 8, 8), 30)  # a frame is 1/30 s, which gif has not
    durations = []
    with Image.open(tmp_path / "x.gif") as image:
        assert image.info["loop"] == 0
        for i in range(image.n_frames):
            image.seek(i)
            durations.append(image.info["duration"])
    assert len(durations) == 30 and 980 <= sum(durations) <= 1020 and set(durations) == {30, 40}


def test_an_ffmpeg_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("common.video.files._ffmpeg", lambda: "/no/such/ffmpeg")
    with pytest.raises(OSError, match="cannot start /no/such/ffmpeg: no such file"):
        write_frames(tmp_path / "x.mp4", ramp(1), 8)
    assert os.listdir(tmp_path) == []


def test_equal_frames_of_webp_become_one_that_lasts_longer(tmp_path):
    path = tmp_path / "x.webp"
    for crf in (None, 0):
        write_frames(path, np.repeat(ramp(1), 3, 0), 10, TITLE, crf=crf)  # a still, without the header of animations
        assert inside(path)[0] == TITLE and np.abs(read(path).astype(int) - ramp(1)).mean() < 4
        write_frames(path, ramp(4)[[0, 1, 1, 3, 3, 3]], 10, crf=crf)
        durations = []
        with Image.open(path) as image:
            for i in range(image.n_frames):
                image.seek(i)
                image.load()
                durations.append(image.info["duration"])
        assert durations == [100, 200, 300]


def inside(path: Path) -> tuple[str, str]:
    """Title and comment of a file."""
    if path.is_dir():
        return inside(max(path.iterdir()))
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return file.metadata()["title"], file.metadata()["comment"]
    with Image.open(path) as image:
        if image.format == "GIF":
            return TITLE, image.info["comment"].decode()
        if image.format == "PNG":
            return image.text["Title"], image.text["Comment"]
        raw = image.getexif()
        comment = raw.get_ifd(0x8769).get(0x9286, b"        ")
    title = raw.get(0x010E, "")  # bytes of UTF-8, which PIL reads as Latin-1
    return title.encode("latin-1").decode(), comment[8:].decode("ascii" if comment[0:5] == b"ASCII" else "utf-16-le")


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.jpg", "x.jpeg", "x.safetensors", "x"])
def test_settings_are_inside(tmp_path, name):
    for comment in (COMMENT, COMMENT.replace("é", "e")):
        write_frames(tmp_path / name, ramp(1 if FORMATS[suffix_of(name)].single else 3), 8, TITLE, comment)
        assert inside(tmp_path / name) == (TITLE, comment)


def test_headers_are_aligned(tmp_path):
    write_frames(tmp_path / "x.webp", ramp(2), 8)
    for i in range(4):
        content = with_webp_exif((tmp_path / "x.webp").read_bytes(), bytes(i))
        assert len(content) == 8 + int.from_bytes(content[4:8], "little") and len(content) % 2 == 0
        write_frames(tmp_path / "x.safetensors", ramp(2), 8, "t" * i, "c")
        assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("name", ["x.mp4", "x.webm"])
def test_settings_are_inside_of_videos(tmp_path, name):
    for more in ({}, {"crf": 0}, {"audio": Audio(np.zeros((1, 8000)), 8000)}):
        write_frames(tmp_path / name, ramp(3), 8, TITLE, COMMENT, **more)
        told = " ".join(said(tmp_path / name).split())
        assert COMMENT in told and "a lemon; 50% =" in told and "Kreis \u2013 龙" in told


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.gif", "x.webp", "x.png", "x.jpg"])
def test_settings_without_end_are_cut(tmp_path, name):
    write_frames(tmp_path / name, ramp(1), 8, "龙" * 90_000, "é" + "e" * 90_000)
    assert len(read(tmp_path / name)) == 1
    write_frames(tmp_path / name, ramp(1), 8, "\0\udce9", "\0\udce9")
    assert len(read(tmp_path / name)) == 1


def test_pictures(tmp_path):
    picture = ramp(1)[0]
    for name in ("a.png", "a.jpg", "a.webp", "b.webp"):
        write_picture(tmp_path / name, torch.from_numpy(picture), TITLE, COMMENT, lossless=name == "b.webp")
        assert inside(tmp_path / name) == (TITLE, COMMENT)
        difference = np.abs(read_image(tmp_path / name).astype(int) - picture)
        assert difference.max() == 0 if name in ("a.png", "b.webp") else 0 < difference.mean() < 2
    assert len(os.listdir(tmp_path)) == 4
    for path, wrong in (("a.bmp", picture), ("a", picture), ("a.png", picture[..., 0]), ("a.png", picture / 255)):
        with pytest.raises(ValueError, match=r"choose one of \.png|needed is uint8"):
            write_picture(tmp_path / path, wrong)
    with pytest.raises(OSError, match=r"cannot write .*none.a\.png: No such file"):
        write_picture(tmp_path / "none" / "a.png", picture)
    with pytest.raises(ValueError, match="holds one picture"):
        write_frames(tmp_path / "a.png", ramp(2), 8)
    assert np.array_equal(read_image(tmp_path / "a.png"), picture) and len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.gif", "x.webp", "x.png", "x.npy", "x.safetensors", "x"])
def test_nothing_is_left_of_what_was_not_finished(tmp_path, name):
    write_frames(tmp_path / name, ramp(1), 8)
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / name, 8, TITLE) as file:
        file.add(noise(1))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="no frames"):
        write_frames(tmp_path / name, iter([]), 8)
    with pytest.raises(ValueError, match="frames of 64x48 in a video of 45x31"):
        write_frames(tmp_path / name, iter([noise(1), ramp(1)]), 8)
    assert os.listdir(tmp_path) == [name] and read(tmp_path / name).shape[1:3] == (48, 64)
    with open_writer(tmp_path / name, 8) as file:  # an older one is replaced
        file.add(noise(1))
        file.finish(tmp_path / "x.json", {"seed": 7})
    assert sorted(os.listdir(tmp_path)) == sorted([name, "x.json"])
    assert read(tmp_path / name).shape[1:3] == ((32, 46) if name == "x.mp4" else (31, 45))


@pytest.fixture(scope="module")
def tiny_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    "name", ["x.mp4", "x.webm", "x.gif", "x.webp", "x.png", "x.jpg", "x.npy", "x.safetensors", "x"]
)
def test_a_full_disk(tiny_disk, name):
    single = FORMATS[suffix_of(name)].single
    frames = noise(1, 300, 300) if single else noise(8, 128, 128)
    crf = {"x.mp4": 5, "x.webm": 5, "x.webp": 0}.get(name)
    with pytest.raises(OSError, match=rf"cannot write {tiny_disk}/{name}: (?i:no space left on)") as full:
        write_frames(tiny_disk / name, frames, 8, TITLE, crf=crf)
    assert "partial" not in str(full.value) and os.listdir(tiny_disk) == []


def test_a_disk_that_is_full_once_the_sound_comes(tiny_disk):
    sound = Audio(np.random.default_rng(0).uniform(-1, 1, (2, 48_000 * 8)), 48_000)
    with pytest.raises(OSError, match=r"cannot write .*x\.mp4: no space left on the disk"):
        write_frames(tiny_disk / "x.mp4", ramp(8), 1, audio=sound)
    assert os.listdir(tiny_disk) == []


def tone(seconds: float, rate: int) -> np.ndarray:
    """Two channels: silence, then 440 Hz from 0.25 s on, the right one at half the level."""
    t = np.arange(round(seconds * rate)) / rate
    left = 0.5 * np.sin(2 * np.pi * 440 * t) * (t >= 0.25)
    return np.stack([left, left / 2])


def heard(path: Path, channels: int, rate: int) -> np.ndarray:
    line = [_ffmpeg(), "-loglevel", "error", "-i", path, "-vn", "-ar", str(rate), "-f", "f32le", "pipe:"]
    return np.frombuffer(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout, "<f4").reshape(-1, channels).T


@pytest.mark.parametrize("name, rate", [("x.mp4", 44_100), ("x.mp4", 16_000), ("x.webm", 48_000), ("x.webm", 22_050)])
@pytest.mark.parametrize("seconds", [0.6, 1.0, 2.5])
def test_sound_lasts_as_long_as_the_frames(tmp_path, name, rate, seconds):
    frames, samples = ramp(8), tone(seconds, rate)
    write_frames(tmp_path / name, frames, 8, audio=Audio(torch.from_numpy(samples), rate))
    back = heard(tmp_path / name, 2, rate)
    assert abs(back.shape[1] - rate) <= 1024  # one packet of AAC
    both = min(back.shape[1], samples.shape[1], rate)
    settled = slice(round(0.3 * rate), both - round(0.05 * rate))
    assert np.abs(back[:, settled] - samples[:, settled]).max() < 0.05  # in step, each channel in its place
    assert np.abs(back[:, : round(0.2 * rate)]).max() < 0.01
    assert seconds > 0.8 or np.abs(back[:, round(0.65 * rate) :]).max() < 0.01
    assert read(tmp_path / name).shape == frames.shape and os.listdir(tmp_path) == [name]
    assert {"x.mp4": "Audio: aac", "x.webm": "Audio: opus"}[name] in said(tmp_path / name)


def test_sound_leaves_the_frames_as_they_are(tmp_path):
    loud = Audio(np.full((1, 4000), 7.0, np.float32), 8000)
    write_frames(tmp_path / "a.mp4", noise(4), 8, crf=0)
    write_frames(tmp_path / "b.mp4", noise(4), 8, audio=loud, crf=0)
    assert np.array_equal(read(tmp_path / "a.mp4"), noise(4)) and np.array_equal(read(tmp_path / "b.mp4"), noise(4))
    assert 0.9 < np.abs(heard(tmp_path / "b.mp4", 1, 8000)).max() < 1.5


@pytest.mark.parametrize(
    "samples, rate, part",
    [
        (np.zeros(800), 8000, "needed are floats"),
        (np.zeros((1, 800), np.int16), 8000, "int16"),
        (np.zeros((1, 0)), 8000, "needed are floats"),
        (np.zeros((800, 2)), 8000, "800 channels"),
        (np.full((1, 8), np.nan), 8000, "NaN"),
        (np.zeros((1, 800)), 24, "from 8000"),
    ],
)
def test_what_is_no_sound(samples, rate, part):
    with pytest.raises(ValueError, match=part):
        Audio(samples, rate)


@pytest.mark.parametrize(
    "name, known, part",
    [
        ("x.avi", {}, r"x\.avi: nothing is written as \.avi; allowed are \.mp4 and \.webm .*folder"),
        ("x.png", {"num_frames": 2}, "holds one frame, not 2"),
        ("x.gif", {"fps": 60}, "at most 50 frames a second"),
        ("x.webp", {"size": (480, 16384)}, "at most 16383 pixels"),
        ("x.gif", {"sound": True}, r"holds no sound; choose \.mp4 or \.webm"),
        ("x.gif", {"crf": 0}, "takes none"),
        ("x", {"crf": 17}, "a folder of PNGs, which takes 0"),
        ("x.mp4", {"crf": 52}, r"0 \(without loss\) to 51"),
        ("x.webm", {"crf": -1}, "to 63"),
    ],
)
def test_what_a_format_does_not_hold(tmp_path, name, known, part):
    assert re.search(part, output_problem(tmp_path / name, **known) or "")
    if not {"num_frames", "size", "sound"} & set(known):
        with pytest.raises(ValueError, match=part):
            open_writer(tmp_path / name, **{"fps": 8, **known})
    assert os.listdir(tmp_path) == []


def test_every_name_is_understood():
    for name in ("x.MP4", "x.webm", "x.Jpeg", "frames", "v1.0/", ".hidden"):
        assert output_problem(name, num_frames=1, size=(480, 848), fps=30) is None
    assert suffix_of("v1.0/") == suffix_of("frames") == "" and suffix_of("a.b.NPY") == ".npy"
    with pytest.raises(ValueError, match="holds no sound"):
        VideoFile("x.gif", 8, audio=Audio(np.zeros((1, 8)), 8000))
    with pytest.raises(ValueError, match="crf 0"):
        VideoFile("x.gif", 8, crf=0)


def test_a_folder_of_frames(tmp_path):
    path = tmp_path / "v1.0"
    write_frames(f"{path}/", noise(11, 4, 4), 8)
    assert sorted(os.listdir(path))[::10] == ["frame-000000.png", "frame-000010.png"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~mask
    write_frames(f"{path}/", noise(2, 4, 4), 8)  # no frame of the longer one stays
    assert len(os.listdir(path)) == 2 and os.listdir(tmp_path) == ["v1.0"]
    for fine in (f"{path}/", tmp_path / "new", tmp_path / "new.mp4"):
        assert destination_problem(fine) is None
    assert os.listdir(tmp_path) == ["v1.0"]
    (tmp_path / "link").symlink_to(path)
    write_frames(tmp_path / "link", noise(3, 4, 4), 8)
    assert (tmp_path / "link").is_symlink() and len(os.listdir(path)) == 3


def test_a_folder_with_something_else_in_it_is_kept(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    assert "holds thesis.txt" in str(destination_problem(tmp_path / "x"))
    with pytest.raises(OSError, match=r"cannot write .*x: the folder holds thesis\.txt"):
        write_frames(tmp_path / "x", noise(2, 4, 4), 8)
    with pytest.raises(OSError, match=r"cannot write .*file: a file has this name"):
        write_frames(tmp_path / "file", noise(2, 4, 4), 8)
    assert "does not exist" in str(destination_problem(tmp_path / "none" / "x"))
    assert sorted(os.listdir(tmp_path)) == ["file", "x"] and os.listdir(tmp_path / "x") == ["thesis.txt"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    write_frames(tmp_path / "x", noise(3, 4, 4), 8)
    renamed = os.rename

    def second_fails(source, target):
        if Path(target) == tmp_path / "x" and "partial" in str(source):
            raise OSError(28, "No space left on device")
        renamed(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match=r"cannot write .*x: No space left"):
        write_frames(tmp_path / "x", noise(2, 4, 4), 8)
    assert os.listdir(tmp_path) == ["x"] and len(os.listdir(tmp_path / "x")) == 3


def test_a_dead_runs_folder_is_removed_and_a_live_ones_is_not(tmp_path):
    (tmp_path / ".x.0abc1234.partial").mkdir()
    (tmp_path / ".x.0abc1234.partial" / "frame-000000.png").touch()
    with PartialFolder(tmp_path / "x", FRAME_NAMES) as live, FrameFolder(tmp_path / "x") as other:
        other.add(noise(2, 4, 4))
        remove_partial(tmp_path / "x")
        assert live.name.exists() and len(os.listdir(tmp_path)) == 2
        other.finish()
    assert os.listdir(tmp_path) == ["x"] and len(os.listdir(tmp_path / "x")) == 2
