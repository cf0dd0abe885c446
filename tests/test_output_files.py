"""What a run writes: names that fit and belong to one run, files that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideox_xdit.fork import FORK as COGVIDEOX
from common.parallel.mesh import Mesh
from common.registry.request import WrongUse
from common.run.command_line import parse
from common.run.outputs import Output, clean_up
from common.system import files
from common.system.files import (
    Partial,
    as_argument,
    claimed,
    remove_partial,
    shown,
    spare_file,
    text_problem,
    writing_problem,
)
from common.system.progress import Report
from common.video import files as video
from common.video.files import VideoFile, read_video
from common.video.latents import load_latents, save_latents
from common.video.writers import write_json
from mochi_xdit.fork import FORK

ROOT = Path(__file__).resolve().parents[1]
FAKE = [sys.executable, str(ROOT / "tests" / "fake_fork" / "cli.py"), "--demo", "--device", "cpu", "--gpus", "1"]


def frames(value: int, count: int = 3) -> np.ndarray:
    return np.full((count, 32, 32, 3), value, dtype=np.uint8)


def problems(*arguments: str) -> list[str]:
    try:
        parse(FORK, ["--demo", "--device", "cpu", *arguments])
    except WrongUse as wrong:
        return wrong.problems
    return []


def test_two_that_write_one_name_do_not_meet(tmp_path):
    path = tmp_path / "x.mp4"
    with VideoFile(path, 8) as one, VideoFile(path, 8) as two:
        one.add(frames(10))
        two.add(frames(200))
        two.finish()
        assert abs(int(read_video(path)[0].mean()) - 200) < 8
        one.finish()
    assert abs(int(read_video(path)[0].mean()) - 10) < 8
    assert os.listdir(tmp_path) == ["x.mp4"]


def test_one_that_fails_leaves_the_other_alone(tmp_path):
    path = tmp_path / "x.mp4"
    with VideoFile(path, 8) as kept:
        kept.add(frames(50))
        with pytest.raises(ValueError), VideoFile(path, 8) as failing:
            failing.add(np.zeros(3))
        remove_partial(path)  # what the clean-up after a failure does
        kept.finish()
    assert len(read_video(path)[0]) == 3


def test_what_a_dead_run_left_is_removed_and_a_live_ones_is_not(tmp_path):
    path = tmp_path / "x.json"
    (tmp_path / ".x.0abc1234.partial.json").write_text("half")
    with Partial(path) as partial:
        remove_partial(path)
        assert partial.name.exists() and len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


def test_without_locks_nothing_of_others_is_removed(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOSYS, "function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    path = tmp_path / "x.mp4"
    with Partial(path) as partial, claimed([path]):
        remove_partial(path)
        partial.commit()
    assert os.listdir(tmp_path) == ["x.mp4"]


def test_a_json_that_cannot_be_written_costs_no_video(tmp_path):
    (tmp_path / "x.json").mkdir()
    told = r"cannot write .*x\.json: Is a directory; the video itself is complete: .*x\.mp4"
    with pytest.raises(OSError, match=told), VideoFile(tmp_path / "x.mp4", 8) as file:
        file.add(frames(90))
        file.finish(tmp_path / "x.json", {})
    assert len(read_video(tmp_path / "x.mp4")[0]) == 3 and sorted(os.listdir(tmp_path)) == ["x.json", "x.mp4"]


def test_a_path_has_the_bytes_of_the_locale(tmp_path, monkeypatch):
    """In a locale of Latin-1, where a name's bytes are not those of its UTF-8."""
    video._ffmpeg()  # found, and remembered, before its processes are caught
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("latin-1", "surrogateescape"))
    started = []
    monkeypatch.setattr(video.subprocess, "Popen", lambda command, **more: started.append(command))
    with VideoFile(tmp_path / "x.mp4", 8, title="é") as file:
        file.partial.name = Path("caf\u00e9.mp4")
        file._start(2, 2)
    assert {b"file:caf\xe9.mp4", "title=é".encode()} <= set(started[0])


def test_latents_that_an_earlier_run_has_kept_stay(tmp_path):
    earlier, mine = tmp_path / "x.latents.safetensors", tmp_path / "y.latents.safetensors"
    for path in (earlier, mine):
        path.write_bytes(b"earlier")
        request = parse(FORK, ["--demo", "--device", "cpu", "--output", str(tmp_path / f"{path.name[0]}.mp4")])
        output = Output(request.videos[0], request, Mesh(), Report())
        if path == mine:
            path.write_bytes(b"written by this run")
        output.write(frames(3))
    assert earlier.exists() and not mine.exists()


