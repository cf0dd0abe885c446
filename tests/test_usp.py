"""Sequence-parallel attention equals plain attention, and sends what the formula says."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from common.memory.estimate import imagined
from common.parallel.attention import attention, attention_with_lse, check_kernel
from common.parallel.exchange import at_once, by_messages, exchange
from common.parallel.guidance import Guidance
from common.parallel.mesh import Layout, Mesh, all_min, broadcast_object, broadcast_tensors, distributed, on_main
from common.parallel.usp import SequenceParallel
from common.registry.layout import head_groups, split_evenly
from common.weights.checkpoint import CheckpointError
from tests.helpers.counting import count_attention, issuing
from tests.test_launch import eventually

SPLITS = [(1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (4, 1), (1, 4), (5, 1), (1, 5)]
SPLITS += [(3, 2), (2, 3), (6, 1), (1, 6), (7, 1), (1, 7), (4, 2), (2, 4), (8, 1), (1, 8)]
# (video tokens, text tokens, heads): primes, fewer tokens than ranks, no text, no video, heads that nothing divides.
STREAMS = [(23, 5, 8), (3, 2, 7), (13, 0, 9), (0, 11, 8), (1, 0, 8), (16, 4, 30)]


def qkv(n: int, heads: int, dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 100 + heads)
    q, k, v = torch.randn(3, batch, n, heads, 4, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, v


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention written out, so that the kernels themselves are under test too."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())


def joint_error(sp: SequenceParallel, n_video: int, n_text: int, heads: int, dtype: torch.dtype, batch: int) -> float:
    """Shard video and text alike, attend, gather, compare with plain attention over the whole."""
    q, k, v = qkv(n_video + n_text, heads, dtype, batch)
    video, text = sp.lengths(n_video), sp.lengths(n_text)
    local = [torch.cat([sp.shard(t[:, :n_video]), sp.shard(t[:, n_video:])], dim=1) for t in (q, k, v)]
    out = sp.attention(*local, [a + b for a, b in zip(video, text)])
    assert out.dtype == dtype
    mine = video[sp.rank]
    whole = torch.cat([sp.gather(out[:, :mine], video), sp.gather(out[:, mine:], text)], dim=1)
    return (whole - reference(q, k, v)).abs().max().item()


def layout_errors(ring: int, ulysses: int, cfg: int) -> dict[str, float]:
    sp = SequenceParallel(distributed(Layout(cfg=cfg, ring=ring, ulysses=ulysses)))
    errors = {}
    for (n_video, n_text, heads), dtype in itertools.product(STREAMS, (torch.float64, torch.float32)):
        if heads >= ulysses:
            batch = 2 if heads == 9 else 1
            errors[f"{n_video}+{n_text}x{heads} {dtype}"] = joint_error(sp, n_video, n_text, heads, dtype, batch)
    return errors


@pytest.mark.parametrize("ring, ulysses", SPLITS)
def test_every_layout_equals_plain_attention(run_ranks, ring, ulysses):
    for errors in run_ranks(ring * ulysses, layout_errors, ring, ulysses, 1):
        assert len(errors) >= 8
        for case, error in errors.items():
            assert error <= (1e-12 if "float64" in case else 1e-5), case


@pytest.mark.parametrize("ring, ulysses", [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (1, 4)])
def test_layouts_under_cfg_parallel(run_ranks, ring, ulysses):
    for errors in run_ranks(2 * ring * ulysses, layout_errors, ring, ulysses, 2):
        assert all(error <= (1e-12 if "float64" in case else 1e-5) for case, error in errors.items())


def grouped_errors(ring: int, ulysses: int, groups: int) -> list[float]:
    """Against plain attention, and against the same layout in one group."""
    mesh = distributed(Layout(ring=ring, ulysses=ulysses))
    errors = []
    for n_video, n_text, heads in ((23, 5, 8), (3, 2, 7), (13, 0, 9), (1, 0, 8)):
        errors.append(joint_error(SequenceParallel(mesh, groups=groups), n_video, n_text, heads, torch.float64, 1))
        one, many = (SequenceParallel(mesh, groups=g) for g in (1, groups))
        q, k, v = (one.shard(t) for t in qkv(n_video, heads, torch.float64))
        difference = one.attention(q, k, v, one.lengths(n_video)) - many.attention(q, k, v, one.lengths(n_video))
        errors.append(difference.abs().max().item() if difference.numel() else 0.0)
    return errors


@pytest.mark.parametrize("ring, ulysses, groups", [(1, 2, 2), (1, 3, 2), (2, 2, 3), (1, 5, 99), (3, 1, 2)])
def test_head_groups_change_nothing(run_ranks, ring, ulysses, groups):
    for errors in run_ranks(ring * ulysses, grouped_errors, ring, ulysses, groups):
        assert max(errors) <= 1e-12


def test_head_groups_are_a_partition():
    for heads, ranks, groups in itertools.product((5, 7, 24, 30, 48), (1, 2, 3, 5), (1, 2, 4, 50)):
        cut = head_groups(heads, ranks, groups)
        assert [h for group in cut for part in group for h in part] == list(range(heads)), "a group's are neighbours"
        assert all(len(part) for group in cut for part in group), "a group without heads for some rank"
        shares = [sum(len(group[rank]) for group in cut) for rank in range(ranks)]
        assert tuple(shares) == split_evenly(heads, ranks)


def both_ways(sent: Sequence[Sequence[int]]) -> list[Tensor]:
    """What rank r of a ring of three gets, by both ways; sent[i][j]: rows from rank i to rank j."""
    with distributed(Layout(ring=3)) as mesh:
        own = mesh.ring.rank
        send = torch.arange(2 * sum(sent[own]), dtype=torch.float64).view(-1, 2) + 100 * own
        received = [row[own] for row in sent]
        return [way(send, sent[own], received, mesh.ring)() for way in (at_once, by_messages)]


@pytest.mark.parametrize(
    "sent",
    [[[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[0, 3, 0], [0, 0, 3], [2, 0, 0]], [[0] * 3, [2, 0, 1], [0, 1, 0]]],
    ids=str,
)
def test_both_ways_bring_the_same(run_ranks, sent):
    for own, (one, other) in enumerate(run_ranks(3, both_ways, sent)):
        rows = [list(range(100 * i, 100 * i + 2 * sum(row))) for i, row in enumerate(sent)]
        begin = [sum(row[:own]) for row in sent]
        wanted = [x for i, row in enumerate(sent) for x in rows[i][2 * begin[i] : 2 * (begin[i] + row[own])]]
        assert one.flatten().tolist() == other.flatten().tolist() == wanted


def after_an_error() -> list[float]:
    """What rank 1 - r sent, when exchanges before were posted and never waited for."""
    with distributed(Layout(ulysses=2)) as mesh:
        for value in (1.0, 2.0):
            exchange(torch.full((2,), value), [1, 1], [1, 1], mesh.ulysses)
        gc.collect()
        got = exchange(torch.full((2,), 3.0 + mesh.ulysses.rank), [1, 1], [1, 1], mesh.ulysses)()
    return got.tolist()


def test_an_exchange_that_an_error_left_behind_does_not_hold_up_the_next(run_ranks):
    assert run_ranks(2, after_an_error) == [[3.0, 4.0]] * 2


def order_of_issue(layout: Layout, groups: int) -> str:
    with distributed(layout) as mesh:
        sp = SequenceParallel(mesh, groups=groups)
        q, k, v = (sp.shard(t) for t in qkv(12, 6, torch.float32))
        with issuing(mesh) as order:
            sp.attention(q, k, v, sp.lengths(12))
    return " ".join(order)


def test_one_group_travels_while_another_is_attended_to(run_ranks):
    for order in run_ranks(2, order_of_issue, Layout(ulysses=2), 3):
        assert order == " ".join(["ulysses"] * 3 + ["wait attention ulysses"] * 3 + ["wait"] * 3)
    for order in run_ranks(2, order_of_issue, Layout(ulysses=2), 1):
        assert order == "ulysses wait attention ulysses wait"


def test_the_rings_exchange_is_posted_before_the_attention_that_hides_it(run_ranks):
    for order in run_ranks(3, order_of_issue, Layout(ring=3), 1):
        assert order == "ring attention wait ring attention wait attention"


def bf16_error() -> float:
    sp = SequenceParallel(distributed(Layout(ring=3, ulysses=2)))
    return joint_error(sp, 37, 5, 5, torch.bfloat16, 1)


def test_bf16_travels_and_merges_in_fp32(run_ranks):
    q, k, v = qkv(42, 5, torch.bfloat16)
    alone = (attention(q, k, v) - reference(q, k, v)).abs().max().item()
    assert max(run_ranks(6, bf16_error)) <= max(2 * alone, 1e-2)


def test_single_process_is_plain():
    sp = SequenceParallel()
    q, k, v = qkv(11, 3, torch.float64)
    assert sp.shard(q) is q and sp.gather(q, sp.lengths(11)) is q
    assert torch.equal(sp.attention(q, k, v), attention(q, k, v))


def test_lengths_are_uneven_by_one_and_may_be_empty():
    assert split_evenly(7, 3) == (3, 2, 2)
    assert split_evenly(2, 4) == (1, 1, 0, 0)
    assert split_evenly(0, 3) == (0, 0, 0)


def shard_gather(dim: int) -> bool:
    sp = SequenceParallel(distributed(Layout(ring=2, ulysses=2)))
    x = torch.arange(2 * 7 * 3).view(2, 7, 3).movedim(1, dim).contiguous()
    return torch.equal(sp.gather(sp.shard(x, dim), sp.lengths(7), dim), x)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.slow
def test_gather_undoes_shard(run_ranks, dim):
    assert all(run_ranks(4, shard_gather, dim))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_sum_exp(dtype):
    q, k, v = qkv(9, 3, dtype)
    out, lse = attention_with_lse(q, k[:, :5], v[:, :5])
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k[:, :5].double()) * 4**-0.5
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (lse - scores.logsumexp(-1)).abs().max() <= tolerance
    assert (out - reference(q, k[:, :5], v[:, :5])).abs().max() <= tolerance


def test_ulysses_beyond_the_heads_is_refused_at_the_door():
    with imagined(Layout(ulysses=8)) as mesh:
        sp = SequenceParallel(mesh)
        with pytest.raises(ValueError, match=r"ulysses degree 8 .* 7 attention heads; use at most 7"):
            sp.require_heads(7)
        sp.require_heads(8)


@pytest.mark.parametrize("kernel, said", [("flash2", "NVIDIA GPU"), ("cudnn", "NVIDIA GPU"), ("fast", "choose one of")])
def test_unavailable_kernel_is_refused_at_the_door(kernel, said):
    with pytest.raises(ValueError, match=said):
        SequenceParallel(Mesh(), kernel)


def test_missing_package_is_named():
    with pytest.raises(ValueError, match="flash-attn 3"):
        check_kernel("flash3", torch.device("cuda"))


# --- Guidance ---------------------------------------------------------------------------------------------------------


def predict(branch: int) -> Tensor:
    return torch.arange(5, dtype=torch.float64) * (branch + 1) + branch


def guided(scale: float, cfg: int) -> tuple[Tensor, tuple[int, ...], list[int]]:
    guidance = Guidance(distributed(Layout(cfg=cfg)).cfg)
    computed = list(guidance.branches(scale))
    combined = guidance.combine({branch: predict(branch) for branch in computed}, scale)
    return combined, guidance.branches(4.5, 1.0), computed


@pytest.mark.parametrize("scale", [4.5, 1.0])
def test_guidance_is_the_same_on_one_and_two_ranks(run_ranks, scale):
    expected = predict(1) + scale * (predict(0) - predict(1)) if scale != 1 else predict(0)
    alone, branches, called = guided(scale, 1)
    assert torch.equal(alone, expected) and branches == (0, 1)
    assert called == ([0] if scale == 1 else [0, 1])
    for rank, (pred, branches, called) in enumerate(run_ranks(2, guided, scale, 2)):
        assert torch.equal(pred, expected)
        assert branches == (rank,) and called == [rank]


def empty_guided() -> int:
    guidance = Guidance(distributed(Layout(cfg=2)).cfg)
    return guidance.combine({branch: torch.zeros(1, 0, 4) for branch in guidance.branches(3.0)}, 3.0).shape[1]


def test_guidance_of_an_empty_shard(run_ranks):
    assert run_ranks(2, empty_guided) == [0, 0]


# --- Mesh -------------------------------------------------------------------------------------------------------------


def places() -> tuple[int, ...]:
    mesh = distributed(Layout(cfg=2, ring=2, ulysses=2))
    return mesh.world.rank, mesh.cfg.rank, mesh.ring.rank, mesh.ulysses.rank, mesh.sequence.rank


def test_ulysses_is_innermost_and_cfg_outermost(run_ranks):
    for world, cfg, ring, ulysses, sequence in run_ranks(8, places):
        assert (cfg, ring, ulysses) == (world // 4, world // 2 % 2, world % 2)
        assert sequence == ring * 2 + ulysses


def broadcasts() -> tuple[object, dict[str, Tensor]]:
    mesh = distributed(Layout(ring=3))
    tensors = {"a": torch.arange(3.0), "none": torch.empty(0, 2)} if mesh.is_main else None
    sent = {"seed": 7} if mesh.is_main else None
    return broadcast_object(mesh.world, sent), broadcast_tensors(mesh.world, tensors, mesh.device)


def test_broadcasts_reach_every_rank(run_ranks):
    for value, tensors in run_ranks(3, broadcasts):
        assert value == {"seed": 7}
        assert torch.equal(tensors["a"], torch.arange(3.0)) and tensors["none"].shape == (0, 2)


class Features(NamedTuple):
    mask: Tensor
    said: str


class Unpicklable(OSError):
    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")


def made_on_main(error: Exception | None) -> object:
    mesh = distributed(Layout(ring=3))
    seen = []

    def make() -> dict[str, object]:
        seen.append(mesh.world.rank)
        if error is not None:
            # One that cannot be pickled cannot come as an argument either.
            raise error if error.args else Unpicklable("a", "is missing")
        return {"shape": (2, 3), "parts": [torch.arange(6.0).view(2, 3).T, Features(torch.tensor([True]), "it")]}

    try:
        made = on_main(mesh, make)
    except Exception as caught:
        made = type(caught), str(caught)
    return made, seen, all_min(mesh.world, 5 - mesh.world.rank, mesh.device)


def test_all_ranks_get_what_rank_0_makes(run_ranks):
    for rank, (made, seen, least) in enumerate(run_ranks(3, made_on_main, None)):
        assert made["shape"] == (2, 3) and torch.equal(made["parts"][0], torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
        assert made["parts"][1].mask.dtype == torch.bool and made["parts"][1].said == "it"
        assert seen == ([0] if rank == 0 else []) and least == 3


@pytest.mark.parametrize("error", [CheckpointError("cut"), FileNotFoundError(2, "gone", "a.pt"), MemoryError("full")])
def test_all_ranks_raise_what_rank_0_raises(run_ranks, error):
    for made, *_ in run_ranks(3, made_on_main, error):
        assert made == (type(error), str(error))


def test_an_error_that_cannot_travel_keeps_its_nearest_kind_and_its_message(run_ranks):
    (main, *_), *others = run_ranks(3, made_on_main, OSError())
    assert main == (Unpicklable, "a: is missing")
    assert [made for made, *_ in others] == [(OSError, "a: is missing")] * 2


def lonely_exchange(gave_up: Path) -> bool:
    """Rank 1 does not come until rank 0 has given up; whether that was so."""
    sp = SequenceParallel(distributed(Layout(ulysses=2), timeout=2))
    if sp.rank == 0:
        with pytest.raises(RuntimeError):
            sp.gather(torch.ones(1, 1), (1, 1), dim=0)
        gave_up.touch()
    return eventually(gave_up.exists)


@pytest.mark.slow
def test_the_timeout_holds_on_every_axis(run_ranks, tmp_path):
    assert run_ranks(2, lonely_exchange, tmp_path / "gave up") == [True, True]


def test_layout_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="needs 4 ranks, but 1 is running"):
        distributed(Layout(ring=2, ulysses=2))
    with pytest.raises(ValueError, match="only 1 or 2"):
        Layout(cfg=3)
    with pytest.raises(ValueError, match="ring degree is 0"):
        Layout(ring=0)


# --- What is sent -----------------------------------------------------------------------------------------------------

MOCHI = {"tokens": 14310, "text": 37, "heads": 24, "width": 128}


@pytest.mark.parametrize("ring, ulysses", [*SPLITS, (3, 4), (2, 6), (12, 1)])
def test_bytes_and_calls_follow_the_formula(ring, ulysses):
    """Summed over the ranks, at the size of Mochi 848x480x49: (u-1)/u of q,k,v and of the output over
    all-to-all, ring-1 times k,v over the ring; one call for each all-to-all and each ring exchange."""
    n, row = MOCHI["tokens"] + MOCHI["text"], MOCHI["heads"] * MOCHI["width"] * 2
    ranks = [count_attention(Layout(ring=ring, ulysses=ulysses), rank, **MOCHI) for rank in range(ring * ulysses)]
    ulysses_bytes = sum(c.sent["ulysses"] for c in ranks)
    ring_bytes = sum(c.sent["ring"] for c in ranks)
    assert ulysses_bytes == pytest.approx(4 * n * row * (ulysses - 1) / ulysses, rel=0.01, abs=0)
    assert ring_bytes == pytest.approx(2 * n * row * (ring - 1), rel=0.01, abs=0)
    for counted in ranks:
        assert counted.issued.count("ulysses") == (2 if ulysses > 1 else 0)
        assert counted.issued.count("ring") == ring - 1


@pytest.mark.parametrize("ring, ulysses", [*SPLITS, (3, 4), (2, 6), (12, 1)])
def test_attention_flops_over_the_ranks_are_those_of_one(ring, ulysses):
    one = count_attention(Layout(), 0, **MOCHI).flops
    ranks = [count_attention(Layout(ring=ring, ulysses=ulysses), rank, **MOCHI).flops for rank in range(ring * ulysses)]
    assert sum(ranks) == pytest.approx(one, rel=0.005)


@pytest.mark.parametrize("layout", [Layout(ring=4), Layout(ring=3, ulysses=2)])
def test_ring_exchange_is_posted_before_the_attention_it_hides_behind(layout):
    events = [e for e in count_attention(layout, 1, **MOCHI).issued if e in ("ring", "attention")]
    assert events == ["ring", "attention"] * (layout.ring - 1) + ["attention"]
