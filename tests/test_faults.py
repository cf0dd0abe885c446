"""Whole programs under fault: the fake one for everything around the models, Mochi's demo for everything it reads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.parallel.mesh import Axis, Layout, Mesh, distributed
from common.registry.forks import Fork
from common.video.files import read_video
from mochi_xdit.fork import FORK as MOCHI
from tests.fake_fork.fork import FORK as FAKE
from tests.helpers.programs import demo_of, main
from tests.test_launch import eventually

ROOT = Path(__file__).resolve().parents[1]


def start(script: str, *arguments: str, torchrun: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    """`script arguments` as a process, under torchrun if its options are given."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    command = [sys.executable, *launcher, str(ROOT / script), *arguments]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings)


def run(script: str, *arguments: str, **options) -> tuple[int, str, list[str]]:
    """Exit status, stdout, and the lines on stderr that tell of errors."""
    process = start(script, *arguments, **options)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err or options.get("torchrun"), err
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("error:")]


def call(fork: Fork, capsys, *arguments: str) -> tuple[int, list[str]]:
    """One rank in this process: saves importing torch once more."""
    status = main(fork, arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, [line for line in captured.err.splitlines() if line.startswith(("error:", "warning:"))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fake(folder: Path, *arguments: str, **options) -> tuple[int, str, list[str]]:
    return run("tests/fake_fork/cli.py", "--demo", "--output", str(folder / "out.mp4"), *arguments, **options)


@pytest.mark.slow
def test_three_ranks_make_numbered_videos(folder):
    (folder / "prompts").write_text("one\ntwo\n")
    status, out, errors = fake(folder, "--prompt-file", str(folder / "prompts"), "--gpus", "3", "--seed", "4")
    assert (status, errors) == (0, [])
    assert out.split() == [str(folder / "out-1.mp4"), str(folder / "out-2.mp4")]
    assert sorted(os.listdir(folder)) == ["out-1.json", "out-1.mp4", "out-2.json", "out-2.mp4", "prompts"]
    report = json.loads((folder / "out-2.json").read_text())
    assert report["settings"]["prompt"] == "two" and report["settings"]["seed"] == 4
    assert report["settings"]["layout"] == {"cfg": 1, "ring": 3, "ulysses": 1, "ranks": 3}
    sampling, writing = report["stages"]
    assert sampling["name"] == "sampling" and sampling["steps"] == 8 and writing["name"] == "writing"
    assert len(sampling["peak_bytes_by_rank"]) == 3 and min(sampling["peak_bytes_by_rank"]) > 1 << 20
    assert report["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_a_failure_keeps_the_videos_before_it_and_the_latents(folder):
    (folder / "prompts").write_text("one\ntwo\nthree\n")
    arguments = ("--prompt-file", str(folder / "prompts"), "--gpus", "2", "--fault", "second@1")
    status, out, errors = fake(folder, *arguments)
    assert status == 1 and out.split() == [str(folder / "out-1.mp4")]
    (line,) = errors
    assert line.startswith(
        "error: rank 1, video 2 of 3, after sampling: the second went wrong; finished latents are kept"
    )
    assert line.endswith(f"--from-latents {folder / 'out-2.latents.safetensors'}")
    assert sorted(os.listdir(folder)) == ["out-1.json", "out-1.mp4", "out-2.latents.safetensors", "prompts"]


@pytest.mark.slow
def test_a_rank_killed_while_sampling(folder):
    began = time.monotonic()
    status, _, errors = fake(folder, "--gpus", "2", "--fault", "kill@1", "--pids", str(folder / "pids"))
    assert status == 1 and time.monotonic() - began < 30
    assert errors[0].startswith("error: rank 1, sampling step 3/8: killed by signal 9 (SIGKILL)") and len(errors) == 1
    assert os.listdir(folder) == ["pids"] and not running(folder)


@pytest.mark.slow
def test_a_rank_that_hangs(folder):
    status, _, errors = fake(
        folder, "--gpus", "2", "--fault", "stop@1", "--timeout", "4", "--pids", str(folder / "pids")
    )
    assert status == 1 and len(errors) == 1
    assert "rank 0, sampling step 3/8: another rank did not answer" in errors[0]
    assert "still silent: rank 1 (sampling step 3/8)" in errors[0]
    assert os.listdir(folder) == ["pids"] and not running(folder)


@pytest.mark.slow
def test_a_rank_that_cannot_be_set_up(folder):
    status, _, errors = fake(folder, "--gpus", "2", "--fault", "setup@1")
    assert (status, errors) == (2, ["error: rank 1, opening the checkpoint: no such kernel; use another"])


def running(folder: Path) -> list[int]:
    pids = [int(line.split()[1]) for line in (folder / "pids").read_text().splitlines()]
    return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.slow
def test_ctrl_c_is_quiet(folder, ranks):
    arguments = ("--demo", "--output", str(folder / "out.mp4"), "--gpus", ranks, "--pause", "0.2", "--num-steps", "200")
    process = start("tests/fake_fork/cli.py", *arguments, "--pids", str(folder / "pids"))
    assert eventually(lambda: (folder / "pids").exists() and len(running(folder)) == int(ranks), 60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == ""
    assert "error" not in err and "Traceback" not in err
    assert os.listdir(folder) == ["pids"] and not running(folder)


@pytest.mark.slow
def test_under_torchrun_one_rank_tells(folder):
    status, _, errors = fake(folder, "--fault", "raise@1", torchrun=("--nproc-per-node", "2"))
    assert status == 1 and errors == ["error: rank 1, sampling step 3/8: tensor x of file y is missing"]


def test_a_debug_run_shows_the_traceback(folder, capsys):
    status = main(FAKE, ["--demo", "--gpus", "1", "--fault", "raise@0", "--debug"])
    told = capsys.readouterr().err
    assert (
        status == 1 and "Traceback" in told and told.splitlines()[-1].startswith("error: sampling step 3/8: tensor x")
    )


def test_a_full_disk(folder, capsys):
    (folder / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", "disk"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        size = ("--width", "128", "--height", "128", "--num-frames", "31")
        status, errors = call(FAKE, capsys, "--demo", "--gpus", "1", "--output", "disk/out.mp4", *size)
        assert status == 1 and "no space is left on the disk" in errors[0] and len(errors) == 1
        assert os.listdir("disk") == ["out.latents.safetensors"]  # finished, and named in the message
        assert "--from-latents disk/out.latents.safetensors" in errors[0]
    finally:
        subprocess.run(["umount", "disk"], check=True)


def _silent_group(rank_that_is_deaf: int, heard: Path) -> str:
    """What the self-test says when one rank does not take part. It ends the process; here the end is caught."""
    import threading

    from common.parallel import self_test as selftest

    with distributed(Layout(ring=2), "cpu", timeout=4) as mesh:
        told = threading.Event()
        words: list[str] = []
        selftest.os = type("NoExit", (), {"_exit": staticmethod(lambda status: (told.set(), heard.touch()))})
        if mesh.world.rank == rank_that_is_deaf:
            assert eventually(heard.exists)
            return ""
        try:
            selftest.self_test(mesh, 0.5, lambda error: words.append(str(error)))
        except RuntimeError:
            pass
        finally:
            selftest.os = os
        assert told.is_set()
        return words[0]


@pytest.mark.slow
def test_the_self_test_names_a_group_that_hangs(run_ranks, tmp_path):
    told = run_ranks(2, _silent_group, 1, tmp_path / "heard")[0]
    assert "the world group (2 ranks) did not answer within 0 s" in told


def _healthy_groups(cfg: int, ring: int, ulysses: int) -> bool:
    from common.parallel.self_test import self_test

    with distributed(Layout(cfg, ring, ulysses), "cpu") as mesh:
        self_test(mesh, 60, lambda error: None)
        wrong = Mesh(layout=mesh.layout, ring=Axis(mesh.ring.size, mesh.ring.rank + 1, mesh.ring.group))
        if mesh.ring.size == 3:
            with pytest.raises(RuntimeError, match="the ring group delivered"):
                self_test(wrong, 60, lambda error: None)
    return True


def test_the_self_test_passes_on_every_group(run_ranks):
    assert all(run_ranks(6, _healthy_groups, 2, 1, 3))
    assert all(run_ranks(4, _healthy_groups, 1, 2, 2))


# ---- Mochi


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    return demo_of(MOCHI)[0]


SMALL = ("--width", "32", "--height", "32", "--num-frames", "7", "--num-steps", "2", "--seed", "3")


@pytest.fixture
def checkpoint(demo, folder) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(demo, folder / "model")
    return folder / "model"


def mochi(capsys, checkpoint: Path, *arguments: str) -> tuple[int, list[str]]:
    return call(
        MOCHI, capsys, "--model-dir", str(checkpoint), "--prompt", "a red circle", "--gpus", "1", *SMALL, *arguments
    )


@pytest.mark.slow
def test_two_nodes_on_loopback_make_the_same_video(demo, folder, capsys):
    assert call(MOCHI, capsys, "--demo", *SMALL, "--gpus", "1", "--output", "one.mp4") == (0, [])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port))
    arguments = ("--demo", *SMALL, "--output", str(folder / "two.mp4"))
    agents = [start("mochi_xdit/cli.py", *arguments, torchrun=(*nodes, "--node-rank", str(i))) for i in (0, 1)]
    told = [agent.communicate(timeout=180) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    one, two = read_video("one.mp4")[0].astype(int), read_video("two.mp4")[0].astype(int)
    assert one.shape == (7, 32, 32, 3) and np.abs(one - two).max() <= 1
    layout = {"cfg": 2, "ring": 1, "ulysses": 1, "ranks": 2}
    assert json.loads((folder / "two.json").read_text())["settings"]["layout"] == layout


@pytest.mark.slow
def test_latents_survive_a_decode_that_fails(checkpoint, folder, capsys):
    assert mochi(capsys, checkpoint, "--output", "whole.mp4") == (0, [])
    decoder = next((checkpoint / "vae").glob("*.safetensors"))
    tensors = load_file(decoder)
    broken = torch.full_like(tensors["decoder.proj_out.bias"], float("nan"))
    save_file({**tensors, "decoder.proj_out.bias": broken}, decoder)
    status, (line,) = mochi(capsys, checkpoint, "--output", "out.mp4")
    assert status == 1 and "the decoder made NaN or infinity in frame" in line
    assert line.endswith("--from-latents out.latents.safetensors") and not (folder / "out.mp4").exists()
    save_file(tensors, decoder)
    assert mochi(capsys, checkpoint, "--output", "out.mp4", "--from-latents", "out.latents.safetensors") == (0, [])
    assert np.array_equal(read_video("out.mp4")[0], read_video("whole.mp4")[0])
    assert (folder / "out.latents.safetensors").exists()  # it was given, so it is not ours to remove
    assert not (folder / "whole.latents.safetensors").exists()


def test_a_truncated_decoder_is_found_before_anything_is_loaded(checkpoint, folder, capsys):
    decoder = next((checkpoint / "vae").glob("*.safetensors"))
    decoder.write_bytes(decoder.read_bytes()[:-1000])
    status, (line,) = mochi(capsys, checkpoint, "--output", "out.mp4")
    assert status == 1 and line.startswith(f"error: opening the checkpoint: {decoder}: truncated file, tensor")


def damage(checkpoint: Path, how: str) -> tuple[Path, str]:
    """Break the transformer's file; returns it, and what a user must be told besides its name."""
    file = next((checkpoint / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("to_q.weight"))
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return file, "tensor"
    if how == "missing tensor":
        del tensors[name]
    elif how == "wrong shape":
        tensors[name] = tensors[name][:-1].clone()
    elif how == "wrong dtype":
        tensors[name] = tensors[name].to(torch.int32)
    elif how == "no file":
        file.unlink()
        return file.parent, ""
    elif how == "no safetensors":
        file.write_bytes(b"<html>not found</html>" * 10)
        return file, ""
    if how != "truncated":
        save_file(tensors, file)
    return file, name


@pytest.mark.parametrize(
    "how", ["truncated", "missing tensor", "wrong shape", "wrong dtype", "no file", "no safetensors"]
)
@pytest.mark.slow
def test_damaged_checkpoints_are_named(checkpoint, folder, capsys, how):
    file, word = damage(checkpoint, how)
    status, (line,) = mochi(capsys, checkpoint)
    assert status == 1 and str(file) in line and word in line
    assert not (folder / "outputs").exists() or os.listdir(folder / "outputs") == []


def test_a_t5_directory_without_a_tokenizer(checkpoint, folder, capsys):
    shutil.rmtree(checkpoint / "tokenizer")
    status, (line,) = mochi(capsys, checkpoint, "--output", "out.mp4")
    assert status in (1, 2) and "tokenizer" in line
    assert os.listdir(folder) == ["model"]


def test_nan_in_the_latents_stops_the_run(checkpoint, folder, capsys):
    file = next((checkpoint / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["proj_out.bias"][:] = float("nan")
    save_file(tensors, file)
    status, (line,) = mochi(capsys, checkpoint, "--output", "out.mp4")
    assert status == 1 and "NaN" in line and "step 1" in line
    assert os.listdir(folder) == ["model"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_decoder_that_overflows_gives_no_video_and_keeps_the_latents(checkpoint, folder, capsys, ranks):
    file = next((checkpoint / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["decoder.proj_out.bias"][1] = float("inf")  # which the conversion to bytes would show as white
    save_file(tensors, file)
    if ranks == 1:
        status, errors = mochi(capsys, checkpoint, "--output", "out.mp4")
    else:
        what = ("--model-dir", str(checkpoint), "--prompt", "a red circle", "--gpus", "2", "--device", "cpu", *SMALL)
        status, _, errors = run("mochi_xdit/cli.py", *what, "--output", str(folder / "out.mp4"))
    (line,) = errors
    assert status == 1 and "decoding" in line and "the decoder made NaN or infinity in frame" in line
    assert "latents are kept" in line and sorted(os.listdir(folder)) == ["model", "out.latents.safetensors"]


def test_latents_that_are_none(demo, folder, capsys):
    Path("text.safetensors").write_text("hello")
    status, (line,) = call(MOCHI, capsys, "--demo", "--gpus", "1", "--from-latents", "text.safetensors")
    assert status == 2 and "text.safetensors" in line


@pytest.mark.parametrize(
    "bad, said",
    [
        (torch.full((1, 12, 2, 4, 4), torch.nan), "NaN or infinity"),
        (torch.full((1, 12, 2, 4, 4), -torch.inf, dtype=torch.float16), "NaN or infinity"),
        (torch.zeros(1, 12, 2, 4, 4, dtype=torch.complex64), "torch.complex64; expected one of bf16, fp16"),
        (torch.zeros(1, 12, 2, 4, 4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(1, 12, 2, 4, 4, dtype=torch.bool), "torch.bool"),
        (torch.zeros(1, 12, 2, 4, 4).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.zeros(1, 12, 0, 4, 4), "(1, 12, 0, 4, 4); expected (1, 12, T, h, w)"),
        (torch.zeros(1, 12, 2, 0, 4), "(1, 12, 2, 0, 4)"),
        (torch.zeros(1, 16, 2, 4, 4), "(1, 16, 2, 4, 4)"),
        (torch.zeros(12, 2, 4, 4), "(12, 2, 4, 4)"),
    ],
)
def test_latents_that_no_decoder_takes(demo, folder, capsys, bad, said):
    save_file({"latents": bad}, "bad.safetensors")
    arguments = ("--demo", "--gpus", "1", "--from-latents", "bad.safetensors", "--output", "out.mp4")
    status, (line,) = call(MOCHI, capsys, *arguments)
    assert status == 2 and "--from-latents bad.safetensors holds latents" in line and said in line
    assert os.listdir(folder) == ["bad.safetensors"]


@pytest.mark.slow
def test_a_long_prompt_is_cut_with_a_warning(demo, folder, capsys):
    arguments = ("--demo", "--gpus", "1", *SMALL, "--prompt", "red circle " * 60 + "zebra", "--output", "out.mp4")
    status, (line,) = call(MOCHI, capsys, *arguments)
    assert status == 0 and line.startswith("warning:") and "zebra" in line
