"""Worker groups on Ray: a cluster of two nodes on this machine, one of which goes away in the middle of a video."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from common.registry.layout import Layout
from common.workers import ray_cluster
from common.workers.group import Cancelled, Finished, GroupError, Lost
from common.workers.ray_cluster import ray_module
from common.workers.ray_group import RayGroup
from mochi_xdit.fork import FORK as MOCHI
from tests.helpers.clusters import needs_ray, one_node
from tests.helpers.programs import main, problems, read
from tests.helpers.workers import SMALL, alone, at_step, ended, job, levels_apart, run, running, until


@pytest.fixture
def cluster() -> Iterator[Any]:
    with one_node() as cluster:
        yield cluster


@pytest.mark.slow
def test_a_node_goes_in_the_middle_and_the_rest_make_the_same_video(cluster, tmp_path):
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    work = job(tmp_path, MOCHI, "v", "--dtype", "fp32", "--prompt", "a red ball", *SMALL, "--num-steps", 60)
    expected = alone(MOCHI, work.request)
    group = RayGroup(2, on_cpu=True, address=cluster.address, timeout=120)
    group.start()
    try:
        assert group.devices == (0, 1) and group.health().state == "idle"
        group.submit(replace(work, id="left", keep_state=None))
        until(group, at_step(1))
        group.cancel("left")
        assert isinstance(until(group, ended)[-1], Cancelled)
        loadings = group.health().loadings

        group.submit(work)
        until(group, at_step(5))
        assert group.health().loadings == loadings
        pids = [rank.pid for rank in group.health().ranks]
        cluster.remove_node(second)
        end = until(group, ended)[-1]
        assert isinstance(end, Lost) and end.at is not None and end.at[0] >= 1, end
        assert work.keep_state.exists()

        group.start()
        assert group.devices == (0,)
        rest = replace(work, request=replace(work.request, layout=Layout()), state=work.keep_state)
        end, _ = run(group, rest)
        assert isinstance(end, Finished), end
        assert levels_apart(work, expected) <= 1 and not work.keep_state.exists()
    finally:
        group.stop(5)
    assert not running(pids)


@pytest.mark.slow
def test_a_group_that_waits_for_the_cluster_can_be_stopped(cluster):
    group = RayGroup(2, on_cpu=True, address=cluster.address, timeout=120)
    said: list[str] = []

    def start() -> None:
        try:
            group.start()
        except GroupError as error:
            said.append(str(error))

    starting = threading.Thread(target=start)
    starting.start()
    while not ray_module().is_initialized():  # then it waits for the second CPU, and would start with one
        time.sleep(0.01)
    group.stop(0)
    starting.join()
    assert said == ["the group was stopped while it started"] and group.health().state == "stopped"
    group.start()
    assert group.devices == (0,) and group.health().state == "idle"
    group.stop(5)


def test_what_takes_connections_and_is_no_cluster_is_told(monkeypatch):
    needs_ray()
    monkeypatch.setattr(ray_cluster, "ANSWER_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(GroupError, match=f"what is at {address} does not answer as a Ray cluster does"):
            ray_cluster.check(address, on_cpu=True, ranks=1)


def test_a_call_that_does_not_come_back_is_left():
    left = threading.Event()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(GroupError, match="at there does not answer"):
        patch.setattr(ray_cluster, "ANSWER_SECONDS", 0.1)
        ray_cluster.within(left.wait, "there")
    left.set()
    with pytest.raises(ZeroDivisionError):
        ray_cluster.within(lambda: 1 / 0, "there")


def test_a_command_for_a_cluster_that_is_not_there_is_wrong_use(tmp_path, capsys):
    needs_ray()
    asked = ("--ray-address", "127.0.0.1:1", "--device", "cpu", "--gpus", "2", "--prompt", "x")
    assert main(MOCHI, ["--demo", *asked, "--output", str(tmp_path / "x.mp4")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: --ray-address: no Ray cluster at 127.0.0.1:1: connection refused; start one")
    assert not list(tmp_path.iterdir())


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GroupError, match=r"need the package ray: .*install"):
        RayGroup(2, on_cpu=True)


def test_a_command_that_asks_for_ray_is_checked_at_the_door(monkeypatch, tmp_path):
    given = ("--demo", "--ray-address", "--output", tmp_path / "x.mp4")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else found(name, *more))
    assert problems(MOCHI, *given)[0].startswith("--ray-address needs the package ray: ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "ray" or found(name, *more))
    # Its GPUs are not those of this machine.
    request = read(MOCHI, *given, "--gpus", 4)
    assert (request.ray_address, request.runtime.device, request.layout.ranks) == ("auto", "cuda", 4)
    request = read(MOCHI, *given, "--device", "cpu", "--ring-degree", 3)
    assert (request.runtime.device, request.layout.ranks, request.replicas) == ("cpu", 3, 1)
