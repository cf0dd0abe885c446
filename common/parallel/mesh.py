"""How the ranks are laid out, as frozen values: `Layout` (what was asked), `Axis` and `Mesh` (what one rank holds).

This is the only file that creates process groups. `build_mesh` makes all of them, in one order on every rank, and they
live until the process ends or `Mesh` is left: NCCL makes and destroys communicators collectively, so ranks that take
different orders wait for each other without end.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common.parallel.interleaver import Interleaver
from common.parallel.network import choose_interface
from common.registry.layout import Layout
from common.system.environment import this_process

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh as a rank sees it. `group` is None when the axis has a single rank."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    edges: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
    """The groups that this rank shares with the rank before it alone, and with the rank after it; see `edges`."""
    pending: set[Any] = field(default_factory=set, compare=False, repr=False)
    """Messages of exchanges that nobody has waited for yet, see `common.parallel.exchange`."""


@dataclass
class ModelCache:
    """Models that stay on a rank's device when a pipeline goes, for the next one on the same mesh.

    They are of one kind, which `key` tells: another kind's take their place.
    """

    key: Any = None
    models: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What pipelines have found out with them."""
    loadings: int = 0
    """How many were loaded so far."""

    def of(self, key: Any) -> dict[str, Any]:
        """The models of a kind, by name; those of another kind are let go. None: of no kind that is kept."""
        if key is None or key != self.key:
            self.models.clear()
            self.facts.clear()
            self.key = key
        return self.models


@dataclass(frozen=True)
class Mesh:
    """One rank's place: every axis it belongs to, and its device. The default is one process on the CPU.

    Ulysses is the innermost axis and cfg the outermost: all-to-all wants the fastest links, and the cfg exchange (one
    shard a step) is the one that can afford the slowest. `weights` has the ranks of `world` and a group of its own, so
    that gathers of weights do not queue before the exchanges of the model (NCCL runs what one group does in order).
    Used as a context manager, a mesh destroys the process groups when it is left without an exception: NCCL's teardown
    waits for the other ranks, which wait for the one that failed.
    """

    layout: Layout = field(default_factory=Layout)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: Axis = field(default_factory=Axis)
    cfg: Axis = field(default_factory=Axis)
    sequence: Axis = field(default_factory=Axis)
    ring: Axis = field(default_factory=Axis)
    ulysses: Axis = field(default_factory=Axis)
    weights: Axis = field(default_factory=Axis)
    cache: ModelCache | None = field(default=None, compare=False)
    """Where models stay between pipelines; None: they go with their pipeline."""
    interleaver: Interleaver | None = field(default=None, compare=False)
    """By which the guidance branches of one rank take turns; None: they are computed one after the other."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that encodes text, prints and writes files."""
        return self.world.rank == 0

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None and self.world.group is not None and dist.is_initialized():
            dist.destroy_process_group()


