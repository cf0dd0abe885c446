"""Which attention kernel runs on which GPU: chosen once, refused at the door, traced without a question to the device.

No GPU is needed: its abilities are pretended, and nothing is computed on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.distributed.fake_pg import FakeStore

from common.model.compile import compile_transformer
from common.parallel import attention as kernels
from common.parallel.attention import Kernel, check_kernel, choose_kernel
from common.parallel.mesh import Axis, Layout, Mesh
from common.parallel.usp import SequenceParallel
from common.registry.settings import CompileOptions
from common.weights.load import assign, on_meta
from mochi_xdit.config import MochiConfig
from mochi_xdit.transformer import MochiTransformer
from tests.helpers.fake_cuda import fake_cuda

GPU = torch.device("cuda:0")
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def card(monkeypatch):
    """A function that pretends a GPU of some compute capability, with every package and a cuDNN."""

    def pretend(capability: tuple[int, int], cudnn: int = 91900) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn > 0)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())

    return pretend


def asked(*args: object) -> None:
    raise AssertionError("the device was asked while the model ran")


def runs(kernel: Kernel, dtype: torch.dtype, width: int = 64, n: int = 5, m: int = 7) -> str:
    """The kernel that a ring's attention of these shapes would run on a GPU."""

    class OnGpu:
        device, shape = GPU, torch.Size((1, n, 2, width))

        def __init__(self) -> None:
            self.dtype = dtype

    class Keys:
        shape = torch.Size((1, m, 2, width))

    return kernels._with_lse(kernel, OnGpu(), Keys()).__name__.removeprefix("_cuda").lstrip("_")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "name", "bf16", "fp16"),
    [
        ((7, 5), "auto", "efficient_widened", "efficient"),
        ((8, 0), "auto", "flash", "flash"),
        ((8, 6), "auto", "flash", "flash"),
        ((8, 9), "auto", "flash", "flash"),
        ((9, 0), "auto", "cudnn", "cudnn"),
        ((10, 0), "auto", "cudnn", "cudnn"),
        ((12, 0), "auto", "flash", "flash"),
        ((9, 0), "sdpa", "flash", "flash"),
        ((8, 0), "cudnn", "cudnn", "cudnn"),
        ((8, 0), "flash2", "flash2", "flash2"),
        ((9, 0), "flash3", "flash3", "flash3"),
    ],
)
def test_what_runs_on_which_card(card, monkeypatch, capability, name, bf16, fp16):
    card(capability)
    kernel = choose_kernel(name, GPU, torch.bfloat16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", asked)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", asked)
    assert (runs(kernel, torch.bfloat16), runs(kernel, torch.float16)) == (bf16, fp16)
    if name == "auto":
        assert runs(kernel, torch.float32) == "efficient" and runs(kernel, torch.float64) == "plain"


def test_cudnn_gets_only_what_it_takes(card):
    card((9, 0))
    for name in ("auto", "cudnn"):
        kernel = choose_kernel(name, GPU)
        assert runs(kernel, torch.bfloat16, n=1) == runs(kernel, torch.bfloat16, m=1) == "flash"
        assert runs(kernel, torch.bfloat16, width=60) == "efficient"
    card((9, 0), cudnn=91400)
    assert runs(choose_kernel("auto", GPU), torch.bfloat16) == "flash", "older ones are wrong for uneven lengths"
    card((9, 0), cudnn=0)
    assert runs(choose_kernel("auto", GPU), torch.bfloat16) == "flash"


def test_who_turned_cudnns_attention_off_does_not_get_it(card, monkeypatch):
    card((9, 0))
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert runs(choose_kernel("auto", GPU), torch.bfloat16) == "flash"


