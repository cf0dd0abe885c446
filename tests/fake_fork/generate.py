"""Noise, after steps that are all-reduces."""

from __future__ import annotations

import os
import signal
import time

from common.registry.request import Request, as_wrong_use
from common.run.outputs import Output, outputs


def generate(request: Request, mesh, report) -> None:
    with as_wrong_use(), report.stage("opening the checkpoint", quiet=True):
        if fault(request, mesh) == "setup":
            raise ValueError("no such kernel; use another")
    for output in outputs(request, mesh, report):
        output.write(make(output, request, mesh, report))


def fault(request: Request, mesh) -> str:
    """The kind of this rank's fault."""
    kind, _, rank = (request.options.fault or "").partition("@")
    return kind if rank and int(rank) == mesh.world.rank else ""


def make(output: Output, request: Request, mesh, report):
    import numpy as np
    import torch
    import torch.distributed as dist

    if request.options.pids:
        with open(request.options.pids, "a") as file:
            file.write(f"{mesh.world.rank} {os.getpid()}\n")
    total, video, kind = torch.zeros(1), output.video, fault(request, mesh)
    with report.stage("sampling", total=video.sampling.num_steps) as step:
        for i in range(video.sampling.num_steps):
            if i == 2:
                misbehave(kind)
            time.sleep(request.options.pause)
            total += mesh.world.rank
            if mesh.world.group is not None:
                dist.all_reduce(total)
            step()
    if mesh.is_main:
        video.latents_file.write_bytes(b"latents")
    if kind == "decode":
        raise RuntimeError("decoding went wrong")
    if kind == "second" and video.prompt == "two":
        raise RuntimeError("the second went wrong")
    if not mesh.is_main:
        return None
    size = (video.sampling.num_frames, video.sampling.height, video.sampling.width, 3)
    return np.random.default_rng(output.seed).integers(0, 256, size, dtype=np.uint8)


def misbehave(kind: str) -> None:
    if kind == "raise":
        raise ValueError("tensor x of file y\nis missing")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "watchdog":
        os.write(2, b"[E] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)\n")
        os.abort()
    if kind == "nan":
        raise FloatingPointError("the latents contain NaN after sampling step 3 of 8")
    if kind == "crash":
        os.write(2, b"terminate called after throwing\n")
        os.abort()
