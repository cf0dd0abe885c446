"""Exchanges of `SequenceParallel.attend` go under work that does not depend on them, and change no result."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cogvideox_xdit.config import CONFIGS as COGVIDEOX
from cogvideox_xdit.transformer import CogVideoXTransformer
from common.memory.estimate import FUSED, Traffic, imagined
from common.model.linear import add_heads, heads_of
from common.parallel.mesh import Layout, Mesh, distributed
from common.parallel.usp import SequenceParallel
from common.registry.forks import get_model
from common.registry.layout import Coordinates
from common.run.demo import fill
from common.weights.float8 import Float8Linear, fill_float8
from common.weights.load import on_meta
from mochi_xdit.config import MochiConfig
from mochi_xdit.transformer import MochiTransformer
from planner import cost, overlap
from tests.helpers import cogvideox, mochi
from wan_xdit.config import T2V_14B, TransformerConfig
from wan_xdit.transformer import WanTransformer
from wan_xdit.transformer import pack as wan_pack

SIZE = (3, 8, 12)
WAN = TransformerConfig(width=80, heads=5, layers=2, ffn=48, text_dim=24, time_width=32, text_length=12)


def made(kind: str, sp: SequenceParallel) -> tuple[nn.Module, Tensor, Any]:
    """A small model in fp64, this rank's latent tokens and a condition."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    model: Any
    if kind == "mochi":
        model = MochiTransformer(replace(mochi.TINY, depth=2), sp)
    elif kind == "cogvideox":
        model = CogVideoXTransformer(cogvideox.small("5b", heads=5), sp)
    else:
        model = WanTransformer(WAN, sp)
    fill(model, 0)
    model = model.double()
    if kind == "mochi":
        x = draw(1, 72, mochi.TINY.patch_dim)
        return model, sp.shard(x), model.prepare(SIZE, draw(1, 9, mochi.TINY.text_dim))
    if kind == "cogvideox":
        x = draw(1, 72, model.config.out_channels * model.config.patch_volume)
        return model, sp.shard(x), model.prepare(draw(1, 7, model.config.text_dim), SIZE)
    x = wan_pack(draw(1, WAN.out_channels, *SIZE), WAN.patch)
    return model, sp.shard(x), model.prepare(draw(1, 7, WAN.text_dim), SIZE)


@torch.inference_mode()
def predicted(kind: str, layout: Layout, groups: int) -> Tensor:
    with distributed(layout) as mesh:
        sp = SequenceParallel(mesh, groups=groups)
        model, x, cond = made(kind, sp)
        time = torch.full((1,), 500.0, dtype=torch.float64) if kind == "mochi" else 500.0
        return sp.gather(model(x, time, cond), sp.lengths(72))


@pytest.mark.parametrize("kind", ["mochi", "cogvideox", "wan"])
@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        (Layout(ulysses=2), 2),
        (Layout(ulysses=2), 9),
        (Layout(ulysses=3), 1),
        (Layout(ring=3), 1),
        (Layout(ring=3), 3),
        (Layout(ring=2, ulysses=2), 2),
        (Layout(ring=3, ulysses=2), 2),
    ],
    ids=str,
)
def test_a_prediction_is_that_of_one_rank(run_ranks, kind, layout, groups):
    alone = predicted(kind, Layout(), 1)
    for found in run_ranks(layout.ranks, predicted, kind, layout, groups):
        assert (found - alone).abs().max() <= 1e-12 * alone.abs().max()


# --- What hides an exchange -------------------------------------------------------------------------------------------


