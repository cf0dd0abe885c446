"""What every pipeline does around its model: noise, stages that load and leave, latents on disk, decode in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.blocks import finish
from common.decode import (
    AgreedPlans,
    VideoDecoder,
    decode_frames,
    decode_memory,
    decode_plans,
    plan_decode,
    plan_for_all,
)
from common.failure import is_out_of_memory
from common.files import Partial, WriteError, reason, shown, spare_file
from common.memory import free_memory, release_memory
from common.parallel import Mesh
from common.progress import Stages
from common.vae import TimeSplit

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
T = TypeVar("T")


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`bf16`, `fp16`, `fp32` or `fp64`, or the torch dtype itself. ValueError for anything else."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def latent_dtype(dtype: torch.dtype) -> torch.dtype:
    """Latents are summed over the steps in fp32, in fp64 when the model runs in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal noise, fp32: full size and from a CPU generator, so that no layout changes it."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def require_finite(z: Tensor, where: str) -> None:
    """Raise FloatingPointError when the latents have left the finite numbers, naming where; on meta there are none."""
    if not z.is_meta and not bool(torch.isfinite(z).all()):
        raise FloatingPointError(
            f"the latents contain NaN or infinity after {where}; the checkpoint may be damaged, or the dtype too narrow"
        )


class Models:
    """The models of a pipeline, one after another on the device, unless they are told to stay."""

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.loaded: dict[str, Any] = {}

    @contextmanager
    def use(self, name: str, load: Callable[[], T]) -> Iterator[T]:
        """The model `name`, loaded now or still there; it leaves the device afterwards unless models are kept.

        The caller must not hold on to it: that is what keeps memory from falling.
        """
        if name not in self.loaded:
            # Not after the previous stage: its own frame still held the model then.
            release_memory()
            self.loaded[name] = load()
        try:
            yield self.loaded[name]
            if not self.keep and isinstance(self.loaded[name], nn.Module):
                finish(self.loaded[name])
        finally:
            if not self.keep:
                del self.loaded[name]


def save_latents(
    path: str | Path, latents: Tensor, settings: Mapping[str, Any], warn: Callable[[str], None] | None = None
) -> None:
    """Write latents (1, C, T, h, w) as safetensors, whole or not at all; `settings` become its metadata.

    warn: told when they had to go to `spare_file`, or nowhere; the decode may still succeed. Without it that raises.
    """
    path = Path(path)
    try:
        _write_latents(path, latents, settings)
    except OSError as error:
        if warn is None:
            raise
        spare, why = spare_file(path), reason(error)
        try:
            _write_latents(spare, latents, settings)
            warn(f"the finished latents are kept in {shown(spare)}, since {shown(path)} cannot be written: {why}")
        except OSError:
            warn(f"the finished latents cannot be kept: {shown(path)}: {why}; going on with the decode")


def _write_latents(path: Path, latents: Tensor, settings: Mapping[str, Any]) -> None:
    with Partial(path) as partial:
        metadata = {name: str(value) for name, value in settings.items()}
        try:
            save_file({"latents": latents.cpu().contiguous()}, partial.name, metadata=metadata)
        except SafetensorError as error:
            raise WriteError(f"cannot write {shown(path)}: {error}") from None
        partial.commit()


def load_latents(path: str | Path, channels: int) -> Tensor:
    """Latents (1, C, T, h, w) from a file of `save_latents`, of a dtype of DTYPES, every number finite.

    Raises ValueError, which says what the file holds instead.
    """
    try:
        with safe_open(str(path), "pt") as file:
            if "latents" not in file.keys():  # noqa: SIM118 (not a mapping)
                raise ValueError(f"{path} holds no tensor named latents; give a file that this program has kept")
            latents = file.get_tensor("latents")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such latents file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable latents file ({error})") from None
    shape = tuple(latents.shape)
    if len(shape) != 5 or shape[:2] != (1, channels) or not all(shape):
        raise ValueError(f"{path} holds latents of shape {shape}; expected (1, {channels}, T, h, w), none of them 0")
    if latents.dtype not in DTYPES.values():
        raise ValueError(f"{path} holds latents of {latents.dtype}; expected one of {', '.join(DTYPES)}")
    if not bool(latents.isfinite().all()):
        raise ValueError(f"{path} holds latents with NaN or infinity; no video can be made of them")
    return latents


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless latents that a caller brings have the shape its size and frames need."""
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; this size and number of frames need {shape}")


def decode_video(
    decoder: VideoDecoder,
    latents: Tensor,
    mesh: Mesh,
    stages: Stages,
    mode: str = "auto",
    chunk: int | None = None,
    tile: tuple[int, int] | None = None,
    room: int | None = None,
    agreed: AgreedPlans | None = None,
) -> Tensor | None:
    """All frames (T, H, W, 3) uint8 on rank 0, None elsewhere, by the best plan that fits into free memory.

    latents: (1, C, T, h, w) of the transformer's space, the same on every rank.
    mode, chunk, tile: as for `decode_plans`. room: bytes that the decode may take here; default: all that are free.
    agreed: what several ranks have found out, kept by the caller for its next videos.
    One process falls back to the next smaller plan when memory runs out after all; several try a plan that just fits
    on zeros first, on a GPU, since a rank that fails leaves the others waiting. Raises MemoryError when nothing fits.
    """
    _, channels, frames, height, width = latents.shape
    size = (channels, frames, height, width)
    plans = decode_plans(decoder, size, mesh.world.size, mode, chunk, tile)
    free = free_memory(mesh, room)
    counted = cache(lambda plan: decode_memory(decoder, size, plan, ranks=mesh.world.size))
    plans = plan_decode(decoder, size, free, plans, counted)
    if mesh.world.size > 1 and mesh.device.type == "cuda":
        agreed = {} if agreed is None else agreed
        plans = (plan_for_all(decoder, size, plans, free, counted, mesh.world, mesh.device, agreed),)
    split = TimeSplit(mesh.world)
    for i, plan in enumerate(plans):
        stages.note(f"decode: {plan}")
        if mode == "auto" and plan.mode == "tiled" and tile is None:
            stages.warn("the exact decode does not fit into memory; seams of tiles are blended (see docs/fidelity.md)")
        try:
            return _collect(
                decode_frames(decoder, latents, plan, split), len(decoder.chunks(frames, plan.chunk)), stages
            )
        except Exception as error:
            if not is_out_of_memory(error) or mesh.world.size > 1 or i == len(plans) - 1:
                raise
            stages.warn(f"out of memory decoding ({plan}); trying a smaller way")
        release_memory()
    raise AssertionError("there is always a plan")


def _collect(pieces: Iterator[Tensor | None], chunks: int, stages: Stages) -> Tensor | None:
    with stages.stage("decoding", total=chunks, unit="chunk") as step:
        kept = []
        for piece in pieces:
            if piece is not None:
                kept.append(piece)
                step()
    return torch.cat(kept) if kept else None
