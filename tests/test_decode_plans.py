"""What a decode takes, which plans there are, and which one all ranks agree on."""

from __future__ import annotations

import gc
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.parallel.device_memory import MARGIN, SPARE, wanted
from common.parallel.mesh import Axis, Layout, distributed
from common.system.units import GIB
from common.video.causal import CausalStream
from common.video.decode import DecodePlan, decode_frames
from common.video.decode_planning import (
    TILES_COST,
    PeakMemory,
    agree,
    decode_memory,
    decode_plans,
    plan_decode,
    plan_for_all,
    probe,
    warning,
)
from tests.helpers.causal_net import Net, latents, net


def test_peak_memory_counts_what_lives_at_once():
    there_before = torch.zeros(5000)
    with PeakMemory() as counter:
        a = torch.zeros(1000)
        assert there_before.view(50, 100)[:3].shape == (3, 100)
        b = a.view(10, 100) + 1
        del a
        c = b * 2
        del b
        gc.collect()
    assert (counter.now, counter.peak) == (4000, 8000)
    assert c.sum() == 2000


def test_memory_of_a_long_video_is_that_of_two_chunks():
    model, z = net(channels=8), latents(12, 9, 8)
    peaks = {}
    for frames in (4, 8, 12):
        gc.collect()
        with PeakMemory("cpu") as counter:
            for _ in decode_frames(model, z[:, :, :frames], DecodePlan("exact", 2)):
                pass
        peaks[frames] = counter.peak
    assert peaks[12] == peaks[8] <= peaks[4] * 1.2
    estimate = decode_memory(model, (2, 12, 9, 8), DecodePlan("exact", 2))
    assert 0.8 < estimate / peaks[12] < 1.2


def test_plans_go_from_the_fastest_to_the_smallest():
    model, shape = net(channels=8), (2, 12, 40, 64)
    plans = decode_plans(model, shape)
    assert [(p.mode, p.chunk) for p in plans[:4]] == [("exact", 3), ("exact", 2), ("exact", 1), ("tiled", 1)]
    needs = [decode_memory(model.to("meta"), shape, plan) for plan in plans]
    assert needs == sorted(needs, reverse=True) and needs[-1] < needs[2] / 4
    for i, need in enumerate(needs):
        assert plan_decode(model, shape, wanted(0, need), plans) == plans[i:]
    assert plan_decode(model, shape, 0, plans) == plans[-1:]
    assert [(p.chunk, p.parts) for p in decode_plans(model, shape, 8, "exact")] == [(3, 8), (2, 8), (1, 8)]
    # A chunk for each rank is ahead here, though cut rows take less memory.
    odd = decode_plans(model, (2, 12, 3, 64), 4, "exact")
    assert [(p.chunk, p.parts) for p in odd] == [(3, 1), (2, 4), (1, 4)]
    assert [(p.chunk, p.parts) for p in decode_plans(model, (2, 9, 2, 64), 6, "exact")] == [(3, 2), (2, 2), (1, 2)]
    assert decode_plans(model, (2, 1, 40, 64))[0].chunk == 1
    assert {p.mode for p in decode_plans(model, shape, mode="exact")} == {"exact"}
    assert decode_plans(model, shape, mode="tiled", tile=(20, 20), chunk=5) == (DecodePlan("tiled", 5, (20, 20)),)


def test_the_picture_is_cut_only_where_the_exact_decode_does_not_fit():
    """A GPU's decode can fail and go on by tiles, so there the smallest exact one is taken without its margin."""
    model, shape = net(channels=8), (2, 12, 40, 64)
    plans = decode_plans(model, shape)
    needs = [decode_memory(model.to("meta"), shape, plan) for plan in plans]
    exact = max(i for i, plan in enumerate(plans) if plan.mode == "exact")
    for free, tries, want in (
        (wanted(0, needs[exact]), False, exact),
        (wanted(0, needs[exact]) - 1, False, exact + 1),
        (wanted(0, needs[exact]) - 1, True, exact),
        (needs[exact], True, exact),
        (needs[exact] - 1, True, exact + 1),
        (wanted(0, needs[0]) - 1, True, 1),
    ):
        first = plan_decode(model, shape, free, plans, tries=tries)[0]
        assert first == plans[want] or (first.mode == plans[want].mode == "tiled"), (free, tries)


def test_a_cut_picture_is_told_with_its_cost_and_what_avoids_it():
    plans = (DecodePlan("exact", 2), DecodePlan("exact", 1), DecodePlan("tiled", 1, (20, 20)))
    needs = dict(zip(plans, (4 * GIB, 2 * GIB, GIB)))
    count = needs.__getitem__
    assert wanted(0, 2 * GIB) == int(MARGIN * 2 * GIB) + SPARE == 3 * GIB
    assert warning(plans[0], plans, 5.5 * GIB, count) == warning(plans[1], plans, 3 * GIB, count) == ""
    assert warning(plans[2], plans[2:], GIB, count) == ""  # they were asked for
    cut = warning(plans[2], plans, 1.8 * GIB, count)
    for part in (
        "changes the picture",
        TILES_COST,
        "1.2 GiB are missing",
        "wants 3.0 GiB",
        "1.8 GiB are free",
        "--vae",
    ):
        assert part in cut
    assert "tight" in warning(plans[1], plans, 2.5 * GIB, count) and TILES_COST in warning(plans[1], plans, GIB, count)
    assert TILES_COST not in warning(plans[1], plans[:2], GIB, count)