class Windows(Traffic):
    """Notes for every exchange its axis and the FLOPs that are issued between its post and the wait for it."""

    def __init__(self, mesh: Mesh, flops: FlopCounterMode) -> None:
        super().__init__(mesh)
        self.flops, self.found = flops, list[list[Any]]()
        self.posted: list[tuple[Tensor, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if "all_to_all_single" in func.name():
            entry = [self.axes[args[3]][0], self.flops.get_total_flops(), None]
            self.found.append(entry)
            self.posted.append((out, entry))
        elif "_wrap_tensor" in func.name():  # the same exchange in another tensor
            self.posted.append((out, self._of(args[0])))
        elif "wait_tensor" in func.name():
            entry = self._of(args[0])
            entry[2] = self.flops.get_total_flops() if entry[2] is None else entry[2]
        return out

    def _of(self, x: Tensor) -> list[Any]:
        (entry,) = [entry for tensor, entry in self.posted if tensor is getattr(x, "elem", x)]
        return entry

    @property
    def windows(self) -> list[tuple[str, int]]:
        assert all(end is not None for _, _, end in self.found), "an exchange that nobody waits for"
        return [(axis, end - begin) for axis, begin, end in self.found]


def block_windows(kind: str, layout: Layout, groups: int) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Of one block's exchanges on rank 0, at the true width; and the FLOPs of its projection and output of all heads
    and of all its attention. 24 frames of 24 tokens, which all layouts here divide; no text."""
    with imagined(layout) as mesh, torch.inference_mode():
        sp = SequenceParallel(mesh, groups=groups)
        model: Any
        if kind == "mochi":
            model = on_meta(MochiTransformer, replace(MochiConfig(), depth=2), sp)
            cond: Any = model.prepare((24, 8, 12), torch.empty(1, 0, 4096, device="meta"))
            width, extra = 3072, (cond.y, torch.empty(1, 3072, device="meta"), cond)
        elif kind == "cogvideox":
            model = on_meta(CogVideoXTransformer, replace(COGVIDEOX["5b"], layers=1), sp)
            cond = model.prepare(torch.empty(1, 0, 4096, device="meta"), (24, 8, 12))
            width, extra = 3072, (torch.empty(1, 512, device="meta"), cond)
        else:
            model = on_meta(WanTransformer, replace(T2V_14B, layers=1), sp)
            cond = model.prepare(torch.empty(1, 8, 4096, device="meta"), (24, 8, 12))
            width, extra = 5120, (torch.empty(1, 1, 6, 5120, device="meta"), cond)
        n = 576 // layout.sequence
        x = torch.empty(1, n, width, device="meta")
        with FlopCounterMode(display=False, custom_mapping=FUSED) as flops, Windows(mesh, flops) as found:
            model.blocks[0](x, *extra)
    return found.windows, {
        "project": 2 * n * 3 * width * width,
        "output": 2 * n * width * width,
        "attend": 4 * n * 576 * width,
    }


@pytest.mark.parametrize("kind", ["mochi", "cogvideox"])
@pytest.mark.parametrize("layout", [Layout(ulysses=2), Layout(ulysses=4)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_group_travels_under_projections_attention_and_output_of_the_others(kind, layout, groups):
    windows, whole = block_windows(kind, layout, groups)
    project, attend, output = (whole[name] // groups for name in ("project", "attend", "output"))
    there = [("ulysses", project * (groups - 1 - i) + attend * i) for i in range(groups)]
    home = [("ulysses", attend * (groups - 1 - i) + output * i) for i in range(groups)]
    assert windows == there + home


def test_queries_and_keys_normed_whole_leave_no_later_than_their_values():
    windows, whole = block_windows("wan", Layout(ulysses=2), 4)
    attend, output = whole["attend"] // 4, whole["output"] // 4
    values = whole["project"] // 3 // 4
    assert windows[:4] == [("ulysses", values * (3 - i) + attend * i) for i in range(4)]
    assert windows[4:] == [("ulysses", attend * (3 - i) + output * i) for i in range(4)]


@pytest.mark.parametrize("kind", ["mochi", "cogvideox", "wan"])
@pytest.mark.parametrize("ring", [2, 3, 4])
def test_keys_and_values_leave_before_the_queries_are_made(kind, ring):
    windows, whole = block_windows(kind, Layout(ring=ring), 1)
    step = whole["attend"] // ring
    assert windows == [("ring", step + (whole["project"] // 3 if i == 0 else 0)) for i in range(ring - 1)]


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_groups_first_round_goes_under_the_last_attention_of_the_one_before(groups):
    windows, whole = block_windows("mochi", Layout(ring=2, ulysses=2), groups)
    step = whole["attend"] // groups // 2
    rounds = [flops for axis, flops in windows if axis == "ring"]
    assert rounds == [step] + [2 * step] * (groups - 1)
    assert len(windows) == 3 * groups


@pytest.mark.parametrize("name", ["mochi", "cogvideox-5b", "wan2.1-t2v-14b"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(ulysses=2),
        Layout(ulysses=4),
        Layout(ring=3),
        Layout(ring=2, ulysses=2),
        Layout(ring=3, ulysses=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_the_planner_knows_what_each_exchange_travels_under(name, layout, groups):
    found, _ = block_windows(name.split("-")[0], layout, groups)
    (stack,) = get_model(name).stacks
    block = cost.forward(stack, (576,), Coordinates(layout, 0)).block
    predicted = overlap.windows(overlap.block(block, groups))
    assert [one.axis for one in predicted] == [axis for axis, _ in found]
    assert [one.work for one in predicted] == pytest.approx([flops for _, flops in found], rel=0.005)


# --- Layers by heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 5), (0, 1, 2, 3, 4, 5)], ids=str)
def test_layers_by_heads_are_the_whole_layers(cuts, float8):
    """In float8 too, whose scales belong to outputs: to the rows of the one weight, to all columns of the other."""
    generator = torch.Generator().manual_seed(0)
    first, last = nn.Linear(24, 3 * 5 * 4), nn.Linear(5 * 4, 24)
    if float8:
        first, last = (eight(linear) for linear in (first, last))
    x = torch.randn(2, 7, 24, generator=generator)
    spans = [slice(a, b) for a, b in pairwise(cuts)]
    with torch.inference_mode():
        whole = first(x).unflatten(-1, (3, 5, 4)).unbind(2)
        for parts in ("qkv", "kv", "q", "v"):
            found = zip(*(heads_of(first, x, 5, span, parts) for span in spans))
            for part, pieces in zip(parts, found):
                torch.testing.assert_close(torch.cat(pieces, dim=2), whole["qkv".index(part)])
        total = None
        for span in spans:
            total = add_heads(last, whole[2][:, :, span], 5, span, total)
        torch.testing.assert_close(total, last(whole[2].flatten(2)))


def eight(linear: nn.Linear) -> Float8Linear:
    layer = Float8Linear(linear.in_features, linear.out_features, bias=True)
    fill_float8(linear.weight.detach(), layer.weight, layer.weight_scale)
    layer.bias.data = linear.bias.detach()
    return layer
