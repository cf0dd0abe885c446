"""Process groups as NCCL needs them, though these ranks use gloo: made once and in one order, used in one order by all,
never torn down on the way out of an error; and what the ranks of a world decide together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from cogvideox_xdit import CogVideoXPipeline
from common.parallel import network as interface
from common.parallel.mesh import Mesh, distributed, resolve_device
from common.parallel.self_test import self_test
from common.registry.layout import Layout
from common.registry.settings import DecodeOptions
from common.system.environment import Process
from tests.helpers.cogvideox import clip, write_checkpoint
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.ranks import JOB_SECONDS
from tests.helpers.recorder import Record, agree, record_rank, recording

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = [Layout(ring=2), Layout(ulysses=3), Layout(cfg=2, ring=2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_checkpoint(tmp_path_factory.mktemp("groups"), kind) for kind in ("2b", "1.5-i2v")}


def make_video(folder: Path, mesh: Mesh, spoil: Callable[[CogVideoXPipeline], None] = lambda pipe: None, **how: Any):
    """Text, video encode, three steps, decode in several chunks."""
    pipe = CogVideoXPipeline.from_pretrained(folder, mesh=mesh, dtype="fp32", **how)
    spoil(pipe)
    options = {"video": clip(17), "height": 48, "width": 32, "num_frames": 17}
    return pipe("a boat", num_steps=4, seed=1, decode=DecodeOptions("exact", 2), **options)


def two_videos(layout: Layout, folders: dict[str, Path]) -> tuple[Record, list[int]]:
    """What this rank did, and how many groups had been made after the start, the first video, and the second."""
    made = []
    with recording(int(os.environ["RANK"])) as record, distributed(layout) as mesh:
        made.append(len(record.log))
        make_video(folders["2b"], mesh, shard_weights=True)
        made.append(len(record.log))
        pipe = CogVideoXPipeline.from_pretrained(folders["1.5-i2v"], mesh=mesh, dtype="fp32")
        pipe(
            "a boat",
            image=clip(1, 64, 96)[0],
            height=64,
            width=96,
            num_frames=9,
            num_steps=2,
            decode=DecodeOptions("tiled"),
        )
        made.append(len(record.log))
    return record, made


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.slow
def test_groups_are_made_once_and_used_in_one_order(run_ranks, folders, layout):
    results = run_ranks(layout.ranks, two_videos, layout, folders)
    records = [record for record, _ in results]
    agree(records)
    for record, made in results:
        assert made[0] == made[1] == made[2], "a video made or destroyed groups"
        assert [name for what, name in record.log if what == "destroy"], "nothing was destroyed at the end"
        # Weights are gathered in a group in which nothing else happens.
        gathered = {c.group for c in record.collectives if c.op == "_allgather_base_"}
        assert len(gathered) == 1 and set(record.of(*gathered)) == {"_allgather_base_"}


@pytest.mark.parametrize("layout", [Layout(ring=2), Layout(ulysses=3), Layout(2, 3, 2), Layout(1, 2, 4)], ids=str)
def test_the_groups_of_a_gpu_mesh_are_made_alike_on_all_ranks(layout):
    with fake_cuda():
        records = [record_rank(layout, rank, device="cuda") for rank in range(layout.ranks)]
    agree(records)
    for record in records:
        pairs = [group for group in record.made.values() if group.backend == "nccl" and len(group.ranks) == 2]
        assert len(pairs) == (3 if layout.ranks == 2 else 2)  # two ranks: the weights' group is a pair as well
        assert [c.tensors[0][2] for c in record.collectives] == ["cuda", "cuda"]


def test_neighbours_are_connected_in_rounds_rather_than_in_a_row():
    """A rank connects the even one of its edges first, so that all pairs of a round connect at once."""
    layout = Layout(ulysses=8)
    for rank in range(8):
        record = record_rank(layout, rank)
        first, second = (record.made[c.group].ranks for c in record.collectives)
        assert first == (rank // 2 * 2, rank // 2 * 2 + 1) and second != first


def test_circles_and_differences_are_found():
    """The harness itself: what it must not let pass."""
    records = [record_rank(Layout(ring=2), rank) for rank in range(2)]
    agree(records)
    edges = [name for name, group in records[0].made.items() if len(group.ranks) == 2][-2:]
    records[0].log += [("destroy", name) for name in edges]
    records[1].log += [("destroy", name) for name in reversed(edges)]
    with pytest.raises(AssertionError, match="wait for each other"):
        agree(records)
    other = [record_rank(Layout(ring=2), 0), record_rank(Layout(ring=2), 1, lambda mesh: dist.barrier())]
    with pytest.raises(AssertionError, match="different collectives"):
        agree(other)


# ---- errors


class Broken(Exception):
    pass


def failing(stage: str, layout: Layout, folder: Path) -> tuple[str, float]:
    """The error that comes out on this rank, and the seconds between the fault, in rank 1, and there."""
    broke = [0.0]
    name = f"_load_{stage}" if stage == "encoder" else f"load_{stage}"

    def breaks(*_: Any) -> None:
        broke[0] = time.monotonic()
        raise Broken(f"the {stage} broke")

    def spoil(pipe: CogVideoXPipeline) -> None:
        load = getattr(pipe, name)

        def spoiled() -> torch.nn.Module:
            model = load()
            model.register_forward_hook(breaks)
            return model

        if pipe.mesh.world.rank == 1:
            setattr(pipe, name, spoiled)

    def waiting(group: Any = None) -> None:
        """NCCL's teardown returns when the other ranks have come to it too; to rank 1's they never do."""
        if os.environ["RANK"] == "1":
            time.sleep(40)

    with mock.patch.object(dist, "destroy_process_group", waiting):
        try:
            with distributed(layout, timeout=15) as mesh:
                make_video(folder, mesh, spoil)
        except Exception as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - broke[0]
    return "", 0.0


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("stage", ["encoder", "transformer", "decoder"])
@pytest.mark.slow
def test_an_error_leaves_its_rank_without_waiting_for_the_others(run_ranks, folders, stage, ranks):
    pipes = run_ranks.start(ranks, failing, stage, Layout(ring=ranks), folders["2b"])
    try:
        assert pipes[1].poll(JOB_SECONDS)
        returned, told = pipes[1].recv()
        assert returned, told
    finally:
        run_ranks.close()  # the others wait until their time is up
    error, seconds = told
    assert error == f"Broken: the {stage} broke" and seconds < 10


# ---- decisions


CHOOSER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from common.run import command_line as cli
from common.run import launch
from common.registry.layout import Layout
from tests.fake_fork.fork import FORK
from tests.fake_fork.generate import generate
rank = int(os.environ["RANK"])
layouts = (Layout(ring=2), Layout(ulysses=2))
cli.choose_layout = lambda *_: (layouts[rank], "")
other = ["--fps", "9"] if rank and "--pause" in sys.argv else []
sys.exit(launch.run(FORK, generate, sys.argv[1:] + other))
"""


