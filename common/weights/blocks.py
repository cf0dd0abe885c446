"""Transformer blocks whose weights need not all be on the device: they pass through it, one block ahead of the work.

A model holds its blocks in `Blocks` and runs them by `for block in streamed(self.blocks)`. With resident weights that
is a loop over an ordinary list. With a `Stream`, two buffers on the device take the blocks' weights in turn: while
block i computes, those of block i + 1 arrive, from wherever the `Source` has them. Parameters are views of the buffer
of their block's turn, for good, so nothing is assigned while the model runs and a compiled block sees the same
addresses in every step.

    host      pinned memory of this process
    file      the checkpoint itself, read anew each time
    shares    every rank has 1/P of the bytes, on its device or in pinned memory; a gather makes the block whole
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.parallel.interleaver import Interleaver
from common.parallel.mesh import Axis
from common.weights.load import assign

ALIGNMENT = 256

Wait = Callable[[], None]
Fill = Callable[[int, Mapping[str, Tensor]], None]
"""Writes the tensors of block `index`, by name inside the block, into the memory given."""


class Blocks(nn.ModuleList):
    """Blocks in the order they run, a list as any other, and what brings their weights where these do not stay."""

    stream: Stream | None = None


def streamed(blocks: Blocks) -> Iterator[nn.Module]:
    """The blocks in the order they run, each when its weights are in place."""
    return iter(blocks) if blocks.stream is None else blocks.stream.visit(list(blocks), len(blocks))


class StreamedLayers(Blocks):
    """Layers of a model whose own code, not ours, goes over them: iterating brings their weights."""

    def __iter__(self) -> Iterator[nn.Module]:
        layers = super().__iter__()
        return layers if self.stream is None else self.stream.visit(layers, len(self))


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its block's bytes."""

    shape: torch.Size
    dtype: torch.dtype
    offset: int
    nbytes: int


@dataclass(frozen=True)
class BlockLayout:
    """All tensors of one block in one run of bytes."""

    entries: Mapping[str, Entry]
    nbytes: int

    @classmethod
    def of(cls, block: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> BlockLayout:
        """dtype_of: the dtype in which a tensor is kept, by its name inside the block."""
        entries, at = {}, 0
        for name, slot in block.state_dict(keep_vars=True).items():
            dtype = dtype_of(name)
            size = slot.numel() * dtype.itemsize
            entries[name] = Entry(slot.shape, dtype, at, size)
            at += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(entries, at)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The block's tensors in memory (>= nbytes,) uint8."""
        return {
            name: memory[e.offset : e.offset + e.nbytes].view(e.dtype).view(e.shape) for name, e in self.entries.items()
        }


class Source(Protocol):
    """Where blocks come from."""

    def fetch(self, index: int, out: Tensor) -> Wait:
        """Begin to write block `index` into out (uint8, on the device); the result waits until it is there."""
        ...


class Stream:
    """Brings blocks from a source, each one block ahead of its turn.

    layouts: of every block, in order. buffer_bytes: bytes of each of the two buffers, at least the largest layout.
    wrap_around: whether the first block is fetched during the last, for another round. interleaver: of functions that
    go along the blocks together and take each while it is there; None: nobody else comes.
    """

    def __init__(
        self,
        source: Source,
        layouts: Sequence[BlockLayout],
        device: torch.device,
        buffer_bytes: int,
        wrap_around: bool,
        interleaver: Interleaver | None = None,
    ) -> None:
        self.source, self.layouts, self.wrap_around = source, layouts, wrap_around
        self.interleaver = interleaver or Interleaver()
        self.buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, device=device) for _ in range(min(2, len(layouts)))
        ]
        self.holds: list[int | None] = [None for _ in self.buffers]
        self.waits: list[Wait | None] = [None for _ in self.buffers]

    def views(self, index: int) -> dict[str, Tensor]:
        """Block `index`'s tensors in the buffer that it always takes."""
        return self.layouts[index].views(self.buffers[index % len(self.buffers)])

    def visit(self, blocks: Iterable[nn.Module], count: int) -> Iterator[nn.Module]:
        """The blocks, each when its weights are there. A buffer is refilled only after its block has been used, by all
        that take turns."""
        for i, block in enumerate(blocks):
            together = self.interleaver.reach(i)
            self._arrive(i)
            next_index = i + 1 if i + 1 < count else 0
            # With an odd number the last block and the first share a buffer, so the first has to wait.
            free = together and next_index % len(self.buffers) != i % len(self.buffers)
            if free and (next_index or self.wrap_around):
                self._request(next_index)
            yield block

    def _request(self, index: int) -> None:
        place = index % len(self.buffers)
        if self.holds[place] != index:
            self.finish(place)
            self.holds[place] = None
            self.waits[place] = self.source.fetch(index, self.buffers[place])
            self.holds[place] = index

    def _arrive(self, index: int) -> None:
        self._request(index)
        self.finish(index % len(self.buffers))

    def finish(self, place: int | None = None) -> None:
        """Wait for what is under way: in one buffer, or (before the buffers are given up) in both."""
        for i in range(len(self.buffers)) if place is None else (place,):
            wait, self.waits[i] = self.waits[i], None
            if wait is not None:
                wait()


