"""The only file that names attention kernels.

Every tensor is (B, N, H, D) outside; PyTorch's own kernels want (B, H, N, D), a transposed view.
Softmax scale is D ** -0.5. Nothing is masked: padding never gets this far.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("auto", "sdpa", "cudnn", "flash2", "flash3")
_PACKAGES = {"flash2": ("flash_attn", "flash-attn"), "flash3": ("flash_attn_interface", "flash-attn 3 (hopper/)")}
_HALF = (torch.float16, torch.bfloat16)


def check_kernel(kernel: str, device: torch.device) -> None:
    """Raise ValueError when `kernel` is unknown or cannot run on `device`, naming what is missing."""
    if kernel not in KERNELS:
        raise ValueError(f"attention kernel {kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
    if kernel in ("auto", "sdpa"):
        return
    if device.type != "cuda":
        raise ValueError(f"attention kernel {kernel} needs an NVIDIA GPU, but the device is {device.type}; use sdpa")
    if kernel == "cudnn" and not torch.backends.cudnn.is_available():
        raise ValueError("attention kernel cudnn needs a PyTorch build with cuDNN; use sdpa")
    if kernel in _PACKAGES:
        module, package = _PACKAGES[kernel]
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"attention kernel {kernel} needs the package {package}, which is not installed")


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str = "auto") -> Tensor:
    """Softmax attention of q (B, N, H, D) over k and v (B, M, H, D); returns (B, N, H, D) in q's dtype."""
    if q.shape[1] == 0 or q.shape[2] == 0:
        return torch.empty_like(q)
    if kernel in ("auto", "sdpa") and q.device.type != "meta":
        return F.scaled_dot_product_attention(*_heads_first(q, k, v)).transpose(1, 2)
    return attention_with_lse(q, k, v, kernel)[0]


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, kernel: str = "auto") -> tuple[Tensor, Tensor]:
    """`attention`, and the log-sum-exp of the scaled scores of every query: (B, H, N), fp32 (fp64 for fp64 inputs).

    Ring attention merges partial results with it. M must be at least 1.
    """
    assert k.shape[1] > 0, "attention over no keys has no log-sum-exp"
    if q.shape[1] == 0 or q.shape[2] == 0:
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype)
    return _lse_kernel(kernel, q)(q, k, v)


_LseKernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _lse_kernel(kernel: str, q: Tensor) -> _LseKernel:
    if kernel in _PACKAGES:
        return _flash2 if kernel == "flash2" else _flash3
    if q.device.type in ("cpu", "meta"):  # on meta for counting: a fused kernel holds no scores
        return _cpu
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return _plain
    if q.dtype not in _HALF:
        return _cuda_efficient
    hopper = torch.cuda.get_device_capability(q.device)[0] >= 9
    if kernel == "cudnn" or (kernel == "auto" and hopper and torch.backends.cudnn.is_available()):
        return _cuda_cudnn
    return _cuda_flash if q.shape[-1] % 8 == 0 else _cuda_efficient


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if k.device.type == "cpu":
        # Every block of queries reads them again; the CPU's kernel is a tenth slower over strided ones.
        k, v = k.contiguous(), v.contiguous()
    return q, k, v


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v))
    return out.transpose(1, 2), lse


def _cuda_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v))
    return out.transpose(1, 2), lse


def _cuda_efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*_heads_first(q, k, v), None, True)
    # This kernel rounds the number of rows of its log-sum-exp up.
    return out.transpose(1, 2), lse[..., : q.shape[1]]


def _cuda_cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, True)
    return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def _flash2(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    return out, lse


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import flash_attn_func

    # Since autumn 2025 the log-sum-exp comes on request; before, always, and the request was not known.
    asked = {"return_attn_probs": True} if _returns_lse_on_request() else {}
    out, lse, *_ = flash_attn_func(q, k, v, **asked)
    return out, lse


@functools.cache
def _returns_lse_on_request() -> bool:
    from flash_attn_interface import flash_attn_func

    return "return_attn_probs" in inspect.signature(flash_attn_func).parameters


def _plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """For devices and dtypes without a fused kernel that returns the log-sum-exp (fp64 on a GPU)."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    lse = torch.logsumexp(scores, dim=-1)
    return torch.einsum("bhnm,bmhd->bnhd", torch.exp(scores - lse[..., None]), v), lse
