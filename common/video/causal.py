"""Causal video autoencoders in bounded memory: streaming in time, on one rank or dealt over many.

A causal layer needs nothing but the last frames of what came before, so a video can pass through chunk by chunk and
come out as if it had passed in one piece. `CausalStream` is all a model sees of this: a causal convolution asks for
`stream.before(self, x, frames)` and computes. Where the frames come from is the link's business: the first frame
repeated, this rank's memory (`LocalLink`), or the rank that computes the chunk before (`PairLink`).

Over P ranks chunk k belongs to rank k mod P, and a convolution's tail leaves for the next rank before the
convolution runs. So chunk k + 1 follows chunk k one layer behind: a wavefront over (chunk, layer). Several ranks can
share a chunk too, each with some rows of the height: see `common.video.rows`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from common.parallel.mesh import Axis
from common.registry.layout import decode_parts, split_evenly
from common.video.rows import Borders, Buffers, Messages, Rows

# Elements of the input of one convolution call. What a call needs beside input and output (the padded copy, the
# workspace) grows with it, and CUDA's 3D kernels index with 32 bits.
LARGEST_CONVOLUTION = 2**27

M = TypeVar("M", bound=nn.Module)

# A message on its way and the tensor that must live until it has arrived.
Sent = tuple[dist.Work | None, Tensor]


def wait_for(message: Sent | None) -> None:
    if message is not None and message[0] is not None:
        message[0].wait()


class Link(Protocol):
    """Carries each layer's last frames from one chunk of a video to the next."""

    def send(self, key: Hashable, tail: Tensor) -> None: ...

    def receive(self, key: Hashable, x: Tensor, size: torch.Size) -> Tensor:
        """The frames before `x`, a tensor of this size (B, C, frames, H, W), with the dtype and device of `x`."""
        ...

    def close(self) -> None:
        """The video is through: wait until everything sent has been taken."""
        ...


class LocalLink:
    """Tails kept in this process. `offload` parks them in host memory, for videos of which only a part is in hand."""

    def __init__(self, offload: bool = False) -> None:
        self.offload = offload
        self.kept: defaultdict[Hashable, deque[Tensor]] = defaultdict(deque)

    def send(self, key: Hashable, tail: Tensor) -> None:
        # A view would keep the whole chunk's activations alive.
        copy = tail.to("cpu", copy=True) if self.offload else tail.clone()
        self.kept[key].append(copy)

    def receive(self, key: Hashable, x: Tensor, size: torch.Size) -> Tensor:
        return self.kept[key].popleft().to(x.device)

    def close(self) -> None:
        self.kept.clear()


class PairLink:
    """Tails to the next rank and from the one before, each over a process group of just these two ranks.

    Both ends go through (chunk, layer) in the same order, so the order of the messages says what they are. A send is
    waited for only when the same layer sends again, one round later: by then its receiver, which depends on nothing
    this rank has still to do, has taken it. At most one tail a layer is on its way.

    Each layer has one buffer to send from and one to receive into, for the whole video; see `Buffers`.
    """

    def __init__(self, before: dist.ProcessGroup, after: dist.ProcessGroup) -> None:
        self.before, self.after = before, after
        self.sending: dict[Hashable, Sent] = {}
        self.buffers = Buffers()

    def send(self, key: Hashable, tail: Tensor) -> None:
        wait_for(self.sending.pop(key, None))
        buffer = self.buffers.take(("sent", key), tail.shape, tail).copy_(tail)
        self.sending[key] = (dist.isend(buffer, group=self.after, group_dst=1 - dist.get_rank(self.after)), buffer)

    def receive(self, key: Hashable, x: Tensor, size: torch.Size) -> Tensor:
        """See `Link`. What is returned holds until the same layer receives again."""
        tail = self.buffers.take(("received", key), size, x)
        wait_for((dist.irecv(tail, group=self.before, group_src=1 - dist.get_rank(self.before)), tail))
        return tail

    def close(self) -> None:
        for message in self.sending.values():
            wait_for(message)
        self.sending.clear()


