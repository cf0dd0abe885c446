"""Report: where a rank is, what it cost, and what the user sees."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from common.system import progress
from common.system.progress import Report


def test_where_follows_the_steps_and_is_reported():
    told: list[str] = []
    stages = Report(tell=told.append)
    with stages.stage("loading transformer"):
        assert stages.where == "loading transformer"
    assert stages.where == "after loading transformer"
    with stages.stage("sampling", total=2) as step:
        for i in range(2):
            assert stages.where == f"sampling step {i + 1}/2"
            step()
    assert told[:2] == ["loading transformer", "after loading transformer"]
    assert told[2:] == ["sampling step 1/2", "sampling step 2/2", "after sampling"]


def test_loading_counts_bytes():
    told: list[str] = []
    screen = io.StringIO()
    stages = Report(Console(file=screen, width=80, force_terminal=True), tell=told.append)
    with stages.loading("loading decoder") as progress:
        for done in range(0, 2001, 5):
            progress(done << 20, 2000 << 20)
        time.sleep(0.4)  # the bar is drawn four times a second
    assert told[0] == "loading decoder" and told[-2:] == ["loading decoder, 100 %", "after loading decoder"]
    assert 50 < len(told) < 110
    assert "2.0 of 2.0 GiB, " in screen.getvalue() and stages.records[0].steps is None


def test_a_failure_is_told_with_the_innermost_stage():
    stages = Report()
    with pytest.raises(KeyError), stages.stage("decoding", total=4, unit="chunk") as step:
        step(2)
        with stages.stage("loading decoder"):
            raise KeyError
    assert stages.where == "loading decoder" and stages.records == []
    stages.about = "video 2 of 3"
    with stages.stage("decoding", total=4, unit="chunk") as step:
        step(2)
        assert stages.where == "video 2 of 3, decoding chunk 3/4"


def test_records_hold_seconds_steps_and_peaks():
    stages = Report()
    with stages.stage("outer"):
        with stages.stage("inner", total=3) as step:
            held = bytearray(64 << 20)
            held[::4096] = b"x" * len(held[::4096])
            del held
            step(3)
        time.sleep(0.02)
    with stages.stage("hidden", quiet=True):
        pass
    inner, outer = stages.records
    assert (inner.name, inner.steps, outer.name, outer.steps) == ("inner", 3, "outer", None)
    assert outer.seconds >= inner.seconds + 0.02
    assert outer.peak_bytes >= inner.peak_bytes >= 64 << 20
    assert "steps" not in outer.as_dict() and inner.as_dict()["steps"] == 3


def test_plain_lines_without_a_terminal(monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    screen = io.StringIO()
    stages = Report(Console(file=screen, width=40))
    with stages.stage("sampling", total=2) as step:
        step()
        stages.warn("a [strange] prompt")
        stages.warn("a [strange] prompt")  # what was said before the work is found again where it comes true
        step()
    with stages.stage("hidden", quiet=True):
        pass
    stages.note("a line that is much longer than the forty columns of this console")
    lines = screen.getvalue().splitlines()
    assert lines[0] == "sampling ..." and lines[1].startswith("sampling 1/2, ") and lines[1].endswith(" left")
    assert lines[2] == "warning: a [strange] prompt"
    assert lines[4].startswith("sampling: ") and "s/step), peak" in lines[4]
    assert lines[5].endswith("of this console") and len(lines) == 6


def test_bars_on_a_terminal():
    screen = io.StringIO()
    stages = Report(Console(file=screen, width=80, force_terminal=True))
    with pytest.raises(ValueError), stages.stage("decoding", total=3, unit="chunk") as step:
        step()
        step()
        stages.note("in between")
        raise ValueError
    with stages.stage("writing"):
        pass
    shown = screen.getvalue()
    assert "2/3" in shown and "s/chunk" in shown and "in between" in shown and "writing: " in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 2  # the cursor comes back
