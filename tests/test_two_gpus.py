"""NCCL itself, on two GPUs: every kind of stage, each under its own time limit, since what goes wrong there hangs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideox_xdit import CogVideoXPipeline
from common.parallel.mesh import distributed
from common.parallel.self_test import self_test
from common.registry.layout import Layout
from common.registry.settings import CompileOptions
from tests.helpers.cogvideox import clip, write_checkpoint
from tests.helpers.ranks import RankPool, needs_gpus

pytestmark = [pytest.mark.gpu, needs_gpus(2)]
LAYOUTS = [Layout(ring=2), Layout(ulysses=2), Layout(cfg=2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_checkpoint(tmp_path_factory.mktemp("gpus"), kind) for kind in ("2b", "1.5-i2v")}


def generate(layout: Layout, folder: Path, options: dict[str, Any], how: dict[str, Any]) -> list[Tensor | None]:
    """Two videos in one process, which make no groups of their own. fp32, so that layouts can be compared."""
    with distributed(layout, "cuda", timeout=60) as mesh:
        self_test(mesh, 60, lambda error: None)
        pipe = CogVideoXPipeline.from_pretrained(folder, mesh=mesh, dtype="fp32", **how)
        videos = [pipe("a boat", num_steps=3, seed=seed, **options) for seed in (1, 2)]
        return [None if video is None else video.cpu() for video in videos]


TEXT = {"height": 48, "width": 32, "num_frames": 17}
IMAGE = {"height": 64, "width": 96, "num_frames": 9, "image": clip(1, 64, 96)[0]}
VIDEO = TEXT | {"video": clip(17)}
DECODE = {"vae": "exact", "vae_chunk": 1}


def compare(run_ranks: RankPool, layout: Layout, folder: Path, options: dict[str, Any], **how: Any) -> None:
    """The frames of two GPUs against those of one, within one level."""
    alone = run_ranks(1, generate, Layout(), folder, options, {}, seconds=120)[0]
    both = run_ranks(2, generate, layout, folder, options, how, seconds=240 if how else 120)[0]
    for one, two in zip(alone, both):
        assert one.shape == two.shape and (one.int() - two.int()).abs().max() <= 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_video_from_text(run_ranks, folders, layout):
    compare(run_ranks, layout, folders["2b"], TEXT)


def test_a_video_from_an_image(run_ranks, folders):
    compare(run_ranks, Layout(ring=2), folders["1.5-i2v"], IMAGE)


def test_a_video_is_encoded_and_decoded_in_many_chunks(run_ranks, folders):
    compare(run_ranks, Layout(ulysses=2), folders["2b"], VIDEO | DECODE)


def test_shared_weights(run_ranks, folders):
    compare(run_ranks, Layout(ulysses=2), folders["2b"], TEXT, shard_weights=True)


def test_compiled_blocks_over_a_ring(run_ranks, folders):
    compare(run_ranks, Layout(ring=2), folders["2b"], TEXT, compiling=CompileOptions(compile=True))


def failing(folder: Path) -> float:
    """Seconds from an error in rank 1's decoder, in the middle of a decode, to the caller."""
    with pytest.raises(ZeroDivisionError), distributed(Layout(ring=2), "cuda", timeout=20) as mesh:
        pipe = CogVideoXPipeline.from_pretrained(folder, mesh=mesh, dtype="fp32")
        load, broke = pipe.load_decoder, [0.0]

        def breaks(*_: Any) -> None:
            broke[0] = time.monotonic()
            raise ZeroDivisionError

        def spoiled() -> torch.nn.Module:
            model = load()
            model.register_forward_hook(breaks)
            return model

        if mesh.world.rank == 1:
            pipe.load_decoder = spoiled
        pipe("a boat", num_steps=2, seed=1, **TEXT, **DECODE)
    return time.monotonic() - broke[0]


def failing_or_late(folder: Path) -> float | str:
    """Rank 0's peers end with the time limit, or with NCCL's own report; rank 1 with its error."""
    try:
        return failing(folder)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def test_an_error_in_the_middle_of_a_decode_is_told_at_once(folders):
    """In a pool of its own: rank 0 is left waiting, and NCCL's watchdog may end its process."""
    pool = RankPool()
    try:
        pipe = pool.start(2, failing_or_late, folders["2b"])[1]
        assert pipe.poll(120), "rank 1 did not come back"
        ok, seconds = pipe.recv()
        assert ok and isinstance(seconds, float) and seconds < 10, seconds
    finally:
        pool.close()
