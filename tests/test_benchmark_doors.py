"""The benchmarks' command lines: wrong numbers end with status 2 at once, and nothing tracked is written unasked."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import calibrate, memory, performance, plots, run
from common.system import environment
from tests.test_docs import PAGES, ROOT

ZERO = "is not a whole number from 1"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "visible_gpus", lambda: 0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("program", "line", "told"),
    [
        ("step", "--model mochi --heads 2", "give a multiple of 3"),
        ("step", "--model sora", "cogvideox-5b"),
        ("step", "--heads 0", ZERO),
        ("step", "--tokens 100 -5", ZERO),
        ("step", "--tokens 1e3", ZERO),
        ("step", "--depth 99999999999999999999", ZERO),
        ("step", "--rounds 0", ZERO),
        ("step", "--words 300", "from 0 to 256"),
        ("step", "--cfg 3", "choose from 1, 2"),
        ("step", "--ranks 0", ZERO),
        ("step", "--ranks 2 --ring 3", "does not divide"),
        ("step", "--ranks 24 --heads 12", "24 ulysses ranks are more than --heads 12"),
        ("step", "--model cogvideox-5b-i2v", "text to video models only"),
        ("step", "--device cuda", "1 GPUs are wanted and 0 are visible"),
        ("step", "--sides ours ours", "twice"),
        ("step", "--output no/such/folder/step.json", "no/such/folder"),
        ("decode", "--frames 50", "6k+1; nearest: 49 or 55"),
        ("decode", "--height 95", "nearest: 80 or 96"),
        ("decode", "--width 0", ZERO),
        ("decode", "--ranks 1 0", ZERO),
        ("decode", "--chunk 0", ZERO),
        ("decode", "--repeat 0", ZERO),
        ("decode", "--threads 0", ZERO),
        ("decode", "--narrow 0", ZERO),
        ("decode", "--device cuda --ranks 1 2", "2 GPUs are wanted"),
        ("serving", "--jobs 0", ZERO),
        ("serving", "--model sora", "mochi-demo"),
        ("overlap", "--tokens 0", ZERO),
        ("overlap", "--groups 0", ZERO),
        ("overlap", "--ring 2", "do not divide by --ring 2"),
        ("overlap", "--rounds 0", ZERO),
        ("links", "--ranks 1", "is not a whole number from 2"),
        ("links", "--layouts 1x2", "is not cfg x ring x ulysses"),
        ("links", "--layouts 3x1x1", "only 1 or 2 is possible"),
        ("links", "--layouts 1x1x3", "for 3 ranks, --ranks is 2"),
        ("links", "--heads 3 --ranks 4 --layouts 1x1x4", "4 ulysses ranks are more than --heads 3"),
        ("links", "--mbit -1", "is not a number above 0"),
        ("links", "--mbit nan", "is not a number above 0"),
        ("links", "--model mochi --heads 2", "give a multiple of 3"),
        ("placement", "--depth 0", ZERO),
        ("placement", "--json /", "argument --json"),
        ("load_memory", "--gigabytes 0", "is not a number above 0"),
        ("load_memory", "--gigabytes nan", "is not a number above 0"),
        ("load_memory", "--ranks -1", ZERO),
        ("counts", "--model mochi sora", "cogvideox-5b"),
        ("counts", "--ranks 0", ZERO),
        ("counts", "--ranks 9999999", ZERO),
    ],
)
def test_wrong_numbers_end_at_the_door(program: str, line: str, told: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *shlex.split(line)])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{program}").main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and told in said, said
    assert all(line.startswith("error: ") for line in said.splitlines()), said


@pytest.mark.parametrize(
    ("command", "line", "told"),
    [
        (run.command, "--width 0", "--width"),
        (run.command, "--num-steps -1", "--num-steps"),
        (run.command, "--gpus 0", "--gpus"),
        (run.command, "--gpus 99999999", "--gpus"),
        (run.command, "--demo --model mochi --width 50", "multiple of 16"),
        (run.command, "--table mochi-l40-sampling", "nothing would be comparable; name weights with --model-dir"),
        (run.command, "--attention fastest", "--attention"),
        (run.command, "--attention flash2 --demo", "needs an NVIDIA GPU"),
        (run.command, "--output bench.csv", "must end in .json"),
        (run.command, "--output no/such/bench.json", "no/such"),
        (run.command, "--model sora", "cogvideox-5b"),
        (memory.main, "--model sora", "cogvideox-5b"),
        (memory.main, "--gpus 0", "--gpus"),
        (calibrate.main, "--write no/such/hardware.json", "no/such"),
        (calibrate.main, "--report /", "--report"),
        (performance.main, "--output no/such/page.md", "no/such"),
    ],
)
def test_wrong_numbers_end_at_the_click_doors(command, line: str, told: str) -> None:
    result = CliRunner().invoke(command, shlex.split(line))
    assert result.exit_code == 2 and told in result.output, (result.output, result.exception)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"stages_s": {"sampling": -4}}, "-4 seconds"),
        ({"key": {"num_frames": 0}}, "impossible size"),
        ({"key": {"width": 0}}, "impossible size"),
        ({"key": {"ring": 0}}, "ring degree is 0"),
        ({"stages_s": {"sampling": "fast"}}, "no results file"),
    ],
)
def test_wrong_results_make_no_profile(wrong: dict, told: str, tmp_path: Path) -> None:
    key = {"model": "mochi", "program": "ours", "cfg": 1, "ring": 1, "ulysses": 1, "guided": True}
    key |= {"width": 848, "height": 480, "num_frames": 49, "num_steps": 64} | wrong.get("key", {})
    row = {"key": key, "stages_s": wrong.get("stages_s", {"sampling": 400.0})}
    (tmp_path / "results.json").write_text(json.dumps({"rows": [row]}))
    line = ["--measured", "results.json", "--gpu", "l40", "--output", "mine.json"]
    result = CliRunner().invoke(calibrate.main, line)
    assert result.exit_code == 2 and told in result.output, (result.output, result.exception)


def test_a_page_of_wrong_results_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "run-x.json").write_text('{"rows": 3}')
    result = CliRunner().invoke(performance.main, ["--results", "run-x.json"])
    assert result.exit_code == 2 and "no results file" in result.output


def test_a_run_without_weights_says_that_nothing_is_comparable(monkeypatch, tmp_path: Path) -> None:
    row = {"total_s": 1.0, "spread_s": 0.1, "stages_s": {"sampling": 1.0}, "peak_gib": {}, "repeats": 1}
    monkeypatch.setattr(run, "measure", lambda job: row)
    result = CliRunner().invoke(run.command, ["--layouts", "1x1x1"])
    assert result.exit_code == 0, result.output
    assert result.output.count("comparable with no published row") == 2  # before and under the table


def test_the_page_is_printed_unless_a_file_is_named() -> None:
    result = CliRunner().invoke(performance.main, [])
    assert result.exit_code == 0 and result.stdout == performance.PAGE.read_text(encoding="utf-8")


def test_figures_and_results_go_where_nothing_is_tracked() -> None:
    (folder,) = (option.default for option in plots.main.params if option.name == "output")
    assert str(folder).startswith("outputs/") and str(run.RESULTS).startswith("outputs/")
    assert "/outputs/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no checkout")
def test_no_documented_benchmark_writes_over_a_tracked_file() -> None:
    """But those that make a page of the repository, and say so."""
    tracked = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines())
    sources = [*PAGES, *(ROOT / "benchmarks").rglob("*.py")]
    found = 0
    for source in sources:
        text = source.read_text(encoding="utf-8").replace("\\\n", " ")
        for script, rest in re.findall(r"(benchmarks/\w+\.py)([^\n`]*)", text):
            for option, target in re.findall(r"(--output|--json|--write|--report)[ =](\S+)", rest):
                found += 1
                makes = script.rsplit("/", 1)[1] in ("performance.py", "plots.py", "calibrate.py")
                assert makes or target not in tracked, f"{source.name}: {script} {option} {target}"
    assert found > 4
