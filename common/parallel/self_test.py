"""Two seconds that prove the ranks can talk, before anyone waits for weights to load."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

from common.parallel.mesh import Axis, Mesh


def self_test(mesh: Mesh, limit: float, on_hang: Callable[[TimeoutError], None]) -> None:
    """Send a number through every group of the mesh, the way the model will, and check what arrives. Collective.

    Afterwards every group is connected and has its buffers, so that free memory can be measured. The groups of
    neighbours (`common.parallel.mesh.edges`) have been connected when they were made.

    limit: seconds for each group. A group that does not answer ends this process with status 1 after
    `on_hang(error)` has told the user: a collective that hangs cannot be interrupted in any other way.
    Raises RuntimeError when a group delivers wrong numbers.
    """
    tests = {
        "world": (mesh.world, _gather),
        "cfg": (mesh.cfg, _all_to_all),
        "sequence": (mesh.sequence, _all_to_all),
        "ring": (mesh.ring, _all_to_all),
        "ulysses": (mesh.ulysses, _all_to_all),
        "weights": (mesh.weights, _gather_single),
    }
    for name, (axis, test) in tests.items():
        if axis.group is None:
            continue
        message = f"the {name} group ({axis.size} ranks) did not answer within {limit:.0f} s; check network and drivers"
        timer = threading.Timer(limit, _give_up, (on_hang, TimeoutError(message)))
        timer.daemon = True
        timer.start()
        ranks = test(axis, mesh.device)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        timer.cancel()
        if ranks.tolist() != list(range(axis.size)):
            raise RuntimeError(f"the {name} group delivered {ranks.tolist()}, expected {list(range(axis.size))}")


def _give_up(on_hang: Callable[[TimeoutError], None], error: TimeoutError) -> None:
    on_hang(error)
    os._exit(1)


def _gather(axis: Axis, device: torch.device) -> torch.Tensor:
    ranks = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(axis.size)]
    dist.all_gather(ranks, torch.full((1,), axis.rank, device=device), group=axis.group)
    return torch.cat(ranks)


def _gather_single(axis: Axis, device: torch.device) -> torch.Tensor:
    ranks = torch.zeros(axis.size, dtype=torch.int64, device=device)
    dist.all_gather_single(ranks, torch.full((1,), axis.rank, device=device), group=axis.group)
    return ranks


def _all_to_all(axis: Axis, device: torch.device) -> torch.Tensor:
    ranks = torch.zeros(axis.size, dtype=torch.int64, device=device)
    # With splits, as the model gives them: NCCL has another function for even ones.
    ones = [1] * axis.size
    dist.all_to_all_single(ranks, torch.full((axis.size,), axis.rank, device=device), ones, ones, group=axis.group)
    return ranks
