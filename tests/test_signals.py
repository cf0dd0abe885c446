"""A few of the moments at which tests/soak/signals.py stops a run, and what torchrun's ranks make of a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from common.run.children import free_port
from common.system.stopping import Stopped, stoppable
from mochi_xdit.fork import FORK
from tests.helpers import programs
from tests.soak.signals import GRACE_SECONDS, LONGEST_SECONDS, ROOT, Moment, _files, try_moment


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


def test_a_signal_waits_for_an_import_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's C++ part ends the process when what it imports raises."""
    (tmp_path / "cut_short.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGHUP)\nwhole = True")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Stopped), stoppable() as signals:
        import cut_short

        time.sleep(10)
    assert cut_short.whole and signals.number == signal.SIGHUP


def test_a_signal_that_waits_is_not_lost_where_its_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cut_last.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGHUP)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Stopped), stoppable() as outer:
        with stoppable() as inner:
            import cut_last  # noqa: F401
        time.sleep(10)
    assert (inner.number, outer.number) == (None, signal.SIGHUP)


def test_what_is_left_behind_is_seen(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "x").touch()
    (tmp_path / ".v.partial.mp4").touch()
    assert len(_files(tmp_path, 143)) == 2 and "ended well with" in _files(tmp_path, 0)[-1]


FAKE = str(ROOT / "tests" / "fake_fork" / "cli.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
SIZE = ("--width", "32", "--height", "32", "--num-frames", "7", "--num-steps", "250", "--seed", "3")
VIDEO = ("-m", "mochi_xdit", "--demo", "--device", "cpu", *SIZE, "--output", "x.mp4")


def begin(folder: Path, *command: str, **more: str) -> subprocess.Popen[str]:
    """A process group of its own, as a terminal gives one to what is typed."""
    given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | given, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def eventually(look: Callable[[], bool]) -> None:
    end = time.monotonic() + LONGEST_SECONDS
    while not look():
        assert time.monotonic() < end
        time.sleep(0.02)


def ranks_of(agent: int) -> list[int]:
    return [child.pid for child in psutil.Process(agent).children() if "RANK" in child.environ()]


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["torchrun ends", "ctrl-c", pytest.param("ranks end", marks=pytest.mark.long)])
def test_torchruns_rank_0_tells_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], ask: str
) -> None:
    agent = begin(tmp_path, *TORCHRUN, *VIDEO, "--save-every", "0.01")
    state = tmp_path / "x.state.safetensors"
    eventually(lambda: state.exists() or agent.poll() is not None)
    if ask == "torchrun ends":
        agent.terminate()
    elif ask == "ctrl-c":
        os.killpg(agent.pid, signal.SIGINT)
    else:
        for rank in ranks_of(agent.pid):
            os.kill(rank, signal.SIGTERM)
    told = agent.communicate(timeout=LONGEST_SECONDS)[1]
    line = re.compile(r"interrupted; step (\d+) is kept: the same command goes on from it, or --resume x\.state\.safet")
    (said,) = [line.match(text) for text in told.splitlines() if text.startswith(("interrupted", "error:"))]
    assert agent.returncode != 0 and said and 0 < int(said[1]) < 250
    assert [path.name for path in tmp_path.iterdir()] == [state.name]
    monkeypatch.chdir(tmp_path)
    assert programs.main(FORK, [*VIDEO[2:], "--gpus", "1"]) == 0
    assert f"step {said[1]} of 250 is done" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.mp4"]


@pytest.mark.slow
def test_a_signal_is_heard_in_a_collective_that_hangs(tmp_path: Path) -> None:
    """Rank 1 has stopped without a word; rank 0 waits for it where no Python runs."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = ("--demo", "--device", "cpu", "--fault", "stop@1", "--output", "x.mp4")
    ranks = [begin(tmp_path, sys.executable, FAKE, *arguments, **world, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    try:
        eventually(lambda: psutil.Process(ranks[1].pid).status() == psutil.STATUS_STOPPED)
        time.sleep(1)
        ranks[0].terminate()
        told = ranks[0].communicate(timeout=GRACE_SECONDS + 20)[1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == 128 + signal.SIGTERM
    assert [text for text in told.splitlines() if text.startswith(("interrupted", "error:"))] == ["interrupted"]
    assert list(tmp_path.iterdir()) == []