def torchrun(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    (folder / "chooser.py").write_text(CHOOSER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(folder / "chooser.py")]
    command += ["--demo", "--timeout", "10", "--output", str(folder / "out.mp4"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("error:")]


@pytest.mark.slow
def test_under_torchrun_rank_0_chooses_for_all(tmp_path):
    assert torchrun(tmp_path) == (0, [])
    layout = json.loads((tmp_path / "out.json").read_text())["settings"]["layout"]
    assert layout == {"cfg": 1, "ring": 2, "ulysses": 1, "ranks": 2}


@pytest.mark.slow
def test_under_torchrun_another_command_line_is_refused(tmp_path):
    status, (line,) = torchrun(tmp_path, "--pause", "0")
    assert status == 1 and line.startswith("error: rank 1, starting: this rank was started with `--demo")
    assert "--fps 9`, rank 0 with `--demo" in line and line.endswith("give all the same")


def different_layouts() -> str:
    try:
        distributed(Layout(ring=2) if os.environ["RANK"] == "0" else Layout(ulysses=2), timeout=20)
    except ValueError as error:
        return str(error)
    return ""


def test_every_rank_hears_of_different_layouts(run_ranks):
    message = "rank 1 asks for layout cfg 1 x ring 1 x ulysses 2, rank 0 for cfg 1 x ring 2 x ulysses 1"
    assert all(told.startswith(message) for told in run_ranks(2, different_layouts))


def test_a_rank_takes_the_one_gpu_that_it_is_shown():
    with fake_cuda(devices=1, tensors=False):
        assert resolve_device("cuda", 3, local_ranks=8) == torch.device("cuda", 0)
        with pytest.raises(ValueError, match="only 1 are visible"):
            resolve_device("cuda:3", 3, local_ranks=8)
    with fake_cuda(devices=4, tensors=False):
        assert resolve_device("auto", 3, local_ranks=4) == torch.device("cuda", 3)
        with pytest.raises(ValueError, match="needs GPU 5, but only 4"):
            resolve_device("cuda", 5, local_ranks=8)


def groups_tested(layout: Layout) -> dict[str, list[str]]:
    with recording(int(os.environ["RANK"])) as record, distributed(layout) as mesh:
        before = len(record.collectives)
        self_test(mesh, 60, lambda error: None)
        record.collectives = record.collectives[before:]
        axes = {name: getattr(mesh, name) for name in ("world", "cfg", "sequence", "ring", "ulysses", "weights")}
        return {name: record.of(axis.group.group_name) for name, axis in axes.items() if axis.group is not None}


def test_the_self_test_uses_each_group_as_the_model_does(run_ranks):
    for tested in run_ranks(4, groups_tested, Layout(2, 2, 1)):
        for name in ("cfg", "sequence", "ring"):
            assert tested[name] == ["alltoall_base_"], name
        assert tested["weights"] == ["_allgather_base_"]


# ---- the network


NAMESPACE = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
def ip(*words):
    subprocess.run(["ip", *words], check=True)
ip("link", "set", "lo", "up")
ip("link", "add", "train0", "type", "veth", "peer", "name", "far0")
ip("addr", "add", "10.77.0.5/24", "dev", "train0")
ip("link", "set", "train0", "up")
ip("link", "set", "far0", "up")
ip("route", "add", "default", "via", "10.77.0.1")
from common.parallel.network import choose_interface
from common.system.environment import Process
for master in ("10.77.0.9", "10.77.0.5", "127.0.0.1", "localhost", "myself"):
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    os.environ["MASTER_ADDR"] = master
    choose_interface(Process(1, 4, 1, 2, "torchrun"))
    print(master, os.environ.get("GLOO_SOCKET_IFNAME"))
"""


def test_gloo_takes_the_interface_towards_the_first_machine(tmp_path):
    """In a network of its own, whose host name is a loopback name as Ubuntu writes it."""
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 myself\n")
    (tmp_path / "names.py").write_text(NAMESPACE)
    inside = f"mount --bind {tmp_path}/hosts /etc/hosts && exec {sys.executable} {tmp_path}/names.py {ROOT}"
    if sys.platform != "linux" or subprocess.run(["unshare", "-nm", "ip", "link"], capture_output=True).returncode:
        pytest.skip("a network namespace needs Linux, root and iproute2")
    done = subprocess.run(["unshare", "-nm", "sh", "-c", inside], capture_output=True, text=True, timeout=60)
    assert dict(line.split() for line in done.stdout.splitlines()) == {
        "10.77.0.9": "train0",
        "10.77.0.5": "train0",
        "127.0.0.1": "None",
        "localhost": "None",
        "myself": "train0",
    }, done.stderr


def test_a_chosen_interface_and_a_single_machine_are_left_alone(monkeypatch):
    monkeypatch.setattr(interface, "interface_towards", lambda address: "wrong")
    monkeypatch.setenv("MASTER_ADDR", "10.77.0.9")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    interface.choose_interface(Process(1, 4, 1, 2, "torchrun"))
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    interface.choose_interface(Process(1, 2, 1, 2, "torchrun"))
    assert "GLOO_SOCKET_IFNAME" not in os.environ
