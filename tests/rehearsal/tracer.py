"""Everything a rank does on its fake GPU, in order: kernels, copies, waits of the host, collectives, and on which
stream, with the order that streams and events give them.

What the host queues on one stream runs in its order. Between streams nothing is ordered but by events, by `wait_stream`
and by waiting for a collective. So each stream has a vector clock: how far it is itself, and how far it knows every
other to be. Two uses of one memory of which one writes are a race (`Trace.hazards`) unless the later one's stream knows
of the earlier one. NCCL runs a group's collectives on a stream of the group's own, which waits for the computing stream
when they are posted; who waits for one makes the computing stream wait, not the host.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._pytree import tree_leaves

from tests.helpers.fake_cuda import Machine, Stream
from tests.helpers.recorder import MESSAGES, Batch, Collective, Record, Watch, describe, is_collective
from tests.rehearsal.memory import Memory
from tests.rehearsal.trace import COMPUTE, HOST, READER, Clock, Copy, Moment, Steps, Sync, Trace, Where
from tests.rehearsal.traffic import Operator, file_of, innermost, launches, on_cuda, operator, take_apart, tensors_of


@dataclass
class _Use:
    """Of a memory: who wrote it last and who has read it since, as (stream, time), and who made it; how many storages
    stand for it."""

    made: str
    written: tuple[str, int] | None = None
    read: dict[str, int] = field(default_factory=dict)
    where: str = ""
    names: int = 1


class Message:
    """What stands for `P2POp`: a message that is posted with others."""

    def __init__(self, op: Callable[..., Any], tensor: Tensor, *, group: Any, tag: int, group_peer: int) -> None:
        self.op, self.tensor, self.group, self.tag, self.group_peer = op, tensor, group, tag, group_peer

    @property
    def sends(self) -> bool:
        return self.op.__name__ == "isend"

    def described(self) -> Collective:
        tensors = ((tuple(self.tensor.shape), self.tensor.dtype, self.tensor.device.type),)
        op = "send" if self.sends else "recv_"
        return Collective(op, self.group.group_name, tensors, self.tensor.is_contiguous(), (), self.group_peer)

    def post(self) -> Any:
        way = {"group_dst" if self.sends else "group_src": self.group_peer}
        return self.op(self.tensor, group=self.group, tag=self.tag, **way)


class Unanswered(AssertionError):
    """The host reads a number that nobody said what it is."""


class Tracer(Watch):
    """Writes a `Trace`, and the collectives into a `Record`.

    answers: by `file:function` what the host reads there, `(tensor) -> value`: each entry is a wait of the host that is
    meant to be. rows: how many rows a boolean mask chooses.
    """

    def __init__(
        self, record: Record, machine: Machine, answers: Mapping[Where, Callable[[Tensor], Any]], rows: int
    ) -> None:
        super().__init__(record)
        self.trace, self.machine, self.answers, self.rows = Trace(), machine, answers, rows
        self.steps = Steps(machine.device)
        self.clocks: defaultdict[str, Clock] = defaultdict(dict)
        self.uses: dict[int, _Use] = {}
        self.names: dict[int, str] = {}
        self.events: weakref.WeakKeyDictionary[Any, Clock] = weakref.WeakKeyDictionary()
        self.pending: dict[int, tuple[Clock, Collective]] = {}
        self.works: weakref.WeakKeyDictionary[Any, tuple[Clock, Collective | Batch]] = weakref.WeakKeyDictionary()
        self.last: tuple[Clock, Collective | Batch] | None = None
        self.pinned: set[int] = set()
        self.memory = Memory()
        self.host = HOST

    @classmethod
    def is_infra_mode(cls) -> bool:
        """A compiler traces what it would trace without this mode."""
        return True

    # ---- streams

    @property
    def step(self) -> str:
        return self.steps.name if self.host == HOST else f"{self.host}, {self.steps.name}"

    def name(self, stream: Stream) -> str:
        return self.names.setdefault(id(stream), COMPUTE if not self.names else f"stream {len(self.names)}")

    @property
    def current(self) -> str:
        return self.name(self.machine.current_stream())

    def tick(self, stream: str) -> int:
        """One more thing on a stream, which knows what the host knew when it queued it."""
        if stream != self.host:
            self.join(stream, self.clocks[self.host])
        clock = self.clocks[stream]
        clock[stream] = clock.get(stream, 0) + 1
        return clock[stream]

    def join(self, stream: str, other: Clock) -> None:
        clock = self.clocks[stream]
        for name, time in other.items():
            clock[name] = max(clock.get(name, 0), time)

    def on_stream(self, what: str, stream: Stream | None, other: Any) -> None:
        """What `fake_cuda` tells of streams and events."""
        if what == "synchronize":
            for name in list(self.clocks) if stream is None else [self.name(stream)]:
                self.join(self.host, self.clocks[name])
            self._host_waited()
            self.trace.syncs.append(Sync(self.step, place(), "synchronize"))
            return
        assert stream is not None
        name = self.name(stream)
        if what == "wait_stream":
            self.join(name, self.clocks[self.name(other)])
        elif what == "record_event":
            self.tick(name)
            self.events[other] = dict(self.clocks[name])
        elif what == "wait_event":
            self.join(name, self.events[other])
        self.trace.timeline.append(Moment(self.step, what, None, name))

    def on_wait(self, work: Any) -> bool:
        """`Work.wait`: at once after the collective where it is not asynchronous."""
        found = self.works.get(work) or self.last
        assert found is not None
        self._arrive(*found)
        return True

    def _arrive(self, clock: Clock, collective: Collective | Batch) -> None:
        on_gpu = any(device == "cuda" for _, _, device in collective.tensors)
        stream = self.current if on_gpu else self.host
        self.join(stream, clock)
        self.trace.timeline.append(Moment(self.step, "wait", collective, stream))
        if not on_gpu:
            self._host_waited()

    def _host_waited(self) -> None:
        if self.host == HOST:
            self.trace.timeline.append(Moment(self.step, "host", None, HOST, _collectives(self.clocks[HOST])))

    @contextmanager
    def other_thread(self) -> Iterator[None]:
        """What is done inside is done by the reading thread, which knows what the host knew when it asked for it."""
        self.host = READER
        self.join(READER, self.clocks[HOST])
        try:
            yield
        finally:
            self.host = HOST

    # ---- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = operator(func)
        name = op.name
        if op.namespace == "prim":
            return func(*args, **kwargs)
        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if fake is None:
            return func(*args, **kwargs)  # real numbers for the test's own use
        if name == "_local_scalar_dense" and getattr(args[0], "constant", None) is None:
            return self._read(args[0])  # not a number that stood in the code, which fake tensors remember
        if name == "index" and any(isinstance(t, Tensor) and t.dtype == torch.bool for t in args[1]):
            return self._masked(*args)
        if name == "record_stream":
            return None
        if (apart := take_apart(self, func, op, args, kwargs)) is not NotImplemented:
            return apart
        out = self.memory.run(func, args, kwargs, fake) if op.namespace == "aten" else func(*args, **kwargs)
        if name in ("wait_tensor", "_wrap_tensor_autograd"):
            if name == "wait_tensor":
                self._arrive(*self.pending[_storage(args[0])])
            self._alias(args[0], out)
        elif is_collective(func):
            self._post(func, name, args, out)
        else:
            self._compute(op, args, kwargs, out)
        return out

    def _read(self, tensor: Tensor) -> Any:
        """The host reads one number; of a tensor on a device it waits for it."""
        where = place()
        if on_cuda(tensor):
            self._touch(tensor, self.current, self.tick(self.current), writes=False)
            self.join(self.host, self.clocks[self.current])
            self._host_waited()
            self.trace.syncs.append(Sync(self.step, where, "read"))
        if where not in self.answers:
            raise Unanswered(f"the host reads a number in {where}, in {self.step}")
        return self.answers[where](tensor)

    def _masked(self, x: Tensor, indices: Any) -> Tensor:
        """x[mask]: the host waits to know how many rows there are."""
        (mask,) = indices
        if on_cuda(x):
            self.trace.syncs.append(Sync(self.step, place(), "read"))
            self.join(self.host, self.clocks[self.current])
            self._host_waited()
        return x.new_empty(self.rows, *x.shape[mask.ndim :])

    def _compute(self, op: Operator, args: Any, kwargs: Any, out: Any) -> None:
        taken, made = tensors_of(args, kwargs), tensors_of(out)
        if kwargs.get("pin_memory"):
            self.pinned.add(_storage(made[0]))
        moved = launches(op, args, kwargs, taken, made)
        for tensor in made:
            self._use(tensor, self.current if on_cuda(tensor) else self.host)
        used = taken + made
        kinds = {tensor.device for tensor in used}
        if not moved and any(kind.type == "cuda" for kind in kinds):
            return  # a view, or memory alone
        self.trace.devices.update(str(kind) for kind in kinds if kind.type != "meta")
        devices = {t.device.type for t in used if t.ndim or on_cuda(t)}
        stream = self.current if "cuda" in devices else self.host
        time = self.tick(stream)
        changed = {id(arg) for arg, written in zip(args, op.changes) if written}
        changed |= {id(t) for t in made}
        for tensor in taken:
            self._touch(tensor, stream, time, writes=id(tensor) in changed)
        for tensor in made:
            self._touch(tensor, stream, time, writes=True)
        if len(devices) > 1:
            self._copied(op.name, args, kwargs, made, stream)
            return
        for launch in moved:
            row = self.trace.launches[self.step, launch.place, launch.op]
            row[0], row[1] = row[0] + 1, row[1] + launch.bytes
            self.trace.timeline.append(Moment(self.step, "launch", launch.op, stream))

    def _copied(self, name: str, args: Any, kwargs: Any, made: list[Tensor], stream: str) -> None:
        source = args[1] if name == "copy_" else args[0]
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        (host,) = (t for t in (source, made[0]) if not on_cuda(t))
        pinned = _storage(host) in self.pinned
        waits = blocking or not pinned
        if waits:
            self.join(self.host, self.clocks[stream])
            self._host_waited()
        kinds = source.device.type, made[0].device.type
        self.trace.copies.append(Copy(self.step, place(), *kinds, source.nbytes, waits, pinned, stream))
        self.trace.timeline.append(Moment(self.step, "copy", place(), stream))

    def post(self, collective: Collective) -> tuple[str, int]:
        """A collective is posted: its stream, and its number on it."""
        self.record.collectives.append(collective)
        self.trace.collectives.append((self.step, collective))
        on_gpu = any(device == "cuda" for _, _, device in collective.tensors)
        backend = "nccl" if on_gpu else "gloo"
        # Gloo's messages to and from different ranks do not wait for each other.
        peer = f" {collective.op} {collective.peer}" if not on_gpu and collective.op in MESSAGES else ""
        stream = f"{backend} {collective.group}{peer}"
        self.join(stream, self.clocks[self.current if on_gpu else self.host])
        time = self.tick(stream)
        self.trace.timeline.append(Moment(self.step, "post", collective, stream, _collectives(self.clocks[stream])))
        return stream, time

    def finish(self, collective: Collective) -> None:
        """A collective is posted and the host waits for it."""
        stream, _ = self.post(collective)
        self.join(self.host, self.clocks[stream])
        self._host_waited()

    def _post(self, func: Any, name: str, args: Any, out: Any) -> None:
        collective = describe(name, args)
        tensors = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
        on_gpu = any(map(on_cuda, tensors))
        stream, time = self.post(collective)
        sends = name == "send"
        for tensor in tensors:
            self._use(tensor, self.current if on_gpu else self.host)
            self._touch(tensor, stream, time, writes=not sends and not _is_input(name, tensor, args))
        self.last = (dict(self.clocks[stream]), collective)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.pending[_storage(tensor)] = self.last

    def posted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function of torch.distributed that gives out a work; which collective it is, is kept."""

        @wraps(call)
        def calling(*args: Any, **kwargs: Any) -> Any:
            work = call(*args, **kwargs)
            if work is not None and self.last is not None:
                self.works[work] = self.last
            return work

        return calling

    def batch(self, messages: Sequence[Message]) -> list[Any]:
        """What stands for `batch_isend_irecv`; on the CPU each message goes by itself."""
        if not on_cuda(messages[0].tensor):
            return [message.post() for message in messages]
        for message in messages:
            other = dist.get_global_rank(message.group, message.group_peer)
            assert on_cuda(message.tensor) and message.group is messages[0].group and other != self.record.rank
        whole = Batch(tuple(message.described() for message in messages))
        stream = f"nccl {whole.group}"
        self.join(stream, self.clocks[self.current])
        time = self.tick(stream)
        self.trace.timeline.append(Moment(self.step, "post", whole, stream, _collectives(self.clocks[stream])))
        for message, described in zip(messages, whole.messages):
            self.record.collectives.append(described)
            self.trace.collectives.append((self.step, described))
            self._use(message.tensor, self.current)
            self._touch(message.tensor, stream, time, writes=not message.sends)
        work = FakeWork()
        self.works[work] = dict(self.clocks[stream]), whole
        return [work]

    # ---- memory

    def _touch(self, tensor: Tensor, stream: str, time: int, writes: bool) -> None:
        """A use of a tensor's memory, checked against all before it that could meet it."""
        if not tensor.numel() or not (on_cuda(tensor) or _storage(tensor) in self.pinned):
            return
        use = self._use(tensor, stream)
        clock = self.clocks[stream]
        before = dict(use.read) if writes else {}
        if use.written is not None:
            before[use.written[0]] = max(before.get(use.written[0], 0), use.written[1])
        for other, then in before.items():
            if other != stream and clock.get(other, 0) < then:
                kind = "writes" if writes else "reads"
                self.trace.hazards.append(
                    f"{self.step}: {stream} {kind} {tuple(tensor.shape)} in {place()} while {other} may still use it"
                    f" ({use.where})"
                )
        if writes:
            use.written, use.read = (stream, time), {}
        else:
            use.read[stream] = time
        use.where = place()

    def _alias(self, tensor: Tensor, other: Tensor) -> None:
        """These are one memory, though a fake operator has made a second one."""
        key = _storage(other)
        if key == _storage(tensor):
            return
        use = self.uses[key] = self._use(tensor, COMPUTE)
        use.names += 1
        self.pending[key] = self.pending[_storage(tensor)]
        weakref.finalize(other.untyped_storage(), self._freed, key)

    def _use(self, tensor: Tensor, stream: str) -> _Use:
        key = _storage(tensor)
        if key not in self.uses:
            self.uses[key] = _Use(stream)
            weakref.finalize(tensor.untyped_storage(), self._freed, key)
        return self.uses[key]

    def _freed(self, key: int) -> None:
        """Memory goes back to the stream it was made on, which may use it again at once."""
        use = self.uses.pop(key, None)
        self.pending.pop(key, None)
        self.pinned.discard(key)
        if use is None:
            return
        use.names -= 1
        if use.names or use.made in (HOST, READER):
            return  # PyTorch keeps its page-locked memory until the copies out of it are done
        clock = self.clocks[use.made]
        last = dict(use.read) | ({use.written[0]: use.written[1]} if use.written else {})
        for stream, then in last.items():
            # What a collective uses, PyTorch keeps until somebody has waited for it.
            if stream not in (use.made, HOST, READER) and not _collectives({stream: 1}) and clock.get(stream, 0) < then:
                self.trace.hazards.append(f"{self.step}: memory of {use.made} is freed while {stream} may still use it")


