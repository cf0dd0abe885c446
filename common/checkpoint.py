"""Safetensors files: headers, memory-mapped tensors, and a writer that holds one tensor at a time.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. It
is read and written here and not by the library so that an error names the tensor a truncated file cuts, so that a file
larger than the machine's memory can be mapped, and so that parts of tensors go to and come from files without a copy of
the whole shard in memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_VARIANTS = ("", "bf16", "fp16")
_MAX_HEADER_BYTES = 100 << 20
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line, names the file and, where there is one, the tensor."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: where its bytes lie, not the bytes."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint(Mapping[str, Stored]):
    """The tensors of one or several safetensors files, by name. Holds headers; data is mapped when asked for."""

    def __init__(self, entries: Mapping[str, Stored], label: str, metadata: Mapping[str, str]) -> None:
        self._entries = dict(entries)
        self._maps: dict[Path, mmap.mmap] = {}
        self.label = label
        """The file, or the index, by which errors name this checkpoint."""
        self.metadata = dict(metadata)
        """The `__metadata__` strings of the files."""

    def __getitem__(self, name: str) -> Stored:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.nbytes for entry in self._entries.values())

    def select(self, prefix: str, strip: bool = False) -> Checkpoint:
        """The tensors whose name starts with `prefix`, with the prefix removed if `strip`."""
        cut = len(prefix) if strip else 0
        part = {name[cut:]: entry for name, entry in self._entries.items() if name.startswith(prefix)}
        return Checkpoint(part, self.label, self.metadata)

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the memory-mapped file, on the CPU, in the stored dtype."""
        entry = self[name]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.file not in self._maps:
            self._maps[entry.file] = _map(entry.file)
        # A tensor keeps the map alive; the map keeps no tensor alive. Odd offsets come from other writers.
        if entry.offset % entry.dtype.itemsize:
            raw = torch.frombuffer(self._maps[entry.file], dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)
            return raw.clone().view(entry.dtype).view(entry.shape)
        count = entry.nbytes // entry.dtype.itemsize
        flat = torch.frombuffer(self._maps[entry.file], dtype=entry.dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape)


def _map(path: Path) -> mmap.mmap:
    # Private and writable: pages are shared with every other process until one writes to them. Without NORESERVE the
    # kernel would refuse a file larger than the machine's memory although nothing of it is ever copied.
    with open(path, "rb") as file:
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def open_checkpoint(files: str | Path | Iterable[str | Path]) -> Checkpoint:
    """Read the headers of safetensors files.

    `files` is one `.safetensors` file, several (shards), or one `*.index.json` that names the shards.
    Raises CheckpointError for a missing file or shard, a file that is not safetensors, a truncated one, a tensor that
    the index promises and the shard lacks, and a tensor that lies in two files.
    """
    paths = [Path(files)] if isinstance(files, (str, Path)) else [Path(file) for file in files]
    if not paths:
        raise CheckpointError("no checkpoint files were given")
    label = str(paths[0]) if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more)"
    placed: dict[str, str] = {}
    if len(paths) == 1 and paths[0].name.endswith(".json"):
        index = paths[0]
        placed = _read_index(index)
        paths = [index.parent / shard for shard in dict.fromkeys(placed.values())]
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{index}: shard {path.name} is missing from {index.parent}")
    entries: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        found, strings = _read_header(path)
        for name in found.keys() & entries.keys():
            raise CheckpointError(f"{path}: tensor {name} is also in {entries[name].file}")
        entries |= found
        metadata |= strings
    for name, shard in placed.items():
        if name not in entries:
            raise CheckpointError(f"{paths[0].parent / shard}: tensor {name} is missing, but {label} says it is there")
    return Checkpoint(entries, label, metadata)


def _read_index(path: Path) -> dict[str, str]:
    try:
        placed = json.loads(path.read_text())["weight_map"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a safetensors index ({error})") from None
    if not isinstance(placed, dict) or not all(isinstance(shard, str) for shard in placed.values()):
        raise CheckpointError(f"{path}: not a safetensors index (weight_map does not map names to files)")
    return placed


def _read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(9)
            length = int.from_bytes(head[:8], "little")
            if head.startswith(b"version "):
                raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
            if head[8:] != b"{" or length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: not a safetensors file")
            if 8 + length > size:
                raise CheckpointError(f"{path}: truncated file, {size} bytes end inside the header")
            header = json.loads(b"{" + file.read(length - 1))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: a directory, not a safetensors file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a safetensors file (its header is no JSON)") from None
    strings = header.pop("__metadata__", None) or {}
    return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}, strings


def _stored(path: Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> Stored:
    try:
        kind, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: not a safetensors file (bad entry for tensor {name})") from None
    if kind not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {kind}")
    dtype = _DTYPES[kind]
    nbytes = math.prod(shape) * dtype.itemsize
    if begin < 0 or end - begin != nbytes:
        raise CheckpointError(f"{path}: tensor {name} takes {end - begin} bytes, its shape and dtype say {nbytes}")
    if start + end > size:
        raise CheckpointError(f"{path}: truncated file, tensor {name} ends at byte {start + end} of {size}")
    return Stored(name, path, dtype, shape, start + begin, nbytes)


def find_files(folder: str | Path, stem: str, dtype: torch.dtype | None = None) -> Path:
    """The checkpoint of a diffusers or transformers folder: `<stem>.safetensors` or `<stem>.safetensors.index.json`.

    The half-precision variants (`<stem>.bf16.safetensors`, `<stem>.safetensors.index.bf16.json`, fp16 alike) are
    preferred when `dtype` is theirs, and taken when there is nothing else. Pass the result to `open_checkpoint`.
    Raises CheckpointError that lists what was looked for.
    """
    folder = Path(folder)
    wanted = "bf16" if dtype == torch.bfloat16 else "fp16" if dtype == torch.float16 else ""
    for variant in sorted(_VARIANTS, key=lambda variant: variant != wanted):
        dotted = f".{variant}" if variant else ""
        for name in (f"{stem}.safetensors.index{dotted}.json", f"{stem}{dotted}.safetensors"):
            if (folder / name).is_file():
                return folder / name
    raise CheckpointError(f"{folder}: no {stem}.safetensors and no {stem}.safetensors.index.json")


def plain_stem(file: Path) -> str:
    """What `find_files` looks for to find `file`, a single file or an index of any variant."""
    stem = file.name.split(".safetensors")[0]
    base, dot, variant = stem.rpartition(".")
    return base if dot and variant in _VARIANTS else stem


def write_file(path: Path, views: Mapping[str, list[Tensor]], metadata: Mapping[str, str]) -> None:
    # Widest elements first keeps every tensor aligned to its own size, which mapping it without a copy needs.
    order = sorted(views, key=lambda name: (-views[name][0].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        group = views[name]
        rows = sum(view.shape[0] for view in group) if len(group) > 1 else None
        shape = list(group[0].shape) if rows is None else [rows, *group[0].shape[1:]]
        size = sum(view.numel() * view.dtype.itemsize for view in group)
        header[name] = {"dtype": DTYPE_NAMES[group[0].dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                for view in views[name]:
                    file.write(view.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
