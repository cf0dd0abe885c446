"""Previews: colours that are learned, estimates from the states of every solver, and what a group shows of a job."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogvideox_xdit.solver import Solver as CogVideoXSolver
from cogvideox_xdit.transformer import pack as cogvideox_pack
from common.run.resume import pack
from common.run.states import At, Slots
from common.video.previews import CELL, Colours, View, flow_levels, learn, read_sums, sums_of
from common.workers.previews import Previews, frame_of
from mochi_xdit.transformer import pack as mochi_pack
from wan_xdit.solver import PREDICTED, new_solver
from wan_xdit.transformer import pack as wan_pack

STEPS = 5


def linear(channels: int, seed: int = 0) -> Colours:
    """A map whose colours stay between 0 and 1 for latents between -1 and 1."""
    weights = np.random.default_rng(seed).uniform(-0.4, 0.4, (channels + 1, CELL, CELL, 3)) / channels
    weights[-1] = 0.5
    return Colours(weights)


def video(colours: Colours, seed: int, count: int = 3, each: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents, and frames that a linear decoder makes of them: `each` to every latent one but the first."""
    channels = len(colours.weights) - 1
    latents = torch.rand(1, channels, count, 6, 10, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    shown = [colours.picture(latents[0, :, t].permute(1, 2, 0).numpy()) for t in range(count)]
    frames = np.stack([shown[-(-k // each)] for k in range((count - 1) * each + 1)])
    return latents, torch.from_numpy(frames.repeat(2, 1).repeat(2, 2))


def test_a_linear_decoder_is_found_and_more_videos_add_to_it(tmp_path: Path) -> None:
    colours, path = linear(5), tmp_path / "new" / "colours.safetensors"
    for seed in range(10):
        learn(path, sums_of(*video(colours, seed)))
    sums = read_sums(path)
    assert sums is not None and sums.videos == 8 and path.stat().st_size < 4096
    assert np.abs(sums.map().weights - colours.weights).max() < 2e-3
    latents, frames = video(colours, 99)
    made = sums.map().picture(latents[0, :, 1].permute(1, 2, 0).numpy())
    assert made.shape == (24, 40, 3) and np.abs(made.astype(int) - frames[4, ::2, ::2].numpy()).max() <= 2

    learn(path, sums_of(*video(linear(4), 0)))  # of other channels
    again = read_sums(path)
    assert again is not None and np.array_equal(again.own, sums.own)
    assert sums_of(latents, frames[:, :-1]) is None


def test_little_to_learn_from_is_no_error(tmp_path: Path) -> None:
    black = torch.zeros(1, 3, 1, 4, 4), torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    learn(tmp_path / "black", sums_of(*black))
    sums = read_sums(tmp_path / "black")
    assert sums is not None and not sums.map().picture(np.ones((4, 4, 3))).any()
    for content in (b"", b"x" * 100, (tmp_path / "black").read_bytes()[:-8]):
        (tmp_path / "bad").write_bytes(content)
        assert read_sums(tmp_path / "bad") is None
    with pytest.raises(ValueError, match="4 channels"):
        sums.map().picture(np.ones((4, 4, 4)))


def test_long_sides_take_fewer_pixels_and_few_bytes() -> None:
    rng = np.random.default_rng(0)
    for size, shown in {(8, 8): (32, 32), (60, 104): (120, 208), (90, 160): (90, 160), (8, 300): (8, 300)}.items():
        png = linear(16).png(rng.uniform(-1, 1, (*size, 16)))
        assert Image.open(io.BytesIO(png)).size == shown[::-1] and len(png) < 100_000


def state(shards: dict[str, torch.Tensor], view: View, ranks: list[Slots], step: int) -> None:
    """Leave a step's state as ranks do: uneven parts, one of them empty."""
    count = shards["z"].shape[1]
    ends = [0, count // 3, count // 3, count]
    for one, (first, last) in zip(ranks, pairwise(ends)):
        one.write(At(0, step), STEPS, pack({name: z[:, first:last] for name, z in shards.items()}, {}, view))


@pytest.fixture
def ranks() -> Iterator[list[Slots]]:
    slots = [Slots.create() for _ in range(3)]
    yield slots
    for one in slots:
        one.close()


def sampled(
    kind: str, clean: torch.Tensor, patch: tuple[int, int, int]
) -> Iterator[tuple[View, int, dict[str, torch.Tensor]]]:
    """The states of a sampling whose model predicts the same video at every step, and their view."""
    size = clean.shape[2], clean.shape[3], clean.shape[4]
    noise = torch.randn(clean.shape, dtype=clean.dtype, generator=torch.Generator().manual_seed(1))
    if kind == "mochi":
        sigmas = [1.0, 0.999, 0.99, 0.9, 0.4, 0.0]
        view = View(size, patch, "tyxc", levels=flow_levels(sigmas))
        for i in range(STEPS):
            yield view, i + 1, {"z": mochi_pack((1 - sigmas[i + 1]) * clean + sigmas[i + 1] * noise)}
    elif kind in ("ddim", "dpm"):
        raw = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "snr_shift_scale": 1.0}
        solver = CogVideoXSolver(raw | {"rescale_betas_zero_snr": True}, STEPS, kind)
        x, view = noise, View(size, patch, clean=("before",), levels=solver.levels)
        for i in range(STEPS):
            a, b = solver.levels[i][:2]
            v = (a * x - clean) / b if b else x  # from video = a x - b v
            x = solver.step(i, x, v, lambda: torch.randn(clean.shape, dtype=clean.dtype))
            memory = {name: cogvideox_pack(z, patch) for name, z in solver.memory.items()}
            yield view, i + 1, {"z": cogvideox_pack(x, patch), **memory}
    else:
        flow = new_solver(kind.removesuffix("++"), STEPS, 3.0)
        x, view = noise, View(size, patch, clean=PREDICTED, levels=flow_levels(flow.sigmas))
        for i in range(STEPS):
            x = flow.step(i, x, (x - clean) / flow.sigmas[i])
            memory = {name: wan_pack(z, patch) for name, z in flow.memory.items()}
            yield view, i + 1, {"z": wan_pack(x, patch), **memory}


@pytest.mark.parametrize("kind", ["mochi", "ddim", "dpm", "unipc", "euler", "dpm++"])
def test_every_solvers_states_show_the_video_that_they_lead_to(ranks, kind) -> None:
    patch = (2, 2, 2) if kind == "ddim" else (1, 2, 2)
    clean = torch.randn(1, 5, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = clean[0, :, 2].permute(1, 2, 0).numpy()
    seen = []
    for view, step, shards in sampled(kind, clean, patch):
        state(shards, View.read(view.text), ranks, step)
        frame = frame_of(ranks, At(0, step), STEPS)
        if frame is not None:
            seen.append(step)
            assert np.abs(frame - expected).max() < 1e-5, (step, kind)
    # Where nothing is remembered of the step before, the first one has nothing to compare with.
    assert seen == list(range(2 if kind in ("mochi", "ddim", "euler") else 1, STEPS + 1))


def test_the_last_step_is_shown_and_a_fault_is_told_once(ranks) -> None:
    clean = torch.zeros(1, 5, 4, 6, 8, dtype=torch.float64)
    told, shown = [], []
    for view, step, shards in sampled("euler", clean, (1, 2, 2)):
        state(shards, view, ranks, step)
    previews = Previews(ranks, linear(5), lambda step, png: shown.append((step, png)), told.append)
    previews.close(True)
    ((step, png),) = shown
    assert step == STEPS and not told and Image.open(io.BytesIO(png)).size == (32, 24)
    other = Previews(ranks, linear(3), lambda step, png: shown.append((step, png)), told.append)
    other.close(True)
    assert len(shown) == 1 and len(told) == 1 and "5 channels" in told[0]
