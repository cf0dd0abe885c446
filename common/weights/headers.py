"""Headers of safetensors files, checked whole before anything is believed. Nothing here imports torch.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.weights.schema import CheckpointError, parse_object, plain_file, quoted, shown

ITEM_BYTES: Mapping[str, int] = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}
MAX_HEADER_BYTES = 16 << 20  # 100,000 tensors; published checkpoints have a few thousand
_MAX_DIMS = 16
_MAX_ELEMENTS = 1 << 60


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `nbytes` bytes from `offset`, counted from the file's first."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def header_of(tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with whose tensors follow in this order.

    tensors: of each name the dtype as the format spells it, the shape and the number of bytes. Filled up to a multiple
    of 64 bytes, so that tensors of falling element sizes lie aligned behind it.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file, and its `__metadata__`.

    CheckpointError, with the file's name, for anything but a whole file of the format.
    """
    with plain_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(9)
        length = int.from_bytes(head[:8], "little")
        if head.startswith(b"version "):
            raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
        if head[8:] != b"{" or not 2 <= length <= MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file")
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated file, {size} bytes end inside the header")
        text = b"{" + file.read(length - 1)
    try:
        header = parse_object(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors file (its header is no JSON: {error})") from None
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: not a safetensors file (its __metadata__ does not map names to texts)")
    return {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}, metadata


def is_possible(shape: Sequence[Any], *places: Any) -> bool:
    """Whether these can be the sides of a tensor and places in a file: whole numbers, few sides, no absurd product."""
    if len(shape) > _MAX_DIMS or not all(type(number) is int and number >= 0 for number in (*shape, *places)):
        return False
    return math.prod(max(side, 1) for side in shape) <= _MAX_ELEMENTS and max(places, default=0) <= _MAX_ELEMENTS


def _entry(path: Path, name: str, entry: Any, start: int, size: int) -> Entry:
    at = f"tensor {quoted(name)}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: not a safetensors file (bad entry for {at})") from None
    if not is_possible(shape, begin, end):
        raise CheckpointError(f"{path}: not a safetensors file (impossible shape or place of {at})")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        text = quoted(dtype) if isinstance(dtype, str) else shown(dtype)
        raise CheckpointError(f"{path}: {at} has the unknown dtype {text}")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise CheckpointError(f"{path}: {at} takes {end - begin} bytes, its shape and dtype say {nbytes}")
    if start + end > size:
        raise CheckpointError(f"{path}: truncated file, {at} ends at byte {start + end} of {size}")
    return Entry(dtype, shape, start + begin, nbytes)
