"""Ranks that share the height of a chunk: their rows together are one full decode, whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.parallel.mesh import Layout, distributed
from common.registry.layout import decode_parts, decode_share, split_evenly
from common.video.causal import Grid, TimeSplit
from common.video.decode import DecodePlan, decode_frames, to_uint8
from common.video.rows import Messages, Rows, doubled, group_norm
from tests.helpers.decoders import ENCODERS, decoded_alone, small_decoder, small_encoder, some_latents

Case = tuple[str, int, int, int, int, int]
"""Decoder, latent frames, rows, columns, chunk, parts."""


def shared(ranks: int, cases: list[Case], dtype: torch.dtype) -> list[tuple[dict[tuple[int, int], Tensor], Tensor]]:
    """Of every case this rank's pixels by (chunk, part), and on rank 0 the frames."""
    mesh = distributed(Layout(ulysses=ranks))
    split, results = TimeSplit(mesh.world), []
    for name, frames, height, width, chunk, parts in cases:
        model, kept = small_decoder(name, dtype), []
        model.register_forward_hook(lambda _m, args, out, kept=kept: kept.append((args[1].rows.part, out.clone())))
        z = some_latents(name, frames, height, width, dtype)
        pieces = list(decode_frames(model, z, DecodePlan("exact", chunk, parts=parts), split))
        assert all((piece is None) == (mesh.world.rank > 0) for piece in pieces)
        grid = Grid(mesh.world, height, parts)
        own = [
            (k, part)
            for k in range(len(model.chunks(frames, chunk)))
            for part in range(len(grid.lengths))
            if grid.owner(k, part) == mesh.world.rank
        ]
        assert [part for _, part in own] == [part for part, _ in kept]
        pixels = {where: out for where, (_, out) in zip(own, kept)}
        results.append((pixels, torch.cat(pieces) if mesh.is_main else torch.empty(0)))
    return results


def whole(found: list[dict[tuple[int, int], Tensor]]) -> Tensor:
    """The pixels of all ranks, put together."""
    pixels = {where: out for one in found for where, out in one.items()}
    assert len(pixels) == sum(map(len, found)), "a part was decoded twice"
    chunks = [[pixels[at] for at in sorted(pixels) if at[0] == k] for k in sorted({k for k, _ in pixels})]
    return torch.cat([torch.cat(parts, dim=3) for parts in chunks], dim=2)


NAMES = ("mochi", "cogvideox", "wan 2.1", "wan 2.2")
CASES = {
    # Uneven rows; fewer rows than ranks, so that parts are empty; a picture of one frame; tails between ranks too.
    2: [(name, 5, 5, 3, 2, 2) for name in NAMES] + [(name, 1, 3, 2, 1, 2) for name in NAMES],
    3: [(name, 3, 2, 3, 1, 3) for name in NAMES] + [("mochi", 1, 7, 2, 1, 3), ("wan 2.1", 1, 1, 2, 1, 3)],
    4: [(name, 9, 3, 2, 2, 2) for name in NAMES] + [("mochi", 4, 5, 2, 1, 4), ("wan 2.2", 7, 1, 3, 1, 2)],
    6: [("mochi", 7, 5, 2, 1, 3), ("cogvideox", 9, 4, 2, 2, 2), ("wan 2.1", 5, 5, 2, 1, 3)],
}


@pytest.mark.parametrize("ranks", CASES)
def test_rows_of_all_ranks_are_one_full_decode(run_ranks, ranks):
    by_rank = run_ranks(ranks, shared, ranks, CASES[ranks], torch.float64)
    for i, (name, frames, height, width, chunk, _) in enumerate(CASES[ranks]):
        expected = decoded_alone(small_decoder(name), some_latents(name, frames, height, width), chunk)
        found = whole([results[i][0] for results in by_rank])
        assert (found - expected).abs().max() <= 1e-10, CASES[ranks][i]
        video = by_rank[0][i][1]
        assert (video.int() - to_uint8(expected[0], small_decoder(name).rounding).int()).abs().max() <= 1


def test_fp32_is_at_most_one_grey_level_off(run_ranks):
    cases = [(name, 3, 5, 4, 2, 4) for name in NAMES]
    for case, (_, video) in zip(cases, run_ranks(4, shared, 4, cases, torch.float32)[0]):
        model = small_decoder(case[0], torch.float32)
        alone = decoded_alone(model, some_latents(*case[:4], torch.float32), case[4])
        assert (video.int() - to_uint8(alone[0], model.rounding).int()).abs().max() <= 1, case


PICTURES = [("cogvideox", 1, 3), ("cogvideox", 9, 4), ("wan 2.1", 1, 7), ("wan 2.1", 5, 3), ("wan 2.2", 1, 2)]
"""Encoder, frames, rows of latents: one chunk or two, so that most ranks have none of their own."""


