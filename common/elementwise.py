"""What blocks compute element by element. Blocks say what; how it is done where, is said here.

In place where no gradient wants the operand back, except for a compiler, which makes its own choice of memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the channels (..., D), a new tensor in at least fp32."""
    wide = at_least_fp32(x.dtype)
    # CPU kernels widen a half-precision operand anew each time; GPU kernels do it on the fly.
    copied = x.device.type == "cpu" and x.dtype != wide
    x = x.to(wide) if copied else x
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    inverse = torch.rsqrt(norm * norm / x.shape[-1] + eps)
    return x.mul_(inverse) if copied and not torch.is_grad_enabled() else x * inverse


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b with (a, b) the halves of the channels of x (..., 2 D), which may be overwritten: (..., D)."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a, inplace=True).mul_(b) if _in_place() else F.silu(a) * b


def gelu(x: Tensor) -> Tensor:
    """The tanh form of gelu (Hendrycks and Gimpel 2016, arXiv 1606.08415) of x, which may be overwritten."""
    return torch.ops.aten.gelu_(x, approximate="tanh") if _in_place() else F.gelu(x, approximate="tanh")


def _in_place() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())
