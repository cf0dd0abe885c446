"""The lab of links: ranks in network namespaces, where they can be made, and what its tables are counted from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import links, namespaces

ROOT = Path(__file__).resolve().parents[1]
PROBLEM = namespaces.problem()
SMALL = ["--heads", "3", "--depth", "1", "--tokens", "96", "--rounds", "1", "--mbit", "0", "8"]


def left_behind() -> set[str]:
    found = subprocess.run("ip netns; ip -o link", shell=True, capture_output=True, text=True, check=True).stdout
    return {word.strip(":") for word in found.split() if word.startswith(("rank", "br"))}


@pytest.mark.slow
@pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
@pytest.mark.parametrize("model", ["cogvideox-5b", pytest.param("wan2.1-t2v-1.3b", marks=pytest.mark.long)])
def test_a_step_over_a_limited_link_takes_as_long_as_its_bytes(model: str, tmp_path: Path) -> None:
    before, output = left_behind(), tmp_path / "links.json"
    command = [sys.executable, "benchmarks/links.py", "--model", model, "--sides", "ours", "one", *SMALL]
    ran = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("ours 1x2x1") == 2 and "exposed" in ran.stdout
    rows = json.loads(output.read_text())["rows"]
    free, slow = rows["0.0"], rows["8.0"]
    assert set(slow) == {"ours 1x1x2", "ours 1x2x1", "ours 2x1x1", "one"}
    for name in ("ours 1x1x2", "ours 1x2x1"):
        row = slow[name]
        sent_late = row["sent"] - namespaces.LEAST_BURST  # what a full bucket lets through is not held up
        assert row["step_s"] > sent_late * 8 / 8e6 > 0.05, row
        assert row["link_s"] == pytest.approx(row["sent"] * 8 / 8e6) and free[name]["link_s"] == 0
        # The rest of what is sent are headers and the round's barrier.
        assert row["sent"] < 1.5 * free[name]["sent"]
    assert slow["one"]["sent"] < 20_000 < slow["ours 1x2x1"]["sent"]
    assert left_behind() == before


@pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
def test_when_a_rank_fails_the_others_are_ended_and_nothing_is_left(tmp_path: Path) -> None:
    before = left_behind()
    with namespaces.Network(3) as network:
        assert network.run(["sh", "-c", "test $RANK != 1 && sleep 600 || exit 7"], {}) == 7
    assert all(process.returncode is not None for process in network.processes) and left_behind() == before


def test_exposed_is_what_exceeds_the_longer_of_work_and_link() -> None:
    hidden = links.row(links.Turn(step=2.0, work=2.0, sent=1e8), 800)
    assert (hidden["link_s"], hidden["exposed_share"], hidden["over_floor"]) == (1.0, 0.0, 1.0)
    assert hidden["even_mbit"] == 400
    waited = links.row(links.Turn(step=5.0, work=1.0, sent=1e8), 200)
    assert (waited["link_s"], waited["exposed_s"], waited["exposed_share"]) == (4.0, 1.0, 0.2)
    assert links.row(links.Turn(step=1.5, work=1.0, sent=1e8), 0)["exposed_s"] == 0.5


def test_without_namespaces_it_is_skipped_with_a_word(monkeypatch, capsys) -> None:
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["links.py"])
    links.main()
    said = capsys.readouterr().out
    assert said.startswith("skipped: ") and len(said.splitlines()) == 1
