"""The CUDA path without a GPU: fake tensors and fake process groups, recorded and checked (tests/rehearsal)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.fake_cuda import fake_cuda
from tests.rehearsal.blocks import count_block
from tests.rehearsal.traffic import MULTIPLIES, Launch, Traffic

BF16 = {"dtype": torch.bfloat16, "device": "cuda:0"}


def launched(work) -> list[tuple[str, int]]:
    """Operators and bytes of what `work` launches on x (1, 10, 64) and w (64, 64), bf16."""
    with fake_cuda(), torch.inference_mode():
        x, w = torch.empty(1, 10, 64, **BF16), torch.empty(64, 64, **BF16)
        with Traffic() as traffic:
            work(x, w)
    return [(launch.op, launch.bytes) for launch in traffic.launches]


X, W = 10 * 64 * 2, 64 * 64 * 2


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x, w: F.linear(x, w), [("mm", X + W + X)]),
        (lambda x, w: F.linear(x, w, w[0]), [("addmm", X + W + 128 + X)]),
        (lambda x, w: x.transpose(1, 2).flatten(1), [("clone", 2 * X)]),
        (lambda x, w: x.transpose(1, 2)[:, :, None].unbind(0), []),
        (lambda x, w: x.expand(5, -1, -1) + 1, [("add", X + 5 * X)]),
        (lambda x, w: x.mul_(2), [("mul_", 2 * X)]),
        (lambda x, w: x.copy_(w[:10]), [("copy_", 2 * X)]),
        (lambda x, w: torch.zeros_like(x), [("zeros_like", X)]),
        (lambda x, w: x[:, :0] * 2, []),
        (lambda x, w: F.rms_norm(x, (64,), w[0], 1e-5), [("_fused_rms_norm", X + 128 + X + 40)]),
        (lambda x, w: torch.empty(3, 3) + 1, []),
    ],
)
def test_kernels_and_bytes_are_those_of_a_cuda_build(work, expected):
    assert launched(work) == expected


def test_a_norm_that_cannot_be_fused_is_counted_as_what_it_is():
    """PyTorch fuses an RMS norm only where its weight has the input's dtype."""
    assert len(launched(lambda x, w: F.rms_norm(x, (64,), w[0].float(), 1e-5))) > 3


def test_attention_gives_out_memory_as_its_queries_lie():
    def joined(x, w):
        q = x.view(1, 10, 2, 32).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    def copied(x, w):
        q = x.view(1, 10, 2, 32).transpose(1, 2).contiguous()
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    flash = "_scaled_dot_product_flash_attention"
    assert [op for op, _ in launched(joined)] == [flash]
    assert [op for op, _ in launched(copied)] == ["clone", flash, "clone"]


@pytest.mark.parametrize("model", ["mochi", "cogvideox-5b", "consisid", "wan-1.3b"])
def test_a_block_is_counted_apart_from_the_rest_of_its_model(model):
    counted = count_block(model)
    outside = [launch for launch in counted.launches if launch.op in MULTIPLIES]
    assert counted.kernels == int(counted.kernels * 2) / 2 and 20 < counted.kernels < 120
    assert 0 < counted.multiplies < counted.bytes < sum(launch.bytes for launch in counted.launches) / 6
    assert all(isinstance(launch, Launch) and launch.place.endswith(tuple("0123456789")) for launch in outside)
