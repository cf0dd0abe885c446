"""What blocks compute element by element. Blocks say what; how it is done where, is said here.

GPUs are bound by memory here: a kernel that does several things at once reads and writes once. Kernels of the CPU widen
half precision in memory of its own, so there it is done by hand, and once. In place where no gradient wants the operand
back, except for a compiler, which makes its own choice of memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times the weight over the channels (..., D), computed in at least fp32; in x's dtype.

    weight: (D,), or of any shape that x broadcasts it to, such as one of each sample (B, 1, D).
    """
    if not fuses(x):
        return _rms_norm_by_hand(x, eps, weight)
    if x.is_meta:  # to count: a GPU has one kernel for it, but the generic code of RMS norms has several
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    if weight is None or weight.numel() == x.shape[-1]:
        return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.flatten().to(x.dtype), eps)
    return (F.rms_norm(x, x.shape[-1:], None, eps) * weight).to(x.dtype)


def _rms_norm_by_hand(x: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    compute_dtype, dtype, in_place = at_least_fp32(x.dtype), x.dtype, not torch.is_grad_enabled()
    copied = dtype != compute_dtype
    x = x.to(compute_dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=compute_dtype)
    inverse = torch.rsqrt(norm * norm / x.shape[-1] + eps)
    x = x.mul_(inverse) if copied and in_place else x * inverse
    if weight is not None:
        x = x.mul_(weight) if in_place else x * weight
    return x.to(dtype)


def add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch, in the dtype of x, which may be overwritten."""
    return x.add_(branch) if in_place() else (x + branch).to(x.dtype)


def add_gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + branch * gate, in the dtype of x, which may be overwritten; the gate broadcasts and may be wider."""
    if in_place():
        return x.addcmul_(branch, gate)
    return torch.addcmul(x, branch, gate).to(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b with (a, b) the halves of the channels of x (..., 2 D), which may be overwritten: (..., D)."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a, inplace=True).mul_(b) if in_place() else F.silu(a) * b


def gelu(x: Tensor) -> Tensor:
    """The tanh form of gelu (Hendrycks and Gimpel 2016, arXiv 1606.08415) of x, which may be overwritten."""
    return torch.ops.aten.gelu_(x, approximate="tanh") if in_place() else F.gelu(x, approximate="tanh")


def fuses(x: Tensor) -> bool:
    """Whether kernels of x's device widen half precision on the fly, so that fused ones are the faster."""
    return x.device.type != "cpu"


def in_place() -> bool:
    """Whether what is no longer needed may be written over."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())
