"""Measures the links between this machine's ranks and what one device computes; xdit-doctor starts it on every rank.

Bandwidths are bytes that a rank sends while it receives as many. Medians of a few rounds after one to warm up.
"""

from __future__ import annotations

import json
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.parallel.exchange import exchange
from common.parallel.mesh import Layout, Mesh, distributed
from common.parallel.self_test import self_test
from common.run.channel import Channel, handed_down
from common.system.environment import this_process

ROUNDS = 5
SELF_TEST_SECONDS = 30.0


@dataclass(frozen=True)
class Job:
    """What the ranks are to measure."""

    device: str
    ranks: int
    message: int
    """Bytes of a message."""
    matrix: int
    output: Path
    """Where rank 0 writes the findings."""
    timeout: float = 60.0


def run(job: Job, mesh: Mesh) -> dict[str, Any]:
    """All measurements, collectively; every rank gets the findings."""
    start = time.perf_counter()
    self_test(mesh, SELF_TEST_SECONDS, lambda error: print(f"error: {error}", file=sys.stderr, flush=True))
    report: dict[str, Any] = {"ranks": job.ranks, "device": str(mesh.device.type), "self_test": "passed"}
    report["self_test_s"] = round(time.perf_counter() - start, 2)
    report["compute"] = compute(mesh.device, job.matrix)
    if job.ranks > 1:
        report["pairs"] = pairs(mesh, job.message)
        report["all_to_all_gbs"] = all_to_all(mesh, job.message)
        report["ring_gbs"] = ring(mesh, job.message)
    return report


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(device: torch.device, action: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median seconds of a call, the device's work included."""
    times = []
    for _ in range(rounds + 1):
        _synchronize(device)
        start = time.perf_counter()
        action()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def compute(device: torch.device, n: int) -> dict[str, float]:
    """TFLOP/s of a matrix product and of attention, GB/s of a copy, on this rank's device (bf16 on a GPU)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    heads, width = 8, 128
    q = torch.randn(1, heads, n, width, device=device, dtype=dtype)
    attention = torch.nn.functional.scaled_dot_product_attention
    return {
        "matmul_tflops": 2 * n**3 / _seconds(device, lambda: a @ a) / 1e12,
        "attention_tflops": 4 * heads * width * n**2 / _seconds(device, lambda: attention(q, q, q)) / 1e12,
        "copy_gbs": 2 * a.nbytes / _seconds(device, a.clone) / 1e9,
    }


def _both_ways(send: torch.Tensor, receive: torch.Tensor, to: int, source: int) -> None:
    ops = [dist.P2POp(dist.isend, send, to), dist.P2POp(dist.irecv, receive, source)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def _slowest(value: float, mesh: Mesh) -> float:
    box = torch.tensor([value], dtype=torch.float64, device=mesh.device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box.item())


def pairs(mesh: Mesh, message: int) -> list[dict[str, float]]:
    """Bandwidth and latency of every pair while the others are idle."""
    entries = []
    big = torch.zeros(message, dtype=torch.uint8, device=mesh.device)
    small = torch.zeros(8, dtype=torch.uint8, device=mesh.device)
    for a in range(mesh.world.size):
        for b in range(a + 1, mesh.world.size):
            times = []
            for data in (big, small):
                seconds = 0.0
                if mesh.world.rank in (a, b):
                    other, inbox = a + b - mesh.world.rank, torch.empty_like(data)

                    def swap(data: torch.Tensor = data, inbox: torch.Tensor = inbox, other: int = other) -> None:
                        _both_ways(data, inbox, other, other)

                    seconds = _seconds(mesh.device, swap)
                times.append(_slowest(seconds, mesh))
            entries.append({"a": a, "b": b, "gbs": message / times[0] / 1e9, "latency_us": times[1] * 1e6})
    return entries


def all_to_all(mesh: Mesh, message: int) -> float:
    """GB/s that a rank sends while all exchange equal parts with all."""
    size = mesh.world.size
    part = max(1, message // size)
    data, rows = torch.zeros(part * size, dtype=torch.uint8, device=mesh.device), [part] * size
    seconds = _slowest(_seconds(mesh.device, lambda: exchange(data, rows, rows, mesh.world)()), mesh)
    return part * (size - 1) / seconds / 1e9


def ring(mesh: Mesh, message: int) -> float:
    """GB/s that a rank sends while all pass a message on around a ring."""
    size, rank = mesh.world.size, mesh.world.rank
    data = torch.zeros(message, dtype=torch.uint8, device=mesh.device)
    box = torch.empty_like(data)
    to, source = (rank + 1) % size, (rank - 1) % size
    return message / _slowest(_seconds(mesh.device, lambda: _both_ways(data, box, to, source)), mesh) / 1e9


def main() -> None:
    """One rank under common.run.supervise."""
    job: Job = pickle.loads(handed_down())
    at = this_process()
    channel = Channel(at)
    try:
        mesh = distributed(Layout(ulysses=job.ranks), job.device, timeout=job.timeout)
        report = run(job, mesh)
    except Exception as error:
        channel.failed("measuring links", error)
        channel.leave(1)
    if at.rank == 0:
        job.output.write_text(json.dumps(report), encoding="utf-8")
    channel.leave(0)


if __name__ == "__main__":
    main()
