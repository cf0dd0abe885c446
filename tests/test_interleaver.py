"""Guidance branches in turn: one computes while what the other waits for is on its way, and no result changes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cogvideox_xdit.config import CONFIGS as COGVIDEOX
from cogvideox_xdit.transformer import CogVideoXTransformer
from common.memory.estimate import FUSED, imagined
from common.parallel.interleaver import Interleaver
from common.parallel.mesh import Layout, distributed
from common.parallel.usp import SequenceParallel
from common.registry.layout import turns_ahead
from common.weights.blocks import BlockLayout, Blocks, Stream, Wait, bind, finish, streamed
from common.weights.load import on_meta
from common.weights.placement import Placement
from mochi_xdit.config import MochiConfig
from mochi_xdit.transformer import MochiTransformer
from mochi_xdit.weights import load_transformer
from tests.helpers.exchanges import told_exchanges
from tests.helpers.mochi import write_checkpoint
from tests.test_overlap import SIZE, Windows, made


@pytest.fixture(autouse=True)
def nobody_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


# --- Turns ------------------------------------------------------------------------------------------------------------


def test_the_turn_goes_round_at_the_places_that_pass_it():
    turns, said = Interleaver(), list[str]()

    def work(name: str) -> str:
        for i in range(3 if name == "a" else 2):
            said.append(f"{name}{i}")
            turns.pass_turn()
        return name.upper()

    assert turns.map(work, "abc") == ["A", "B", "C"]
    assert said == ["a0", "b0", "c0", "a1", "b1", "c1", "a2"]


def test_the_first_ones_lead_by_the_turns_that_they_keep():
    turns, said = Interleaver(), list[str]()

    def work(name: str) -> None:
        for i in range(5):
            said.append(f"{name}{i}")
            turns.pass_turn()

    turns.map(work, "ab", ahead=2)
    assert said == ["a0", "a1", "a2", "b0", "a3", "b1", "a4", "b2", "b3", "b4"]
    said.clear()
    turns.map(work, "abc", ahead=1)
    assert said[:7] == ["a0", "a1", "a2", "b0", "b1", "c0", "a3"]


def test_one_alone_needs_no_thread_and_has_nobody_to_pass_the_turn_to():
    turns = Interleaver()

    def work(value: int) -> tuple[int, threading.Thread, bool]:
        turns.pass_turn()
        return value, threading.current_thread(), turns.reach(7)

    assert turns.map(work, [3]) == [(3, threading.main_thread(), True)]
    assert turns.map(work, []) == []
    turns.pass_turn()
    assert turns.reach(5)


def test_nobody_gets_two_places_ahead_and_the_last_to_come_finds_all_there():
    turns, said = Interleaver(), list[tuple[str, int, bool]]()

    def work(name: str) -> None:
        for i in range(4):
            together = turns.reach(i)
            said.append((name, i, together))
            if name == "a" and i == 1:
                turns.pass_turn()  # of its own accord, so that it goes on to the next place at once

    turns.map(work, "ab")
    at = {"a": 0, "b": 0}
    for name, i, together in said:
        at[name] = i
        assert max(at.values()) - min(at.values()) <= 1
        assert not together or all(place >= i - 1 for place in at.values())
    assert [i for name, i, _ in said if name == "a"] == [i for name, i, _ in said if name == "b"] == [0, 1, 2, 3]
    assert said[:4] == [("a", 0, True), ("b", 0, True), ("a", 1, True), ("b", 1, True)]


@pytest.mark.parametrize("failing", ["a", "b", "c"])
def test_an_error_ends_the_others_where_they_wait(failing):
    turns, left = Interleaver(), list[str]()

    def work(name: str) -> None:
        try:
            turns.pass_turn()
            if name == failing:
                raise MemoryError(name)
            for _ in range(10):
                turns.pass_turn()
        finally:
            left.append(name)

    with pytest.raises(MemoryError, match=failing):
        turns.map(work, "abc")
    assert sorted(left) == ["a", "b", "c"]
    assert turns.map(str, [1, 2]) == ["1", "2"]


def test_a_signal_ends_all_whoever_has_the_turn():
    turns, calls = Interleaver(), list[str]()

    def work(name: str) -> None:
        for _ in range(1000):
            calls.append(name)
            if len(calls) == 10:  # the second's, which the main thread waits for
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(0.2)
            turns.pass_turn()

    with pytest.raises(KeyboardInterrupt):
        turns.map(work, "ab")
    assert len(calls) < 1000


def test_threads_see_what_the_caller_has_set():
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.by: list[bool] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.by.append(threading.current_thread() is threading.main_thread())
            return func(*args, **(kwargs or {}))

    def state(_: int) -> tuple[object, ...]:
        torch.ones(1)
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
            torch.get_num_threads(),
        )

    turns = Interleaver()
    with Seen() as seen, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first, second = turns.map(state, range(2))
    assert first == second and first[:3] == (False, True, torch.bfloat16)
    assert seen.by == [True, False]
    with torch.no_grad():
        assert len(set(turns.map(state, range(3)))) == 1
    assert len(set(turns.map(state, range(3)))) == 1


# --- Exchanges --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predicted(kind: str, layout: Layout, groups: int) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Of two conditions, one after the other and in turn; and the exchanges that were posted for the latter."""
    with distributed(layout) as mesh:
        both, order = [], list[str]()
        for interleaver in (None, Interleaver()):
            at = replace(mesh, interleaver=interleaver)
            sp = SequenceParallel(at, groups=groups)
            model, x, cond = made(kind, sp)
            conds = [cond, other_of(kind, model, cond)]
            time = torch.full((1,), 500.0, dtype=torch.float64) if kind == "mochi" else 500.0
            order = []
            with told_exchanges(at, order.append):
                found = list(sp.each(partial(model, x, time), conds))
            both.append([sp.gather(one, sp.lengths(72)) for one in found])
        return both[0], both[1], order


