"""From latents to frames, over one or many ranks."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.parallel.mesh import Axis
from common.registry.layout import split_evenly
from common.system.stopping import Abandoned
from common.video.causal import CausalStream, Grid, Link, LocalLink, Sent, TimeSplit, spans, wait_for
from common.video.rows import Rows
from common.video.tiles import tiles

OVERLAP = 8

DecodeSize = tuple[int, int, int, int]
"""Of latents: (C, T, h, w)."""


class VideoDecoder(nn.Module):
    """What a model's decoder says about itself. Chunk lengths are in latent frames."""

    spatial_factor: int
    """Pixels to a latent pixel."""
    time_factor: int = 1
    """Frames to a latent frame, but for the video's first, which is a single one."""
    chunk_choices: tuple[int, ...]
    """Chunk lengths to choose from, the longest first; with `chunks_fixed` there is no other, since the result depends
    on it."""
    compiled_parts: tuple[type[nn.Module], ...] = ()
    """Classes of modules without memory of earlier chunks, for `common.model.compile`."""
    chunks_fixed = False
    rounding: str = "truncate"
    """Of pixels to grey levels, as the reference's: see `to_uint8`."""

    def denormalize(self, latents: Tensor) -> Tensor:
        """From the transformer's space to the decoder's own, (B, C, t, h, w). Here: they are one."""
        return latents

    def chunks(self, latents: int, chunk: int) -> list[int]:
        """The lengths of the chunks that `latents` frames are decoded in, at most about `chunk` at a time.

        Here: in as few as needed, as even as can be, the longer ones first.
        """
        return list(split_evenly(latents, -(-latents // chunk)))

    def num_frames(self, latents: int, first: bool) -> int:
        """Frames that a chunk of `latents` becomes; `first` says that the video begins with it."""
        return self.time_factor * latents - (self.time_factor - 1) * first

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        """(B, C, t, h, w) -> (B, 3, num_frames(t), h * spatial_factor, w * spatial_factor), pixels in [-1, 1]."""
        raise NotImplementedError


@dataclass(frozen=True)
class DecodePlan:
    """How to decode: `exact` gives the result of one full decode, `tiled` cuts the picture too."""

    mode: str = "exact"
    chunk: int = 1
    """Latent frames at a time."""
    tile: tuple[int, int] | None = None
    """Largest tile (height, width) and overlap, in latent pixels, when tiled."""
    overlap: int = OVERLAP
    parts: int = 1
    """Of the height, each of them on another rank, when exact; divides the number of ranks."""

    def __str__(self) -> str:
        where = f", tiles of {self.tile[0]}x{self.tile[1]} latent pixels" if self.tile else ""
        frames = "1 latent frame" if self.chunk == 1 else f"{self.chunk} latent frames"
        where += f", the height shared by {self.parts} ranks" if self.parts > 1 else ""
        return f"{self.mode}, {frames} at a time{where}"


def to_uint8(pixels: Tensor, rounding: str = "truncate") -> Tensor:
    """Pixels (3, t, H, W) in [-1, 1] as frames (t, H, W, 3) uint8 on the CPU.

    rounding: `truncate` (Mochi's reference) or `nearest` (reference pipelines that go through PIL images).
    """
    if pixels.dtype not in (torch.float32, torch.float64):
        pixels = pixels.float()
    scaled = ((pixels + 1) / 2).clamp(0, 1) * 255
    if rounding == "nearest":
        scaled = scaled.round()
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous()


def require_finite_pixels(pixels: Tensor, frames: range) -> None:
    """Raise FloatingPointError, naming `frames`, when their pixels hold NaN or infinity. One pass, nothing copied.

    A clamp would turn infinity into white, and NaN becomes black in uint8: neither would be seen later.
    """
    if not bool(torch.stack(pixels.aminmax()).isfinite().all()):
        where = f"frame {frames[0]}" if len(frames) == 1 else f"frames {frames[0]} to {frames[-1]}"
        raise FloatingPointError(
            f"the decoder made NaN or infinity in {where}; its weights may be damaged, or --dtype too narrow"
        )


def decode_frames(
    decoder: VideoDecoder,
    latents: Tensor,
    plan: DecodePlan | None = None,
    split: TimeSplit | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[Tensor | None]:
    """Decode a video, yielding its frames in order as they become ready.

    latents: (1, C, T, h, w) of the transformer's space, the same on every rank.
    split: the ranks that share the work; collective over its axis. Default: this process alone.
    pause: called on every rank between two rounds of chunks; may raise `Abandoned` on all of them alike.
    Yields on rank 0 uint8 CPU tensors (t, H, W, 3), one per chunk, together all frames; on the other ranks None, now
    and then. Every rank must run it to its end: one that stops early leaves the others waiting.
    Raises ValueError for more than one video, and on the rank that computed them FloatingPointError for frames that
    are not finite.
    """
    if latents.ndim != 5 or latents.shape[0] != 1:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; one video is decoded at a time: (1, C, T, h, w)")
    plan, split = plan or DecodePlan(), split or TimeSplit()
    weight = next(decoder.parameters())
    run = _Decode(decoder, decoder.denormalize(latents).to(weight.device, weight.dtype), plan, split, pause)
    yield from run.tiled() if plan.mode == "tiled" else run.exact()


class _Decode:
    """One run of `decode_frames`. Inference mode is entered where something is computed: it must not leak to the
    caller while a generator rests."""

    def __init__(
        self, decoder: VideoDecoder, z: Tensor, plan: DecodePlan, split: TimeSplit, pause: Callable[[], None]
    ) -> None:
        self.decoder, self.z, self.split, self.pause = decoder, z, split, pause
        lengths = decoder.chunks(z.shape[2], plan.chunk)
        self.times = spans(lengths)
        self.frames = [decoder.num_frames(n, first=k == 0) for k, n in enumerate(lengths)]
        self.output_frames = [range(span.start, span.stop) for span in spans(self.frames)]
        self.height, self.width = z.shape[3], z.shape[4]
        self.tiles = tiles(self.height, self.width, plan.tile, plan.overlap)
        self.grid = Grid(split.axis, self.height, plan.parts)

    def stream(self, k: int, link: Link, rows: Rows | None = None) -> CausalStream:
        return CausalStream(link, first=k == 0, last=k == len(self.times) - 1, rows=rows)

    def exact(self) -> Iterator[Tensor | None]:
        """Chunk by chunk and part by part of the height, each on the rank that the grid says."""
        link, grid, factor = self.grid.link(), self.grid, self.decoder.spatial_factor
        count = len(grid.heights)
        if count > 1:
            grid.messages.meet(self.z.device)

        @torch.inference_mode()
        def work(item: int) -> Tensor:
            k, part = divmod(item, count)
            z = self.z[:, :, self.times[k], grid.heights[part]]
            pixels = self.decoder(z, self.stream(k, link, grid.rows(k, part)))
            require_finite_pixels(pixels, self.output_frames[k])
            return to_uint8(pixels[0], self.decoder.rounding)

        def blank(item: int) -> Tensor:
            k, part = divmod(item, count)
            rows = grid.lengths[part] * factor
            return torch.empty(self.frames[k], rows, self.width * factor, 3, dtype=torch.uint8)

        owners = [grid.owner(k, part) for k in range(len(self.times)) for part in range(count)]
        pieces = compute_round_robin(owners, self.split.axis, work, blank, grid.groups * count, self.pause)
        if self.split.axis.rank != 0 or count == 1:
            yield from pieces
        else:
            for _ in self.times:
                yield torch.cat([piece for piece in itertools.islice(pieces, count) if piece is not None], dim=1)
        link.close()

    def tiled(self) -> Iterator[Tensor | None]:
        """Tile j, streamed in time, on rank j mod P; rank 0 blends the tiles of one chunk at a time."""
        axis, count = self.split.axis, len(self.tiles)
        # Every tile's tails wait while the others are computed: together they are as large as the whole picture's.
        offload = self.z.device.type != "cpu"
        links = {j: LocalLink(offload) for j in range(axis.rank, count, axis.size)}

        @torch.inference_mode()
        def work(item: int) -> Tensor:
            k, j = divmod(item, count)
            z = self.tiles[j].of(self.z[:, :, self.times[k]])
            pixels = self.decoder(z, self.stream(k, links[j]))
            require_finite_pixels(pixels, self.output_frames[k])
            return pixels[0].cpu().contiguous()

        def blank(item: int) -> Tensor:
            k, j = divmod(item, count)
            return torch.empty(3, self.frames[k], *self.tiles[j].size(self.decoder.spatial_factor), dtype=self.z.dtype)

        owners = [item % count % axis.size for item in range(len(self.times) * count)]
        pieces = compute_round_robin(owners, axis, work, blank, count, self.pause)
        if axis.rank != 0:
            yield from pieces
            return
        for frames in self.frames:
            canvas = self.canvas(frames)
            for tile in self.tiles:
                # In a fixed order, so that the sum is the same on any number of ranks.
                piece = next(pieces)
                assert piece is not None
                tile.blend(canvas, piece, self.decoder.spatial_factor)
            yield to_uint8(canvas, self.decoder.rounding)

    def canvas(self, frames: int) -> Tensor:
        dtype = torch.float64 if self.z.dtype == torch.float64 else torch.float32
        size = (self.height * self.decoder.spatial_factor, self.width * self.decoder.spatial_factor)
        return torch.zeros(3, frames, *size, dtype=dtype, device=self.z.device)


def compute_round_robin(
    owners: Sequence[int],
    axis: Axis,
    compute: Callable[[int], Tensor],
    empty: Callable[[int], Tensor],
    of_round: int,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[Tensor | None]:
    """Item i is computed by rank owners[i]; rank 0 yields every item in order, the others None for each of theirs.

    compute(i): the item, a contiguous CPU tensor. empty(i): an empty tensor of its shape and dtype.
    pause: called on every rank before each `of_round` items but the first; where it raises `Abandoned`, it does so on
    every rank, and all items of the rounds before have arrived.
    Rank 0 computes its next item before it waits for those of the others, so it never holds up the wavefront, and
    holds no more than the items between two of its own. The others keep one finished item until it is taken.
    """
    if axis.rank == 0:
        messages: deque[Sent] = deque()
        for item, owner in enumerate(owners):
            if item and item % of_round == 0:
                _pause(pause, lambda: list(_arrivals(messages)))
            if owner == 0:
                mine = compute(item)
                yield from _arrivals(messages)
                yield mine
            else:
                box = empty(item)
                messages.append((dist.irecv(box, group=axis.group, group_src=owner), box))
        yield from _arrivals(messages)
        return
    message: Sent | None = None
    for item, owner in enumerate(owners):
        if item and item % of_round == 0:
            _pause(pause, partial(wait_for, message))
        if owner == axis.rank:
            mine = compute(item)
            wait_for(message)
            message = (dist.isend(mine, group=axis.group, group_dst=0), mine)
            yield None
    wait_for(message)


def _pause(pause: Callable[[], None], settle: Callable[[], object]) -> None:
    """Where the ranks leave here, what is on its way to rank 0 is let through first."""
    try:
        pause()
    except Abandoned as error:
        settle()
        error.unread = True  # the tails of the last chunk
        raise


def _arrivals(messages: deque[Sent]) -> Iterator[Tensor]:
    while messages:
        message = messages.popleft()
        wait_for(message)
        yield message[1]
