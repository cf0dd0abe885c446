"""Linear layers whose weights are held in eight bits: float8 e4m3 with one scale for each output channel.

A scale is a power of two, so that a widened weight (value times scale) is exact in bf16 and in fp32 alike: a float
loses nothing by it, and every machine computes with the very same weights. Where the hardware multiplies fp8 matrices
(compute capability 8.9 and newer), activations are rounded to fp8 row by row as well and torchao's matmul is used;
elsewhere the weights are widened, one layer at a time, when the layer runs.

e4m3: 4 bits of exponent, 3 of mantissa, largest value 448 (Micikevicius et al. 2022, arXiv 2209.05433).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
SCALE = "weight_scale"
"""Name of the scales beside `weight`, in the module as in files."""
_ELEMENTS = 1 << 22
"""Of a weight that are rounded at a time, to save memory."""
_ACTIVATIONS = 1 << 26
"""The same of activations: many, since each piece costs a launch of two kernels."""
_ALIGNMENT = 16
_SMALLEST = -126
"""The exponent of the smallest scale: of fp32's and bf16's smallest normal number."""


def to_float8(x: Tensor, elements: int = _ACTIVATIONS) -> tuple[Tensor, Tensor]:
    """x (..., n) as e4m3 and the fp32 scale (..., 1) of each row, a power of two; a row of zeros has scale 1.

    elements: how many are widened at a time. A compiler fuses everything into one pass and widens none in memory.
    """
    if torch.compiler.is_compiling():
        scale = _scales(x)
        return (x.float() / scale).to(FLOAT8), scale
    rows = x.reshape(-1, x.shape[-1])
    values = torch.empty(rows.shape, dtype=FLOAT8, device=x.device)
    scale = torch.empty(rows.shape[0], 1, dtype=torch.float32, device=x.device)
    fill_float8(rows, values, scale, elements)
    return values.view(x.shape), scale.view(*x.shape[:-1], 1)


def fill_float8(x: Tensor, values: Tensor, scale: Tensor, elements: int = _ELEMENTS) -> None:
    """Round x (m, n) into values (m, n) e4m3 and scale (m, 1), about `elements` at a time.

    Three passes over x: its peaks, the division, which is exact, and the rounding. bf16 has fp32's exponents and is not
    widened for it.
    """
    scale.copy_(_scales(x))
    compute_dtype = x.dtype if x.dtype == torch.bfloat16 else torch.float32
    rows = max(1, elements // max(1, x.shape[1]))
    for at in range(0, x.shape[0], rows):
        part = slice(at, at + rows)
        values[part].copy_(x[part].to(compute_dtype) / scale[part].to(compute_dtype))


def _scales(x: Tensor) -> Tensor:
    """(..., 1) fp32: the smallest power of two, no less than 2^-126, by which no element of a row exceeds LARGEST."""
    peak = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True).float()
    mantissa, exponent = torch.frexp(peak / LARGEST)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=_SMALLEST)
    return torch.where(peak > 0, torch.ldexp(torch.ones_like(peak), exponent), 1.0)


class Float8Linear(nn.Module):
    """As `nn.Linear`, with `weight` (out, in) in e4m3 and `weight_scale` (out, 1) in fp32. No gradients.

    multiplies: whether bf16 inputs are rounded as well and multiplied in fp8, see `has_float8_matmul`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        device: torch.device | str | None = None,
        multiplies: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=FLOAT8, device=device), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(outputs, 1, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs, device=device), requires_grad=False) if bias else None
        self.multiplies = multiplies and _aligned(outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight, self.weight_scale, self.bias)

    def rows(self, x: Tensor, spans: Sequence[slice]) -> Sequence[Tensor]:
        """Some of the outputs, (..., length of the span) each; x is rounded once."""
        # Bytes, which every device joins.
        weight = torch.cat([self.weight.view(torch.uint8)[span] for span in spans]).view(FLOAT8)
        scale = torch.cat([self.weight_scale[span] for span in spans])
        bias = None if self.bias is None else torch.cat([self.bias[span] for span in spans])
        return self._product(x, weight, scale, bias).split([span.stop - span.start for span in spans], dim=-1)

    def columns(self, x: Tensor, span: slice, bias: bool = False) -> Tensor:
        """What some of the inputs, x (..., length of the span), have in the outputs; bias: whether it is added."""
        weight = self.weight.view(torch.uint8)[:, span].contiguous().view(FLOAT8)
        return self._product(x, weight, self.weight_scale, self.bias if bias else None)

    def _product(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        if self.multiplies and _aligned(*weight.shape) and x.numel() and x.dtype == torch.bfloat16:
            return scaled_matmul(x, weight, scale, bias)
        return F.linear(x, weight.to(x.dtype) * scale.to(x.dtype), bias)


def _aligned(outputs: int, inputs: int) -> bool:
    """Whether the hardware takes a weight of these sizes."""
    return not (outputs % _ALIGNMENT or inputs % _ALIGNMENT)


def scaled_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) bf16 rounded to fp8 by rows, times the weight (out, in) in fp8; result (..., out) bf16.

    Sums are kept in fp32: the faster way of the hardware, which carries fewer bits of them, is not asked for.
    """
    values, scale = to_float8(x.flatten(0, -2))
    out = _multiply(values, scale, weight.t(), weight_scale.t(), x.dtype, bias)
    return out.unflatten(0, x.shape[:-1])


def _multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    if a.is_meta:  # to count: the op below torchao's function, which may not be there where a plan is made
        return torch._scaled_mm(a, b, a_scale, b_scale, bias, out_dtype=dtype)
    from torchao.float8.inference import addmm_float8_unwrapped_inference

    return addmm_float8_unwrapped_inference(a, a_scale, b, b_scale, dtype, bias=bias, use_fast_accum=False)


def has_float8_matmul(device: torch.device) -> bool:
    """Whether this device multiplies fp8 matrices and torchao is there to ask for it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    return importlib.util.find_spec("torchao") is not None


def plans_float8_matmul(device: torch.device | str) -> bool:
    """`has_float8_matmul` of this machine's GPU; of one that is only planned for, that it would."""
    device = torch.device(device)
    return device.type == "cuda" and (not torch.cuda.is_available() or has_float8_matmul(device))


def use_float8(module: nn.Module, names: Iterable[str], multiplies: bool = False) -> None:
    """Put a `Float8Linear` into the place of each linear layer named; their weights are not taken over.

    names: paths inside `module`; those it has not are skipped (the last block of some models has fewer). multiplies:
    as for `Float8Linear`, on the device where the module will run.
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
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        setattr(owner, leaf, Float8Linear(*sizes, device, multiplies))