def other_of(kind: str, model: Any, cond: Any) -> Any:
    """The condition of another prompt: for Mochi the empty one, of which ranks have other lengths."""
    if kind == "mochi":
        return model.prepare(SIZE)
    width = model.config.text_dim
    text = torch.linspace(-1, 1, 7 * width, dtype=torch.float64).view(1, 7, width)
    return model.prepare(text, SIZE)


@pytest.mark.parametrize(
    ("kind", "layout", "groups"),
    [
        ("mochi", Layout(ulysses=3), 1),
        ("mochi", Layout(ring=3), 1),
        ("mochi", Layout(ring=2, ulysses=2), 2),
        ("cogvideox", Layout(ulysses=2), 3),
        ("cogvideox", Layout(ring=2), 1),
        ("cogvideox", Layout(ring=3), 2),
        ("wan", Layout(ulysses=3), 1),
        ("wan", Layout(ring=3), 3),
        ("wan", Layout(ring=2, ulysses=2), 1),
    ],
    ids=str,
)
def test_in_turn_predictions_are_the_same_and_all_ranks_post_the_same(run_ranks, kind, layout, groups):
    ran = run_ranks(layout.ranks, predicted, kind, layout, groups)
    for apart, in_turn, order in ran:
        assert all(torch.equal(a, b) for a, b in zip(apart, in_turn))
        assert not torch.equal(*in_turn)
        assert order == ran[0][2] and order.count("wait") * 2 == len(order)
    # The second branch's first exchange is on its way before the first one waits, but for the turns that it leads by.
    lead, waits = turns_ahead(layout.ring, layout.ulysses, groups), [i for i, x in enumerate(ran[0][2]) if x == "wait"]
    assert waits[lead] - lead >= lead + 2


