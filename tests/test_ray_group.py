"""Worker groups on Ray: a cluster of two nodes on this machine, one of which goes away in the middle of a video."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from common.registry.layout import Layout
from common.workers.group import Cancelled, Finished, GroupError, Lost
from common.workers.ray_group import RayGroup
from mochi_xdit.fork import FORK as MOCHI
from tests.helpers.programs import problems, read
from tests.helpers.workers import SMALL, alone, at_step, ended, job, levels_apart, run, running, until


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: the extra ray brings it")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


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