class CausalStream:
    """One chunk's place in its video, and the rows of it that are in hand.

    The default is the whole video as one chunk, which also trains.
    """

    def __init__(
        self, link: Link | None = None, first: bool = True, last: bool = True, rows: Rows | None = None
    ) -> None:
        self.link = link or LocalLink()
        self.first, self.last = first, last
        self.rows = rows or Rows()

    def before(
        self, key: Hashable, x: Tensor, frames: int, zeros: bool = False, borders: Borders | None = None
    ) -> Tensor:
        """The `frames` frames before `x` (B, C, T, H, W): copies of its first frame where the video begins, or zeros.

        `key` names the layer. The chunk's own last frames are handed on before the chunk before is waited for, unless
        this one is so short that they reach into that one. borders: the rows beside x, which have arrived; the frames
        that are handed on and come back have such rows too, so that nobody asks for them twice.
        """
        borders = borders or Borders()
        size = torch.Size((*x.shape[:2], frames, x.shape[3] + sum(borders.rows), x.shape[4]))
        if frames == 0:
            return x.new_empty(size)
        enough = x.shape[2] >= frames
        if enough and not self.last:
            self.link.send(key, borders.around(x, slice(-frames, None)))
        if not self.first:
            before = self.link.receive(key, x, size)
        elif zeros:
            before = x.new_zeros(size)
        else:
            before = borders.around(x, slice(0, 1)).expand(size)
        if not enough and not self.last:
            self.link.send(key, torch.cat([before, borders.around(x, slice(None))], dim=2)[:, :, -frames:])
        return before

    def skip(self, x: Tensor, frames: int) -> Tensor:
        """`x` without the video's first `frames` frames, which only its first chunk has."""
        return x[:, :, frames:] if self.first else x


