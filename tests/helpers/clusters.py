"""A Ray cluster of this machine's own, in which nodes are processes."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}


def needs_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: the extra ray brings it")


@contextmanager
def one_node() -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` with one node of one CPU; `add_node` and `remove_node` are its."""
    needs_ray()
    handler = signal.getsignal(signal.SIGTERM)
    with mock.patch.dict(os.environ, QUIET):
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            signal.signal(signal.SIGTERM, handler)  # the cluster has taken it
