"""Fixtures of every test file, and what holds while any test runs."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.hub import Hub
from tests.helpers.ranks import RankPool

torch.set_num_threads(1)
# For the programs that are started: the bytecode of our sources, once written, is not made again by each of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# They begin first, so that the last ones of all are short and no core waits long for the other.
LONGEST = ("rehearsal", "estimate", "workers", "compile", "faults", "gpu_check", "serve_cli", "outside_fork", "bench")
LONGEST += ("replicas", "ray_group", "launch", "output_files", "serve_api", "cogvideox_cli", "planner_counts")
# A runner in the background ignores these for all it starts, and the programs honour that: not where they are tested.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(scope="session", autouse=True)
def no_profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nobody's own hardware profiles decide layouts here, or are written over; programs that are started inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """What imports and the files before have left is never garbage: not looked through each time that a stage is
    dropped. Of each file, since the rehearsal thaws it all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


Serve = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Serve:
    """xdit-serve in this process and in `tmp_path`, with these variables: for what ends before anything is started."""
    from xdit_serve.cli import main

    def served(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        status = main(arguments)
        told = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, status, told.out, told.err)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDIT_API_KEY", raising=False)
    return served


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
