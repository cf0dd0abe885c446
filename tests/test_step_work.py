"""A step does nothing that it did the step before: all it computes comes from the latents and the timestep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvideox_xdit.transformer import CogVideoXTransformer
from cogvideox_xdit.transformer import pack as cogvideox_pack
from common.parallel.mesh import Layout, distributed
from common.parallel.usp import SequenceParallel
from common.run.demo import fill
from consisid_xdit.transformer import ConsisIDTransformer
from mochi_xdit import MochiPipeline
from mochi_xdit.transformer import MochiTransformer
from mochi_xdit.transformer import pack as mochi_pack
from tests.helpers import cogvideox, consisid, mochi

SIZE = (3, 8, 12)
COSTLY = ("mm", "convolution", "attention", "arange", "cos", "sin", "exp", "cat", "all_to_all")


class Repeated(TorchDispatchMode):
    """Notes every new tensor that none of the step's own inputs went into, as (operation, elements)."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.seen: list[Tensor] = []  # alive, so that no address is used twice
        self.moving = {self._memory(t) for t in inputs}
        self.found: list[tuple[str, int]] = []

    @staticmethod
    def _memory(t: Tensor) -> int:
        return t.untyped_storage()._cdata

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {self._memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self.seen.append(made)
                if given & self.moving:
                    self.moving.add(self._memory(made))
                elif self._memory(made) not in given:
                    self.found.append((func.name(), made.numel()))
        return out


def a_step(kind: str, sp: SequenceParallel, dtype: torch.dtype) -> tuple[list[tuple[str, int]], int]:
    """What a forward computes besides what depends on the step, and how large one text stream is on this rank."""
    generator = torch.Generator().manual_seed(0)
    t = torch.full((1,), 500.0)
    with torch.no_grad():
        model, x, cond = prepared(kind, sp, dtype, generator)
        plain = model(x, t, cond)
        with Repeated(x, t) as work:
            again = model(x, t, cond)
    assert torch.equal(plain, again) and work.seen
    return work.found, cond.y.numel()


def prepared(
    kind: str, sp: SequenceParallel, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, Tensor, Any]:
    if kind == "mochi":
        built = MochiTransformer(mochi.TINY, sp)
        fill(built, 0)
        model = built.to(dtype)
        text = torch.randn(1, 9, mochi.TINY.text_dim, generator=generator)
        latents = torch.randn(1, mochi.TINY.channels, *SIZE, generator=generator)
        return model, sp.shard(mochi_pack(latents)), model.prepare(SIZE, text)
    known = consisid.small() if kind == "consisid" else cogvideox.small(kind)
    other = ConsisIDTransformer(known, sp) if kind == "consisid" else CogVideoXTransformer(known, sp)
    fill(other, 0)
    other = other.to(dtype)
    given = (consisid if kind == "consisid" else cogvideox).inputs(known, SIZE)
    extra = {"face": other.read_face(**consisid.identity(known))} if kind == "consisid" else {}
    cond = other.prepare(given["text"], SIZE, given.get("image"), **extra)
    return other, sp.shard(cogvideox_pack(given["latents"], known.patch)), cond


def check(found: list[tuple[str, int]], text: int) -> None:
    for name, elements in found:
        assert elements <= text, (name, elements)
        # Mochi lays the weights of q's and k's norms side by side, 2 x 16 of them.
        if (name, elements) not in (("aten::stack", 32), ("aten::cat", 32)):
            assert not any(part in name for part in COSTLY), (name, elements)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mochi", "2b", "5b", "5b-i2v", "consisid"])
def test_a_step_repeats_nothing(kind, dtype):
    check(*a_step(kind, SequenceParallel(), dtype))


def on_rank(kind: str, layout: Layout) -> tuple[list[tuple[str, int]], int]:
    with distributed(layout) as mesh:
        return a_step(kind, SequenceParallel(mesh), torch.float32)


@pytest.mark.parametrize("kind", ["mochi", "5b", "consisid"])
def test_nor_does_a_rank(run_ranks, kind):
    for found, text in run_ranks(4, on_rank, kind, Layout(ring=2, ulysses=2)):
        check(found, text)


class FromHost(TorchDispatchMode):
    """Counts numbers that become tensors, each a copy to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "lift_fresh" in func.name()
        return func(*args, **(kwargs or {}))


def test_the_schedule_is_on_the_device_before_the_first_step(tmp_path):
    pipe = MochiPipeline.from_pretrained(mochi.write_checkpoint(tmp_path), dtype="fp32", keep_loaded=True)
    counts = []
    for steps in (2, 2, 5):
        with FromHost() as copies:
            pipe("a ball", height=32, width=48, num_frames=7, num_steps=steps, output="latent")
        counts.append(copies.count)
    assert 0 < counts[2] == counts[1]
