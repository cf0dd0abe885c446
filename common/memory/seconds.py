"""How long sampling takes on a CPU: its FLOPs by what this machine multiplies in a second, measured at once."""

from __future__ import annotations

import time

import torch

LONG = 3600.0
"""Seconds of sampling that nobody is made to wait for on a CPU without having asked for it."""
SLOWEST = 1e9
"""FLOP/s that any machine makes: what takes less than `LONG` at this rate is not measured."""
SIDE = 1024


def cpu_rate(dtype: torch.dtype) -> float:
    """FLOP/s of matrix products of this dtype in this process: the best of three of 2 GFLOP each."""
    a, seconds = torch.ones(SIDE, SIDE, dtype=dtype), []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(seconds)


def cpu_seconds(flops: float, dtype: torch.dtype, ranks: int = 1) -> float:
    """Seconds that a rank's FLOPs take at least, by its matrix products alone; 0 for what is done in minutes anywhere.

    ranks: how many share the cores that this process measures with.
    """
    return 0.0 if flops < LONG * SLOWEST else flops * ranks / cpu_rate(dtype)


def duration(seconds: float) -> str:
    """A long time in words that need not be precise."""
    hours = seconds / 3600
    return f"{hours:.0f} hours" if hours < 72 else f"{hours / 24:.0f} days"
