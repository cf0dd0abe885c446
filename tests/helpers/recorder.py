"""One rank of a world that is not there: fake process groups of any size, and what the rank did with them.

    records = [record_rank(layout, rank, work) for rank in range(layout.ranks)]
    agree(records)

The ranks run one after the other in this process. A fake group's messages arrive at once and bring nothing. `agree`
compares what the ranks did: groups are made and torn down in one order, and each group's collectives come in one order.
On NCCL every difference is a hang.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common.parallel.mesh
from common.parallel.mesh import Mesh, build_mesh
from common.registry.layout import Layout

MESSAGES = ("send", "recv_", "recv_any_source_")  # between two ranks: each end has its own name for the message
_LOCAL = ("wait_tensor", "_wrap_tensor_autograd")  # nothing is sent


@dataclass(frozen=True)
class Group:
    """A process group: its name, its global ranks in order, and the backend that was asked for."""

    name: str
    ranks: tuple[int, ...]
    backend: str


@dataclass(frozen=True)
class Collective:
    """op: the operator's name. group: its name. tensors: (shape, dtype, device) of each tensor that took part.

    contiguous: whether all of them are. splits: of an all-to-all, rows received from and sent to each rank; none where
    they are even. peer: of a message, the other end's rank in the group; of a broadcast, its source's.
    """

    op: str
    group: str
    tensors: tuple[tuple[tuple[int, ...], torch.dtype, str], ...]
    contiguous: bool = True
    splits: tuple[tuple[int, ...], ...] = ()
    peer: int | None = None


@dataclass(frozen=True)
class Batch:
    """Messages that one rank posts together: on NCCL one launch on the group's stream, done when all of them are."""

    messages: tuple[Collective, ...]
    op: str = "batch"

    @property
    def group(self) -> str:
        return self.messages[0].group

    @property
    def tensors(self) -> tuple[tuple[tuple[int, ...], torch.dtype, str], ...]:
        return self.messages[0].tensors

    @property
    def splits(self) -> tuple[tuple[int, ...], ...]:
        return ()


@dataclass
class Record:
    """What one rank did, in order. log: ("make" or "destroy", group name).

    made: groups that this rank belongs to, by name. allocations: bytes of each tensor made, by device type.
    """

    rank: int
    log: list[tuple[str, str]] = field(default_factory=list)
    made: dict[str, Group] = field(default_factory=dict)
    collectives: list[Collective] = field(default_factory=list)
    allocations: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def of(self, group: str) -> list[str]:
        """The collectives of one group by name. In a group of two both ends of a message are called `message`; in
        larger ones a message concerns two ranks only and is left out."""
        names = [c.op for c in self.collectives if c.group == group]
        if len(self.made[group].ranks) > 2:
            return [name for name in names if name not in MESSAGES]
        return ["message" if name in MESSAGES else name for name in names]


class Watch(TorchDispatchMode):
    """Writes collectives and allocations into a record."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if is_collective(func):
            self.record.collectives.append(describe(name, args))
        taken = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in taken:
                self.record.allocations[leaf.device.type].append(leaf.untyped_storage().nbytes())
        return out


def is_collective(func: Any) -> bool:
    """Whether an operator sends something."""
    return func.namespace in ("c10d", "_c10d_functional") and func._schema.name.split("::")[1] not in _LOCAL


def describe(name: str, args: Sequence[Any]) -> Collective:
    """A call of the operator `name`."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    described = tuple((tuple(t.shape), t.dtype, t.device.type) for t in tensors)
    splits = tuple(tuple(arg) for arg in args if isinstance(arg, (list, tuple)) and all(type(n) is int for n in arg))
    # The group comes before the rank, and the tag or whether to wait after it.
    numbers = [arg for arg in args if type(arg) is int]
    peer = numbers[0] if name in (*MESSAGES, "broadcast_") and numbers else None
    contiguous = all(tensor.is_contiguous() for tensor in tensors)
    return Collective(name, _group_name(args), described, contiguous, splits if any(splits) else (), peer)


