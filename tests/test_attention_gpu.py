"""Every CUDA kernel behind `--attention` against PyTorch's plain attention in fp64: output and log-sum-exp.

Skips itself without a GPU, and where a kernel's package is not installed.
"""

from __future__ import annotations

import pytest
import torch

from common.parallel.attention import KERNELS, Kernel, attention, attention_with_lse, choose_kernel

pytestmark = pytest.mark.gpu
SHAPES = [(1, 256, 256, 24, 128), (2, 77, 333, 3, 64), (1, 1, 1, 1, 128), (1, 129, 31, 5, 64)]
"""B, N, M, H, D: the models' widths, uneven and prime lengths as shards have them."""


def usable(name: str, dtype: torch.dtype, width: int) -> Kernel:
    try:
        return choose_kernel(name, torch.device("cuda"), dtype, width)
    except ValueError as error:
        pytest.skip(str(error))


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (t.double() for t in (q, k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_output_and_lse_are_those_of_plain_attention(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, n, m, heads, width = shape
    kernel = usable(name, dtype, width)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, tokens, heads, width, device="cuda", dtype=torch.float32, generator=generator).to(dtype)
        for tokens in (n, m, m)
    )
    out, lse = attention_with_lse(q, k, v, kernel)
    expected, expected_lse = exact(q, k, v)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 5e-3}[dtype]
    assert out.shape == q.shape and out.dtype == dtype
    assert lse.shape == (batch, heads, n) and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(attention(q, k, v, kernel).double(), expected, atol=tolerance, rtol=tolerance)