def _collectives(clock: Clock) -> Clock:
    return {stream: time for stream, time in clock.items() if stream.startswith(("nccl", "gloo"))}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_input(name: str, tensor: Tensor, args: Any) -> bool:
    """Whether a collective only reads a tensor: the first argument of functional ones, the second of the others."""
    inputs = args[1] if name in ("alltoall_base_", "_allgather_base_", "allgather_") else args[0]
    made = name in ("broadcast_", "allreduce_", "recv_")
    return not made and any(tensor is leaf for leaf in tree_leaves(inputs))


def place() -> Where:
    """`file:function` of the product's innermost frame."""
    frame = innermost()
    return f"{file_of(frame)}:{frame.f_code.co_name}" if frame else "?"


ASYNCHRONOUS = (
    "isend",
    "irecv",
    "all_gather_single",
    "all_gather_into_tensor",
    "all_reduce",
    "broadcast",
    "all_gather",
)


@contextmanager
def tracing(tracer: Tracer) -> Iterator[None]:
    """Within it the tracer hears of streams, events and works. The mode itself is entered by `fake_groups`."""
    tracer.machine.listeners.append(tracer.on_stream)
    tracer.name(tracer.machine.current_stream())
    with (
        mock.patch.object(FakeWork, "wait", lambda work, *_: tracer.on_wait(work)),
        # Else a functional collective would wait at once, as it does while a compiler traces it.
        mock.patch.object(functional, "_are_we_tracing", torch.compiler.is_dynamo_compiling),
        mock.patch.multiple(dist, **{name: tracer.posted(getattr(dist, name)) for name in ASYNCHRONOUS}),
        mock.patch.multiple(dist, P2POp=Message, batch_isend_irecv=tracer.batch),
    ):
        yield
    tracer.machine.listeners.remove(tracer.on_stream)
