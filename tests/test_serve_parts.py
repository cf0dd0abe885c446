"""The server's parts that need no server: what fits into memory, keys, models of folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.registry.forks import fork_of, forks, get_model
from planner.hardware import get_profile
from xdit_serve.building import build
from xdit_serve.groups import deployment
from xdit_serve.keys import Keys, read_keys
from xdit_serve.memory import Memory
from xdit_serve.offers import Offer, checkpoint, demos, find

OWN = ("--device=cpu", "--gpus=2")


def test_what_does_not_fit_is_refused_in_the_estimators_words(tmp_path: Path) -> None:
    offer, memory = find(demos(), "mochi-demo", "video"), Memory()
    try:
        fits = build(offer, OWN, ["--prompt=x"], tmp_path, "x.mp4")
        tight = build(offer, (*OWN, "--max-memory=0.0001"), ["--prompt=x", "--width=96"], tmp_path, "x.mp4")
        assert memory.problem(offer.name, fits) == ""
        assert "not enough memory: " in memory.problem(offer.name, tight)
        memory.close()  # as after a rest: what was answered is known, the rest is asked of another process
        assert memory.problem(offer.name, fits) == ""
        wide = build(offer, OWN, ["--prompt=x", "--width=16384", "--height=16384"], tmp_path, "x.mp4")
        assert "not enough memory: " in memory.problem(offer.name, wide)
    finally:
        memory.close()
    assert memory._child is None


def test_without_a_number_there_are_as_many_groups_as_the_planner_advises(monkeypatch: pytest.MonkeyPatch) -> None:
    cogvideox = get_model("cogvideox-2b")
    rules = replace(demos()[0].rules, heads=cogvideox.heads, width=720, height=480, num_frames=49, num_steps=50)
    offers = [Offer("big", fork_of(cogvideox), ("--model-dir", "none"), rules)]
    monkeypatch.setattr("common.system.environment.visible_gpus", lambda: 8)
    monkeypatch.setattr("planner.layouts.local_profile", lambda device: (get_profile("h100"), "PROFILE"))
    at = deployment("auto", None, None, None, offers)
    assert at.replicas > 1 and (at.replicas * at.ranks, at.on_cpu) == (8, False)
    assert (
        deployment("auto", None, 2, None, offers).replicas == 2
        and deployment("auto", 1, None, None, offers).replicas == 1
    )
    assert (
        deployment("cpu", None, None, None, offers).replicas == 1
        and deployment("auto", 8, None, "auto", offers).replicas == 1
    )
    assert deployment("auto", None, None, None, [*offers, *demos()]).replicas == 1  # the planner knows no demo


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# who: what\nfirst-key-1\n\nsecond-key-2\n")
    assert read_keys(file, {"XDIT_API_KEY": "not-this-one"}) == ["first-key-1", "second-key-2"]
    assert read_keys(None, {"XDIT_API_KEY": "one-key-111 two-key-222"}) == ["one-key-111", "two-key-222"]
    assert read_keys(None, {}) == []
    keys = Keys(read_keys(file))
    owners = {keys.owner(f"Bearer {key}".encode()) for key in ("first-key-1", "second-key-2")}
    assert len(owners) == 2 and None not in owners and not any("key" in str(owner) for owner in owners)
    assert keys.owner(None) is None and keys.owner(b"Bearer first-key") is None and Keys().owner(None) == ""
    for content, problem in (("short\n", "key 1 is not 8"), ("# none\n", "holds no key"), ("a b c d e f\n", "key 1")):
        file.write_text(content)
        with pytest.raises(ValueError, match=problem):
            read_keys(file)
    with pytest.raises(ValueError, match="no such file"):
        read_keys(tmp_path / "none")


def test_a_folder_is_offered_by_the_program_that_reads_it(tmp_path: Path) -> None:
    for fork in forks():
        folder = fork.demo_folder()
        offer = checkpoint(folder, [folder.name])
        assert (offer.fork, offer.name, offer.demo) == (fork, f"{folder.name}-2", False)
    with pytest.raises(ValueError, match="is no checkpoint of a program here"):
        checkpoint(tmp_path)
    with pytest.raises(ValueError, match="--model-dir"):
        checkpoint(tmp_path / "none")
