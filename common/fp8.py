"""Linear layers whose weights are held in eight bits: float8 e4m3 with one scale for each output channel.

A scale is a power of two, so that a widened weight (value times scale) is exact in bf16 and in fp32 alike: a float
loses nothing by it, and every machine computes with the very same weights. Where the hardware multiplies fp8 matrices
(compute capability 8.9 and newer), activations are rounded to fp8 row by row as well and torchao's matmul is used;
elsewhere the weights are widened, one layer at a time, when the layer runs.

e4m3: 4 bits of exponent, 3 of mantissa, largest value 448 (Micikevicius et al. 2022, arXiv 2209.05433).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
SCALE = "weight_scale"
"""Name of the scales beside `weight`, in the module as in files."""
_ROWS = 1 << 22
_ALIGNMENT = 16


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., n) as e4m3 and the fp32 scale (..., 1) of each row, a power of two; a row of zeros has scale 1."""
    peak = x.abs().amax(-1, keepdim=True).float()
    mantissa, exponent = torch.frexp(peak / LARGEST)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scale = torch.where(peak > 0, torch.ldexp(torch.ones_like(peak), exponent), 1.0)
    return (x.float() / scale).to(FLOAT8), scale


def fill_float8(weight: Tensor, values: Tensor, scale: Tensor) -> None:
    """Round weight (out, in) into values (out, in) e4m3 and scale (out, 1); a few rows at a time, to save memory."""
    rows = max(1, _ROWS // max(1, weight.shape[1]))
    for at in range(0, weight.shape[0], rows):
        part = slice(at, at + rows)
        rounded, scales = to_float8(weight[part])
        values[part].copy_(rounded)
        scale[part].copy_(scales)


class Float8Linear(nn.Module):
    """As `nn.Linear`, with `weight` (out, in) in e4m3 and `weight_scale` (out, 1) in fp32. No gradients."""

    def __init__(self, inputs: int, outputs: int, bias: bool, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=FLOAT8, device=device), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(outputs, 1, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs, device=device), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.numel() and x.dtype == torch.bfloat16 and self._multiplies_float8(x.device):
            return self.scaled_matmul(x)
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale.to(x.dtype), self.bias)

    def _multiplies_float8(self, device: torch.device) -> bool:
        aligned = not any(size % _ALIGNMENT for size in self.weight.shape)
        return aligned and has_float8_matmul(device)

    def scaled_matmul(self, x: Tensor) -> Tensor:
        """x (..., in) bf16 rounded to fp8 by rows, times the weight in fp8; sums in fp32, result (..., out) bf16."""
        from torchao.float8.inference import addmm_float8_unwrapped_inference

        values, scale = to_float8(x.flatten(0, -2))
        out = addmm_float8_unwrapped_inference(
            values, scale, self.weight.t(), self.weight_scale.t(), x.dtype, bias=self.bias, use_fast_accum=True
        )
        return out.unflatten(0, x.shape[:-1])


def has_float8_matmul(device: torch.device) -> bool:
    """Whether this device multiplies fp8 matrices and torchao is there to ask for it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    return importlib.util.find_spec("torchao") is not None


def use_float8(module: nn.Module, names: Iterable[str]) -> None:
    """Put a `Float8Linear` into the place of each linear layer named; their weights are not taken over.

    names: paths inside `module`; those it has not are skipped (the last block of some models has fewer).
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
            linear = getattr(owner, leaf)
        except AttributeError:
            continue
        if linear is None:
            continue
        assert isinstance(linear, nn.Linear), f"{name} is no linear layer"
        device = linear.weight.device
        setattr(owner, leaf, Float8Linear(linear.in_features, linear.out_features, linear.bias is not None, device))
