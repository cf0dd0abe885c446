"""Checkpoints: strict, streaming loads from safetensors files, renames both ways, and sharded saves.

    module = on_meta(MochiTransformer, config, sp)              # shapes only, no memory
    ckpt = open_checkpoint("dit.safetensors")                   # one file, several, or an index.json
    load(module, ckpt, rename=table, device="cuda", dtype=torch.bfloat16, keep_fp32=("pos_frequencies",))
    save(module.state_dict(), "out/diffusion_pytorch_model.safetensors", rename=table, shard_bytes=10**10)

Memory. Towards a GPU (or when the dtype or the order of rows changes) a tensor is read from the file in pieces of at
most 64 MiB straight into its final place, so the host holds less than one tensor. On the CPU a tensor that needs no
change is a view of the memory-mapped file: every process of the machine shares the same pages, and a write to one is
private to the writer. The file must therefore not be overwritten in place while it is in use; `save` replaces files
whole.

Renames. A table says for each name of ours (a tensor, or a module whose `weight`, `bias`, ... follow the module) where
it lies in the other layout: a plain name, `Concat` (ours is the others stacked along dim 0: a fused q, k, v), or `Swap`
(the two halves of dim 0 change places). `load` reads through the table and `save` writes through the same table
backwards. `rename=None` is the identity.

Eight bits. A slot in float8 takes float8 tensors with their scales as they are, and any other dtype is rounded on the
way in (`common.weights.float8`); a checkpoint in float8 does not fit a module that is not.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from common.weights.checkpoint import (
    DTYPE_NAMES,
    Checkpoint,
    CheckpointError,
    Stored,
    find_files,
    open_checkpoint,
    write_file,
)
from common.weights.float8 import FLOAT8, SCALE, fill_float8

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Concat",
    "Rename",
    "Stored",
    "Swap",
    "WeightReader",
    "assign",
    "check",
    "find_files",
    "load",
    "on_meta",
    "open_checkpoint",
    "save",
]

Progress = Callable[[int, int], None]
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_STAGING_BYTES = 64 << 20


@dataclass(frozen=True)
class Concat:
    """Ours is these tensors of the other layout stacked along dim 0, all of one shape."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Swap:
    """Ours is this tensor of the other layout with the two halves of dim 0 exchanged."""

    name: str


Rename = Mapping[str, "str | Concat | Swap"]