def resolve_device(device: str | torch.device, local_rank: int = 0, local_ranks: int = 1) -> torch.device:
    """`auto` is CUDA where there is a GPU, else the CPU; a bare `cuda` is the local rank's own GPU.

    local_ranks: ranks on this machine. Where several of them see one GPU each, as job schedulers arrange it, every rank
    takes the one it sees. Raises ValueError when the device does not exist on this machine.
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but PyTorch sees no GPU; use --device cpu or a CUDA build")
    gpu = torch.device(name)
    visible = torch.cuda.device_count()
    if gpu.index is None:
        gpu = torch.device("cuda", 0 if visible == 1 and local_ranks > 1 else local_rank)
    if gpu.index >= visible:
        raise ValueError(f"rank needs GPU {gpu.index}, but only {visible} are visible; start fewer ranks")
    return gpu


def meet(timeout: float = 600) -> dist.Store | None:
    """The store in which the ranks of torchrun's environment find each other; None for one process.

    Sets GLOO_SOCKET_IFNAME where that is needed, see `common.parallel.network`. timeout: seconds.
    """
    if this_process().world_size == 1:
        return None
    choose_interface(this_process())
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    return store


def distributed(
    layout: Layout | None = None,
    device: str | torch.device = "cpu",
    timeout: float = 600,
    store: dist.Store | None = None,
) -> Mesh:
    """Build this rank's mesh from torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*).

    layout: the degrees, the same on all ranks; their product must be the number of ranks. Default: one process.
    device: `cpu`, `cuda` (this rank's own GPU) or `auto`.
    timeout: seconds after which a collective that does not finish raises.
    store: from `meet`, for who has used it already.
    Raises ValueError when the layout does not fit the number of ranks or that of another rank, or the device does not
    exist.
    """
    layout = layout or Layout()
    at = this_process()
    if layout.ranks != at.world_size:
        raise ValueError(
            f"layout {layout} needs {layout.ranks} ranks, but {at.world_size} "
            f"{'is' if at.world_size == 1 else 'are'} running; the degrees must multiply to {at.world_size}"
        )
    local_device = resolve_device(device, at.local_rank, at.local_world_size)
    if local_device.type == "cuda":
        torch.cuda.set_device(local_device)
    if at.world_size == 1:
        return Mesh(layout=layout, device=local_device)

    store = store or meet(timeout)
    backend = "cpu:gloo,cuda:nccl" if local_device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=at.rank, world_size=at.world_size, timeout=limit)
    layouts: list[Any] = [None] * at.world_size
    dist.all_gather_object(layouts, layout)
    if other := next((i for i, one in enumerate(layouts) if one != layouts[0]), None):
        raise ValueError(
            f"rank {other} asks for layout {layouts[other]}, rank 0 for {layouts[0]}; give all ranks the same degrees"
        )
    return build_mesh(layout, local_device, timeout)


def build_mesh(layout: Layout, device: torch.device, timeout: float | None = None) -> Mesh:
    """This rank's mesh, over the process group of all ranks, which exists already. Collective: makes all the groups.

    device: of this rank. timeout: as for `distributed`; default: what the backends have.
    """
    names = ("cfg", "ring", "ulysses")
    shape = tuple(getattr(layout, name) for name in names)
    device_mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
    limit = None if timeout is None else timedelta(seconds=timeout)
    axes: dict[str, Any] = {name: _axis(device_mesh[name], limit) for name in names}
    axes["sequence"] = _axis(device_mesh["ring", "ulysses"]._flatten("sequence"), limit)
    everyone, rank = list(range(layout.ranks)), dist.get_rank()
    whole = dist.new_group(everyone, limit, _backend(device))
    axes["weights"] = Axis(layout.ranks, rank, whole)
    neighbours = edges([everyone], device, limit)
    return Mesh(layout=layout, device=device, world=Axis(layout.ranks, rank, dist.group.WORLD, neighbours), **axes)


def side_group(mesh: Mesh, timeout: float) -> dist.ProcessGroup | None:
    """A group of all ranks for messages on the CPU, beside the model's own; None for one rank. Collective."""
    if mesh.world.group is None:
        return None
    return dist.new_group(list(range(mesh.world.size)), timedelta(seconds=timeout), "gloo")


def with_new_edges(mesh: Mesh, timeout: float) -> Mesh:
    """The mesh after a decode that was left: its neighbours connected anew, whatever was on its way. Collective."""
    if mesh.world.edges is None:
        return mesh
    for group in mesh.world.edges:
        if mesh.device.type == "cuda":
            group.abort()  # its kernel would wait for the other side without end
        else:
            dist.destroy_process_group(group)
    everyone = list(range(mesh.world.size))
    return replace(mesh, world=replace(mesh.world, edges=edges([everyone], mesh.device, timedelta(seconds=timeout))))


def take_down(mesh: Mesh, broken: bool) -> None:
    """End all process groups of a mesh, so that another can be built. Collective unless broken.

    broken: an error left its ranks at different places; nothing is waited for.
    """
    if mesh.world.group is None:
        return
    if broken and mesh.device.type == "cuda":
        for group in list(dist.distributed_c10d._world.pg_map):
            group.abort()
    dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    """Of a group for tensors of this device alone: gloo, beside NCCL, would connect all its ranks a second time."""
    return "nccl" if device.type == "cuda" else dist.get_backend()


def _axis(device_mesh: dist.DeviceMesh, limit: timedelta | None) -> Axis:
    size = device_mesh.size()
    if size == 1:
        return Axis()
    group = device_mesh.get_group()
    if limit is not None:
        # A mesh's groups start with the backend's default timeout, not with the world's.
        dist.distributed_c10d._set_pg_timeout(limit, group)
    return Axis(size, device_mesh.get_local_rank(), group)


def edges(
    rings: Sequence[Sequence[int]], device: torch.device, limit: timedelta | None = None
) -> tuple[dist.ProcessGroup, dist.ProcessGroup] | None:
    """This rank's groups with the rank before it and the rank after it, in the ring that it belongs to; None in none.

    rings: global ranks of rings of at least two that have no rank in common. limit: how long a message may take.
    Collective over all ranks of the world.
    A ring of P has P groups, p with p + 1, so that with two ranks the two directions do not queue behind each other
    (NCCL gives a group one stream). NCCL connects at a group's first message and blocks until the other side does the
    same; around a ring of sends that would never end, so the groups are connected here: first the even ones, all at
    once, then the odd ones, rather than each after the one before.
    """
    backend, rank = _backend(device), dist.get_rank()
    mine: dict[tuple[int, int], dist.ProcessGroup] = {}
    for ring in rings:
        for pair in zip(ring, [*ring[1:], ring[0]]):
            group = dist.new_group(list(pair), limit, backend)
            if rank in pair:
                mine[pair] = group
    for ring in rings:
        pairs = list(zip(ring, [*ring[1:], ring[0]]))
        for pair in pairs[::2] + pairs[1::2]:
            if pair in mine:
                _connect(mine[pair], pair, device)
    if not mine:
        return None
    (before,) = (group for (_, second), group in mine.items() if second == rank)
    (after,) = (group for (first, _), group in mine.items() if first == rank)
    return before, after


def _connect(group: dist.ProcessGroup, pair: tuple[int, int], device: torch.device) -> None:
    token = torch.zeros(1, device=device)
    if dist.get_rank() == pair[0]:
        dist.send(token, dst=pair[1], group=group)
    else:
        dist.recv(token, src=pair[0], group=group)


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
    specs = broadcast_object(axis, tensors and {n: (t.shape, t.dtype) for n, t in tensors.items()}, device)
    copies = {}
    for name, (shape, dtype) in specs.items():
        if tensors is not None and axis.rank == 0:
            tensor = tensors[name].to(device).contiguous()
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        if tensor.numel():
            dist.broadcast(tensor, group=axis.group, group_src=0)
        copies[name] = tensor
    return copies


def all_min(axis: Axis, value: int, device: torch.device) -> int:
    """The smallest value of the axis' ranks, on all of them. Collective. device: of this rank."""
    if axis.group is None:
        return value
    least = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=axis.group)
    return int(least.item())


