"""What a computation on fake CUDA tensors would launch: its kernels, and the bytes that each reads and writes.

    with fake_cuda(), torch.inference_mode(), Traffic() as traffic:
        model(x)
    len(traffic.launches), traffic.bytes(), traffic.bytes(MULTIPLIES)

An operation that PyTorch writes in terms of others is taken apart as a CUDA build would do it, and each of the others
counts as one kernel, which reads each input once and writes each output once. Rows that a tensor repeats (`expand`)
are read once. What a cache saves, and what a kernel reads twice, is not seen; the few kernels that read twice by
design are listed. Views and empty tensors cost nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"{ROOT}/{part}" for part in ("common/", "mochi_xdit/", "cogvideox_xdit/", "consisid_xdit/", "wan_xdit/"))

ATTENTION = frozenset(f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn"))
MULTIPLIES = frozenset(("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "_scaled_mm", "convolution", *ATTENTION))
"""Matrix products, convolutions and attention: what is left where everything else is fused away."""

# A CUDA build has one kernel where the generic code below them has several.
_FUSED = frozenset({"_fused_rms_norm"})
# The last is a view whose operator does not say so.
_MAKES_NOTHING = frozenset({"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view"})
_WRITES_ONLY = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_"})
"""Of what they change in place, they read nothing."""
_LIKE = frozenset({"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"})
"""They take of a tensor its shape and its kind alone."""
_WRITES_ONLY_OR_LIKE = _WRITES_ONLY | _LIKE
_READS_TWICE = frozenset({"native_group_norm"})
"""First for the statistics of whole groups, in a kernel of its own."""
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@dataclass(frozen=True)
class Launch:
    """One kernel: the operator's name, bytes read and written, and the line of the product that asked for it."""

    op: str
    bytes: int
    place: str


@dataclass(frozen=True)
class Operator:
    """What PyTorch says of an operator, which takes long to ask: there is one of these for each.

    name: `mm` of aten::mm.default. changes: which of its arguments it writes. aliases: whether it gives out memory of
    its arguments. composite: whether it is written in terms of others.
    """

    name: str
    namespace: str
    changes: tuple[bool, ...]
    aliases: bool
    composite: bool


@cache
def operator(func: Any) -> Operator:
    schema = func._schema
    return Operator(
        schema.name.split("::")[1],
        func.namespace,
        tuple(_writes(argument) for argument in schema.arguments),
        any(returned.alias_info is not None for returned in schema.returns),
        func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE),
    )


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


class Traffic(TorchDispatchMode):
    """Writes down every kernel on a CUDA device. Enter it inside `fake_cuda` and inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def bytes(self, ops: Collection[str] | None = None) -> int:
        """Read and written by these operators; default: by all."""
        return sum(launch.bytes for launch in self.launches if ops is None or launch.op in ops)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = operator(func)
        if (apart := take_apart(self, func, op, args, kwargs)) is not NotImplemented:
            return apart
        out = func(*args, **kwargs)
        self.launches += launches(op, args, kwargs, tensors_of(args, kwargs), tensors_of(out))
        return out


def take_apart(mode: TorchDispatchMode, func: Any, op: Operator, args: Any, kwargs: Any) -> Any:
    """The result of an operation that PyTorch writes in terms of others, whose parts `mode` sees; else NotImplemented.

    In inference mode such operations arrive whole.
    """
    if op.namespace != "aten" or op.name in _FUSED:
        return NotImplemented
    if func is torch.ops.aten.scaled_dot_product_attention.default and on_cuda(args[0]):
        with mode:
            return _attention(*args, **kwargs)
    if not op.composite:
        return NotImplemented
    with mode:
        return func._op_dk(_COMPOSITE, *args, **kwargs)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **how: Any,
) -> Tensor:
    """The kernel that PyTorch's own attention would take on a GPU, since a build without CUDA has no choice to make.

    Flash attention stands for cuDNN's as well: both give out memory laid out as the queries are.
    """
    assert dropout_p == 0 and not how.get("enable_gqa")
    ops, scale, width = torch.ops.aten, how.get("scale"), q.shape[-1]
    fused = q.ndim == k.ndim == v.ndim == 4
    if fused and mask is None and q.dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256:
        return ops._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    if fused and q.dtype != torch.float64:
        return ops._scaled_dot_product_efficient_attention(q, k, v, mask, False, 0.0, is_causal, scale=scale)[0]
    return ops._scaled_dot_product_attention_math(q, k, v, mask, 0.0, is_causal, scale=scale)[0]


def launches(op: Operator, args: Any, kwargs: Any, taken: list[Tensor], made: list[Tensor]) -> list[Launch]:
    """The kernels of an operation that has been run; none for a view, an empty tensor, or one on the CPU.

    taken, made: the tensors among its arguments and its results.
    """
    if op.namespace != "aten" or op.name in _MAKES_NOTHING or (op.aliases and not any(op.changes)):
        return []
    if (not any(map(on_cuda, made)) and not any(map(on_cuda, taken))) or not any(t.numel() for t in made):
        return []
    skipped = kwargs["out"] if "out" in kwargs else args[0] if op.name in _WRITES_ONLY_OR_LIKE else None
    read = sum(span(t) for t in taken if t is not skipped)
    where = place()
    moved = [Launch(op.name, read + sum(map(span, made)), where)]
    twice = span(taken[0]) if op.name in _READS_TWICE else 0
    return [*moved, Launch(op.name, twice, where)] if twice else moved


def tensors_of(*leaves: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts, in order."""
    found: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, (list, tuple)):
            found += tensors_of(*leaf)
        elif isinstance(leaf, dict):
            found += tensors_of(*leaf.values())
    return found


def on_cuda(tensor: Tensor) -> bool:
    """Without `is_cuda`, for which a fake tensor asks every mode that is entered."""
    return tensor.device.type == "cuda"


def span(tensor: Tensor) -> int:
    """Bytes of the different elements of a tensor: what `expand` repeats counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


def innermost() -> FrameType | None:
    """The product's innermost frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame and not _ours(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


@cache
def _ours(file: str) -> bool:
    return file.startswith(OURS)


def file_of(frame: FrameType) -> str:
    return frame.f_code.co_filename.removeprefix(f"{ROOT}/")


def place() -> str:
    """`file:line` of the product's innermost frame."""
    frame = innermost()
    return f"{file_of(frame)}:{frame.f_lineno}" if frame else "?"


def by_place(launched: Collection[Launch]) -> list[tuple[str, str, int, int]]:
    """(place, operator, kernels, bytes), the most bytes first."""
    kernels: Counter[tuple[str, str]] = Counter()
    moved: Counter[tuple[str, str]] = Counter()
    for launch in launched:
        kernels[launch.place, launch.op] += 1
        moved[launch.place, launch.op] += launch.bytes
    return [(*key, kernels[key], size) for key, size in moved.most_common()]