class _Copies:
    """A stream of its own for copies towards a GPU; on the CPU things are simply done."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self) -> AbstractContextManager[object]:
        """Work inside waits for everything issued so far, which includes the buffer's last use."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return torch.cuda.stream(self.stream)

    def wait(self) -> Wait:
        """Makes whoever computes wait for what was issued inside."""
        if self.stream is None:
            return _nothing
        event = self.stream.record_event()
        return lambda: torch.cuda.current_stream(event.device).wait_event(event)


def _nothing() -> None:
    return None


class Pinned:
    """Memory (n,) uint8 of this process that a GPU reads by itself, for as long as it is not released.

    PyTorch's own pinned memory would stay with its allocator, locked, when the tensors are gone.
    """

    def __init__(self, nbytes: int) -> None:
        # Pages of its own: none may be registered twice.
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = torch.frombuffer(pages, dtype=torch.uint8)
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), nbytes, 0))
        # Also when it is dropped without a word; not at the end of the process, which gives everything back.
        self.release = weakref.finalize(self, _unregister, self.bytes)
        self.release.atexit = False


def _unregister(memory: Tensor) -> None:
    torch.cuda.synchronize()  # copies out of it may be under way
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))


class FromHost:
    """Blocks, or a rank's shares of them, in host memory; pinned, in front of a GPU, so that copies need no help."""

    def __init__(self, device: torch.device) -> None:
        self.copies, self.pinned = _Copies(device), device.type == "cuda"
        self.parts: list[Tensor] = []
        self.buffers: list[Pinned] = []

    def add(self, part: Tensor) -> None:
        """Keep a copy of the next block's bytes (n,)."""
        if self.pinned:
            self.buffers.append(Pinned(part.numel()))
        memory = self.buffers[-1].bytes if self.pinned else torch.empty_like(part)
        self.parts.append(memory.copy_(part))

    def fetch(self, index: int, out: Tensor) -> Wait:
        with self.copies.begin():
            self.copy(index, out)
        return self.copies.wait()

    def copy(self, index: int, out: Tensor) -> None:
        part = self.parts[index]
        out[: part.numel()].copy_(part, non_blocking=True)

    def release(self) -> None:
        """Unlock the memory; nothing is fetched any more."""
        self.parts.clear()
        for pinned in self.buffers:
            pinned.release()
        self.buffers.clear()


class FromFile:
    """Blocks read from files each time, by a thread, while the device computes."""

    def __init__(self, fill: Fill, layouts: Sequence[BlockLayout], device: torch.device) -> None:
        self.fill, self.layouts, self.copies = fill, layouts, _Copies(device)
        # A thread begins on GPU 0, where it would open a context of its own.
        start = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self.reader = ThreadPoolExecutor(1, "weights", *start)

    def fetch(self, index: int, out: Tensor) -> Wait:
        # Entered and left here for its wait on the work so far; the thread has a current stream of its own.
        with self.copies.begin():
            pass
        future = self.reader.submit(self._read, index, out)

        def wait() -> None:
            future.result()
            self.copies.wait()()

        return wait

    def _read(self, index: int, out: Tensor) -> None:
        stream = self.copies.stream
        with torch.inference_mode(), nullcontext() if stream is None else torch.cuda.stream(stream):
            self.fill(index, self.layouts[index].views(out))


class FromShares:
    """Every rank of an axis keeps 1/P of each block's bytes; the ranks make the block whole together.

    offload: whether the shares lie in host memory. Collective: all ranks fetch the same blocks in the same order.
    """

    def __init__(self, axis: Axis, device: torch.device, offload: bool) -> None:
        assert axis.group is not None, "one rank has nothing to share"
        self.axis, self.device, self.copies = axis, device, _Copies(device)
        self.host = FromHost(device) if offload else None
        self.shares: list[Tensor] = []
        self.share: Tensor | None = None

    @staticmethod
    def share_bytes(nbytes: int, ranks: int) -> int:
        """Bytes of one rank's share of a block: its part, rounded up."""
        return -(-nbytes // (ranks * ALIGNMENT)) * ALIGNMENT

    def add(self, whole: Tensor) -> None:
        """Keep this rank's share of the next block's bytes (n,)."""
        size = self.share_bytes(whole.numel(), self.axis.size)
        part = torch.zeros(size, dtype=torch.uint8)
        mine = whole[self.axis.rank * size : (self.axis.rank + 1) * size]
        part[: mine.numel()].copy_(mine)
        if self.host is None:
            self.shares.append(part.to(self.device))
        else:
            self.host.add(part)
            if self.share is None or self.share.numel() < size:
                self.share = torch.empty(size, dtype=torch.uint8, device=self.device)

    def fetch(self, index: int, out: Tensor) -> Wait:
        with self.copies.begin():
            if self.host is None:
                share = self.shares[index]
            else:
                assert self.share is not None
                share = self.share[: self.host.parts[index].numel()]
                self.host.copy(index, share)
            whole = out[: self.axis.size * share.numel()]
            work = dist.all_gather_single(whole, share, group=self.axis.group, async_op=True)
        return work.wait  # type: ignore[union-attr]


def bind(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make these the block's tensors, by their names inside it."""
    for name, tensor in tensors.items():
        assign(block, name, tensor)


def finish(model: nn.Module) -> None:
    """Wait for weights that are still on their way to a model that is about to be dropped; unlock host memory."""
    for module in model.modules():
        if isinstance(module, Blocks) and module.stream is not None:
            module.stream.finish()
            source = module.stream.source
            host = source.host if isinstance(source, FromShares) else source
            if isinstance(host, FromHost):
                host.release()