@pytest.mark.parametrize(
    ("capability", "kernel", "dtype", "width", "said"),
    [
        ((8, 0), "flash2", torch.float32, 64, "bf16 or fp16, not in float32"),
        ((9, 0), "flash3", torch.float64, 64, "bf16 or fp16, not in float64"),
        ((9, 0), "cudnn", torch.float32, 64, "bf16 or fp16, not in float32"),
        ((7, 5), "flash2", torch.float16, 64, "8.0 .Ampere. or newer; this one has 7.5"),
        ((8, 9), "flash3", torch.bfloat16, 64, "9.0 .Hopper.; this one has 8.9"),
        ((10, 0), "flash3", torch.bfloat16, 64, "9.0 .Hopper.; this one has 10.0"),
        ((7, 0), "cudnn", torch.float16, 64, "8.0 .Ampere. or newer; this one has 7.0"),
        ((9, 0), "cudnn", torch.bfloat16, 60, "this model's are 60"),
        ((9, 0), "flash2", torch.bfloat16, 512, "at most 256"),
    ],
)
def test_a_kernel_that_would_fail_at_the_first_step_is_refused_at_the_door(
    card, capability, kernel, dtype, width, said
):
    card(capability)
    with pytest.raises(ValueError, match=said):
        check_kernel(kernel, GPU, dtype, width)
    with pytest.raises(ValueError, match=said):
        SequenceParallel(Mesh(device=GPU), kernel, dtype=dtype).require_heads(4, width)


def test_an_old_cudnn_is_named(card):
    card((9, 0), cudnn=91000)
    with pytest.raises(ValueError, match=r"cuDNN 9\.15\.1 or newer"):
        check_kernel("cudnn", GPU)


@pytest.fixture
def ring() -> Iterator[Axis]:
    """Rank 0's place in a ring of two, whose other rank answers nothing and is never asked."""
    torch._dynamo.reset()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield Axis(2, 0, dist.group.WORLD)
    dist.destroy_process_group()
    torch._dynamo.reset()


# Compiled once with each kernel: which card it is on, only attention sees, between the regions.
@pytest.mark.parametrize(
    ("capability", "kernel", "compiled"),
    [
        ((8, 0), "flash", False),
        ((8, 6), "flash", False),
        ((8, 9), "flash", True),
        ((9, 0), "cudnn", True),
        ((10, 0), "cudnn", False),
    ],
)
@pytest.mark.slow
def test_a_ring_runs_on_every_card(monkeypatch, ring, capability, kernel, compiled):
    """A block of Mochi's on fake CUDA tensors: regions trace whole, attention is this card's, twice around."""
    ran: list[str] = []

    def named(*given):
        ran.append(found := chosen(*given).__name__)
        return getattr(kernels, found)

    chosen = kernels._with_lse
    monkeypatch.setattr(kernels, "_with_lse", named)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    counter = CompileCounterWithBackend("eager")
    with fake_cuda(capability), torch.inference_mode():
        sp = SequenceParallel(Mesh(Layout(ring=2), GPU, ring, sequence=ring, ring=ring))
        config = MochiConfig(depth=2, heads=2, head_dim=64, hidden_y=64)
        model = on_meta(MochiTransformer, config, sp)
        for name, slot in list(model.state_dict(keep_vars=True).items()):
            assign(model, name, torch.empty(slot.shape, dtype=torch.bfloat16, device=GPU))
        compile_transformer(model, CompileOptions(compile=compiled, backend=counter))
        # Else dynamo would save and restore a CUDA that this PyTorch may not have.
        with mock.patch.object(torch.cuda, "is_available", lambda: False):
            cond = model.prepare((1, 6, 10), torch.randn(1, 5, config.text_dim, device=GPU))
            x = sp.shard(torch.randn(1, 15, config.patch_dim, device=GPU))
            model(x, torch.zeros(1, device=GPU), cond)
    assert ran == [f"_cuda_{kernel}"] * 4
    # Four regions of both blocks; keys and values are made apart from queries, alike in both.
    assert counter.frame_count == (8 if compiled else 0)
