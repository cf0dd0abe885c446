"""Latents outside of the models: the noise that they begin as, and the file that keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.system.files import Partial, WriteError, reason, shown, spare_file
from common.weights.dtypes import DTYPES


def draw_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal noise, fp32: full size and from a CPU generator, so that no layout changes it."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def require_finite(z: Tensor, where: str) -> None:
    """Raise FloatingPointError when the latents have left the finite numbers, naming where; on meta there are none."""
    if not z.is_meta and not bool(torch.isfinite(z).all()):
        raise FloatingPointError(
            f"the latents contain NaN or infinity after {where}; the checkpoint may be damaged, or the dtype too narrow"
        )


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


def initial_latents(latents: Tensor | None, shape: tuple[int, ...], seed: int) -> Tensor:
    """The noise that a caller brings, ValueError where it has another shape, or else the seed's."""
    if latents is None:
        return draw_noise(shape, seed)
    check_latents(latents, shape)
    return latents


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless latents that a caller brings have the shape its size and frames need."""
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}; this size and number of frames need {shape}")
