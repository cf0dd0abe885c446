"""xfuser as an engine: what it cannot do is refused; where it is installed, its own classes run on CPU ranks.

xfuser imports its attention only beside an accelerator and its kernels are CUDA's. For these tests, and in them only,
the probe is told of a GPU and the kernel is replaced by the CPU's; exchange, ring, merge and groups are xfuser's own.
"""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from importlib import metadata
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from common.parallel.mesh import Layout, Mesh, distributed
from common.parallel.usp import SequenceParallel
from common.parallel.xfuser import XFuserSequenceParallel, sequence_parallel
from common.registry.checks import xfuser_problems
from common.registry.request import WrongUse
from common.run.command_line import parse
from mochi_xdit.fork import FORK

installed = all(importlib.util.find_spec(name) for name in ("xfuser", "yunchang", "triton"))
works = installed and metadata.version("xfuser") == "0.4.5"  # later ones do not import, see common/parallel/xfuser.py
needs_xfuser = pytest.mark.skipif(not works, reason="xfuser 0.4.5 is not installed")
HEADS, WIDTH = 4, 16


def test_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"needs GPUs.*--engine native"):
        sequence_parallel(Mesh(), engine="xfuser")


def test_unknown_engine_and_native() -> None:
    with pytest.raises(ValueError, match="'ray' is unknown; choose one of native, xfuser"):
        sequence_parallel(Mesh(), engine="ray")
    assert type(sequence_parallel(Mesh())) is SequenceParallel


def test_refusals_name_the_reason_and_what_would_do() -> None:
    with patch("importlib.util.find_spec", lambda name: object()):
        assert xfuser_problems("cuda", heads=24, ulysses=8) == []
        (heads,) = xfuser_problems("cuda", heads=30, ulysses=4)
        assert "30 do not divide by --ulysses-degree 4; degrees that do: 1, 2, 3, 5, 6, 10, 15, 30" in heads
        (dtype,) = xfuser_problems("cuda", dtype="fp32")
        assert "bf16 or fp16, not in fp32" in dtype
        (kernel,) = xfuser_problems("cuda", attention="cudnn")
        assert "log-sum-exp" in kernel
    with patch("importlib.util.find_spec", lambda name: None):
        assert [p.split(":")[0] for p in xfuser_problems("cuda")] == [
            "--engine xfuser needs the package xfuser",
            "--engine xfuser needs the package yunchang",
        ]


def test_the_command_line_refuses_it_on_a_cpu() -> None:
    with pytest.raises(WrongUse) as wrong:
        parse(FORK, ["--demo", "--engine", "xfuser", "--device", "cpu"])
    assert [p for p in wrong.value.problems if p.startswith("--engine xfuser needs GPUs")]
    assert parse(FORK, ["--demo", "--device", "cpu"]).runtime.engine == "native"


def stand_in_for_a_gpu(stack: ExitStack) -> None:
    device = SimpleNamespace(gcnArchName="none", name="none", major=9, minor=0, multi_processor_count=1)
    answers = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "T4",  # what its probe takes for a card without flash-attn
        "get_device_properties": lambda *_: device,
        "get_device_capability": lambda *_: (9, 0),
    }
    with patch.object(torch.version, "cuda", "12.8"), patch.multiple(torch.cuda, **answers):
        import xfuser.core.distributed
        import xfuser.core.long_ctx_attention.ring  # noqa: F401
    import yunchang.kernels.attention as kernels

    def flash(q, k, v, dropout_p, is_causal, scale):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, scale=scale)

    stack.enter_context(patch.object(kernels, "_scaled_dot_product_flash_attention", flash))
    stack.enter_context(patch("common.parallel.xfuser.xfuser_problems", lambda device, *a, **k: accelerated(*a, **k)))


def accelerated(*arguments: object, **named: object) -> list[str]:
    return xfuser_problems("cuda", *arguments, **named)


def one_call(layout: Layout, tokens: int, dtype: torch.dtype) -> tuple[float, float, tuple[int, ...]]:
    """Largest difference of xfuser's gathered output from plain attention in fp64, and the native engine's."""
    generator = torch.Generator().manual_seed(layout.ranks)
    q, k, v = (torch.randn(2, tokens, HEADS, WIDTH, generator=generator, dtype=torch.float64) for _ in "qkv")
    attend = torch.nn.functional.scaled_dot_product_attention
    exact = attend(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    with ExitStack() as stack:
        stand_in_for_a_gpu(stack)
        from xfuser.core.distributed import parallel_state

        mesh = distributed(layout, "cpu")
        errors = []
        try:
            for sp in (XFuserSequenceParallel(mesh), SequenceParallel(mesh)):
                sp.require_heads(HEADS)
                lengths = sp.lengths(tokens)
                out = sp.attention(*(sp.shard(t.to(dtype)).contiguous() for t in (q, k, v)), lengths)
                errors.append((sp.gather(out, lengths).double() - exact).abs().max().item())
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
    return errors[0], errors[1], lengths


@needs_xfuser
@pytest.mark.parametrize("layout", [(1, 1, 2), (1, 2, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2), (1, 1, 4)])
def test_same_answer_as_plain_attention(run_ranks, layout: tuple[int, int, int]) -> None:
    for xfuser_error, native_error, lengths in run_ranks(
        Layout(*layout).ranks, one_call, Layout(*layout), 24, torch.float64
    ):
        assert xfuser_error < 1e-6 and native_error < 1e-12  # xfuser holds its result in fp32
        assert set(lengths) == {24 // Layout(*layout).sequence}


@needs_xfuser
def test_its_ring_rounds_the_log_sum_exp(run_ranks) -> None:
    """A fact the pages state: with PyTorch's kernel its ring merges by a log-sum-exp in the inputs' dtype."""
    (xfuser_error, native_error, _), *_ = run_ranks(4, one_call, Layout(1, 4, 1), 64, torch.bfloat16)
    assert native_error < 0.02 < 0.2 and xfuser_error < 0.1
    assert xfuser_error > native_error


def refusals(layout: Layout) -> list[str]:
    found = []
    with ExitStack() as stack:
        stand_in_for_a_gpu(stack)
        from xfuser.core.distributed import parallel_state

        mesh = distributed(layout, "cpu")
        try:
            sp = XFuserSequenceParallel(mesh)
            for attempt in (lambda: sp.lengths(25), lambda: sp.require_heads(3), lambda: sp.require_heads(1)):
                try:
                    attempt()
                except ValueError as error:
                    found.append(str(error))
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
    return found


@needs_xfuser
def test_what_does_not_divide_is_refused(run_ranks) -> None:
    tokens, heads, few = run_ranks(2, refusals, Layout(1, 1, 2))[0]
    assert "a stream of 25 does not divide by 2 ranks" in tokens and "--engine native" in tokens
    assert "3 do not divide by --ulysses-degree 2" in heads
    assert "more than the model's 1 attention heads" in few


@pytest.mark.gpu
@needs_xfuser
def test_single_gpu_needs_no_groups() -> None:
    sp = XFuserSequenceParallel(distributed(Layout(), "cuda"))
    q = torch.randn(1, 64, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(sp.attention(q, q, q), SequenceParallel(Mesh(device=q.device)).attention(q, q, q))
