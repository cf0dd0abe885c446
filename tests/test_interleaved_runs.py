"""Commands whose guidance branches take turns: when they do, what it takes, and that no result changes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.memory.choice import Outlook, in_turn
from common.memory.estimate import Estimator, Workload, imagined
from common.parallel.interleaver import Interleaver
from common.parallel.mesh import Layout, Mesh
from common.registry.forks import Size, forks, get_model
from common.registry.request import WrongUse
from common.registry.settings import Runtime
from common.run.pipeline import Pipeline
from common.weights.placement import Placement
from mochi_xdit.sampling import workload
from tests.helpers.counting import shorten
from tests.helpers.programs import read

FORKS = [fork for fork in forks() if fork.demos]


def small(mesh: Mesh) -> Workload:
    """Mochi's true width with four layers, for a small video, without its text encoder."""
    return replace(shorten(workload(get_model("mochi"), Size(64, 64, 13, 1), mesh, negative=True), 4), text=())


@pytest.mark.parametrize("layout", [Layout(), Layout(ring=2)], ids=str)
def test_the_estimate_counts_what_both_branches_hold(layout):
    with imagined(layout) as mesh:
        counted = [Estimator(small(at), at) for at in (mesh, replace(mesh, interleaver=Interleaver()))]
        counted[1].peaks = counted[0].peaks
        apart, both = (one.estimate(Placement("block" if layout.ranks == 1 else "stage")) for one in counted)
        shared = [one.estimate(Placement(shard=True)).sent.get("weights", 0) for one in counted]
    assert both.flops == apart.flops and both.sent == apart.sent
    two, one = (counts.stages["sampling"].activations for counts in (both, apart))
    assert one < two < 2 * one
    assert shared[0] == 2 * shared[1]


# ConsisID's sampling is CogVideoX's, and its demo makes only longer videos.
@pytest.mark.parametrize("fork", [fork for fork in FORKS if fork.name != "consisid"], ids=lambda fork: fork.name)
def test_a_command_whose_weights_stream_takes_turns(fork, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def made(name: str, *more: str) -> np.ndarray:
        line = ["--demo", "--gpus", "1", "--device", "cpu", "--num-steps", "1", "--seed", "1", "--offload", "disk"]
        size = ["--width", "32", "--height", "32", "--num-frames", "1"]
        monkeypatch.setattr(sys, "argv", [fork.program, *line, *size, *more, "--output", name])
        with pytest.raises(SystemExit) as left:
            fork.module("cli").main()
        assert left.value.code == 0
        return np.load(name)

    in_turn = made("turns.npy")
    assert "guidance branches take turns" in capfd.readouterr().err
    assert json.loads(Path("turns.npy.json").read_text())["settings"]["interleave_branches"] is True
    apart = made("apart.npy", "--no-interleave-branches")
    assert "take turns" not in capfd.readouterr().err
    np.testing.assert_array_equal(in_turn, apart)


def test_what_has_no_meaning_is_said():
    def problems(*line: str) -> str:
        with pytest.raises(WrongUse) as wrong:
            read(FORKS[0], "--demo", "--device", "cpu", "--interleave-branches", *line)
        return str(wrong.value)

    assert "--cfg-parallel puts each on ranks of its own" in problems("--gpus", "2", "--cfg-parallel")
    assert read(FORKS[0], "--demo", "--device", "cpu", "--interleave-branches", "--gpus", "2").layout.cfg == 1
    mesh = Mesh(layout=Layout(cfg=2))
    with pytest.raises(ValueError, match="leave one of them out"):
        Pipeline("nowhere", mesh, Runtime(interleave_branches=True))


@pytest.mark.parametrize(
    ("line", "said"), [(("--cfg-scale", "1"), "without guidance"), ((), "one GPU whose weights stay")]
)
def test_what_would_do_nothing_is_off_and_said(line, said):
    request = read(FORKS[0], "--demo", "--device", "cpu", "--gpus", "1", "--interleave-branches", *line)
    outlook = in_turn(Outlook(Placement(), False), request, 1 << 40, lambda asking: pytest.fail("nothing to count"))
    assert not outlook.interleave and said in outlook.warnings[0]


@pytest.mark.parametrize(
    ("placement", "chosen", "said"), [("disk", "", "once a step for both"), ("stage", "5 s a step", ": 5 s a step")]
)
def test_without_room_for_both_branches_they_do_not_take_turns(placement, chosen, said):
    request = read(FORKS[0], "--demo", "--device", "cpu", "--gpus", "1", "--offload", placement)
    groups, counted = 3 if chosen else None, Estimator(small(Mesh()), Mesh())
    request = replace(request, turns_chosen=chosen, groups_in_turn=groups)
    asked = []
    for free, expected in ((1 << 50, True), (1, False)):
        outlook = in_turn(Outlook(Placement(placement), False), request, free, lambda r: asked.append(r) or counted)
        assert outlook.interleave is expected and (said in outlook.turns) is expected
        assert outlook.groups == asked[-1].runtime.overlap_groups == 3 if expected and chosen else outlook.groups == 1
        assert ("3 groups of heads" in outlook.turns) is bool(expected and chosen)
