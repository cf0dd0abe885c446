"""A few of the moments at which tests/soak/signals.py stops a run; it tries any number of them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.soak.signals import Moment, _files, try_moment


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        Moment(signal.SIGINT, 0.6, 1),
        Moment(signal.SIGTERM, 4.0, 3),
        Moment(signal.SIGHUP, 6.0, 1),
        Moment(signal.SIGPIPE, 2.0, 1),
    ],
    ids=str,
)
def test_a_signal_leaves_nothing_behind(tmp_path: Path, moment: Moment) -> None:
    assert try_moment(moment, tmp_path)[1] == []


def test_what_is_left_behind_is_seen(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "x").touch()
    (tmp_path / ".v.partial.mp4").touch()
    assert len(_files(tmp_path, 143)) == 2 and "ended well with" in _files(tmp_path, 0)[-1]
