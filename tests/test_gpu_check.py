"""`make gpu-check` in miniature, what it does when parts fail or are cut off, and what it says of results."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from click import UsageError
from safetensors.torch import load_file, save_file

from benchmarks.gpu_check import __main__ as program
from benchmarks.gpu_check import checkpoints, claims, measures, parts, runner
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.runner import Cell, Kept, Part
from common.registry.forks import get_model, models
from xdit_doctor import cli as doctor

ROOT = Path(__file__).resolve().parents[1]
HERE = Machine(0, ("mochi",))
CARD = Machine(2, ("mochi",), "NVIDIA H100 80GB HBM3", (9, 0))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Scratch folders of parts go there; the miniature keeps the user's cache with the demo."""
    if "miniature" not in request.node.name:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_the_miniature_runs_every_part_and_says_what_it_could_not_test(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--mini", "--models", "mochi", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [part.name for part in parts.all_parts(HERE)]
    kept = {name: Kept.read(tmp_path, name) for name in names}
    wrong = {f"{n} {k}": row["error"] for n, one in kept.items() for k, row in one.rows.items() if "error" in row}
    assert not wrong and all(one.finished for one in kept.values())
    assert len(kept["exact-mochi"].rows) == 3 and kept["step-mochi"].rows["block"]["step_s"] > 0
    assert kept["peers-mochi"].rows["sides"]["seconds"].keys() == {"ours", "diffusers"}
    assert {"holds", "not tested here"} == {line.split("  ")[0] for line in verdict_lines(done.stdout)}
    page = (tmp_path / "README.md").read_text()
    assert "latents of every layout as of one process | mochi |" in page and "A miniature" in page
    assert json.loads((tmp_path / "environment.json").read_text())["miniature"]


def verdict_lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(("holds ", "falls short ", "not tested here "))]


def count(marks: Path, name: str) -> dict[str, int]:
    """A figure, and a line in a file for every time it was measured."""
    with marks.open("a") as file:
        file.write(name + "\n")
    return {"figure": 1}


def fails() -> dict[str, int]:
    raise ZeroDivisionError("a kernel that is not there")


def dies() -> dict[str, int]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def dies_once(marks: Path) -> dict[str, int]:
    if "fell" in marks.read_text().split():
        return {"figure": 2}
    count(marks, "fell")
    return dies()


def waits(seconds: float) -> dict[str, int]:
    time.sleep(seconds)
    return {"figure": 3}


def refuses(machine: Machine) -> list[Cell]:
    raise RuntimeError("no such model")


def part(name: str, *cells: Cell, seconds: float = 60) -> Part:
    return Part(name, name, lambda machine: list(cells), seconds)


def run(one: Part, folder: Path, again: bool = False) -> Kept:
    return runner.run(one, HERE, folder, again, lambda line: None)


def test_what_fails_stops_neither_its_part_nor_the_others(tmp_path: Path, capsys) -> None:
    marks = tmp_path / "marks"
    made = [
        part("a", Cell("wrong", fails), Cell("right", partial(count, marks, "a"))),
        Part("b", "b", refuses),
        part("c", Cell("dead", dies)),
        part("d", Cell("left", skip="there is one GPU"), Cell("right", partial(count, marks, "d"))),
    ]
    given = ["--mini", "--models", "mochi", "--output", str(tmp_path / "out")]
    assert program.check(given, lambda machine: made) == 1  # c has not come to its end
    rows = {one.name: Kept.read(tmp_path / "out", one.name).rows for one in made}
    assert rows["a"]["wrong"]["error"] == "ZeroDivisionError: a kernel that is not there"
    assert rows["a"]["right"]["figure"] == 1 and "no such model" in rows["b"]["all"]["error"]
    assert "ended with status -9" in rows["c"]["dead"]["error"] and rows["d"]["left"] == {"skipped": "there is one GPU"}
    assert marks.read_text().split() == ["a", "d"]
    assert "a kernel that is not there" in (tmp_path / "out" / "README.md").read_text()
    assert "ZeroDivisionError" in (tmp_path / "out" / "logs" / "a.log").read_text()
    assert "failed, which is no verdict: wrong of a, all of b, dead of c; " in capsys.readouterr().out
    assert not list((tmp_path / "cache" / "xdit").iterdir()), "scratch folders are left"


