"""What a process finds around it: which rank it is, the machine's GPUs and cores, its standard streams. No torch."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

REPORT, LIFE, STDERR, PARENT = "XDIT_REPORT_FD", "XDIT_LIFE_FD", "XDIT_STDERR_FD", "XDIT_PARENT_PID"
HANDED = "XDIT_REQUEST_FD"
"""Variables that `common.run.supervise` gives a rank: descriptors of its pipes, and who started it."""


@dataclass(frozen=True)
class Process:
    """This process among others: a rank of torchrun's or of `supervise`'s, or alone (`launcher` is None)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str | None = None


def this_process(env: Mapping[str, str] = os.environ) -> Process:
    """The one reading of torchrun's variables. Raises ValueError, with the fix, for values that name no rank.

    Without both RANK and WORLD_SIZE this process is alone. So it is in a world of one that torchrun did not make:
    job schedulers preset such a world in every container, and it is no reason not to start ranks.
    """
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Process()
    world = _number(env, "WORLD_SIZE", 1, None)
    rank = _number(env, "RANK", 0, world - 1)
    if world == 1 and REPORT not in env and "TORCHELASTIC_RUN_ID" not in env:
        return Process()
    local_world = _number(env, "LOCAL_WORLD_SIZE", 1, world) if "LOCAL_WORLD_SIZE" in env else world
    local_rank = _number(env, "LOCAL_RANK", 0, local_world - 1) if "LOCAL_RANK" in env else 0
    return Process(rank, world, local_rank, local_world, "supervise" if REPORT in env else "torchrun")


def _number(env: Mapping[str, str], name: str, least: int, most: int | None) -> int:
    text = env[name]
    if (
        text.isascii()
        and text.isdigit()
        and len(text) < 10
        and int(text) >= least
        and (most is None or int(text) <= most)
    ):
        return int(text)
    bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
    raise ValueError(
        f"the environment has {name}={text[:40]!r}, which is no whole number {bounds}; "
        "unset RANK and WORLD_SIZE to let the program start its ranks, or start it with torchrun"
    )


def driver_present() -> bool:
    """Whether the system has a GPU driver, whatever this PyTorch can do with it."""
    return any(os.path.exists(node) for node in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def visible_gpus() -> int:
    """GPUs this process may use. torch is asked only where a driver is present."""
    if not driver_present():
        return 0
    import torch

    with warnings.catch_warnings():
        # A driver that is too old is told by the caller, in one line.
        warnings.simplefilter("ignore")
        usable = torch.cuda.is_available()
    # The count alone comes from the driver's own library, which has one for GPUs that CUDA cannot use.
    return torch.cuda.device_count() if usable else 0


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_cores(at: Process) -> None:
    """Give every CPU rank its share of the cores; torchrun's blanket single thread is not a choice of the user's."""
    if at.launcher == "torchrun" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        import torch

        torch.set_num_threads(max(1, cores() // at.local_world_size))


def open_standard_streams() -> None:
    """Open descriptors 0 to 2 where whoever started us closed them, as daemons and cron wrappers do.

    Otherwise the next pipe or file would get such a number, and would be replaced by a child's own stdin or stderr.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            devnull = os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one
            os.set_inheritable(devnull, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", closefd=False))  # noqa: SIM115
