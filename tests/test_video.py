"""Frames to mp4 and back, and every way a file can fail."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.video.files import VideoFile, _ffmpeg, read_video
from common.video.formats import write_frames
from common.video.pictures import read_image
from common.video.writers import write_json


def ramp(count: int, height: int, width: int) -> np.ndarray:
    """A picture that changes in space and time and survives compression."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([20 + 10 * t, 40 + y * 2, 60 + x * 2], -1).astype(np.uint8)


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (1, 1), (2, 33)])
def test_round_trip(tmp_path, size):
    frames = ramp(7, *size)
    path = tmp_path / "a b: c.mp4"
    write_frames(path, torch.from_numpy(frames), fps=24)
    read, fps = read_video(path)
    height, width = size
    assert read.shape == (7, height + height % 2, width + width % 2, 3) and fps == 24
    assert np.abs(read[:, :height, :width].astype(int) - frames).mean() < 4
    assert os.listdir(tmp_path) == [path.name]


def test_chunks_make_the_same_video(tmp_path):
    frames = ramp(9, 32, 32)
    write_frames(tmp_path / "whole.mp4", frames, 8)
    write_frames(tmp_path / "parts.mp4", (frames[i : i + 4] for i in range(0, 9, 4)), 8)
    assert np.array_equal(read_video(tmp_path / "whole.mp4")[0], read_video(tmp_path / "parts.mp4")[0])
    assert len(read_video(tmp_path / "whole.mp4", max_frames=5)[0]) == 5


def test_metadata_and_sidecar(tmp_path):
    path = tmp_path / "out.mp4"
    with VideoFile(path, 30, title="a lemon; 50% = \nyellow", comment='{"seed": 7}') as file:
        file.add(ramp(3, 32, 32))
        assert not path.exists()
        file.finish(tmp_path / "out.json", {"seed": 7, "prompt": "é"})
    shown = subprocess.run([_ffmpeg(), "-i", str(path)], capture_output=True, text=True).stderr
    assert '{"seed": 7}' in shown and "a lemon; 50% =" in shown
    assert "h264" in shown and "yuv420p(tv, bt709" in shown and "32x32" in shown and "30 fps" in shown
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == {"seed": 7, "prompt": "é"}
    assert sorted(os.listdir(tmp_path)) == ["out.json", "out.mp4"]


def test_nothing_is_left_of_an_interrupted_video(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoFile(tmp_path / "out.mp4", 30) as file:
        file.add(ramp(40, 64, 64))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_an_older_video_survives_a_failure(tmp_path):
    path = tmp_path / "out.mp4"
    write_frames(path, ramp(2, 32, 32), 8)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="32x32"):
        write_frames(path, iter([ramp(2, 32, 32), ramp(2, 32, 48)]), 8)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 1), np.uint8)]
)
def test_frames_that_are_none(tmp_path, bad):
    with pytest.raises(ValueError, match="needed are uint8"):
        write_frames(tmp_path / "out.mp4", bad, 8)
    with pytest.raises(ValueError, match="no frames"):
        write_frames(tmp_path / "out.mp4", iter([]), 8)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*out\.mp4.*No such file"):
        write_frames(tmp_path / "none" / "out.mp4", ramp(2, 32, 32), 8)


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tiny_disk):
    noise = np.random.default_rng(0).integers(0, 256, (30, 128, 128, 3), dtype=np.uint8)
    with pytest.raises(OSError, match="no space left on the disk"):
        write_frames(tiny_disk / "out.mp4", noise, 8)
    assert os.listdir(tiny_disk) == []
    with pytest.raises(OSError, match="No space left"):
        write_json(tiny_disk / "out.json", ["x" * 1000] * 1000)
    assert os.listdir(tiny_disk) == []


def test_read_image(tmp_path):
    picture = ramp(1, 20, 30)[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(picture, -1))
    Image.fromarray(np.full((4, 5), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png"), np.full((4, 5, 3), 0x80, np.uint8))
    Image.fromarray(picture).convert("LA").save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (20, 30, 3)


def damaged(tmp_path: Path) -> list[Path]:
    Image.fromarray(ramp(1, 64, 64)[0]).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:80])
    write_frames(tmp_path / "good.mp4", ramp(5, 32, 32), 8)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:400])
    (tmp_path / "empty.bin").touch()
    (tmp_path / "text.bin").write_text("this is no picture\n" * 20)
    return [tmp_path / name for name in ("cut.png", "cut.mp4", "empty.bin", "text.bin", "none.bin", ".")]


def test_unreadable_files_are_named_in_one_line(tmp_path):
    for path in damaged(tmp_path):
        for read in (read_image, read_video):
            if (read, path.name) == (read_video, "cut.png"):
                continue  # ffmpeg may show what there is of a picture
            with pytest.raises(ValueError) as caught:
                read(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