def test_the_cost_of_tiles_is_the_measured_one():
    page = (Path(__file__).parents[1] / "docs" / "fidelity.md").read_text()
    means = sorted(round(float(mean)) for mean in re.findall(r"--vae tiled --vae-tile 32` \| ([\d.]+) dB", page))
    assert len(means) == 3 and TILES_COST.startswith(f"{means[0]} to {means[-1]} dB")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mode": "fast"}, "auto, exact or tiled"),
        ({"chunk": 0}, "at least 1"),
        ({"tile": (2, 9)}, "at least 4x4"),
        ({"mode": "exact", "tile": (9, 9)}, "does not cut"),
    ],
)
def test_plans_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        decode_plans(net(), (2, 4, 8, 8), **wrong)


class Rigid(Net):
    """A model of which the chunks are a part."""

    chunk_choices = (2,)
    chunks_fixed = True


def test_fixed_chunks_stay():
    assert {p.chunk for p in decode_plans(Rigid(), (2, 12, 40, 64), ranks=12)} == {2}
    assert decode_plans(Rigid(), (2, 12, 40, 64), chunk=2)[0].chunk == 2
    with pytest.raises(ValueError, match="only 2 is possible"):
        decode_plans(Rigid(), (2, 12, 40, 64), chunk=3)


class Starved(Net):
    """Runs out of memory above a picture size."""

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        if z.shape[-1] > 30:
            raise torch.OutOfMemoryError("too wide")
        return super().forward(z, stream)


def agreed(ranks: int, hungry_rank: int) -> str:
    mesh = distributed(Layout(ulysses=ranks))
    shape = (2, 4, 20, 40)
    model = Starved() if mesh.world.rank == hungry_rank else Net()
    plans = decode_plans(model, shape, ranks=mesh.world.size)
    return str(agree(plans, lambda plan: probe(model, shape, plan), mesh.world, mesh.device))


def tried(ranks: int) -> list[tuple[str, int]]:
    """The plan for all, and how often the decoder ran to find it: short of memory twice, then with plenty."""
    mesh = distributed(Layout(ulysses=ranks))
    shape, runs, agreed, found = (2, 6, 20, 40), [], {}, []
    model = Starved() if mesh.world.rank == 1 else Net()
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    plans = decode_plans(model, shape, ranks)
    count = cache(lambda plan: decode_memory(Net(), shape, plan, "cpu", ranks))
    need = count(plans[0])
    for free in (wanted(0, need), wanted(0, need), 2 * wanted(0, need) - need):
        runs.clear()
        plan = plan_for_all(model, shape, plans, free, count, mesh.world, mesh.device, agreed)
        found.append((plan.mode, len(runs)))
    return found


def test_a_plan_is_tried_out_once_and_only_where_memory_is_short(run_ranks):
    for first, again, ample in run_ranks(2, tried, 2):
        assert first[0] == "tiled" and first[1] >= 4
        assert again == ("tiled", 0) and ample == ("exact", 0)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("GET was unable to find an engine to execute this")],
)
def test_a_probe_sees_memory_run_out_whoever_says_it(monkeypatch, error):
    given_back = []
    monkeypatch.setattr("common.video.decode_planning.release_memory", lambda: given_back.append(1))
    model = net(torch.float32)
    assert probe(model, (2, 4, 3, 5), DecodePlan()) and len(given_back) == 1
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
    assert not probe(model, (2, 4, 3, 5), DecodePlan()) and len(given_back) == 2
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("a defect")), prepend=True)
    with pytest.raises(RuntimeError, match="a defect"):
        probe(model, (2, 4, 3, 5), DecodePlan())


def test_a_part_of_the_height_takes_so_much_less_memory():
    model, shape = net(channels=8).to("meta"), (2, 9, 40, 64)
    whole, shared = (decode_memory(model, shape, DecodePlan("exact", 2, parts=n), ranks=n) for n in (1, 4))
    assert 0.25 < shared / whole < 0.35  # its own quarter, and the rows beside it
    empty = decode_memory(model, (2, 9, 3, 64), DecodePlan("exact", 2, parts=8), ranks=8)
    assert empty == decode_memory(model, (2, 9, 3, 64), DecodePlan("exact", 2, parts=3), ranks=3)


def test_tails_that_arrive_from_another_rank_are_counted():
    model, shape, plan = net(channels=8), (2, 12, 9, 8), DecodePlan("exact", 2)
    tails = 8 * 2 * (2 + 3 * 8) * 18 * 16  # two frames before each layer of 2 and 8 channels
    alone = decode_memory(model, shape, plan)
    assert decode_memory(model, shape, plan, ranks=2) == alone + tails
    tiles = DecodePlan("tiled", 2, (8, 8))
    assert decode_memory(model, shape, tiles, "cuda", ranks=2) == decode_memory(model, shape, tiles, "cuda")


def test_ranks_agree_on_a_plan_that_fits_them_all(run_ranks):
    roomy = run_ranks(2, agreed, 2, -1)
    assert roomy[0] == roomy[1] == "exact, 3 latent frames at a time, the height shared by 2 ranks"
    tight = run_ranks(2, agreed, 2, 1)
    assert tight[0] == tight[1] and tight[0].startswith("tiled")
    with pytest.raises(MemoryError, match="smallest"):
        agree((DecodePlan(),), lambda plan: False, Axis(), torch.device("cpu"))
