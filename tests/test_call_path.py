"""The way from a command to a block and to a convolution of the decoder, as docs/parallel.md tells it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import nn

from common.registry.forks import Fork, forks
from common.video.causal import CausalConv3d
from common.weights.blocks import Blocks

ROOT = Path(__file__).resolve().parents[1]
FORKS = [fork for fork in forks() if fork.demos]


def way() -> list[str]:
    """The project's files on the stack, outermost first, each as often as it is entered from another."""
    frame, files = sys._getframe(1), []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv"):
            files.append(str(path.relative_to(ROOT)))
        frame = frame.f_back
    return [name for name, _ in groupby(reversed(files))]


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, list[str]]]]:
    """Runs a fork's demo on one rank: the ways to its first block and to its first convolution in the decoder."""
    monkeypatch = pytest.MonkeyPatch()

    @cache
    def of(name: str) -> dict[str, list[str]]:
        fork = next(fork for fork in FORKS if fork.name == name)
        found: dict[str, list[str]] = {}
        blocks: set[nn.Module] = set()

        def entered(module: nn.Module, _: object) -> None:
            if any(parameter.is_meta for parameter in module.parameters()):
                return  # the estimate's, which runs one step without data
            blocks.update(b for part in module.children() if isinstance(part, Blocks) for b in part.children())
            if module in blocks and hasattr(module, "regions"):  # the text encoder's have none
                found.setdefault("block", way())
            if "convolution" in found or not isinstance(module, CausalConv3d):
                return
            if "common/video/decode.py" in (files := way()):
                found["convolution"] = files

        monkeypatch.chdir(tmp_path_factory.mktemp(fork.name))
        line = ["--demo", "--gpus", "1", "--device", "cpu", "--num-steps", "1", "--output", "x.mp4"]
        monkeypatch.setattr(sys, "argv", [fork.program, *line])
        hook = torch.nn.modules.module.register_module_forward_pre_hook(entered)
        try:
            with pytest.raises(SystemExit) as left:
                fork.module("cli").main()
        finally:
            hook.remove()
        assert left.value.code == 0
        return found

    yield of
    monkeypatch.undo()


@pytest.mark.parametrize("fork", FORKS, ids=lambda fork: fork.name)
def test_no_file_is_entered_twice_on_the_way_down(ways, fork: Fork) -> None:
    for name, files in ways(fork.name).items():
        assert len(files) == len(set(files)), f"{name}: {' -> '.join(files)}"


def test_the_page_tells_the_way(ways) -> None:
    page = (ROOT / "docs" / "parallel.md").read_text()
    told = [re.findall(r"`([a-z_]+/[\w/]+\.py)`", line) for line in page.splitlines() if line.startswith("| `")]
    found = ways(FORKS[0].name)
    sampling, decoding = found["block"], found["convolution"]
    assert [files[0] for files in told] == [*sampling, *decoding[decoding.index("common/run/pipeline.py") :]]
    assert len(sampling) - 1 == 6 and len(decoding) - 1 - decoding.index("mochi_xdit/generate.py") == 4
