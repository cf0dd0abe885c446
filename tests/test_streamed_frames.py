"""Frames go to the output as they are decoded: never all in memory, and nothing by halves whatever ends it."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.parallel.mesh import Layout, Mesh, distributed
from common.registry.request import beside
from common.registry.settings import DecodeOptions
from common.run.command_line import parse
from common.run.outputs import Output
from common.system.files import WriteError
from common.system.progress import Report
from common.system.stopping import Abandoned, Stopped
from common.video import writers
from common.video.decode_video import AllFrames, decode_video
from mochi_xdit.fork import FORK
from tests.helpers.decoders import DECODERS, small_decoder, some_latents

LATENTS = 7


class Counted(AllFrames):
    """Keeps the frames, and how many of the pieces that came are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.pieces = self.most = 0

    def add(self, frames: Tensor) -> None:
        super().add(frames)
        self.alive.add(frames.untyped_storage())
        self.pieces += 1
        self.most = max(self.most, len(self.alive))


def decoded(name: str, layout: Layout) -> tuple[Tensor | None, int, int, int]:
    """The frames, how many were announced, the pieces that they came in and how many of those were alive at once."""
    kept, mesh = Counted(), Mesh() if layout.ranks == 1 else distributed(layout)
    decoder, latents = small_decoder(name, torch.float32), some_latents(name, LATENTS, 4, 4, torch.float32)
    smallest = DecodeOptions(vae="exact", vae_chunk=decoder.chunk_choices[-1])
    decode_video(decoder, latents, mesh, smallest, Report(), kept)
    return kept.frames, kept.count, kept.pieces, kept.most


@pytest.mark.parametrize("name", DECODERS)
def test_as_many_frames_as_were_announced_a_chunk_at_a_time(name: str) -> None:
    frames, count, pieces, most = decoded(name, Layout())
    decoder = small_decoder(name)
    chunks = decoder.chunks(LATENTS, decoder.chunk_choices[-1])
    assert frames is not None and len(frames) == count and pieces == len(chunks) > 2
    assert most <= 2  # the one that is given, and the next


def test_ranks_send_theirs_a_round_at_a_time(run_ranks) -> None:
    alone, *_ = decoded("wan 2.1", Layout())
    assert alone is not None
    (frames, count, pieces, most), *others = run_ranks(3, decoded, "wan 2.1", Layout(ulysses=3))
    assert (frames.int() - alone.int()).abs().max() <= 1 and len(frames) == count
    assert pieces == LATENTS and most <= 4
    assert [other[0] for other in others] == [None, None]


# --- The output -------------------------------------------------------------------------------------------------------


def output(path: Path) -> Output:
    """Of a video whose latents are there."""
    request = parse(FORK, ["--demo", "--device", "cpu", "--prompt", "x", "--overwrite", "--output", str(path)])
    made = Output(request.videos[0], request, Mesh(), Report())
    made.video.latents_file.write_bytes(b"latents")
    return made


def piece(value: int) -> Tensor:
    return torch.full((2, 16, 16, 3), value, dtype=torch.uint8)


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("name", ["x.mp4", "x.npy", "x"])
@pytest.mark.parametrize("ending", [Stopped(2), Abandoned(), FloatingPointError("NaN")], ids=lambda e: type(e).__name__)
def test_a_decode_that_ends_early_replaces_nothing_and_keeps_the_latents(tmp_path, name, ending) -> None:
    with output(tmp_path / name).opened() as file:
        file.begin(2, 16, 16)
        file.add(piece(1))
    beside(tmp_path / name, name == "x", ".json").write_text("earlier")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(type(ending)), output(tmp_path / name).opened() as file:
        file.begin(4, 16, 16)
        file.add(piece(2))
        raise ending
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert after.pop(beside(tmp_path / name, name == "x", ".latents.safetensors")) and after == before


def test_a_smaller_plan_begins_the_output_anew(tmp_path) -> None:
    with output(tmp_path / "x.npy").opened() as file:
        file.begin(4, 16, 16)
        file.add(piece(1))
        file.begin(4, 16, 16)
        file.add(piece(2))
        file.add(piece(3))
    frames = np.load(tmp_path / "x.npy")
    assert frames[:, 0, 0, 0].tolist() == [2, 2, 3, 3] and left(tmp_path) == ["x.npy", "x.npy.json"]


def test_a_full_disk_is_told_when_no_rank_waits_any_more(tmp_path, monkeypatch) -> None:
    def full(self, picture) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writers.ArrayFile, "_write", full)
    given = []
    with pytest.raises(WriteError, match="No space left"), output(tmp_path / "x.npy").opened() as file:
        file.alone = False
        file.begin(4, 16, 16)
        for value in (1, 2):
            file.add(piece(value))
            given.append(value)
    assert given == [1, 2] and left(tmp_path) == ["x.npy.latents.safetensors"]
    given.clear()
    with pytest.raises(WriteError, match="No space left"), output(tmp_path / "x.npy").opened() as file:
        file.begin(4, 16, 16)
        file.add(piece(1))
        given.append(1)
    assert given == [] and left(tmp_path) == ["x.npy.latents.safetensors"]