@pytest.mark.slow
def test_torchruns_ranks_give_the_names_back(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *FAKE[1:4], "cpu"]
    done = subprocess.run([*command, "--output", "x.mp4"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.mp4"]


def test_a_file_that_others_may_read(tmp_path):
    write_json(tmp_path / "x.json", {})
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_name_belongs_to_one_run(tmp_path):
    outputs = [tmp_path / f"{i}.mp4" for i in range(3)]
    with claimed(outputs):
        with pytest.raises(ValueError, match=r"2\.mp4: another run is writing it"), claimed([outputs[2]]):
            pass
        with claimed([tmp_path / "other.mp4"]):
            pass
    with claimed(outputs):
        pass
    assert os.listdir(tmp_path) == []


def test_a_killed_run_gives_its_names_back(tmp_path):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with claimed([tmp_path / "x.mp4"]):
            os.write(told, b"1")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(ValueError), claimed([tmp_path / "x.mp4"]):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with claimed([tmp_path / "x.mp4"]):
        pass


def test_the_second_run_of_one_output_is_told(tmp_path):
    line = [*FAKE, "--prompt", "one", "--output", "x.mp4"]
    first = subprocess.Popen([*line, "--pause", "0.5"], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not list(tmp_path.glob(".x.mp4.lock")):
        assert first.poll() is None
        time.sleep(0.05)
    second = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 2
    assert "error: --output x.mp4: another run is writing it" in second.stderr
    assert first.wait(60) == 0
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.mp4"]


def test_a_reader_that_left_ends_no_job(tmp_path):
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    line = [*FAKE, "--prompt-file", "two.txt", "--output", "x.mp4", "--overwrite"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(line, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x-1.mp4").exists() and (tmp_path / "x-2.mp4").exists()
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            assert subprocess.run(line, cwd=tmp_path, stdout=full, stderr=full).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_logs_on_a_full_disk_end_no_job_of_several_ranks(tmp_path):
    with open("/dev/full", "w") as full:
        line = [*FAKE[:-1], "2", "--prompt", "one", "--output", "x.mp4", "--overwrite"]
        assert subprocess.run(line, cwd=tmp_path, stdout=full, stderr=full).returncode == 0
        wrong = subprocess.run([*line, "--fault", "raise@1"], cwd=tmp_path, stdout=full, stderr=full)
    assert wrong.returncode == 1 and sorted(os.listdir(tmp_path)) == ["x.json", "x.mp4"]


@pytest.mark.parametrize("length", [225, 240, 250, 400])
def test_a_name_without_room_for_the_derived_ones(tmp_path, length):
    found = problems("--output", str(tmp_path / ("b" * length + ".mp4")))
    assert any("too long" in line for line in found)
    assert os.listdir(tmp_path) == []


def test_an_empty_name_is_a_folder():
    assert any("is a directory" in line for line in problems("--output=", "--num-videos", "3"))


@pytest.mark.parametrize("taken", ["u.json", "u.latents.safetensors", "u.mp4", "u-2.json"])
def test_a_derived_name_that_is_taken(tmp_path, taken):
    (tmp_path / taken).mkdir()
    more = ("--num-videos", "2") if "-2" in taken else ()
    found = problems("--output", str(tmp_path / "u.mp4"), *more)
    assert any(f"{taken} is a directory" in line for line in found)


def test_a_pipe_is_no_output_and_a_link_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert any("a device or a pipe" in line for line in problems("--output", str(tmp_path / "pipe.mp4")))
    (tmp_path / "link.mp4").symlink_to("real.mp4")
    request = parse(FORK, ["--demo", "--device", "cpu", "--output", str(tmp_path / "link.mp4")])
    assert request.videos[0].output == tmp_path / "real.mp4"
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    assert problems("--output", str(tmp_path / "loop.mp4"))


@pytest.mark.parametrize(
    "option", ["--output", "--model-dir", "--from-latents", "--text-cache", "--text-encoder-dir", "--prompt-file"]
)
def test_paths_too_long_are_one_line(option):
    demo = [] if option == "--model-dir" else ["--demo"]
    with pytest.raises(WrongUse) as wrong:
        parse(FORK, [*demo, "--device", "cpu", option, "a" * 300])
    assert any(option in line and "too long" in line for line in wrong.value.problems)


@pytest.mark.parametrize("option", ["--image", "--video"])
def test_an_input_too_long_is_one_line(option):
    with pytest.raises(WrongUse) as wrong:
        parse(COGVIDEOX, ["--demo", "--device", "cpu", option, "a" * 300])
    assert any(option in line and "too long" in line for line in wrong.value.problems)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody without rights")
@pytest.mark.parametrize("option", ["--output", "--from-latents", "--text-encoder-dir"])
def test_a_folder_of_somebody_else(tmp_path, monkeypatch, option):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0)
    for above in (tmp_path, *tmp_path.parents[:2]):
        above.chmod(0o755)  # pytest's folders are the user's alone
    monkeypatch.chdir("/tmp")
    child = os.fork()
    if child == 0:
        os.setuid(12345)
        found = problems(option, str(folder / "x" / "a.mp4"))
        os._exit(0 if any("permission denied" in line for line in found) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_prompts_that_no_file_can_hold(tmp_path):
    (tmp_path / "nul.txt").write_bytes(b"fine\na red circle\0 yes\n")
    (found,) = problems("--prompt-file", str(tmp_path / "nul.txt"))
    assert "line 2: character 13 is the control character U+0000" in found
    assert any("no UTF-8 text" in line for line in problems("--prompt", "caf\udce9"))
    (kept,) = parse(FORK, ["--demo", "--device", "cpu", "--prompt", "caf\udcc3\udca9"]).videos
    assert kept.prompt == "café"  # as Python reads UTF-8 in a locale of ASCII
    assert text_problem("two\nlines\tand Kreis \u2013 龙") is None
    (tmp_path / "crlf.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    request = parse(FORK, ["--demo", "--device", "cpu", "--prompt-file", str(tmp_path / "crlf.txt")])
    assert [video.prompt for video in request.videos] == ["one", "two"]


def test_a_name_outside_utf8_is_written_and_told(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    with VideoFile(path, 8, title="Kreis \u2013 龙") as file:
        file.add(frames(90))
        file.finish(path.with_suffix(".json"), {"output": str(path)})
    assert path.stat().st_size > 500
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["output"] == str(path)
    assert shown(path.name) == "caf\\xe9.mp4"
    assert as_argument("caf\udce9 \u2013 \0") == b"caf\xe9 \xe2\x80\x93 "


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("--gpus", "99999999999"), "at most 512"),
        (("--ring-degree", "9" * 20), "at most 512"),
        (("--num-videos", "1000000000"), "at most 100000"),
        (("--width", "1600000", "--height", "1600000"), "at most 16384"),
        (("--num-frames", "6" * 22), "at most 100000"),
        (("--vae-tile", "²²²"), "no tile size"),
        (("--fps", "100000000000"), "at most 1000"),
        (("--max-memory", "1e300"), "up to 1000000"),
        (("--num-steps", "9" * 20), "at most 10000"),
        (("--cfg-scale", "1e300"), "from 0 to 1000"),
        (("--overlap-groups", "9" * 20), "at most 1024"),
    ],
)
def test_absurd_numbers_are_refused_before_anything_grows(arguments, part):
    assert any(part in line for line in problems(*arguments))


def test_default_names_are_of_one_run_only():
    names = {parse(FORK, ["--model-dir", str(ROOT / "mochi_xdit/demo_data"), "--prompt", "x"]).output for _ in range(9)}
    assert len(names) == 9


def test_latents_go_elsewhere_when_their_folder_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    z, told = torch.ones(1, 4, 2, 2, 2), []
    with pytest.raises(OSError, match="cannot write"):
        save_latents(tmp_path / "gone" / "x.latents.safetensors", z, {})
    save_latents(tmp_path / "gone" / "x.latents.safetensors", z, {}, told.append)
    (kept,) = tmp_path.glob("*.latents.safetensors")
    assert kept == spare_file(tmp_path / "gone" / "x.latents.safetensors")
    assert kept != spare_file(tmp_path / "other" / "x.latents.safetensors")  # another run's, of the same name
    assert str(kept) in told[0] and "no such file" in told[0]
    assert torch.equal(load_latents(kept, 4), z)

    def full(self):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Partial, "commit", full)
    save_latents(tmp_path / "y.latents.safetensors", z, {}, told.append)
    assert "cannot be kept" in told[1] and "no space is left" in told[1]
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_the_clean_up_does_not_fail_itself():
    request = parse(FORK, ["--demo", "--device", "cpu"])
    for name in ("b" * 250 + ".mp4", "no/such/folder.mp4"):
        video = request.videos[0].__class__(**{**request.videos[0].__dict__, "output": Path(name)})
        assert clean_up(request.__class__(**{**request.__dict__, "videos": (video,)}), 0.0) == ""


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 300 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", folder]).returncode:
        pytest.skip("needs root and mounts, for a disk that is full")
    yield folder
    subprocess.run(["umount", folder])


def test_a_disk_that_fills(full_disk):
    noise = np.random.default_rng(0).integers(0, 256, (40, 128, 128, 3), dtype=np.uint8)
    with pytest.raises(OSError, match=r"cannot write .*x\.mp4.*") as full, VideoFile(full_disk / "x.mp4", 8) as file:
        file.add(noise)
        file.finish()
    assert "no space left" in str(full.value).lower()
    with pytest.raises(OSError):
        save_latents(full_disk / "x.latents.safetensors", torch.zeros(1, 4, 30, 30, 30), {})
    assert os.listdir(full_disk) == []
    (full_disk / "filler").write_bytes(bytes(290_000))
    assert "no space is left" in (writing_problem(full_disk / "x.mp4") or "")


@pytest.mark.slow
def test_another_locale_ends_no_job_of_several_ranks(tmp_path):
    (tmp_path / "two.txt").write_text("one\nKreis \u2013 \u9f99\n", encoding="utf-8")
    line = [word if word != "1" else "2" for word in FAKE]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line += ["--prompt-file", "two.txt", "--output", "x.mp4", "--overwrite"]
    done = subprocess.run(line, cwd=tmp_path, env=os.environ | plain, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x-2.mp4").exists() and b"\\u9f99" in done.stderr