def some_pixels(name: str, frames: int, rows: int) -> Tensor:
    side = ENCODERS[name][2]
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(1, 3, frames, rows * side, 2 * side, generator=generator, dtype=torch.float64) * 2 - 1


def encoded(ranks: int) -> list[tuple[tuple[Tensor, ...], list[int]]]:
    """Of every case the latents, and the heights that this rank's encoder was given."""
    mesh, results = distributed(Layout(ulysses=ranks)), []
    for name, frames, rows in PICTURES:
        model, heights = small_encoder(name), list[int]()
        model.register_forward_pre_hook(lambda _m, args, heights=heights: heights.append(args[0].shape[3]))
        with torch.no_grad():
            found = ENCODERS[name][1](model, some_pixels(name, frames, rows), TimeSplit(mesh.world))
        results.append((found if isinstance(found, tuple) else (found,), heights))
    return results


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_rows_of_all_ranks_are_one_full_encode(run_ranks, ranks):
    by_rank = run_ranks(ranks, encoded, ranks)
    for i, (name, frames, rows) in enumerate(PICTURES):
        model, pixels = small_encoder(name), some_pixels(name, frames, rows)
        with torch.no_grad():
            alone = ENCODERS[name][1](model, pixels)
        for found, _ in (results[i] for results in by_rank):
            for ours, expected in zip(found, alone if isinstance(alone, tuple) else (alone,)):
                assert (ours - expected).abs().max() <= 1e-10, PICTURES[i]
        assert max(max(heights, default=0) for _, heights in (results[i] for results in by_rank)) < pixels.shape[3]


@pytest.mark.parametrize("ranks, parts", [(1, 1), (4, 1), (4, 2), (4, 4), (6, 2), (6, 3), (8, 8)])
def test_tails_go_to_the_next_rank_and_every_part_has_one(ranks, parts):
    class Imagined:
        size, rank, group, edges = ranks, 0, None, None

    grid = Grid(Imagined(), 7, parts)
    assert grid.lengths == list(split_evenly(7, parts))[: len(grid.lengths)] and sum(grid.lengths) == 7
    step = 0 if parts == ranks else 1
    for k in range(12):
        owners = [grid.owner(k, part) for part in range(len(grid.lengths))]
        assert len(set(owners)) == len(owners) and set(owners) <= set(range(ranks))
        following = [grid.owner(k + 1, part) for part in range(len(grid.lengths))]
        assert following == [(owner + step) % ranks for owner in owners]


def test_the_grid_has_the_least_work_on_the_critical_path():
    even = split_evenly(9, 3)
    assert decode_share(even, 60, 8, 1) == pytest.approx(1 / 3)
    assert decode_parts(even, 60, 8) == 8 and decode_share(even, 60, 8, 8) == pytest.approx(8 / 60)
    assert decode_parts((1,), 60, 8) == 8 and decode_parts((1,), 5, 7) == 7
    assert decode_parts((1,) * 9, 2, 6) == 2  # three groups of two
    assert decode_parts((3, 3, 3), 1, 3) == 1


@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (2, 8, 3, 5, 3)])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_shared_group_norm_is_that_of_the_whole(shape, dtype, limit, monkeypatch):
    """One process stands for both parts: what it hears of the other is put into the memory where that would arrive."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape) * 2 + 3, torch.randn(8), torch.randn(8)
    expected = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)
    x, weight, bias = (tensor.to(dtype) for tensor in (x, weight, bias))
    parts = x[..., :2, :], x[..., 2:, :]
    rows = [Rows((2, shape[-2] - 2), part, messages=Messages()) for part in (0, 1)]
    heard = {}

    def listening(self, mean, variance):
        heard[self.part] = torch.stack((mean, variance))
        return mean, variance

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "merge", listening)
        for part, at in zip(parts, rows):
            group_norm(part, 4, weight, bias, 1e-5, at)
    for at in rows:
        other = 1 - at.part

        def deliver(sent, awaited, other=other):
            awaited[0][1].copy_(heard[other])
            return []

        at.messages.post = deliver
    found = torch.cat([group_norm(part, 4, weight, bias, 1e-5, at) for part, at in zip(parts, rows)], dim=-2)
    assert found.dtype == dtype and (found.double() - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_doubled_rows_are_what_a_padded_convolution_sees(order):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=order)
    enlarged = F.pad(F.interpolate(x, scale_factor=2.0), (0, 0, 1, 1))
    assert torch.equal(doubled(x, None, None), enlarged)
    assert doubled(x, None, None).is_contiguous(memory_format=order)
    inside = doubled(x[:, :, 1:3], x[:, :, :1], x[:, :, 3:])
    assert torch.equal(inside, enlarged[:, :, 2:8])
