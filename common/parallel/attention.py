"""The only file that names attention kernels.

Every tensor is (B, N, H, D) outside; PyTorch's own kernels want (B, H, N, D), a transposed view.
Softmax scale is D ** -0.5. Nothing is masked: padding never gets this far.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.system.extras import install

KERNELS = ("auto", "sdpa", "cudnn", "flash2", "flash3")
_PACKAGES = {"flash2": ("flash_attn", "flash-attn"), "flash3": ("flash_attn_interface", "flash-attn 3 (hopper/)")}
_HALF = (torch.float16, torch.bfloat16)
Capability = tuple[int, int]
_AMPERE = (8, 0)
_CUDNN_CARDS = ((9, 0), (10, 0), (10, 3))
"""Where PyTorch's own attention prefers cuDNN's kernel: `check_prefer_cudnn_attention` in its sdp_utils.cpp."""
_CUDNN = 91501
"""The first cuDNN whose attention is right for lengths that 128 does not divide (the same place; 9.15.1)."""
_WIDEST = 256
"""The largest head width of flash attention, in PyTorch as in flash-attn."""


@dataclass(frozen=True)
class Kernel:
    """An attention kernel with what its device can do, looked up once by `choose_kernel`.

    While a model runs nothing is asked any more but shapes and dtypes, so a compiler can trace a choice among them.
    """

    name: str = "auto"
    """One of KERNELS."""
    capability: Capability | None = None
    """The GPU's, None without one."""
    cudnn: bool = False
    """Whether `auto` may take cuDNN's kernel."""


def choose_kernel(
    name: str, device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> Kernel:
    """The kernel `name` on `device`. ValueError as of `check_kernel`, which takes the same arguments."""
    check_kernel(name, device, dtype, head_dim)
    if device.type != "cuda":
        return Kernel(name)
    capability = torch.cuda.get_device_capability(device)
    return Kernel(name, capability, capability in _CUDNN_CARDS and torch.backends.cuda.cudnn_sdp_enabled() and _cudnn())


def _cudnn() -> bool:
    return torch.backends.cudnn.is_available() and (torch.backends.cudnn.version() or 0) >= _CUDNN


def check_kernel(
    kernel: str, device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> None:
    """Raise ValueError when `kernel` is unknown or cannot run on `device`, naming what is missing.

    dtype, head_dim: of queries and keys, where they are known.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention kernel {kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
    if kernel in ("auto", "sdpa"):
        return
    if device.type != "cuda":
        raise ValueError(f"attention kernel {kernel} needs an NVIDIA GPU, but the device is {device.type}; use sdpa")
    if kernel == "cudnn" and not _cudnn():
        raise ValueError("attention kernel cudnn needs a PyTorch build with cuDNN 9.15.1 or newer; use sdpa")
    if kernel in _PACKAGES:
        module, package = _PACKAGES[kernel]
        if importlib.util.find_spec(module) is None:
            how = install("flash") if kernel == "flash2" else "docs/weights.md says how it is built"
            raise ValueError(f"attention kernel {kernel} needs the package {package}: {how}; or use sdpa")
    if dtype is not None and dtype not in _HALF:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"attention kernel {kernel} computes in bf16 or fp16, not in {name}; use sdpa")
    if head_dim is not None and (head_dim % 8 or head_dim > _WIDEST):
        raise ValueError(
            f"attention kernel {kernel} takes heads that are a multiple of 8 and at most {_WIDEST} wide; this "
            f"model's are {head_dim}; use sdpa"
        )
    _check_capability(kernel, torch.cuda.get_device_capability(device))


def _check_capability(kernel: str, have: Capability) -> None:
    if have < _AMPERE or (kernel == "flash3" and have[0] != 9):
        requirement = "9.0 (Hopper)" if kernel == "flash3" else "8.0 (Ampere) or newer"
        raise ValueError(
            f"attention kernel {kernel} needs a GPU of compute capability {requirement}; this one has "
            f"{have[0]}.{have[1]}; use sdpa"
        )


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel | None = None) -> Tensor:
    """Softmax attention of q (B, N, H, D) over k and v (B, M, H, D); returns (B, N, H, D) in q's dtype."""
    if q.shape[1] == 0 or q.shape[2] == 0:
        return torch.empty_like(q)
    kernel = kernel or Kernel()
    if kernel.name in ("auto", "sdpa") and q.device.type != "meta":
        return F.scaled_dot_product_attention(*_heads_first(q, k, v)).transpose(1, 2)
    return attention_with_lse(q, k, v, kernel)[0]


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel | None = None) -> tuple[Tensor, Tensor]:
    """`attention`, and the log-sum-exp of the scaled scores of every query: (B, H, N), fp32 (fp64 for fp64 inputs).

    Ring attention merges partial results with it. M must be at least 1.
    """
    assert k.shape[1] > 0, "attention over no keys has no log-sum-exp"
    if q.shape[1] == 0 or q.shape[2] == 0:
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype)
    return _with_lse(kernel or Kernel(), q, k)(q, k, v)


_LseKernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _with_lse(kernel: Kernel, q: Tensor, k: Tensor) -> _LseKernel:
    if kernel.name in _PACKAGES:
        return _flash2 if kernel.name == "flash2" else _flash3
    if q.device.type in ("cpu", "meta"):  # on meta for counting: a fused kernel holds no scores
        return _cpu
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return _plain
    if q.dtype not in _HALF:
        return _cuda_efficient
    assert kernel.capability is not None, "a kernel for a GPU comes from choose_kernel"
    if kernel.capability < _AMPERE:
        # These kernels are not built for bf16 below Ampere.
        return _cuda_efficient if q.dtype == torch.float16 else _cuda_efficient_widened
    if q.shape[-1] % 8 or q.shape[-1] > _WIDEST:
        return _cuda_efficient
    # PyTorch's own attention leaves single queries and single keys to other kernels, too.
    several = q.shape[1] > 1 and k.shape[1] > 1
    if several and (kernel.name == "cudnn" or (kernel.name == "auto" and kernel.cudnn)):
        return _cuda_cudnn
    return _cuda_flash


def empty_heads(like: Tensor, n: int) -> Tensor:
    """A tensor (B, n, H, D) to be filled, as `like` (B, any, H, D) otherwise, in memory as `attention` reads it."""
    batch, _, heads, width = like.shape
    if _by_head(like):
        return like.new_empty(batch, heads, n, width).transpose(1, 2)
    return like.new_empty(batch, n, heads, width)


def join_heads(*streams: Tensor) -> Tensor:
    """Tokens of streams (B, n, H, D), one stream after the other, in memory as `attention` reads them."""
    if _by_head(streams[0]):
        return torch.cat([x.transpose(1, 2) for x in streams], dim=2).transpose(1, 2)
    return torch.cat(streams, dim=1)


def _by_head(x: Tensor) -> bool:
    """Every block of queries reads keys and values again; the CPU's kernel is a tenth slower over strided ones.

    GPUs read them token by token, as matrix products write them, and give out what they compute in the same way.
    """
    return x.device.type == "cpu"


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if _by_head(k):
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


def _cuda_efficient_widened(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _cuda_efficient(q.float(), k.float(), v.float())
    return out.to(q.dtype), lse


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
    options = {"return_attn_probs": True} if _returns_lse_on_request() else {}
    out, lse, *_ = flash_attn_func(q, k, v, **options)
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
