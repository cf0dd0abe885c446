"""Fixtures of every test file, and what holds while any test runs."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest
import torch

from tests.helpers.hub import Hub
from tests.helpers.ranks import RankPool

torch.set_num_threads(1)
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


def pytest_collection_finish() -> None:
    """What the imports left is never garbage: not looked through again each time that a stage is dropped."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