def _group_name(args: Sequence[Any]) -> str:
    """Functional collectives name their group; the others hold it."""
    for leaf in tree_leaves(args):
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return dist.ProcessGroup.unbox(leaf).group_name
    return next(str(arg) for arg in reversed(args) if isinstance(arg, str))


@contextmanager
def recording(rank: int, fake: bool = False, watch: Callable[[Record], TorchDispatchMode] = Watch) -> Iterator[Record]:
    """What this process does with groups while it is `rank`. fake: groups are, whatever backend is asked for.

    watch: what writes collectives into the record.
    """
    record = Record(rank)
    make, destroy = c10d._new_process_group_helper, c10d.destroy_process_group

    def making(size: int, own: int | None, ranks: Any, backend: Any, store: Any, name: Any, *rest: Any, **more: Any):
        # For ranks outside it as well: making a group is collective over the world.
        members = tuple(ranks) or tuple(range(size))
        record.log.append(("make", str(name)))
        if rank in members:
            record.made[str(name)] = Group(str(name), members, str(backend))
        if fake:
            backend, store = "fake", FakeStore()
        return make(size, own, ranks, backend, store, name, *rest, **more)

    def destroying(group: dist.ProcessGroup | None = None) -> None:
        names = [c10d._world.pg_names[group]] if group not in (None, dist.group.WORLD) else _teardown_order()
        record.log.extend(("destroy", name) for name in names)
        destroy(group)

    with (
        mock.patch.object(c10d, "_new_process_group_helper", making),
        mock.patch.object(c10d, "destroy_process_group", destroying),
        mock.patch.object(dist, "destroy_process_group", destroying),
        watch(record),
    ):
        yield record


@contextmanager
def fake_groups(rank: int, world_size: int, watch: Callable[[Record], TorchDispatchMode] = Watch) -> Iterator[Record]:
    """A recorded world in which this process is `rank` and every group is fake. watch: as for `recording`."""
    with recording(rank, fake=True, watch=watch) as record:
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            yield record
        except BaseException:
            dist.destroy_process_group()
            raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _teardown_order() -> list[str]:
    """In which order the end of the world shuts down its groups: by name, the last first."""
    return sorted(c10d._world.pg_names.values(), reverse=True)


def record_rank(
    layout: Layout, rank: int, work: Callable[[Mesh], Any] = lambda mesh: None, device: str = "cpu"
) -> Record:
    """What `rank` of a layout does when its mesh is made, and then in `work(mesh)`."""
    with fake_groups(rank, layout.ranks) as record:
        work(fake_mesh(layout, torch.device(device)))
    return record


def fake_mesh(layout: Layout, device: torch.device) -> Mesh:
    """`build_mesh` within `fake_groups`. DeviceMesh computes with ranks in tensors, which must not be fake."""
    connect = common.parallel.mesh._connect
    with unset_fake_temporarily() as mode:

        def connecting(*args: Any) -> None:
            with mode or nullcontext():
                connect(*args)

        with mock.patch.object(common.parallel.mesh, "_connect", connecting):
            return build_mesh(layout, device)


def agree(records: Sequence[Record]) -> None:
    """AssertionError unless all ranks made the same groups, in one order, and used and destroyed each in one order."""
    groups = {name: group for record in records for name, group in record.made.items()}
    made = [[name for what, name in record.log if what == "make"] for record in records]
    assert all(order == made[0] for order in made), f"groups are made in different orders: {made}"
    shut = [[name for what, name in record.log if what == "destroy"] for record in records]
    _no_circle(shut)
    for name, group in groups.items():
        orders = {rank: records[rank].of(name) for rank in group.ranks}
        assert len(set(map(tuple, orders.values()))) == 1, f"{group}: different collectives: {orders}"


def _no_circle(orders: Sequence[Sequence[str]]) -> None:
    """AssertionError unless one order of all groups contains the order of every rank: else ranks wait in a circle."""
    waiting = [list(order) for order in orders]
    while any(waiting):
        ready = next((o[0] for o in waiting if o and all(o[0] not in p[1:] for p in waiting)), None)
        assert ready is not None, f"groups are destroyed in orders that wait for each other: {orders}"
        waiting = [order[1:] if order[:1] == [ready] else order for order in waiting]
