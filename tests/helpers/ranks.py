"""A pool of worker processes that stand in for ranks: imports are the main cost of a distributed test, so one process
makes them and the workers are its forks, started once per session; every test borrows as many as it needs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.registry.forks import forks

JOB_SECONDS = 120
LARGE = ("transformers.models.t5.modeling_t5", "diffusers", "torch._dynamo")


def _worker(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        port, rank, world_size, fn, args = job
        # What imports left, those of the function that came among them, is never garbage.
        gc.freeze()
        # The same variables torchrun sets; the parent hosts a fresh store for every job.
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        try:
            result = (True, fn(*args))
        except BaseException:
            result = (False, traceback.format_exc())
        pipe.send(result)
        # After the answer: on GPUs it waits for the other ranks.
        if dist.is_initialized():
            dist.destroy_process_group()


class RankPool:
    """Runs a module-level function on n ranks and returns what each of them returned. seconds: its time limit."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        # This module brings torch; no thread runs before the fork.
        self.context.set_forkserver_preload([__name__, *(f"{fork.package}.pipeline" for fork in forks()), *LARGE])
        self.store: dist.TCPStore | None = None
        self.workers: list[tuple[Any, Connection]] = []

    def __call__(self, world_size: int, fn: Callable[..., Any], *args: Any, seconds: float = JOB_SECONDS) -> list[Any]:
        return self._collect(self.start(world_size, fn, *args), seconds)

    def start(self, world_size: int, fn: Callable[..., Any], *args: Any) -> list[Connection]:
        """Begin; each rank's pipe will bring whether it returned, and what."""
        while len(self.workers) < world_size:
            mine, theirs = self.context.Pipe()
            process = self.context.Process(target=_worker, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, mine))
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        pipes = [pipe for _, pipe in self.workers[:world_size]]
        for rank, pipe in enumerate(pipes):
            pipe.send((self.store.port, rank, world_size, fn, args))
        return pipes

    def _collect(self, pipes: list[Connection], seconds: float) -> list[Any]:
        """One failed rank leaves the others waiting in a collective: report it and start the pool anew."""
        results: dict[int, Any] = {}
        while len(results) < len(pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
            ready = multiprocessing.connection.wait(list(waiting), timeout=seconds)
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not finish within {seconds:.0f} s")
            for pipe in ready:
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
                    self.close()
                    raise RuntimeError(f"rank {waiting[pipe]} failed:\n{value}")
                results[waiting[pipe]] = value
        return [results[rank] for rank in range(len(pipes))]

    def close(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            pipe.close()
        self.workers = []


def needs_gpus(count: int) -> pytest.MarkDecorator:
    """Skips a test where fewer GPUs are visible."""
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} CUDA GPUs")
