"""Headers of `torch.save` files: names, shapes and places of plain tensors, of which nothing is run. No torch here.

Since torch 1.6 such a file is an uncompressed zip archive: `data.pkl` says what there is, and each storage is a record
of its own. The pickle is read by a machine that knows tensors and tables and nothing else, so a file that asks for
more, be it code, is refused by the name of what it asks for; tensors are then read from their bytes like any others.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.weights.headers import ITEM_BYTES, Entry, is_possible
from common.weights.opcodes import Machine, UnknownError
from common.weights.schema import CheckpointError, plain_file, quoted, shown

MAGIC = b"PK\x03\x04"
_MAX_TABLE_BYTES = 16 << 20
_LOCAL_HEADER = 30
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "",
}
_DTYPES = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
"""Those whose tensors lie in an untyped storage and are named beside it."""


@dataclass(frozen=True)
class _Kind:
    dtype: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    record: str


@dataclass(frozen=True)
class _View:
    """A tensor: elements of a storage from `start` on."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _view(storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> _View:
    kind = rest[2] if len(rest) > 2 else None  # the third version says the dtype
    sides = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    if not isinstance(storage, _Storage) or not sides or not is_possible(shape, start, *strides):
        raise UnknownError("a tensor of an odd kind")
    if isinstance(kind, _Kind):
        storage = _Storage(kind.dtype, storage.record)
    return _View(storage, start, shape, strides)


def _size(sides: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sides, tuple):
        raise UnknownError("a size of an odd kind")
    return sides


def _parameter(view: Any, *_: Any) -> _View:
    if not isinstance(view, _View):
        raise UnknownError("a parameter of an odd kind")
    return view


_KNOWN: dict[tuple[str, str], Callable[..., Any] | _Kind] = {
    ("collections", "OrderedDict"): lambda: {},
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_tensor_v3"): _view,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): _Kind(dtype) for name, dtype in (_STORAGES | _DTYPES).items()},
    ("torch.storage", "UntypedStorage"): _Kind(""),
}


def _named(module: str, name: str) -> Callable[..., Any] | _Kind:
    if (module, name) not in _KNOWN:
        raise UnknownError(f"{module}.{name}")
    return _KNOWN[module, name]


def _stored(pid: Any) -> _Storage:
    if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage":
        raise UnknownError("a storage of an odd kind")
    _, kind, record, *_ = pid
    if not isinstance(kind, _Kind) or not isinstance(record, str):
        raise UnknownError("a storage of an odd kind")
    return _Storage(kind.dtype, record)


def read_pickle_header(path: Path) -> dict[str, Entry]:
    """The tensors of a `torch.save` file of the format since torch 1.6.

    CheckpointError, with the file's name, for one that is damaged, holds anything but a table of plain tensors, or
    tensors that do not lie in one run of bytes.
    """
    with plain_file(path) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{path}: not a file of torch.save since torch 1.6, or damaged")
        try:
            with zipfile.ZipFile(file) as archive:
                table, records = _table(archive), {info.filename: info for info in archive.infolist()}
                state = Machine(_named, _stored).load(archive.read(table))
                stem = table.filename.removesuffix("data.pkl")
                return _entries(path, file, state, {k.removeprefix(stem): info for k, info in records.items()})
        except UnknownError as error:
            raise CheckpointError(
                f"{path} is no file of plain tensors: it holds {quoted(str(error))}, which may be code that could do "
                "anything on this machine, and is not loaded; take the model's safetensors file, or a copy from its "
                "own page"
            ) from None
        except CheckpointError:
            raise
        except Exception as error:  # zip, pickletools, unicode and type errors alike
            text = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path} is damaged or truncated: {quoted(text) or type(error).__name__}") from None


def _table(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = [info for info in archive.infolist() if info.filename.count("/") == 1]
    table = next((info for info in members if info.filename.endswith("/data.pkl")), None)
    if table is None or table.file_size > _MAX_TABLE_BYTES:
        raise UnknownError("an archive of another kind")
    order = next((info for info in members if info.filename.endswith("/byteorder")), None)
    if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
        raise UnknownError("numbers in another byte order")
    return table


def _entries(path: Path, file: BinaryIO, state: Any, records: dict[str, zipfile.ZipInfo]) -> dict[str, Entry]:
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} does not hold a table of named tensors")
    places: dict[str, tuple[int, int]] = {}
    entries = {}
    for name, view in state.items():
        if not isinstance(name, str) or not isinstance(view, _View) or view.storage.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{path}: {shown(name)} is no plain tensor")
        key = view.storage.record
        if key not in places:
            places[key] = _place(file, records[f"data/{key}"])
        begin, size = places[key]
        item, count = ITEM_BYTES[view.storage.dtype], math.prod(view.shape)
        at = f"{path}: tensor {quoted(name)}"
        if (view.start + count) * item > size:
            raise CheckpointError(f"{at} needs more bytes than its record has; the file is damaged")
        if count and view.strides != _in_one_run(view.shape, view.strides):
            raise CheckpointError(f"{at} does not lie in one run of bytes; save it contiguous")
        entries[name] = Entry(view.storage.dtype, view.shape, begin + view.start * item, count * item)
    return entries


def _in_one_run(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor; those of sides of 1, which do not matter, as they are."""
    contiguous_strides, step = [], 1
    for side, stride in zip(reversed(shape), reversed(strides), strict=True):
        contiguous_strides.append(stride if side == 1 else step)
        step *= side
    return tuple(reversed(contiguous_strides))


def _place(file: BinaryIO, record: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a record's bytes begin in the file, and how many there are."""
    if record.compress_type != zipfile.ZIP_STORED:
        raise UnknownError("compressed tensors")
    file.seek(record.header_offset)
    head = file.read(_LOCAL_HEADER)
    if len(head) < _LOCAL_HEADER or not head.startswith(MAGIC):
        raise zipfile.BadZipFile("a record's header is missing")
    begin = record.header_offset + _LOCAL_HEADER + int.from_bytes(head[26:28], "little")
    begin += int.from_bytes(head[28:30], "little")
    if begin + record.file_size > file.seek(0, 2):
        raise zipfile.BadZipFile("a record ends beyond the file")
    return begin, record.file_size