def two_blocks(kind: str, layout: Layout, groups: int) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Of two blocks for each of two branches in turn, on rank 0 at the true width: the exchanges in the order they are
    posted, with the FLOPs under each; and the FLOPs of a block's parts. 24 frames of 24 tokens, no text."""
    with imagined(layout) as mesh, torch.inference_mode():
        sp = SequenceParallel(replace(mesh, interleaver=Interleaver()), groups=groups)
        model: Any
        if kind == "mochi":
            model = on_meta(MochiTransformer, replace(MochiConfig(), depth=3), sp)
            cond: Any = model.prepare((24, 8, 12), torch.empty(1, 0, 4096, device="meta"))
            extra = (cond.y, torch.empty(1, 3072, device="meta"), cond)
        else:
            model = on_meta(CogVideoXTransformer, replace(COGVIDEOX["5b"], layers=2), sp)
            cond = model.prepare(torch.empty(1, 0, 4096, device="meta"), (24, 8, 12))
            extra = (torch.empty(1, 512, device="meta"), cond)
        n = 576 // layout.sequence

        def run(x: Tensor) -> None:
            for block in model.blocks[:2]:
                x = block(x, *extra)[0] if kind == "mochi" else block(x, *extra)

        with FlopCounterMode(display=False, custom_mapping=FUSED) as flops, Windows(mesh, flops) as found:
            sp.each(run, [torch.empty(1, n, 3072, device="meta") for _ in range(2)])
    project, attend, output = 6 * n * 3072**2, 4 * n * 576 * 3072, 2 * n * 3072**2
    rest = flops.get_total_flops() // 4 - project - attend - output
    return found.windows, {"project": project, "attend": attend, "output": output, "rest": rest}


@pytest.mark.parametrize("kind", ["mochi", "cogvideox"])
def test_heads_travel_under_the_other_branch(kind):
    """Between blocks under its output, its feed-forward and its next projection: the most that a block has."""
    windows, part = two_blocks(kind, Layout(ulysses=2), 1)
    project, attend, after = part["project"], part["attend"], part["output"] + part["rest"]
    modulation = windows[0][1] - project  # what comes before it in a block, of the feed-forward's share
    assert 0 <= modulation < 0.02 * project
    between = after + project
    first = [project + modulation, attend, attend, between]
    second = [between, attend, attend, after - modulation]
    assert [flops for _, flops in windows] == first + second


@pytest.mark.parametrize("kind", ["mochi", "cogvideox"])
@pytest.mark.parametrize(
    ("layout", "groups"),
    [(Layout(ulysses=4), 2), (Layout(ring=2), 1), (Layout(ring=4), 1), (Layout(ring=2, ulysses=2), 2)],
    ids=str,
)
def test_nothing_travels_without_work_of_the_other_branch_under_it(kind, layout, groups):
    apart = dict[str, list[int]]()
    windows, part = two_blocks(kind, layout, groups)
    for axis, flops in windows:
        apart.setdefault(axis, []).append(flops)
    # At least a group's share of the smallest part, whichever exchange it is.
    least = min(part["project"], part["output"], part["attend"]) // groups // layout.ring
    assert all(flops >= least for found in apart.values() for flops in found)
    assert len(windows) == 4 * ((layout.ring - 1) * groups + 2 * groups * (layout.ulysses > 1))


# --- Weights that stream ----------------------------------------------------------------------------------------------


class Listed:
    """A source that notes what is fetched, and overwrites what it is given until somebody has waited."""

    def __init__(self, blocks: list[Tensor]) -> None:
        self.blocks, self.fetched = blocks, list[int]()

    def fetch(self, index: int, out: Tensor) -> Wait:
        self.fetched.append(index)
        out.fill_(255)
        return lambda: out.copy_(self.blocks[index])