def on_meta(build: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Build a module on the meta device: names and shapes without memory. Fill it with `load`."""
    with torch.device("meta"):
        return build(*args, **kwargs)


@dataclass(frozen=True)
class _Piece:
    """Part `part` of `of` equal parts along dim 0 of one tensor."""

    name: str
    part: int = 0
    of: int = 1

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.of)[self.part] if self.of > 1 else tensor


def _source(rename: Rename | None, name: str) -> str | Concat | Swap:
    """Where our tensor `name` lies in the other layout."""
    if rename is None:
        return name
    if name in rename:
        return rename[name]
    module, _, leaf = name.rpartition(".")
    if module not in rename:
        raise CheckpointError(f"the rename table has no entry for {name}")
    source = rename[module]
    if isinstance(source, Concat):
        return Concat(tuple(f"{part}.{leaf}" for part in source.names))
    if isinstance(source, Swap):
        return Swap(f"{source.name}.{leaf}")
    return f"{source}.{leaf}"


def _reads(source: str | Concat | Swap) -> tuple[_Piece, ...]:
    """Parts of the other layout's tensors that make ours, in order."""
    if isinstance(source, Concat):
        return tuple(_Piece(name) for name in source.names)
    if isinstance(source, Swap):
        return (_Piece(source.name, 1, 2), _Piece(source.name, 0, 2))
    return (_Piece(source),)


def _writes(source: str | Concat | Swap, name: str) -> dict[str, tuple[_Piece, ...]]:
    """The other layout's tensors, each as parts of our tensor `name`: the inverse of `_reads`."""
    if isinstance(source, Concat):
        return {other: (_Piece(name, i, len(source.names)),) for i, other in enumerate(source.names)}
    if isinstance(source, Swap):
        return {source.name: (_Piece(name, 1, 2), _Piece(name, 0, 2))}
    return {source: (_Piece(name),)}


def load(
    module: M,
    checkpoint: Checkpoint,
    rename: Rename | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    keep_fp32: Collection[str] = (),
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
) -> M:
    """Fill `module` (usually from `on_meta`) with the tensors of `checkpoint`, one at a time; return it in eval mode.

    rename    table to the checkpoint's names; None when they are the module's own
    dtype     of floating tensors; None keeps the stored ones
    keep_fp32 names of tensors that are held in fp32 at least, whatever `dtype` says
    ignore    shell patterns of the checkpoint's tensors that may be left over
    progress  called with (bytes done, bytes in all)

    Everything is checked against the headers before the first byte is read. Raises CheckpointError naming the file and
    the tensors that are missing, unexpected, or of the wrong shape or dtype. Parameters come out frozen; tensors that
    several names share (tied embeddings) need to be stored under one of them.
    """
    with WeightReader(module, checkpoint, rename, device, dtype, keep_fp32, ignore) as reader:
        reader.load(progress=progress)
    return module.eval()


class WeightReader:
    """A module's tensors in a checkpoint, to be read once or again and again. Arguments and errors as for `load`.

    Everything is checked when it is made. Holds open files from the first read until it is closed.
    """

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        rename: Rename | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        keep_fp32: Collection[str] = (),
        ignore: Sequence[str] = (),
    ) -> None:
        self.module, self.checkpoint, self.device = module, checkpoint, torch.device(device)
        self.dtype, self.keep_fp32 = dtype, frozenset(keep_fp32)
        self.slots = _slots(module)
        self.by_name = {name: (names, slot) for names, slot in self.slots for name in names}
        self.plan = _plan(self.slots, checkpoint, rename, ignore)
        self.total = sum(_nbytes(checkpoint, pieces) for pieces in self.plan.values())
        self.done = 0
        self.reader = _FileReader(self.device)

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.reader.close()

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that the module's tensor of this name gets."""
        names, slot = self.by_name[name]
        if slot.dtype == FLOAT8 or _is_scale(name):
            return slot.dtype
        file_dtype = self.checkpoint[self.plan[names][0].name].dtype
        dtype = (self.dtype or file_dtype) if slot.is_floating_point() else file_dtype
        return torch.promote_types(dtype, torch.float32) if self.keep_fp32.intersection(names) else dtype

    def load(self, prefix: str = "", without: str | None = None, progress: Progress | None = None) -> None:
        """Put the tensors whose names start with `prefix`, and not with `without`, into the module."""
        for names, slot in self.slots:
            if names not in self.plan or not names[0].startswith(prefix):
                continue
            if without is not None and names[0].startswith(without):
                continue
            pieces, dtype = self.plan[names], self.dtype_of(names[0])
            file_dtype = self.checkpoint[pieces[0].name].dtype
            if self.device.type == "cpu" and dtype == file_dtype and len(pieces) == 1:
                tensors = {names[0]: self.checkpoint.tensor(pieces[0].name)}
            else:
                tensors = {names[0]: torch.empty(slot.shape, dtype=dtype, device=self.device)}
                if dtype == FLOAT8 and file_dtype != FLOAT8:
                    scale = names[0].removesuffix("weight") + SCALE
                    tensors[scale] = torch.empty(slot.shape[0], 1, device=self.device)
                self.read(names, tensors)
            for name, tensor in tensors.items():
                for alias in names if name == names[0] else (name,):
                    assign(self.module, alias, tensor)
            self.count(names, progress)

    def count(self, names: tuple[str, ...], progress: Progress | None) -> None:
        """Note that a tensor has been read."""
        self.done += _nbytes(self.checkpoint, self.plan[names])
        if progress is not None:
            progress(self.done, self.total)

    def read(self, names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> None:
        """Read one tensor into `tensors[names[0]]`, and where it is rounded to float8 its scale beside it."""
        out, pieces = tensors[names[0]], self.plan[names]
        parts = [(self.checkpoint[piece.name], piece) for piece in pieces]
        file_dtype = parts[0][0].dtype
        if out.dtype != FLOAT8 or file_dtype == FLOAT8:
            self.reader.read(parts, out)
            return
        whole = torch.empty(out.shape, dtype=file_dtype, device=self.device)
        self.reader.read(parts, whole)
        fill_float8(whole, out, tensors[names[0].removesuffix("weight") + SCALE])

    def fill(self, prefix: str, tensors: Mapping[str, Tensor], progress: Progress | None = None) -> None:
        """Read the tensors whose names start with `prefix` into memory given by the rest of their names."""
        whole = {prefix + name: tensor for name, tensor in tensors.items()}
        for names in self.plan:
            if names[0] in whole:
                self.read(names, whole)
                if progress is not None:
                    self.count(names, progress)


def check(module: nn.Module, checkpoint: Checkpoint, rename: Rename | None = None, ignore: Sequence[str] = ()) -> None:
    """Raise what `load` would raise for these headers, and read nothing: for a check at the door."""
    _plan(_slots(module), checkpoint, rename, ignore)


def _nbytes(checkpoint: Checkpoint, pieces: Iterable[_Piece]) -> int:
    return sum(checkpoint[piece.name].nbytes // piece.of for piece in pieces)


def _slots(module: nn.Module) -> list[tuple[tuple[str, ...], Tensor]]:
    """Tensors of the module's state, each with all the names it goes by."""
    state = module.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return [(tuple(group), state[group[0]]) for group in names.values()]


def _plan(
    slots: list[tuple[tuple[str, ...], Tensor]], checkpoint: Checkpoint, rename: Rename | None, ignore: Sequence[str]
) -> dict[tuple[str, ...], tuple[_Piece, ...]]:
    plan: dict[tuple[str, ...], tuple[_Piece, ...]] = {}
    sources: set[str] = set()
    missing: list[str] = []
    for names, slot in slots:
        options = [_reads(_source(rename, name)) for name in names]
        sources |= {piece.name for pieces in options for piece in pieces}
        pieces = next((o for o in options if all(p.name in checkpoint for p in o)), None)
        if pieces is None and _is_scale(names[0]) and not any(p.name in checkpoint for p in options[0]):
            weight = _reads(_source(rename, names[0].removesuffix(SCALE) + "weight"))
            if all(p.name in checkpoint and checkpoint[p.name].dtype != FLOAT8 for p in weight):
                continue  # made when the weight is rounded
        if pieces is None:
            missing += [piece.name for piece in options[0] if piece.name not in checkpoint]
            continue
        plan[names] = pieces
        _check(slot, checkpoint, pieces)
    extra = [name for name in checkpoint if name not in sources and not any(fnmatch.fnmatch(name, p) for p in ignore)]
    problems = [_some("missing", missing), _some("unexpected", extra)]
    if missing or extra:
        raise CheckpointError(f"{checkpoint.label}: " + "; ".join(problem for problem in problems if problem))
    return plan


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def _check(slot: Tensor, checkpoint: Checkpoint, pieces: tuple[_Piece, ...]) -> None:
    parts = len(pieces) // pieces[0].of or 1
    shape = tuple(slot.shape) if parts == 1 else (slot.shape[0] // parts, *slot.shape[1:])
    dtypes = {checkpoint[piece.name].dtype for piece in pieces}
    for piece in pieces:
        entry = checkpoint[piece.name]
        at = f"{entry.file}: tensor {entry.name}"
        if entry.shape != shape:
            raise CheckpointError(f"{at} has shape {list(entry.shape)}, expected {list(shape)}")
        allowed_dtypes = _allowed(piece.name, slot)
        if entry.dtype not in allowed_dtypes:
            names = ", ".join(DTYPE_NAMES[dtype] for dtype in allowed_dtypes)
            raise CheckpointError(f"{at} has dtype {DTYPE_NAMES[entry.dtype]}, expected {names}")
        if len(dtypes) > 1:
            raise CheckpointError(f"{at} and those it is fused with have different dtypes")


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] == SCALE


def _allowed(name: str, slot: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes in which a file may have a tensor for this slot."""
    if not slot.is_floating_point() or _is_scale(name):
        return (slot.dtype,)
    return (FLOAT8, *CASTABLE) if slot.dtype == FLOAT8 else CASTABLE


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the module's parameter (frozen) or buffer of that name, with its own dtype and device."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


class _FileReader:
    """Reads parts of files into their final place through one small buffer; keeps the files it reads open."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.files: dict[Path, FileIO] = {}
        self.open = ExitStack()
        self.staging: Tensor | None = None

    def close(self) -> None:
        self.open.close()
        self.files.clear()

    def read(self, parts: list[tuple[Stored, _Piece]], out: Tensor) -> None:
        """The parts, one after the other, into contiguous `out`; values are cast to its dtype."""
        flat, at = out.view(-1), 0
        for entry, piece in parts:
            count = math.prod(entry.shape) // piece.of
            if entry.make is not None:
                flat[at : at + count].view(-1, *entry.shape[1:]).copy_(piece.rows(entry.make()))
                at += count
                continue
            start = entry.offset + piece.part * count * entry.dtype.itemsize
            self._fill(flat[at : at + count], entry, start)
            at += count

    def _fill(self, out: Tensor, entry: Stored, start: int) -> None:
        if out.device.type == "cpu" and out.dtype == entry.dtype:
            self._bytes(entry, start, out.view(torch.uint8))
            return
        if self.staging is None:
            pinned = self.device.type == "cuda"
            self.staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=pinned, device="cpu")
        step = _STAGING_BYTES // entry.dtype.itemsize
        for begin in range(0, out.numel(), step):
            target = out[begin : begin + step]
            raw = self.staging[: target.numel() * entry.dtype.itemsize]
            self._bytes(entry, start + begin * entry.dtype.itemsize, raw)
            target.copy_(raw.view(entry.dtype))

    def _bytes(self, entry: Stored, start: int, out: Tensor) -> None:
        if entry.file not in self.files:
            self.files[entry.file] = self.open.enter_context(FileIO(entry.file))
        file, view = self.files[entry.file], out.numpy().data
        file.seek(start)
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{entry.file}: truncated file, tensor {entry.name} ends early")
            view = view[count:]


def save(
    state: Mapping[str, Tensor],
    path: str | Path,
    rename: Rename | None = None,
    shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write `state` as safetensors in the layout of `rename` and return the files written.

    With `shard_bytes` the tensors go to `<stem>-00001-of-0000N.safetensors` of at most that many bytes each (a single
    larger tensor gets a file of its own) beside `<stem>.safetensors.index.json`; without, to `path` itself. Tensors may
    lie on any device; one at a time passes through the host. A file appears whole or not at all.
    """
    path = Path(path)
    parts: dict[str, tuple[_Piece, ...]] = {}
    for name in state:
        parts |= _writes(_source(rename, name), name)
    views = {other: [piece.rows(state[piece.name].detach()) for piece in pieces] for other, pieces in parts.items()}
    sizes = {name: sum(view.numel() * view.dtype.itemsize for view in group) for name, group in views.items()}
    metadata = {"format": "pt", **(metadata or {})}
    if shard_bytes is None:
        write_file(path, views, metadata)
        return [path]
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    files = [path.with_name(f"{path.stem}-{i:05d}-of-{len(shards):05d}.safetensors") for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards):
        write_file(file, {name: views[name] for name in names}, metadata)
    weight_map = {name: file.name for file, names in zip(files, shards) for name in names}
    index = path.with_name(f"{path.stem}.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=1))
    return [*files, index]
