"""The machine that is measured, and how much of each measurement it gets."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from benchmarks.run import context as about
from common.registry.forks import Model, Size, fork_of, forks, get_model
from common.registry.layout import Layout, layouts_of
from common.system.environment import visible_gpus
from planner.layouts import refusal

FIELDS = ("name", "memory.total", "driver_version", "compute_cap", "pcie.link.gen.max", "clocks.max.sm", "power.limit")


@dataclass(frozen=True)
class Machine:
    """What is measured on."""

    gpus: int
    """How many GPUs are measured; 0 for a miniature on two CPU ranks, which shows that the command works."""
    models: tuple[str, ...]
    name: str = "cpu"
    capability: tuple[int, int] = (0, 0)
    scratch: Path = Path()
    """Where a part puts large files; gone when it ends."""

    @property
    def mini(self) -> bool:
        return self.gpus == 0

    @property
    def device(self) -> str:
        return "cpu" if self.mini else "cuda"

    @property
    def ranks(self) -> int:
        return self.gpus or 2

    @property
    def slug(self) -> str:
        words = re.findall(r"[a-z0-9]+", self.name.lower().replace("nvidia", ""))
        return "-".join(words) + (f"-x{self.gpus}" if self.gpus > 1 else "")

    @property
    def processes(self) -> BaseContext:
        """How processes start: CUDA does not survive a fork; without it a fork saves every import."""
        return multiprocessing.get_context("fork" if self.mini else "spawn")

    def size(self, model: Model) -> Size:
        """What is sampled: the official size; in miniature the demo's."""
        if self.mini:
            assert model.demo is not None
            return replace(model.demo.size, num_steps=2)
        return model.default_size

    def layouts(self, model: Model, size: Size) -> list[Layout]:
        """Every layout of 2 to all ranks that the model admits."""
        every = [layout for n in range(2, self.ranks + 1) for layout in layouts_of(n)]
        return [layout for layout in every if refusal(model, size, layout, "ours") is None]


def smi(fields: tuple[str, ...], query: str = "gpu") -> list[dict[str, str]]:
    """Rows of nvidia-smi; empty where it does not answer."""
    command = ["nvidia-smi", f"--query-{query}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(fields, (cell.strip() for cell in line.split(",")))) for line in out.splitlines() if line]


def find(models: list[str], mini: bool = False) -> Machine:
    """This machine, with all its visible GPUs up to eight. models: names; none for all, in miniature one of each
    fork. ValueError for a name that nobody has registered."""
    gpus = 0 if mini else min(8, visible_gpus())
    every = [model for fork in forks() for model in (fork.models if gpus else fork.models[:1])]
    chosen = tuple(get_model(name).name for name in models) or tuple(model.name for model in every)
    if not gpus:
        _import_once(chosen)
        return Machine(0, chosen)
    import torch

    return Machine(gpus, chosen, torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0))


def _import_once(models: tuple[str, ...]) -> None:
    """What every forked process would import for itself."""
    import transformers.models.t5.modeling_t5  # noqa: F401

    for name in models:
        fork_of(get_model(name)).pipeline_class()


def environment(machine: Machine) -> dict[str, Any]:
    """What a reader of the results needs to know of where they come from."""
    switches = ("NCCL_", "CUDA_", "PYTORCH_", "TORCH", "OMP_")
    found = about() | {"miniature": machine.mini, "models": list(machine.models), "cards": smi(FIELDS)}
    found["command"] = "python -m benchmarks.gpu_check"
    found["switches"] = {name: value for name, value in sorted(os.environ.items()) if name.startswith(switches)}
    found["sockets"] = sockets()
    if not machine.mini:
        import torch

        found["cuda"] = {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def sockets() -> int:
    """Processor sockets of this machine; 1 where Linux does not say."""
    folders = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/physical_package_id")
    try:
        return len({path.read_text().strip() for path in folders}) or 1
    except OSError:
        return 1
