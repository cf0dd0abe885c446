"""What the planner says of hidden and of exposed exchanges, and the number of head groups that follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cogvideox_xdit import fork as cogvideox
from cogvideox_xdit.config import CONFIGS as COGVIDEOX
from common.registry.forks import Model, get_model
from common.registry.layout import Coordinates, Layout, turns, turns_ahead
from common.registry.request import settings
from common.run.command_line import parse
from common.run.degrees import with_overlap
from mochi_xdit import fork as mochi
from mochi_xdit.config import MochiConfig
from planner import cost, get_profile, overlap, plan, predict
from planner.hardware import Profile, make_profile
from planner.machine import lab, with_hiding
from planner.model import hidden_share, spread, step_seconds


class Tokens:
    """So many of the two branches, whatever the size."""

    def __init__(self, *counts: int) -> None:
        self.counts, self.token_channels = counts, 64

    def tokens(self, size: object) -> tuple[int, ...]:
        return self.counts


def measured_model(name: str) -> Model:
    """As `benchmarks/links.py` narrows it: 12 heads, 2 blocks."""
    model, tokens, words = get_model(name), Tokens(2016, 2016), Tokens(226, 226)
    stack: Any
    if name == "mochi":
        config = MochiConfig(depth=2, heads=12, hidden_y=768, mlp_x=4096, mlp_y=2048, text_dim=512)
        stack = mochi.stack(config, tokens, Tokens(256, 0))  # type: ignore[arg-type]
    else:
        stack = cogvideox.stack(replace(COGVIDEOX["5b"], heads=12, layers=2), tokens, words)  # type: ignore[arg-type]
    return replace(model, stacks=(stack,))


def test_steps_measured_on_a_cpu_are_explained() -> None:
    errors = []
    for row in lab()["measured"]:
        profile = make_profile("cpu", lab()["profile"])
        if row["mbit"]:  # four bytes a number, of which the planner counts two
            profile = replace(profile, links=replace(profile.links, gbs=row["mbit"] / 8000 / 2))
        model, layout = measured_model(row["model"]), Layout(*map(int, row["layout"].split("x")))
        at, groups = spread(layout, profile.links), row["groups"]
        step = sum(step_seconds(model, model.default_size, layout, profile, "ours", at, groups=groups).values())
        errors.append(abs(step / row["seconds"] - 1))
    mean = sum(errors) / len(errors)
    assert mean < 0.03 and max(errors) < 0.1
    assert mean == pytest.approx(lab()["mean_error"], abs=0.0005)  # as the page of predictions says


def block(layout: Layout, groups: int) -> list[overlap.Operation]:
    (stack,) = get_model("cogvideox-5b").stacks
    at = cost.forward(stack, (17550, 226), Coordinates(layout, 0)).block
    assert at is not None
    return overlap.block(at, groups)


@pytest.mark.parametrize("layout", [Layout(ulysses=3), Layout(ring=3), Layout(ring=2, ulysses=3)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_groups_change_neither_bytes_nor_flops(layout: Layout, groups: int) -> None:
    (stack,) = get_model("cogvideox-5b").stacks
    whole = cost.forward(stack, (17550, 226), Coordinates(layout, 0))
    sent = {"ulysses": 0.0, "ring": 0.0}
    attention = 0.0
    for one in block(layout, groups):
        if isinstance(one, overlap.Post):
            sent[one.axis] += one.amount
        elif isinstance(one, overlap.Work) and one.kind == "attention":
            attention += one.amount
    assert sent == pytest.approx({"ulysses": whole.all_to_all / 42, "ring": whole.ring / 42})
    assert attention == pytest.approx(whole.attention / 42)


def test_what_is_waited_for_is_what_no_work_covers() -> None:
    post, work, wait = overlap.Post("ulysses", 10, 0), overlap.Work("matmul", 4), overlap.Wait(0)

    def seconds(*operations: overlap.Operation, **how: float) -> float:
        return overlap.waited(operations, **how)["ulysses"]

    assert seconds(post, wait) == 10
    assert seconds(post, work, wait) == 6
    assert seconds(post, work, work, work, wait) == 0
    assert seconds(post, work, work, work, wait, exposed=0.5) == 5
    second = overlap.Post("ulysses", 10, 1), overlap.Wait(1)
    assert seconds(post, second[0], wait, second[1]) == 20  # one link


def test_branches_in_turn_compute_and_send_the_same() -> None:
    for layout in (Layout(ulysses=2), Layout(ring=2), Layout(ring=2, ulysses=2)):
        one = overlap.repeated([*block(layout, 2), overlap.Work("rest", 5e11)], 3)
        both = overlap.interleaved(one, one, turns_ahead(layout.ring, layout.ulysses, 2))
        assert len(both) == 2 * sum(not isinstance(what, overlap.Turn) for what in one)
        for kind in (overlap.Work, overlap.Post):
            amounts = [sorted(w.amount for w in side if isinstance(w, kind)) for side in (both, one * 2)]
            assert amounts[0] == amounts[1]
        keys = [w.key for w in both if isinstance(w, overlap.Post)]
        assert len(set(keys)) == len(keys) and {w.key for w in both if isinstance(w, overlap.Wait)} == set(keys)


@pytest.mark.parametrize(
    ("layout", "groups", "most"),
    [
        (Layout(ulysses=2), 1, 1.28),
        (Layout(ulysses=2), 3, 1.04),
        (Layout(ulysses=4), 4, 1.04),
        (Layout(ring=2), 1, 1.05),
        (Layout(ring=4), 1, 1.27),
        (Layout(ring=2, ulysses=2), 1, 1.16),
    ],
    ids=str,
)
def test_the_first_branch_leads_by_what_hides_most(layout: Layout, groups: int, most: float) -> None:
    """Over a link that takes as long for all that a block sends as the block computes, of 8 blocks."""
    made, computing = block(layout, groups), overlap.Work("rest", 5e11)
    work = sum(one.amount for one in [*made, computing] if isinstance(one, overlap.Work))
    sent = sum(one.amount for one in made if isinstance(one, overlap.Post))
    even = [replace(one, amount=one.amount * work / sent) if isinstance(one, overlap.Post) else one for one in made]
    blocks = overlap.repeated([*even, computing], 8)

    def of_work(lead: int) -> float:
        return 1 + sum(overlap.waited(overlap.interleaved(blocks, blocks, lead)).values()) / (16 * work)

    count = turns(layout.ring, layout.ulysses, groups)
    assert count == sum(isinstance(one, overlap.Turn) for one in made)
    found = of_work(turns_ahead(layout.ring, layout.ulysses, groups))
    assert found == pytest.approx(min(map(of_work, range(count)))) and found < most


@pytest.mark.parametrize("layout", [Layout(ulysses=4), Layout(ring=4), Layout(ring=2, ulysses=2)], ids=str)
def test_branches_in_turn_hide_more(layout: Layout) -> None:
    model, profile = get_model("mochi"), replace(get_profile("l40"), exposed=0.0)
    size = model.default_size
    after, in_turn = (predict(model, size, layout, profile, "ours", interleave=how) for how in (False, True))
    assert in_turn.step < after.step
    compute = after.step - (after.parts["all-to-all"] + after.parts["ring"]) / size.num_steps
    assert in_turn.step > compute * 0.999
    one, both = (hidden_share(model, size, layout, profile, 1, how) for how in (False, True))
    assert 0 <= one < both <= 1


# --- The number of groups ---------------------------------------------------------------------------------------------


def test_slower_links_take_more_groups_and_one_rank_takes_one() -> None:
    model = get_model("mochi")
    assert predict(model, model.default_size, Layout(), get_profile("l40")).groups == 1
    assert predict(model, model.default_size, Layout(cfg=2, ring=3), get_profile("l40")).groups == 1
    counts = [
        predict(model, model.default_size, Layout(cfg=2, ulysses=3), get_profile("l40", link)).groups
        for link in ("10000", "20", "2")
    ]
    assert counts == sorted(counts) and counts[0] == 1 < counts[-1]


def test_groups_that_are_best_are_never_slower_than_one() -> None:
    for name, gpu in (("mochi", "l40"), ("cogvideox-5b", "4090"), ("wan2.1-t2v-14b", "h100")):
        model = get_model(name)
        for one in plan(model, model.default_size, 4, get_profile(gpu)).layouts:
            alone = predict(model, model.default_size, one.layout, get_profile(gpu), "ours", groups=1)
            assert one.step <= alone.step * 1.003 and one.groups <= model.heads // one.layout.ulysses


@pytest.fixture
def l40(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("common.system.environment.visible_gpus", lambda: 0)
    monkeypatch.setattr("planner.layouts.local_profile", lambda device: (get_profile("l40"), "PROFILE"))
    monkeypatch.chdir(tmp_path)


PLANNED = ("--dry-run", "mochi", "--device", "cuda", "--ulysses-degree", "3", "--cfg-parallel")


@pytest.mark.usefixtures("l40")
def test_a_command_takes_the_planners_number_and_says_why() -> None:
    request = parse(mochi.FORK, PLANNED)
    model = get_model("mochi")
    expected = predict(model, model.default_size, Layout(2, 1, 3), get_profile("l40"), "ours").groups
    assert request.runtime.overlap_groups == expected > 1
    assert settings(request, request.videos[0])["overlap_groups"] == expected
    assert (
        "s a step predicted with pcie, 20.4 GB/s" in request.groups_chosen and "from PROFILE" in request.groups_chosen
    )
    expected = predict(model, model.default_size, Layout(1, 6, 1), get_profile("l40"), "ours").groups
    assert with_overlap(replace(request, layout=Layout(1, 6, 1)), ("mochi",)).runtime.overlap_groups == expected > 1
    assert with_overlap(replace(request, layout=Layout(2, 1, 1)), ("mochi",)).runtime.overlap_groups == 1


@pytest.mark.usefixtures("l40")
def test_a_number_that_is_given_stays() -> None:
    for number in ("1", "5"):
        request = parse(mochi.FORK, (*PLANNED, "--overlap-groups", number))
        assert request.runtime.overlap_groups == int(number) and request.groups_chosen == ""
        assert with_overlap(request, ("mochi",)) == request


def slowed(factor: float) -> Profile:
    profile = get_profile("l40")
    return replace(profile, links=replace(profile.links, gbs=profile.links.gbs / factor))


@pytest.mark.usefixtures("l40")
def test_branches_on_the_same_ranks_take_turns_where_links_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout, line = get_model("mochi"), Layout(ring=3), ("--dry-run", "mochi", "--device", "cuda", "--gpus", "3")
    for factor in (8, 0.01):
        profile = slowed(factor)
        monkeypatch.setattr("planner.layouts.local_profile", lambda device, known=profile: (known, "PROFILE"))
        request = parse(mochi.FORK, (*line, "--ring-degree", "3"))
        assert request.layout == layout
        after, turns = (
            predict(model, model.default_size, layout, profile, "ours", interleave=way).step for way in (False, True)
        )
        assert bool(request.turns_chosen) is (turns < 0.97 * after) is (factor == 8)
        assert factor != 8 or f"{turns:.4g} s a step predicted with pcie" in request.turns_chosen
    monkeypatch.setattr("planner.layouts.local_profile", lambda device: (slowed(4), "PROFILE"))
    layout, profile = Layout(ulysses=3), replace(slowed(2), exposed=0.0)
    monkeypatch.setattr("planner.layouts.local_profile", lambda device: (profile, "PROFILE"))
    ways = {way: predict(model, model.default_size, layout, profile, "ours", interleave=way) for way in (False, True)}
    assert ways[False].groups != ways[True].groups > 1
    request = parse(mochi.FORK, (*line, "--ulysses-degree", "3"))
    assert (request.runtime.overlap_groups, request.groups_in_turn) == (ways[False].groups, ways[True].groups)
    assert f"{ways[True].step:.4g} s a step" in request.turns_chosen and ways[True].step < ways[False].step
    request = parse(mochi.FORK, (*line, "--ulysses-degree", "3", "--interleave-branches"))
    assert request.runtime.overlap_groups == ways[True].groups and request.groups_in_turn is None
    request = parse(mochi.FORK, (*line, "--ulysses-degree", "3", "--overlap-groups", "2"))
    assert request.runtime.overlap_groups == request.groups_in_turn == 2
    for other in (("--no-interleave-branches",), ("--cfg-scale", "1"), ("--gpus", "6", "--cfg-parallel")):
        assert parse(mochi.FORK, (*line, "--ring-degree", "3", *other)).turns_chosen == ""


def test_where_nothing_is_known_there_is_one_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("planner.layouts.local_profile", lambda device: None)
    monkeypatch.chdir(tmp_path)
    request = parse(mochi.FORK, PLANNED)
    assert request.runtime.overlap_groups == 1 and "xdit-doctor measures them" in request.groups_chosen
    demo = parse(mochi.FORK, ("--demo", "--device", "cpu", "--ulysses-degree", "2"))
    assert demo.runtime.overlap_groups == 1 and "does not know this checkpoint" in demo.groups_chosen


def test_ranks_on_a_cpu_have_the_link_that_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("planner.layouts.local_profile", lambda device: None)
    monkeypatch.chdir(tmp_path)
    request = parse(mochi.FORK, ("--dry-run", "mochi", "--device", "cpu", "--ulysses-degree", "2"))
    assert request.runtime.overlap_groups is not None and request.runtime.overlap_groups > 1
    assert "measured on other CPU cores" in request.groups_chosen
    mine = replace(get_profile("l40"), name="mine")
    found = with_hiding((mine, "HERE"), "cpu")
    assert found is not None and found[1] == "HERE"
    assert found[0].tflops == mine.tflops and found[0].group_ms == make_profile("cpu", lab()["profile"]).group_ms
    assert with_hiding((mine, "HERE"), "cuda") == (mine, "HERE")