def on_main(mesh: Mesh, make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank: `make` runs there alone, all get its value or its error. Collective.

    The value may be anything picklable, with tensors anywhere inside: they are broadcast as tensors and lie on
    `mesh.device` on every rank. An error is raised on rank 0 as it is, on the others as the same kind of exception with
    the same message; what cannot be pickled becomes the nearest of Python's own.
    """
    pickled: bytes | None = None
    failure: Exception | None = None
    tensors: dict[str, torch.Tensor] = {}
    if mesh.is_main:
        try:
            pickled, tensors = _take_apart(make())
        except Exception as error:  # told to every rank before it goes on
            failure = error
    # Without mesh.device: after an error of the device's memory the message must not need any.
    pickled, main_failure = broadcast_object(mesh.world, (pickled, failure and _picklable(failure)))
    if pickled is None:
        raise failure or main_failure
    return _put_together(pickled, broadcast_tensors(mesh.world, tensors if mesh.is_main else None, mesh.device))


def _take_apart(value: Any) -> tuple[bytes, dict[str, torch.Tensor]]:
    """A value pickled without its tensors, and the tensors by the names that stand in their places."""
    tensors: dict[str, torch.Tensor] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> str | None:
            if not isinstance(part, torch.Tensor):
                return None
            tensors[name := str(len(tensors))] = part
            return name

    buffer = io.BytesIO()
    Pickler(buffer).dump(value)
    return buffer.getvalue(), tensors


def _put_together(pickled: bytes, tensors: dict[str, torch.Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, name: str) -> torch.Tensor:
            return tensors[name]

    return Unpickler(io.BytesIO(pickled)).load()


def _picklable(error: Exception) -> Exception:
    """The error, or one of Python's own kinds with its message where a copy of it would not survive the way."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # whatever an exception's own pickling raises
        pass
    kinds = (ValueError, MemoryError, OSError, ArithmeticError, ImportError, TypeError, LookupError, RuntimeError)
    return next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)(str(error))
