"""How the ranks are laid out, as frozen values: `Layout` (what was asked), `Axis` and `Mesh` (what one rank holds).

This is the only file that creates process groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.launch import place
from common.layout import Layout


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh as a rank sees it. `group` is None when the axis has a single rank."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """One rank's place: every axis it belongs to, and its device. The default is one process on the CPU.

    Ulysses is the innermost axis and cfg the outermost: all-to-all wants the fastest links, and the
    cfg exchange (one shard a step) is the one that can afford the slowest. Used as a context manager,
    a mesh destroys the process groups when it is left.
    """

    layout: Layout = field(default_factory=Layout)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: Axis = field(default_factory=Axis)
    cfg: Axis = field(default_factory=Axis)
    sequence: Axis = field(default_factory=Axis)
    ring: Axis = field(default_factory=Axis)
    ulysses: Axis = field(default_factory=Axis)

    @property
    def is_main(self) -> bool:
        """True on the one rank that encodes text, prints and writes files."""
        return self.world.rank == 0

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.world.group is not None and dist.is_initialized():
            dist.destroy_process_group()


def resolve_device(device: str | torch.device, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA where there is a GPU, else the CPU; a bare `cuda` is the local rank's own GPU.

    Raises ValueError when the device does not exist on this machine.
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but PyTorch sees no GPU; use --device cpu or a CUDA build")
    chosen = torch.device(name)
    if chosen.index is None:
        chosen = torch.device("cuda", local_rank)
    if chosen.index >= torch.cuda.device_count():
        raise ValueError(
            f"rank needs GPU {chosen.index}, but only {torch.cuda.device_count()} are visible; start fewer ranks"
        )
    return chosen


def distributed(layout: Layout | None = None, device: str | torch.device = "cpu", timeout: float = 600) -> Mesh:
    """Build this rank's mesh from torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*).

    layout: the degrees; their product must be the number of ranks. Default: one process.
    device: `cpu`, `cuda` (this rank's own GPU) or `auto`.
    timeout: seconds after which a collective that does not finish raises.
    Raises ValueError when the layout does not fit the number of ranks or the device does not exist.
    """
    layout = layout or Layout()
    at = place()
    rank, world_size = at.rank, at.world_size
    if layout.ranks != world_size:
        raise ValueError(
            f"layout {layout} needs {layout.ranks} ranks, but {world_size} "
            f"{'is' if world_size == 1 else 'are'} running; the degrees must multiply to {world_size}"
        )
    chosen = resolve_device(device, at.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return Mesh(layout=layout, device=chosen)

    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    names = ("cfg", "ring", "ulysses")
    shape = tuple(getattr(layout, name) for name in names)
    device_mesh = dist.init_device_mesh(chosen.type, shape, mesh_dim_names=names)
    axes = {name: _axis(device_mesh[name], timeout) for name in names}
    axes["sequence"] = _axis(device_mesh["ring", "ulysses"]._flatten("sequence"), timeout)
    world = Axis(world_size, rank, dist.group.WORLD)
    return Mesh(layout=layout, device=chosen, world=world, **axes)


def _axis(device_mesh: dist.DeviceMesh, timeout: float) -> Axis:
    size = device_mesh.size()
    if size == 1:
        return Axis()
    group = device_mesh.get_group()
    # A mesh's groups start with the backend's default timeout, not with the world's.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)
    return Axis(size, device_mesh.get_local_rank(), group)


def broadcast_object(axis: Axis, value: Any, device: torch.device | None = None) -> Any:
    """The picklable value of the axis' rank 0, on every rank of the axis."""
    if axis.group is None:
        return value
    box = [value if axis.rank == 0 else None]
    dist.broadcast_object_list(box, group=axis.group, group_src=0, device=device)
    return box[0]


def broadcast_tensors(
    axis: Axis, tensors: dict[str, torch.Tensor] | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """The tensors of the axis' rank 0, on every rank of the axis; other ranks pass None. Shapes travel with them."""
    if axis.group is None:
        assert tensors is not None
        return {name: t.to(device) for name, t in tensors.items()}
    described = broadcast_object(axis, tensors and {n: (t.shape, t.dtype) for n, t in tensors.items()}, device)
    received = {}
    for name, (shape, dtype) in described.items():
        if tensors is not None and axis.rank == 0:
            tensor = tensors[name].to(device).contiguous()
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        if tensor.numel():
            dist.broadcast(tensor, group=axis.group, group_src=0)
        received[name] = tensor
    return received
