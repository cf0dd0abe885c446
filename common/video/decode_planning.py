"""How to decode within the memory at hand: the ways there are, what each takes, and which one the ranks agree on."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.parallel.device_memory import release_memory, wanted
from common.parallel.mesh import Axis, all_min
from common.registry.layout import decode_parts, decode_share, split_evenly
from common.system.failure import is_out_of_memory
from common.system.units import gib, gibs
from common.video.causal import CausalStream, LocalLink
from common.video.decode import OVERLAP, DecodePlan, DecodeSize, VideoDecoder
from common.video.rows import Messages, Rows
from common.video.tiles import tiles

TILES_COST = "24 to 29 dB PSNR to the exact one on the demos (docs/fidelity.md)"
"""What tiles of 32 pixels make of a picture, as it was measured."""

AgreedPlans = dict[tuple[DecodeSize, DecodePlan], DecodePlan]
"""By size and the plan that would be tried first: the plan that several ranks found to fit."""
MOST_COUNTED = 1024
"""Plans of all sizes whose bytes are kept."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside it make: `now`, and `peak` at once.

    On the meta device it measures a computation that could not run. device: the type of the device for which it
    stands. On a CPU a convolution takes, for its time, a copy of its input or its output in another order, whichever
    is larger (measured on oneDNN's). On a GPU, where a convolution leaves the channels last
    (`common.video.causal.lay_out`), a group norm of a video takes a contiguous copy; frames in a batch have been
    counted as copied when they were made.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.on_cpu = device == "cpu"
        self.now = self.peak = 0
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What goes in and was not made here was there before; a view of it is not new memory.
        self.storages.update(leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        # In inference mode a convolution arrives under its own name.
        convolution = func.overloadpacket in (torch.ops.aten.conv3d, torch.ops.aten.convolution)
        if self.on_cpu and convolution and math.prod(args[1].shape[2:]) > 1:
            self.peak = max(self.peak, self.now + max(args[0].nbytes, out.nbytes))
        norm = func.overloadpacket in (torch.ops.aten.group_norm, torch.ops.aten.native_group_norm)
        if not self.on_cpu and norm and args[0].ndim == 5:
            self.peak = max(self.peak, self.now + args[0].nbytes)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.storages:
            return
        self.storages.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, size: int) -> None:
        self.now -= size


def decode_memory(
    decoder: VideoDecoder, latents: DecodeSize, plan: DecodePlan, device: str | None = None, ranks: int = 1
) -> int:
    """Bytes at the peak of decoding (C, T, h, w) latents by `plan` on one of `ranks` ranks.

    Counted by running the decoder's first two chunks without data, in the dtype of its weights, which are not
    included, nor the workspaces of the kernels (`common.parallel.device_memory.wanted` is for those). device: the type
    of the device on which it would run; default: where the decoder is.
    """
    parts = tiles(latents[2], latents[3], plan.tile, plan.overlap)
    groups = ranks // plan.parts
    weights = {name: torch.empty_like(weight, device="meta") for name, weight in decoder.state_dict().items()}
    device = device or next(decoder.parameters()).device.type
    link, counter = LocalLink(), PeakMemory(device)
    # A compiled part would see that it is being watched, and never be compiled again.
    with torch.compiler.set_stance("force_eager"), counter:
        _two_chunks(lambda *args: functional_call(decoder, weights, args), decoder, latents, plan, link, "meta")
    # Beside a GPU the waiting tiles' tails lie in host memory; on the CPU they lie where the work is done.
    tail_sets = len(parts) - 1 if device == "cpu" else 0
    # Between ranks a tail that is received lies beside the one that is being sent.
    tail_sets += plan.mode == "exact" and groups > 1
    tails = sum(tail.nbytes for queue in link.kept.values() for tail in queue)
    return counter.peak + tail_sets * tails


def _two_chunks(
    run: Callable[[Tensor, CausalStream], Tensor],
    decoder: VideoDecoder,
    latents: DecodeSize,
    plan: DecodePlan,
    link: LocalLink,
    device: torch.device | str,
) -> None:
    """The largest tile's first chunk, which is the longest, and its second, which finds tails and leaves its own.

    Of a shared height one part of the largest, beside two others where there are so many.
    """
    channels, frames, height, width = latents
    heights = [length for length in split_evenly(height, plan.parts) if length]
    part = int(len(heights) > 2 and heights[1] == heights[0])
    messages = Messages()
    sizes = [part.size() for part in tiles(height, width, plan.tile, plan.overlap)]
    tall, wide = max(sizes, key=lambda size: size[0] * size[1])
    tall = heights[part] if plan.parts > 1 else tall
    lengths = decoder.chunks(frames, plan.chunk)
    dtype = next(decoder.parameters()).dtype
    with torch.inference_mode():
        for k, length in enumerate(lengths[:2]):
            z = torch.zeros(1, channels, length, tall, wide, dtype=dtype, device=device)
            rows = Rows(heights, part, messages=messages)
            run(z, CausalStream(link, k == 0, k == len(lengths) - 1, rows))


def decode_plans(
    decoder: VideoDecoder,
    latents: DecodeSize,
    ranks: int = 1,
    mode: str = "auto",
    chunk: int | None = None,
    tile: tuple[int, int] | None = None,
    overlap: int = OVERLAP,
) -> tuple[DecodePlan, ...]:
    """The ways to decode (C, T, h, w) latents on `ranks` ranks, each needing less memory than the one before.

    The first has the least work on any rank (`common.registry.layout.decode_share`); of two alike it is the one with
    the longer chunks.
    mode: `auto`, `exact` or `tiled`; chunk (latent frames) and tile (latent pixels) fix what they name.
    Raises ValueError for a mode, chunk or tile that cannot be.
    """
    _, frames, height, width = latents
    if mode not in ("auto", "exact", "tiled"):
        raise ValueError(f"VAE mode is {mode!r}; it must be auto, exact or tiled")
    if chunk is not None and chunk < 1:
        raise ValueError(f"VAE chunk is {chunk}; it must be at least 1 latent frame")
    if tile is not None and min(tile) < 4:
        raise ValueError(f"VAE tile is {tile[0]}x{tile[1]} latent pixels; it must be at least 4x4")
    if tile is not None and mode == "exact":
        raise ValueError("VAE mode exact does not cut the picture; leave the tile away or use mode tiled")
    if chunk is not None and decoder.chunks_fixed and chunk not in decoder.chunk_choices:
        raise ValueError(
            f"VAE chunk is {chunk}; the chunks are part of this model, so only {decoder.chunk_choices[0]} is possible"
        )
    choices = tuple(c for c in (chunk,) if c) or decoder.chunk_choices
    exact = _exact_plans(decoder, frames, height, ranks, choices) if mode != "tiled" and tile is None else []
    smallest = DecodePlan("tiled", choices[-1], overlap=overlap)
    limits = [tile] if tile else _tile_limits(height, width)
    tiled = [replace(smallest, tile=limit) for limit in limits] if mode != "exact" else []
    return tuple(exact + tiled)


def _exact_plans(
    decoder: VideoDecoder, frames: int, height: int, ranks: int, choices: Sequence[int]
) -> list[DecodePlan]:
    """The fastest plan for each length of chunks, from the fastest of all on, and the one with the most parts."""
    lengths = {chunk: decoder.chunks(frames, chunk) for chunk in choices}
    plans = [DecodePlan("exact", c, parts=decode_parts(lengths[c], height, ranks)) for c in choices if c <= frames]
    plans = plans or [DecodePlan("exact", choices[-1], parts=decode_parts(lengths[choices[-1]], height, ranks))]
    least = min(decode_share(lengths[plan.chunk], height, ranks, plan.parts) for plan in plans)
    while decode_share(lengths[plans[0].chunk], height, ranks, plans[0].parts) > least + 1e-9:
        del plans[0]
    if plans[-1].parts < ranks and -(-height // ranks) < -(-height // plans[-1].parts):
        plans.append(replace(plans[-1], parts=ranks))
    # What is in hand at once: frames of a chunk times rows.
    sizes = [max(lengths[plan.chunk]) * -(-height // plan.parts) for plan in plans]
    return [plan for i, plan in enumerate(plans) if sizes[i] < min(sizes[:i], default=sizes[i] + 1)]


def _tile_limits(height: int, width: int, smallest: int = 12) -> list[tuple[int, int]]:
    """Tile sizes, each about half the one before; the longer side is cut once more until it is."""
    limits: list[tuple[int, int]] = []
    rows = columns = 1
    while True:
        if width / columns >= height / rows:
            columns += 1
        else:
            rows += 1
        tall = height if rows == 1 else -(-height // rows) + OVERLAP
        wide = width if columns == 1 else -(-width // columns) + OVERLAP
        limit = (min(tall, height), min(wide, width))
        if -(-height // rows) < smallest and -(-width // columns) < smallest:
            break
        if not limits or limit[0] * limit[1] < 0.6 * limits[-1][0] * limits[-1][1]:
            limits.append(limit)
    return limits or [(height, width)]


class KnownPlans:
    """What the decodes of one decoder have found out, kept by the caller for the next ones.

    agreed: by several ranks.
    """

    def __init__(self) -> None:
        self.agreed: AgreedPlans = {}
        self._bytes: dict[tuple[DecodeSize, DecodePlan, int], int] = {}

    def count(self, decoder: VideoDecoder, size: DecodeSize, ranks: int, plan: DecodePlan) -> int:
        """`decode_memory`, which takes as long as a small video, once."""
        if (size, plan, ranks) not in self._bytes:
            if len(self._bytes) >= MOST_COUNTED:
                self._bytes.clear()
            self._bytes[size, plan, ranks] = decode_memory(decoder, size, plan, ranks=ranks)
        return self._bytes[size, plan, ranks]


def plan_decode(
    decoder: VideoDecoder,
    latents: DecodeSize,
    free_bytes: float,
    plans: tuple[DecodePlan, ...],
    count: Callable[[DecodePlan], int] | None = None,
    tries: bool = False,
) -> tuple[DecodePlan, ...]:
    """`plans` from the first one on that fits into `free_bytes` with its margin (the last one, if none does).

    count: bytes of a plan, for who keeps them; default: `decode_memory`. tries: a plan that runs out of memory is given
    up for the next, as on a GPU; then the smallest exact one is taken without the margin, before the picture is cut.
    The rest are the fall-backs, in order, after an out-of-memory error. All ranks must start with the same plan:
    give the smallest free memory of them all, or see `agree`.
    """
    exact = [plan for plan in plans if plan.mode == "exact"][-1:] if tries else []
    for i, plan in enumerate(plans):
        need = decode_memory(decoder, latents, plan) if count is None else count(plan)
        if (need if plan in exact else wanted(0, need)) <= free_bytes:
            return plans[i:]
    return plans[-1:]


def warning(
    plan: DecodePlan, plans: tuple[DecodePlan, ...], free_bytes: float, count: Callable[[DecodePlan], int]
) -> str:
    """What a user is to know of the plan that was taken out of all `plans` for these free bytes.

    Empty where the decode is exact and fits with its margin, and where tiles were asked for.
    """
    exact = [one for one in plans if one.mode == "exact"]
    if not exact or (plan.mode == "exact" and wanted(0, count(plan)) <= free_bytes):
        return ""
    need = count(plan if plan.mode == "exact" else exact[-1])
    want, by_count, free = gibs(wanted(0, need), need, free_bytes)
    room = f"it wants {want} beside its weights, margin included, by count {by_count}, and {free} are free"
    if plan.mode == "exact":
        caveat = f"; where memory runs out, tiles change the picture: {TILES_COST}" if len(exact) < len(plans) else ""
        return f"the exact decode is tight: {room}{caveat}"
    return (
        f"the decode is cut into tiles, which changes the picture: {TILES_COST}. For the exact decode "
        f"{gib(wanted(0, need) - free_bytes)} are missing: {room}. More free memory avoids it, or a smaller picture "
        "(--width, --height) or more ranks, which share its height; fewer frames do not, since one chunk is held at a "
        "time. "
        "--vae exact cuts nothing, and stops where memory runs out"
    )


def probe(decoder: VideoDecoder, latents: DecodeSize, plan: DecodePlan) -> bool:
    """Whether this rank can decode two chunks of zeros by `plan`; False after an out-of-memory error.

    Leaves the device as it was: what it took would be missing to who allocates outside of PyTorch, as NCCL does.
    """
    try:
        _two_chunks(decoder, decoder, latents, plan, LocalLink(), next(decoder.parameters()).device)
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    finally:
        release_memory()
    return False


def agree(
    plans: tuple[DecodePlan, ...], fits: Callable[[DecodePlan], bool], axis: Axis, device: torch.device
) -> DecodePlan:
    """The first plan that fits on every rank of the axis; collective.

    In the middle of a decode a rank that runs out of memory cannot call the others back from waiting for it, so
    with several ranks the plan is tried out (`probe`) before it is used. Raises MemoryError when none fits.
    """
    for plan in plans:
        if all_min(axis, int(fits(plan)), device):
            return plan
    raise MemoryError(f"even the smallest way to decode ({plans[-1]}) does not fit into memory")


def plan_for_all(
    decoder: VideoDecoder,
    latents: DecodeSize,
    plans: tuple[DecodePlan, ...],
    free_bytes: float,
    count: Callable[[DecodePlan], int],
    axis: Axis,
    device: torch.device,
    agreed: AgreedPlans,
) -> DecodePlan:
    """The first of `plans` that every rank of the axis can take; collective.

    Tried out (`agree`, `probe`) only where less than twice the first one's margin is free, since that costs the time
    of two chunks, and once: `agreed` keeps what was found. free_bytes, count: as for `plan_decode`, the same on
    every rank, as `agreed` is.
    """
    first = plans[0]
    if 2 * wanted(0, count(first)) - count(first) <= free_bytes:
        return first
    if (latents, first) not in agreed:
        agreed[latents, first] = agree(plans, lambda plan: probe(decoder, latents, plan), axis, device)
    return agreed[latents, first]