@pytest.mark.parametrize("waits", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_a_block_is_fetched_once_for_all_that_take_turns(count, waits):
    """waits: how often a block's work passes the turn by itself."""
    weights = [torch.full((16,), i, dtype=torch.float32) for i in range(count)]
    source, turns = Listed([w.view(torch.uint8) for w in weights]), Interleaver()
    blocks = Blocks(nn.Linear(4, 4, bias=False).requires_grad_(False) for _ in range(count))
    layouts = [BlockLayout.of(block, lambda _: torch.float32) for block in blocks]
    blocks.stream = Stream(source, layouts, torch.device("cpu"), 64 * 4, True, turns)
    source.blocks = [torch.cat((w, w.new_zeros(64 * 4 - 64))) for w in source.blocks]
    for i, block in enumerate(blocks):
        bind(block, blocks.stream.views(i))
    seen = list[tuple[str, int]]()

    def work(name: str) -> None:
        for i, block in enumerate(streamed(blocks)):
            for passed in range(waits + 1):
                assert (block.weight == i).all()
                seen.append((name, i))
                if passed < waits:
                    turns.pass_turn()

    rounds = [["ab", "ab"], ["ab", "a", "ab"], ["abc", "b"]]
    for names in rounds:
        seen.clear()
        source.fetched.clear()
        for together in names:
            turns.map(work, together)
        assert len(seen) == sum(map(len, names)) * count * (waits + 1)
        expected = [i for _ in names for i in range(count)]
        # The first two of a round may be there from the one before, and those of the next may be on their way.
        assert len(source.fetched) <= len(expected) + 1
        assert [i for i in source.fetched if i > 1] == [i for i in expected if i > 1]


def test_after_an_error_the_next_round_begins_anew():
    source, turns = Listed([torch.full((64,), i, dtype=torch.uint8) for i in range(5)]), Interleaver()
    blocks = Blocks(nn.Linear(4, 4, bias=False).requires_grad_(False) for _ in range(5))
    layouts = [BlockLayout.of(block, lambda _: torch.float32) for block in blocks]
    blocks.stream = Stream(source, layouts, torch.device("cpu"), 64, True, turns)
    for i, block in enumerate(blocks):
        bind(block, blocks.stream.views(i))

    def work(last: int) -> list[int]:
        found = []
        for i, block in enumerate(streamed(blocks)):
            assert (block.weight.view(torch.uint8) == i).all()
            if i == last:
                raise ArithmeticError
            found.append(i)
        return found

    for failing in (0, 1, 3, 4):
        with pytest.raises(ArithmeticError):
            turns.map(work, [9, failing])
        assert turns.map(work, [9, 9]) == [[0, 1, 2, 3, 4]] * 2


def placed(folder: Path, layout: Layout, placement: Placement) -> tuple[list[Tensor], list[Tensor], list[int], int]:
    """Of two conditions by resident weights, by weights that stream to both in turn; which blocks were fetched, and how
    many blocks there are."""
    with distributed(layout) as mesh, torch.inference_mode():
        found, fetched = [], list[int]()
        for where, interleaver in ((Placement(), None), (placement, Interleaver())):
            sp = SequenceParallel(replace(mesh, interleaver=interleaver))
            model = load_transformer(folder, sp, placement=where, world=mesh.weights)
            if (stream := model.blocks.stream) is not None:
                fetch = stream.source.fetch

                def noted(index: int, out: Tensor, fetch: Any = fetch) -> Wait:
                    fetched.append(index)
                    return fetch(index, out)

                stream.source.fetch = noted
            text = torch.linspace(-1, 1, 9 * model.config.text_dim).view(1, 9, -1)
            conds = [model.prepare(SIZE, text), model.prepare(SIZE)]
            x = sp.shard(torch.linspace(-1, 1, 72 * model.config.patch_dim).view(1, 72, -1))
            for time in (0.0, 500.0):
                shards = sp.each(partial(model, x, torch.full((1,), time)), conds)
                last = [sp.gather(one, sp.lengths(72)) for one in shards]
            found.append(last)
            finish(model)
        return found[0], found[1], fetched, len(model.blocks)


@pytest.mark.parametrize(
    ("layout", "placement"),
    [
        (Layout(), Placement("block")),
        (Layout(), Placement("disk")),
        (Layout(ulysses=3), Placement(shard=True)),
        (Layout(ring=3), Placement("block", shard=True)),
        (Layout(ring=2, ulysses=2), Placement("disk")),
    ],
    ids=str,
)
def test_streamed_weights_come_once_a_step(run_ranks, tmp_path, layout, placement):
    folder = write_checkpoint(tmp_path)
    for resident, streaming, fetched, count in run_ranks(layout.ranks, placed, folder, layout, placement):
        assert all(torch.equal(a, b) for a, b in zip(resident, streaming))
        assert [fetched.count(i) for i in range(2, count)] == [2] * (count - 2)
        assert len(fetched) <= 2 * count + 1
