"""Profile files of machines: what may be in them, and which machine they decide on."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from common.registry.layout import RULE, Layout
from common.run import degrees
from planner import choose_layout, get_profile, machine
from planner.hardware import Machine
from tests.helpers.planning import ask


def test_a_profile_file_takes_the_place_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"gpu": "x", "tflops": 200, "hbm_gbs": 1000, "memory_gib": 48, "links": {"gbs": 7}}))
    profile = get_profile(str(path))
    assert (profile.links.gbs, profile.tflops) == (7, 200)
    assert choose_layout("mochi", None, 2, str(path))[0].ranks == 2
    path.write_text("{}")
    with pytest.raises(ValueError, match="xdit-doctor"):
        get_profile(str(path))


SHEET = {"gpu": "x", "tflops": 100, "hbm_gbs": 1000, "memory_gib": 48}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        *(
            ({"tflops": value}, "tflops is")
            for value in (0, "abc", None, -5, float("nan"), float("inf"), True, 10**400)
        ),
        ({"memory_gib": [1]}, "memory_gib is [1]; it must be a number"),
        ({"gpu": 4090}, "gpu is 4090; it must be a text"),
        ({"fsdp": 1}, "fsdp is 1; it must be true or false"),
        ({"exposed": 2}, "exposed is 2; it must be a number from 0 to 1"),
        ({"links": []}, "links is []"),
        ({"links": {"gbs": 0}}, "links.gbs is 0"),
        ({"links": {"gbs": -4}}, "links.gbs is -4"),
        ({"links": {"gpus_per_node": 0}}, "links.gpus_per_node is 0"),
        ({"links": {"gpus_per_socket": 1.5}}, "links.gpus_per_socket is 1.5; it must be a whole number"),
        ({"scheme": "foo"}, "scheme is 'foo'; it must be one of ours, reference"),
        ({"name": {}}, "name is {}"),
        ({"machine": 3}, "machine is 3, not a table"),
        ({"machine": {"count": "8"}}, "machine.count is '8'"),
    ],
)
def test_a_profile_files_values_are_checked(tmp_path: Path, wrong: dict, told: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(SHEET | wrong))
    with pytest.raises(ValueError) as error:
        get_profile(str(path))
    assert str(path) in str(error.value) and told in str(error.value) and len(str(error.value)) < 300 + len(str(path))


def test_a_profile_file_without_end_or_bottom(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for text in ("[" * 100_000, json.dumps(SHEET | {"note": "x" * (2 << 20)})):
        path.write_text(text)
        assert "is not readable JSON" in ask("--model", "mochi", "--gpu", str(path), expect=2).output


def test_a_user_without_a_home_directory_has_no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("PATH", "")
    assert machine.config_folder() is None
    assert machine.local_profile("cuda") is None and machine.local_profile("cpu") is None


EIGHT = Machine("cuda", "NVIDIA L40", 8)


def kept(folder: Path, of: Machine, at: Machine, **more) -> Path:
    """A profile of one machine where that of another is looked for."""
    path = folder / "xdit-zoo" / machine.profile_path(at).name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(SHEET | {"machine": vars(of)} | more))
    return path


def test_a_profile_decides_on_the_machine_that_it_was_measured_on_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its kind of device, its name and the number of its devices; elsewhere what is known of the kind of GPU."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    here: dict[str, Machine | None] = {"cuda": EIGHT, "cpu": Machine("cpu", "EPYC", 64)}
    monkeypatch.setattr(machine, "this_machine", here.get)
    choose = partial(degrees.choose_layout, ("mochi",), 8, 24, True)
    without = choose()
    assert "the planner's data on l40" in without[1]
    for other in (replace(EIGHT, count=4), replace(EIGHT, name="NVIDIA L40S"), replace(EIGHT, device="cpu")):
        kept(tmp_path, other, at=EIGHT)
        assert choose() == without, other
    assert choose(device="cpu") == (Layout(2, 4, 1), RULE)
    # Links that nothing gets through in a ring, so that the profile changes the layout.
    path = kept(tmp_path, EIGHT, at=EIGHT, links={"gbs": 500, "ring_gain": 0.001, "gpus_per_socket": 8})
    layout, why = choose()
    assert layout.ring == 1 and without[0].ring > 1
    assert f"from the profile of 8 x NVIDIA L40 in {path}" in why
    path.write_text("{")
    assert choose() == without
    here["cuda"] = None
    assert choose() == (Layout(2, 4, 1), RULE)
