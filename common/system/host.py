"""What the machine says without PyTorch: which CPU cores are near its GPUs, what a process holds.

Everything is read from Linux's /proc and /sys; what is not there, as in some containers, is no error.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ALLOCATOR = "expandable_segments:True"
"""PyTorch's allocator maps memory of any size from the same pages, so that many sizes leave no gaps behind."""


def allocator_default(env: Mapping[str, str]) -> dict[str, str]:
    """The setting of PyTorch's CUDA allocator where the user has made none, under its old name or its new one."""
    settings = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & env.keys()
    return {} if settings else {"PYTORCH_ALLOC_CONF": ALLOCATOR}


def ensure_temporary_folder(fallback: Path) -> None:
    """Name a folder for temporary files, for this process and those it starts, where the usual ones cannot be written.

    PyTorch and transformers want one when imported. fallback: a folder that can be written; memory comes before it.
    """
    try:
        tempfile.gettempdir()
    except OSError:
        shared_memory = Path("/dev/shm")
        os.environ["TMPDIR"] = str(shared_memory if os.access(shared_memory, os.W_OK) else fallback.absolute())


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of a process, of this one by default; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def gpus_are_hidden(env: Mapping[str, str]) -> bool:
    """Whether the user wants no GPU to be seen: CUDA_VISIBLE_DEVICES is empty or starts with -1."""
    return env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() in ("", "-1")


@dataclass(frozen=True)
class _Gpu:
    address: str
    """On the PCI bus, as the kernel writes it: `0000:17:00.0`."""
    model: str
    uuid: str


def bind_to_gpu(local_rank: int, root: Path = Path("/")) -> None:
    """Keep this process and its later threads on the cores of its GPU's socket, where they are known.

    Pinned memory lies where it is first touched, and a copy from another socket's memory has its link to cross. Never
    adds a core to those the process may use, so that `taskset` and containers keep their say.
    """
    with suppress(OSError, ValueError, AttributeError):  # AttributeError: a system without affinity
        mine = os.sched_getaffinity(0)
        near = near_cores(local_rank, os.environ, root) & mine
        if near and near != mine:
            os.sched_setaffinity(0, near)


def near_cores(local_rank: int, env: Mapping[str, str], root: Path = Path("/")) -> set[int]:
    """Cores of the socket of this rank's GPU; empty where they, or which GPU it is, are not known."""
    visible = _visible(_gpus(root), env)
    if len(visible) == 1:
        local_rank = 0  # launchers that show each rank its own GPU alone
    if local_rank >= len(visible):
        return set()
    return parse_cores((root / "sys/bus/pci/devices" / visible[local_rank].address / "local_cpulist").read_text())


def parse_cores(text: str) -> set[int]:
    """`0-3,8` is {0, 1, 2, 3, 8}."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    return cores


def _gpus(root: Path) -> list[_Gpu]:
    """All GPUs of NVIDIA's driver in the order of their addresses."""
    gpus = []
    for folder in sorted((root / "proc/driver/nvidia/gpus").iterdir()):
        lines = (folder / "information").read_text(errors="replace").splitlines()
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        gpus.append(_Gpu(folder.name.lower(), fields.get("Model", ""), fields.get("GPU UUID", "")))
    return gpus


def _visible(gpus: list[_Gpu], env: Mapping[str, str]) -> list[_Gpu]:
    """The GPUs as CUDA numbers them for this process; empty where that cannot be told (several models, MIG)."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    # Unless told to go by address, CUDA puts the fastest model first; equal ones are in the order of their addresses.
    numbered = env.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({gpu.model for gpu in gpus}) == 1
    if visible is None:
        return gpus if numbered else []
    selection = []
    for name in (part.strip() for part in visible.split(",")):
        if name.isdecimal():
            fitting = gpus[int(name) : int(name) + 1] if numbered else []
        else:
            fitting = [gpu for gpu in gpus if name.startswith("GPU-") and gpu.uuid.startswith(name)]
        if len(fitting) != 1:
            return []
        selection += fitting
    return selection
