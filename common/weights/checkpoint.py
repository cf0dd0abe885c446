"""Files of tensors: safetensors headers, memory-mapped tensors, and a writer that holds one tensor at a time.

Files of `torch.save` are read as well where they hold a table of plain tensors; nothing in them is run.

The format (see `common.weights.headers`) is read and written here and not by the library so that an error names the
tensor a truncated file cuts, so that a file larger than the machine's memory can be mapped, and so that parts of
tensors go to and come from files without a copy of the whole shard in memory.
"""

from __future__ import annotations

import mmap
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.system.files import Partial, writing
from common.weights.headers import Entry, header_of, read_header
from common.weights.pickles import MAGIC, read_pickle_header
from common.weights.schema import CheckpointError, plain_file, quoted
from common.weights.tables import PICKLES, read_index

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
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: where its bytes lie, not the bytes."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    make: Callable[[], Tensor] | None = field(default=None, compare=False)
    """What gives a tensor that is no plain run of bytes; `offset` says nothing then."""


class Checkpoint(Mapping[str, Stored]):
    """The tensors of one or several files, by name. Holds headers; data is mapped when asked for."""

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
        start = len(prefix) if strip else 0
        part = {name[start:]: entry for name, entry in self._entries.items() if name.startswith(prefix)}
        return Checkpoint(part, self.label, self.metadata)

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the memory-mapped file, on the CPU, in the stored dtype."""
        entry = self[name]
        if entry.make is not None:
            return entry.make()
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
    """Read the headers of safetensors files, and the tables of `torch.save` files.

    `files` is one `.safetensors` or one of `PICKLES`, several (shards), or one `*.index.json` that names the shards.
    Raises CheckpointError for a missing file or shard, a file that is neither, a truncated one, one that holds code,
    a tensor that the index promises and the shard lacks, and a tensor that lies in two files.
    """
    paths = [Path(files)] if isinstance(files, (str, Path)) else [Path(file) for file in files]
    if not paths:
        raise CheckpointError("no checkpoint files were given")
    label = str(paths[0]) if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more)"
    weight_map: dict[str, str] = {}
    if len(paths) == 1 and paths[0].name.endswith(".json"):
        index = paths[0]
        weight_map = read_index(index)
        paths = [index.parent / shard for shard in dict.fromkeys(weight_map.values())]
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{index}: shard {quoted(path.name)} is missing from {index.parent}")
    entries: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        table, strings = _read_table(path)
        for name in table.keys() & entries.keys():
            raise CheckpointError(f"{path}: tensor {quoted(name)} is also in {entries[name].file}")
        entries |= table
        metadata |= strings
    for name, shard in weight_map.items():
        if name not in entries:
            at = paths[0].parent / shard
            raise CheckpointError(f"{at}: tensor {quoted(name)} is missing, but {label} says it is there")
    return Checkpoint(entries, label, metadata)


def _read_table(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """What lies in one file, and its metadata."""
    if path.suffix in PICKLES and not is_zip(path):
        return {name: _pickled(path, name, tensor) for name, tensor in load_table(path).items()}, {}
    table, strings = (read_pickle_header(path), {}) if path.suffix in PICKLES else read_header(path)
    return {name: _stored(path, name, entry) for name, entry in table.items()}, strings


def _stored(path: Path, name: str, entry: Entry) -> Stored:
    return Stored(name, path, _DTYPES[entry.dtype], entry.shape, entry.offset, entry.nbytes)


def _pickled(path: Path, name: str, tensor: Tensor) -> Stored:
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{path}: tensor {quoted(name)} has the unknown dtype {tensor.dtype}")
    return Stored(name, path, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes, lambda: tensor.detach().contiguous())


def is_zip(path: Path) -> bool:
    """Whether a `torch.save` file is of the format since torch 1.6, which can be mapped."""
    with plain_file(path) as file:
        return file.read(4) == MAGIC


def load_pickle(path: Path) -> Any:
    """What a `torch.save` file holds, on the CPU; nothing in it is run. Mapped, unless it is of the format before 1.6.

    CheckpointError names the file when it is damaged, or holds more than tensors.
    """
    zipped = is_zip(path)
    try:
        return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} is no file of plain tensors: it holds code ({unsafe[1]}), which could do anything on this "
                "machine, and is not loaded; take the model's safetensors file, or a copy from its own page"
            ) from None
        raise CheckpointError(f"{path} is damaged, or no file of plain tensors; nothing else is loaded") from None
    except Exception as error:  # zip, unicode, memory and runtime errors alike
        message = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is damaged or truncated: {message or type(error).__name__}") from None


def load_table(path: Path) -> dict[str, Tensor]:
    """The named tensors of a `torch.save` file of any format. CheckpointError for anything else in it."""
    state = load_pickle(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} does not hold a table of named tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: {quoted(str(name))} is no plain tensor")
    return state


def find_files(folder: str | Path, stem: str, dtype: torch.dtype | None = None) -> Path:
    """The checkpoint of a diffusers or transformers folder: `<stem>.safetensors` or `<stem>.safetensors.index.json`.

    The half-precision variants (`<stem>.bf16.safetensors`, `<stem>.safetensors.index.bf16.json`, fp16 alike) are
    preferred when `dtype` is theirs, and taken when there is nothing else. Pass the result to `open_checkpoint`.
    Raises CheckpointError that lists what was looked for.
    """
    folder = Path(folder)
    preference = "bf16" if dtype == torch.bfloat16 else "fp16" if dtype == torch.float16 else ""
    for variant in sorted(_VARIANTS, key=lambda variant: variant != preference):
        suffix = f".{variant}" if variant else ""
        for name in (f"{stem}.safetensors.index{suffix}.json", f"{stem}{suffix}.safetensors"):
            if (folder / name).is_file():
                return folder / name
    raise CheckpointError(f"{folder}: no {stem}.safetensors and no {stem}.safetensors.index.json")


def plain_stem(file: Path) -> str:
    """What `find_files` looks for to find `file`, a single file or an index of any variant."""
    stem = file.name.split(".safetensors")[0]
    base, dot, variant = stem.rpartition(".")
    return base if dot and variant in _VARIANTS else stem


def stored_as(views: Sequence[Tensor]) -> tuple[str, list[int], int]:
    """Dtype, shape and bytes of a tensor that is written as the views of its rows, as `header_of` takes them."""
    shape = list(views[0].shape)
    if len(views) > 1:
        shape[0] = sum(view.shape[0] for view in views)
    return DTYPE_NAMES[views[0].dtype], shape, sum(view.numel() * view.dtype.itemsize for view in views)


def write_file(path: Path, views: Mapping[str, list[Tensor]], metadata: Mapping[str, str]) -> None:
    """A file of these tensors, each the views of its rows one after another; whole or not at all. WriteError."""
    # Widest elements first keeps every tensor aligned to its own size, which mapping it without a copy needs.
    order = sorted(views, key=lambda name: (-views[name][0].dtype.itemsize, name))
    header = header_of({name: stored_as(views[name]) for name in order}, metadata)
    with Partial(path) as partial, writing(path):
        with open(partial.name, "wb") as file:
            file.write(header)
            for name in order:
                for view in views[name]:
                    file.write(view.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        partial.commit()