def test_a_part_that_was_cut_off_goes_on_and_a_finished_one_is_left_alone(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    one = part(
        "a",
        Cell("1", partial(count, marks, "1")),
        Cell("2", partial(dies_once, marks)),
        Cell("3", partial(count, marks, "3")),
    )
    cut = run(one, tmp_path)
    assert not cut.finished and cut.rows["1"]["figure"] == 1 and "error" in cut.rows["2"] and "3" not in cut.rows
    cut.rows["2"].pop("given_up")
    cut.write(cut.data["state"])
    done = run(one, tmp_path)
    assert done.finished and [row["figure"] for row in done.rows.values()] == [1, 2, 1]
    run(one, tmp_path)
    assert marks.read_text().split() == ["1", "fell", "3"]
    run(one, tmp_path, again=True)
    assert marks.read_text().split() == ["1", "fell", "3", "1", "3"]


def test_a_cell_that_takes_all_the_time_of_its_part_is_given_up(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    one = part("a", Cell("long", partial(waits, 60)), Cell("next", partial(count, marks, "next")), seconds=1)
    first = run(one, tmp_path)
    assert first.rows == {"long": {"error": "cut off after 1 s", "given_up": True}}
    assert run(one, tmp_path).finished and marks.read_text().split() == ["next"]
    # One that had company gets a time of its own first.
    two = part("b", Cell("short", partial(waits, 0.5)), Cell("long", partial(waits, 60)), seconds=2)
    assert run(two, tmp_path).rows.keys() == {"short"} and run(two, tmp_path).rows["long"]["given_up"]


def interrupted(folder: Path, made: list[Part]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program.check(["--mini", "--models", "mochi", "--output", str(folder)], lambda machine: made)


def test_an_interrupted_command_goes_on_where_it_was(tmp_path: Path) -> None:
    marks, out = tmp_path / "marks", tmp_path / "out"
    first = part("a", Cell("1", partial(count, marks, "1")))
    process = multiprocessing.get_context("fork").Process(
        target=interrupted,
        args=(out, [first, part("b", Cell("1", partial(count, marks, "b1")), Cell("2", partial(waits, 600)))]),
    )
    process.start()
    for _ in range(600):
        if Kept.read(out, "b").data.get("running") == "2":
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode not in (None, 0)
    second = part("b", Cell("1", partial(count, marks, "b1")), Cell("2", partial(count, marks, "b2")))
    given = ["--mini", "--models", "mochi", "--output", str(out)]
    assert program.check(given, lambda machine: [first, second]) == 0
    assert marks.read_text().split() == ["1", "b1", "b2"]


def test_every_line_of_what_only_a_gpu_can_show_has_a_claim() -> None:
    lines = (ROOT / "docs" / "cuda-to-check.md").read_text().splitlines()
    listed = {line.split("|")[1].strip() for line in lines if line.startswith("|")} - {"what", "---"}
    assert {claim.row for claim in claims.CLAIMS if claim.row} == listed
    named = {one.name for one in parts.all_parts(CARD)}
    for claim in claims.CLAIMS:
        assert bool(claim.manual) != bool(claim.part and claim.value), claim.what
        assert claim.manual or any(name.startswith(claim.part) for name in named), claim.what


def test_verdicts_say_what_holds_what_falls_short_by_how_much_and_what_was_not_tested() -> None:
    step = {
        "rate": {"matmul_tflops": 700.0},
        "bf16 compiled": {"tflops": 525.0, "step_s": 1.3},
        "fp8 compiled": {"step_s": 1.2},
        "block": {"error": "RankError: rank 0: OutOfMemoryError"},
        "ring 2, auto": {"skipped": "there is one GPU"},
    }
    results = {"step-mochi": step, "peers-mochi": {"sides": {"seconds": {"ours": 1.0, "diffusers": 1.25}}}}
    found = {(one.claim.what, one.subject): one for one in claims.verdicts(CARD, results)}
    share = found["share of the bf16 matmul rate, compiled", "mochi"]
    assert share.said == "holds" and share.figure == "75 %, at least 70 %"
    fp8 = found["fp8 against bf16, compiled", "mochi"]
    assert fp8.said == "falls short" and fp8.figure.endswith("off by 0.217 x")
    assert found["eager against diffusers eager", "mochi"].said == "holds"
    untested = found["sampling by block offload, GiB", "mochi"]
    assert untested.said == "not tested here" and "OutOfMemoryError" in untested.figure
    ring = found["cuDNN's kernel in a ring faster than flash attention", "mochi"]
    assert "there is one GPU" in ring.figure or "was not reached" in ring.figure
    assert found["tests that need a GPU that fail", ""].figure == "its part did not run"
    of_cpu = {one.said for one in claims.verdicts(HERE, results) if not one.claim.cpu}
    assert of_cpu == {"not tested here"}


@pytest.mark.parametrize("model", models(), ids=lambda model: model.name)
def test_models_are_shortened_in_configuration_and_costs(model) -> None:
    small = checkpoints.reduced(model, 6)
    assert small.stacks[0].layers == 6 and 6 in vars(small.config).values()
    flops = parts.counts.ours(small, model.default_size, parts.Layout())[0][0]
    whole = parts.counts.ours(model, model.default_size, parts.Layout())[0][0]
    assert flops / whole == pytest.approx(6 / model.stacks[0].layers, rel=0.2)


def test_files_are_filled_with_numbers(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "_POOL", 1000)
    file = tmp_path / "x.safetensors"
    kinds = {"a": torch.bfloat16, "b": torch.float32, "c": torch.float16}
    save_file({f"{n}.weight": torch.zeros(96, 64, dtype=kind) for n, kind in kinds.items()} | {
        "a.bias": torch.ones(3000), "norm.weight": torch.zeros(5, dtype=torch.bfloat16)
    }, file)  # fmt: skip
    checkpoints.fill(file)
    found = load_file(file)
    for name in kinds:
        weight = found[f"{name}.weight"].float()
        assert weight.std().item() == pytest.approx(1 / 8, rel=0.1) and weight[-1].abs().min() > 0
    assert not found["a.bias"].any() and (found["norm.weight"] == 1).all()


def test_plans_are_read_as_printed() -> None:
    line = "rank 0      text 1.0 GiB + 36.0 MiB, sampling 1.0 GiB + 1.5 GiB, decode 0.7 GiB + 10.2 GiB; decode exact"
    found = measures.read_plan(f"compute\n{line}\n")
    assert found["sampling_work_gib"] == pytest.approx(1.5)
    assert found["text_work_gib"] == pytest.approx(36 / 2**10)
    with pytest.raises(ValueError, match="no plan: error: no GPU"):
        measures.read_plan("error: no GPU")


def test_wrong_use_is_told(tmp_path: Path, capsys) -> None:
    assert program.check(["--models", "no-such"]) == 2 and "no-such" in capsys.readouterr().err
    assert (
        program.check(["--mini", "--parts", "no-such"]) == 2 and "there is no part no-such" in capsys.readouterr().err
    )
    with pytest.raises(UsageError, match="runs from a checkout"):
        doctor.gpu_check(True, tmp_path)


def test_a_machine_names_its_folder_and_its_layouts(monkeypatch, tmp_path: Path) -> None:
    assert CARD.slug == "h100-80gb-hbm3-x2" and re.fullmatch("[a-z0-9-]+", CARD.slug)
    assert len(CARD.layouts(get_model("mochi"), CARD.size(get_model("mochi")))) == 3
    monkeypatch.setattr(program, "ROOT", tmp_path)
    old = tmp_path / "benchmarks" / "results" / "h100-80gb-hbm3-x2-2025-01-31"
    old.mkdir(parents=True)
    one = part("a")
    assert program.folder_of(CARD, [one], False) == old
    Kept.read(old, "a").write("finished")
    assert program.folder_of(CARD, [one], False) != old and program.folder_of(CARD, [one], True) == old
