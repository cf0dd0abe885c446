"""What a block moves on a GPU, counted without one; what GPUs do otherwise than CPUs gives the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.model.elementwise import add_gated, rms_norm
from common.model.linear import linear_gelu
from common.model.rope import rotate_pairs, rotation
from common.parallel.usp import SequenceParallel
from common.registry.layout import Layout
from tests.helpers.fake_cuda import fake_cuda
from tests.rehearsal.blocks import count_block
from tests.rehearsal.floor import floor_of
from tests.rehearsal.rounding import as_a_gpu_computes
from tests.test_step_work import prepared


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.fixture
def as_on_a_gpu():
    with as_a_gpu_computes():
        yield


def predict(kind: str, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode():
        model, x, cond = prepared(kind, SequenceParallel(), dtype, torch.Generator().manual_seed(0))
        return model(x, torch.full((1,), 500.0), cond).double()


@pytest.mark.parametrize(
    ("model", "kernels", "gigabytes", "of_the_floor"),
    [
        ("mochi", 44, 6.23, 1.73),
        ("cogvideox-2b", 27, 2.60, 1.14),
        ("cogvideox-5b", 31, 5.12, 1.22),
        ("consisid", 33, 5.49, 1.18),
        ("wan-14b", 26, 42.9, 1.20),
    ],
)
def test_a_block_moves_no_more_than_it_has_to_without_kernels_of_its_own(model, kernels, gigabytes, of_the_floor):
    counted = count_block(model)
    assert counted.kernels <= kernels and counted.bytes <= gigabytes * 1e9
    assert floor_of(model) < counted.bytes <= of_the_floor * floor_of(model)


@pytest.mark.parametrize(
    ("model", "layout", "kernels", "gigabytes"),
    [
        ("mochi", Layout(ulysses=4), 48, 2.06),
        ("mochi", Layout(ring=2), 53, 4.01),
        ("cogvideox-5b", Layout(ring=2, ulysses=4), 42, 1.20),
    ],
)
def test_what_travels_is_copied_once_and_partial_results_are_merged_once(model, layout, kernels, gigabytes):
    counted = count_block(model, layout=layout)
    assert counted.kernels <= kernels and counted.bytes <= gigabytes * 1e9


def test_wans_stream_in_fp32_costs_what_it_is_said_to():
    counted, floor = count_block("wan-14b", wide=True), floor_of("wan-14b", wide=True)
    assert counted.kernels <= 33 and floor < counted.bytes <= 1.35 * floor


@pytest.mark.parametrize("kind", ["mochi", "2b", "5b", "consisid"])
def test_a_gpus_operations_give_the_same_prediction_and_round_no_more(kind):
    wanted = predict(kind, torch.float64)
    with as_a_gpu_computes():
        torch.testing.assert_close(predict(kind, torch.float64), wanted, atol=1e-10, rtol=0)
        on_a_gpu = torch.linalg.vector_norm(predict(kind, torch.bfloat16) - wanted)
    by_hand = torch.linalg.vector_norm(predict(kind, torch.bfloat16) - wanted)
    assert 0 < on_a_gpu < 1.1 * by_hand


def test_half_precision_is_turned_without_wide_copies(as_on_a_gpu):
    x, rest, angles = draw(2, 7, 3, 8, dtype=torch.bfloat16), draw(2, 4, 3, 8, dtype=torch.bfloat16), draw(7, 3, 4)
    turn = torch.polar(torch.ones_like(angles), angles)
    want = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2)
    rope = rotation(angles.cos().float(), angles.sin().float(), torch.bfloat16)
    with torch.inference_mode():
        out = rotate_pairs(x, rope, rest)
    assert rope.dtype == torch.float16 and out.dtype == torch.bfloat16
    torch.testing.assert_close(out[:, :7].double(), want, atol=0.02, rtol=2**-8)
    assert torch.equal(out[:, 7:], rest)
    grown = rotate_pairs(x.clone().requires_grad_(), rope, rest)
    torch.testing.assert_close(grown, out, atol=0.02, rtol=2**-7)


@pytest.mark.parametrize("batch", [1, 3])
def test_norms_have_the_weights_of_their_samples(batch, as_on_a_gpu):
    x, weight = draw(batch, 5, 8), draw(batch, 1, 8)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, 1e-6, weight), want, atol=1e-12, rtol=0)


def test_a_gate_may_be_wider_and_its_gradients_are_right():
    x, branch, gate = draw(1, 5, 8, dtype=torch.bfloat16), draw(1, 5, 8, dtype=torch.bfloat16), draw(1, 1, 8).float()
    want = (x.float() + branch.float() * gate).bfloat16()
    with torch.inference_mode():
        assert torch.equal(add_gated(x.clone(), branch, gate), want)
    assert torch.equal(add_gated(x.clone().requires_grad_(), branch, gate), want)
    given = [t.double().requires_grad_() for t in (x, branch, gate)]
    torch.autograd.gradcheck(lambda *t: add_gated(*t), given)


def test_a_feed_forwards_activation_is_in_its_product_on_a_gpu_and_the_tanh_form_everywhere():
    layer, x = nn.Linear(8, 16).double(), draw(2, 5, 8)
    with torch.inference_mode():
        torch.testing.assert_close(linear_gelu(layer, x), F.gelu(layer(x), approximate="tanh"))
    with fake_cuda(), torch.inference_mode():
        layer = nn.Linear(8, 16, device="cuda:0")
        assert linear_gelu(layer, torch.empty(2, 5, 8, device="cuda:0")).shape == (2, 5, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_in_the_product_is_the_tanh_form(dtype):
    layer, x = nn.Linear(512, 1024, device="cuda", dtype=dtype), torch.randn(1, 777, 512, device="cuda", dtype=dtype)
    with torch.inference_mode():
        want = F.gelu(layer(x).double(), approximate="tanh")
        torch.testing.assert_close(
            linear_gelu(layer, x).double(), want, atol=1e-4 if x.dtype.itemsize > 2 else 2e-2, rtol=1e-2
        )
