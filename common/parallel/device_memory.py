"""Memory that can still be allocated: on the devices, and on this machine within the limits of its control groups."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from common.parallel.mesh import Mesh, all_min

MARGIN = 1.25
SPARE = 512 * 2**20
"""The one margin: free bytes wanted for each byte of activations that is counted, and on top of that.

Allocators round (malloc kept up to 0.4 GB), convolutions and matrix products take workspaces (cuBLAS's are 32 MiB on
Hopper and 8 MiB elsewhere for each stream), and NCCL connects after free memory was asked for. By arithmetic; what a
GPU really takes has not been measured.
"""

# Limits of a control group in bytes, its usage, and its page cache that the kernel drops first, in memory.stat.
_GROUP_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


def wanted(weights: int, activations: int) -> int:
    """Free bytes that a stage wants, the decode like the others, for what is counted of it."""
    return int(weights + MARGIN * activations + SPARE)


def release_memory() -> None:
    """Give back what freed models held."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_memory(mesh: Mesh, most: int | None = None, reclaimable: int = 0) -> int:
    """Bytes that every rank can still allocate on its device: the smallest figure of them all. Collective.

    most: no more than this, where a rank has been given a limit. reclaimable: bytes of this rank's that count as free.
    """
    if mesh.device.type == "cuda":
        free = torch.cuda.mem_get_info(mesh.device)[0]
        free += torch.cuda.memory_reserved(mesh.device) - torch.cuda.memory_allocated(mesh.device)
    else:
        free = host_memory() // mesh.world.size
    free += reclaimable
    return all_min(mesh.world, free if most is None else min(free, most), mesh.device)


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process can still take; where Linux does not say, a cautious 4 GiB.

    The least of what the machine has available and what each control group that the process is in leaves: containers
    are such groups, and their limit is not in meminfo. root: where /proc and /sys are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return 4 << 30
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return max(0, min([available, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """Limit minus usage of every control group from the process's own up to the root, for those that have a limit.

    A container may see the path that its group has outside, with its own group mounted as the root: levels that are
    not there are passed over.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, mount = (1, "sys/fs/cgroup/memory") if controllers else (2, "sys/fs/cgroup")
        path = Path(own.lstrip("/"))
        for level in (path, *path.parents):
            yield from _left_in(root / mount / level, version)


def _left_in(group: Path, version: int) -> Iterator[int]:
    limits, usage, inactive = _GROUP_FILES[version]
    try:
        used = int((group / usage).read_text())
        counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        for name in limits:
            if (group / name).exists() and (limit := (group / name).read_text().strip()) != "max":
                yield int(limit) - used + int(counters.get(inactive, 0))
    except (OSError, ValueError):
        return  # no such group, or no memory controller in it