def silu(x: Tensor) -> Tensor:
    """In place where no gradient is needed: what lives at once is what decides how much fits."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that sees no later frame; padding in space is half the kernel, in the given mode.

    zeros_before: what stands before the video's first frame is zeros, instead of copies of it.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int | tuple[int, int, int],
        padding_mode: Literal["zeros", "replicate"] = "zeros",
        stride: int | tuple[int, int, int] = 1,
        zeros_before: bool = False,
    ) -> None:
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        padding = (0, (kernel[1] - 1) // 2, (kernel[2] - 1) // 2)
        super().__init__(channels_in, channels_out, kernel, stride, padding, padding_mode=padding_mode)
        self.zeros_before = zeros_before

        self.border = padding[1:] if padding_mode == "replicate" else (0, 0)

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:  # type: ignore[override]
        borders = stream.rows.borders(x, int(self.padding[1])).wait()
        before = stream.before(self, x, self.kernel_size[0] - 1, self.zeros_before, borders)
        cuts = self._cuts(before.shape[2] + x.shape[2], x[:, :, 0].numel())
        whole = stream.rows.alone
        if len(cuts) == 1:
            # Rebound, so that what was handed in does not live beside its copy while that is convolved.
            x = self._input(before, x, cuts[0][0], borders, whole)
            return self._convolve(x, whole)
        rows, columns = (self._size(x.shape[dim], dim) for dim in (3, 4))
        total = self._size(before.shape[2] + x.shape[2], 2)
        out = empty_for(self.weight, (x.shape[0], self.out_channels, total, rows, columns), x)
        for window, frames in cuts:
            out[:, :, frames] = self._convolve(self._input(before, x, window, borders, whole), whole)
        return out

    def _size(self, length: int, dim: int) -> int:
        """What `length` along `dim` becomes."""
        i = dim - 2
        return (length + 2 * int(self.padding[i]) - self.kernel_size[i]) // self.stride[i] + 1

    def _cuts(self, frames: int, size: int) -> list[tuple[slice, slice]]:
        """Overlapping stretches of `frames` frames, and the frames that each of them makes."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = self._size(frames, 2)
        most = max(1, (LARGEST_CONVOLUTION // size - kernel) // stride + 1)
        outputs = [slice(i, min(i + most, total)) for i in range(0, total, most)]
        return [(slice(m.start * stride, (m.stop - 1) * stride + kernel), m) for m in outputs]

    def _input(self, before: Tensor, x: Tensor, window: slice, borders: Borders, alone: bool) -> Tensor:
        """The frames `window` of both together and the rows and columns around them, written once, into one tensor.

        Around them are the rows of other ranks, and where the picture ends its edges repeated, or zeros. alone: this is
        the whole height, around which the convolution puts zeros by itself.
        """
        n, (top, left) = before.shape[2], self.border
        top = top if alone else int(self.padding[1])
        old, new = before[:, :, window], slice(max(window.start - n, 0), max(window.stop - n, 0))
        x = x[:, :, new]
        if not (old.shape[2] or top or left):
            return x
        height, width = x.shape[3:]
        size = (*x.shape[:2], old.shape[2] + x.shape[2], height + 2 * top, width + 2 * left)
        whole = empty_for(self.weight, size, x)
        inside = whole[..., left : left + width]
        above, below = borders.rows
        if old.shape[2]:
            inside[:, :, : old.shape[2], top - above : top + height + below] = old
        inside = inside[:, :, old.shape[2] :]
        inside[:, :, :, top : top + height] = x
        for side, start in ((borders.above, 0), (borders.below, top + height)):
            if side is not None:
                inside[:, :, :, start : start + top] = side[:, :, new]
        self._edges(whole, (0 if above else top, 0 if below else top), left)
        return whole

    def _edges(self, whole: Tensor, rows: tuple[int, int], columns: int) -> None:
        """Fill the outermost rows, so many above and below, and columns, so many on each side."""
        # Rows, then columns: these bring the corners along.
        for dim, (first, last) in ((3, rows), (4, (columns, columns))):
            for count, start, edge in (
                (first, 0, first),
                (last, whole.shape[dim] - last, whole.shape[dim] - last - 1),
            ):
                if count and self.padding_mode == "zeros":
                    whole.narrow(dim, start, count).zero_()
                elif count:
                    whole.narrow(dim, start, count).copy_(whole.narrow(dim, edge, 1))

    def _convolve(self, x: Tensor, alone: bool) -> Tensor:
        """alone: as for `_input`."""
        padding = self.padding if self.padding_mode == "zeros" else (0, 0, 0)
        around = padding if alone else (0, 0, padding[2])
        return F.conv3d(x, self.weight, self.bias, self.stride, around)  # type: ignore[arg-type]


def lay_out(model: M, device: torch.device) -> M:
    """The model with its convolutions' weights, in place, in the memory order that the device's kernels want.

    On a GPU that is channels last: cuDNN's fast kernels read and write nothing else, and would otherwise bring what
    each call reads and writes into that order and back. `CausalConv3d` hands its weight what lies as the weight does.
    """
    if device.type == "cuda":
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                order = torch.channels_last_3d if isinstance(module, nn.Conv3d) else torch.channels_last
                module.weight.data = module.weight.data.contiguous(memory_format=order)
    return model


def empty_for(weight: Tensor, size: Sequence[int], like: Tensor) -> Tensor:
    """An empty tensor (B, C, T, H, W) in the memory order of a convolution's weight; dtype and device of `like`."""
    order = torch.contiguous_format if weight.is_contiguous() else torch.channels_last_3d
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=order)


class TimeSplit:
    """The ranks of an axis as a ring along which tails travel. The axis has `edges` where it has several ranks."""

    def __init__(self, axis: Axis | None = None) -> None:
        self.axis = axis or Axis()
        assert self.axis.group is None or self.axis.edges is not None, "this axis was made without edges"

    def link(self) -> Link:
        """A fresh link for one video."""
        return PairLink(*self.axis.edges) if self.axis.edges else LocalLink()


class Grid:
    """Which rank of an axis has which part of the height of which chunk.

    height: rows of latents. parts: how many parts a chunk is cut into, a divisor of the number of ranks; where there
    are fewer rows, the last parts are empty and their ranks have nothing to do for it.

    Where all ranks share every chunk, each keeps its part of the height. Else part r of chunk k belongs to rank
    k + r G mod P, with G = P / parts groups of ranks that chunks are dealt to: so tails always go to the next rank,
    and groups of neighbours that the ranks have already are enough for every grid.
    """

    def __init__(self, axis: Axis, height: int, parts: int = 1) -> None:
        assert axis.size % parts == 0, f"{parts} parts on {axis.size} ranks"
        self.axis, self.groups = axis, axis.size // parts
        self.lengths = [length for length in split_evenly(height, parts) if length]
        self.heights = spans(self.lengths)
        self.messages = Messages(axis if axis.group is not None else None)

    def link(self) -> Link:
        """A fresh link for one video."""
        return TimeSplit(self.axis).link() if self.groups > 1 else LocalLink()

    def owner(self, chunk: int, part: int) -> int:
        """The rank of the axis."""
        return part if self.groups == 1 else (chunk + part * self.groups) % self.axis.size

    def rows(self, chunk: int, part: int) -> Rows:
        return Rows(self.lengths, part, [self.owner(chunk, i) for i in range(len(self.lengths))], self.messages)


def spans(lengths: Sequence[int]) -> list[slice]:
    """Consecutive slices of the given lengths."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [slice(start, start + length) for start, length in zip(starts, lengths)]


def encode_moments(
    encoder: Callable[[Tensor, CausalStream], Tensor],
    video: Tensor,
    lengths: Sequence[int],
    split: TimeSplit,
    factor: int,
) -> Tensor:
    """Encode a video chunk by chunk, chunk k on rank k mod P; the whole result is on every rank.

    Where ranks would have nothing to do, as for a single picture, the height is shared as well: see `Grid`.

    encoder: (1, C, t, H, W) and a stream -> (1, C', t', H / factor, W / factor). video: (1, C, T, H, W), the same on
    every rank. lengths: frames of each chunk. Collective over the axis of `split`.
    """
    axis, times, height = split.axis, spans(lengths), video.shape[3] // factor
    grid = Grid(axis, height, decode_parts(lengths, height, axis.size))
    link, parts = grid.link(), [slice(rows.start * factor, rows.stop * factor) for rows in grid.heights]
    if len(parts) > 1:
        grid.messages.meet(video.device)
    mine = {}
    for k, frames in enumerate(times):
        for i, rows in enumerate(parts):
            if grid.owner(k, i) == axis.rank:
                stream = CausalStream(link, first=k == 0, last=k == len(times) - 1, rows=grid.rows(k, i))
                mine[k, i] = encoder(video[:, :, frames, rows], stream)
    link.close()
    whole = mine if axis.group is None else _everywhere(mine, axis, video)
    return torch.cat([torch.cat([whole[k, i] for i in range(len(parts))], dim=3) for k in range(len(times))], dim=2)


def _everywhere(mine: dict[tuple[int, int], Tensor], axis: Axis, like: Tensor) -> dict[tuple[int, int], Tensor]:
    """All pieces on every rank, each broadcast by its owner, who alone knows its shape."""
    specs: list[dict[tuple[int, int], tuple[torch.Size, torch.dtype]]] = [{} for _ in range(axis.size)]
    dist.all_gather_object(specs, {at: (x.shape, x.dtype) for at, x in mine.items()}, group=axis.group)
    pieces = {}
    for at, owner in sorted((at, rank) for rank, its in enumerate(specs) for at in its):
        shape, dtype = specs[owner][at]
        piece = mine[at].contiguous() if at in mine else torch.empty(shape, dtype=dtype, device=like.device)
        dist.broadcast(piece, group=axis.group, group_src=owner)
        pieces[at] = piece
    return pieces
