"""Packages that only a GPU can use, with their published signatures: flash-attn 2 and 3, and torchao's fp8 matmul.

They compute nothing but refuse what the real ones refuse. flash-attn: `flash_attn/flash_attn_interface.py` and
`hopper/flash_attn_interface.py` of Dao-AILab/flash-attention; torchao: `torchao/float8/inference.py` of pytorch/ao.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@contextmanager
def installed() -> Iterator[None]:
    """Within it the three packages can be imported."""
    functions: dict[str, dict[str, Callable[..., Any]]] = {
        "flash_attn": {"flash_attn_func": _flash2},
        "flash_attn_interface": {"flash_attn_func": _flash3},
        "torchao": {},
        "torchao.float8": {},
        "torchao.float8.inference": {"addmm_float8_unwrapped_inference": _addmm},
    }
    # Only these names are put back: what else is imported meanwhile stays.
    before = {name: sys.modules.get(name) for name in functions}
    sys.modules.update({name: _module(name, given) for name, given in functions.items()})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _module(name: str, functions: dict[str, Callable[..., Any]]) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(functions)
    return module


def _flash2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    out, lse = _flash(q, k, v)
    return (out, lse, None) if return_attn_probs else out


def _flash3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """As since autumn 2025, as far as it concerns us; before, both came always and could not be asked for."""
    out, lse = _flash(q, k, v)
    return (out, lse) if return_attn_probs else out


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, H, D) and the log-sum-exp (B, H, N)."""
    for tensor in (q, k, v):
        assert tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16), f"{tensor.device}, {tensor.dtype}"
        assert tensor.stride(-1) == 1 and tensor.shape[-1] % 8 == 0 and tensor.shape[-1] <= 256
    assert q.shape[0] == k.shape[0] and k.shape == v.shape and q.shape[2:] == k.shape[2:]
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)
    return out.transpose(1, 2), lse


def _addmm(
    a_data: Tensor,
    a_scale: Tensor,
    b_data: Tensor,
    b_scale: Tensor,
    output_dtype: torch.dtype,
    output_scale: Tensor | None = None,
    bias: Tensor | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """Row-wise scaling, as `_scaled_mm` checks it for CUDA (aten/src/ATen/native/cuda/ScaledBlas.cpp)."""
    (m, k), n = a_data.shape, b_data.shape[1]
    assert a_data.stride(1) == 1 and b_data.stride(0) == 1, "the first must lie by rows, the second by columns"
    assert k % 16 == 0 and n % 16 == 0 and b_data.shape[0] == k
    assert (a_scale.shape, b_scale.shape) == ((m, 1), (1, n))
    assert a_scale.dtype == b_scale.dtype == torch.float32
    assert a_scale.is_contiguous() and b_scale.is_contiguous()
    assert output_dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16)
    return torch._scaled_mm(
        a_data, b_data, a_scale, b_scale, bias, output_scale, output_dtype, use_fast_accum=use_fast_accum
    )
