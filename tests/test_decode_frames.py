"""Tiles, and frames as they leave a decoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.parallel.mesh import Layout, distributed
from common.video.causal import CausalStream, TimeSplit
from common.video.decode import DecodePlan, decode_frames, to_uint8
from common.video.tiles import cut, tiles
from tests.helpers.causal_net import Net, latents, net


@pytest.mark.parametrize("length", [1, 2, 7, 13, 16, 17, 25, 60, 61, 106, 211])
@pytest.mark.parametrize("limit, overlap", [(4, 8), (6, 2), (12, 8), (16, 8), (24, 7), (30, 0), (300, 8)])
def test_cuts_cover_every_length_and_weigh_one(length, limit, overlap):
    found = cut(length, limit, overlap)
    total, covered = torch.zeros(8 * length, dtype=torch.float64), torch.zeros(8 * length)
    for span in found:
        assert 0 <= span.start < span.stop <= length and span.stop - span.start <= limit
        pixels = span.scaled(8)
        total[pixels.slice] += pixels.weight(torch.float64, torch.device("cpu"))
        covered[pixels.slice] += 1
    assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12)
    assert covered.min() >= 1 and covered.max() <= 2
    if length <= limit:
        assert len(found) == 1


def test_blending_the_cut_picture_gives_the_picture():
    picture = torch.randn(3, 2, 26, 38, dtype=torch.float64)
    canvas = torch.zeros_like(picture)
    parts = tiles(13, 19, (7, 8), 2)
    for part in parts:
        rows, columns = part.rows.scaled(2), part.columns.scaled(2)
        part.blend(canvas, picture[..., rows.slice, columns.slice], 2)
    assert len(parts) == 9 and torch.allclose(canvas, picture, rtol=0, atol=1e-12)


def tiled(ranks: int, size: tuple[int, int], plan: DecodePlan) -> Tensor:
    mesh = distributed(Layout(ulysses=ranks))
    frames = list(decode_frames(net(), latents(5, *size), plan, TimeSplit(mesh.world)))
    return torch.cat(frames) if mesh.is_main else torch.empty(0)


SIZES = [(3, 5), (8, 8), (9, 16), (17, 7), (23, 31)]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_have_the_right_size_and_are_close(size):
    exact = torch.cat(list(decode_frames(net(), latents(5, *size)))).float()
    plan = DecodePlan("tiled", 2, (8, 8), 2)
    ours = torch.cat(list(decode_frames(net(), latents(5, *size), plan))).float()
    assert ours.shape == exact.shape == (5, 2 * size[0], 2 * size[1], 3)
    # Four 3x3 layers reach 4 pixels over a seam of 4: only there may it differ.
    assert (ours - exact).abs().mean() < 2
    assert (ours == exact).float().mean() > 0.4
    alone = torch.cat(list(decode_frames(net(), latents(5, *size), DecodePlan("tiled", 2, (40, 40)))))
    assert torch.equal(alone.float(), exact)


@pytest.mark.parametrize("ranks, size", [(2, (9, 16)), (3, (23, 31)), (5, (9, 8))])
def test_tiles_dealt_over_ranks_are_the_same_to_the_bit(run_ranks, ranks, size):
    plan = DecodePlan("tiled", 2, (8, 8), 2)
    alone = torch.cat(list(decode_frames(net(), latents(5, *size), plan)))
    assert torch.equal(run_ranks(ranks, tiled, ranks, size, plan)[0], alone)


def test_pixels_become_bytes_by_the_named_rule():
    grey = torch.tensor([-2.0, -1.0, 0.0, 0.9999, 1.0, 3.0]).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    assert to_uint8(grey)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(grey, "nearest")[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(grey.bfloat16())[0, 0, :, 0].tolist() == [0, 0, 127, 255, 255, 255]


class Overflowing(Net):
    """One pixel of the video's frame `at` is what it should never be."""

    def __init__(self, value: float, at: int) -> None:
        super().__init__()
        self.value, self.at, self.seen = value, at, 0

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        pixels = super().forward(z, stream)
        if 0 <= self.at - self.seen < pixels.shape[2]:
            pixels[0, 1, self.at - self.seen, 2, 3] = self.value
        self.seen += pixels.shape[2]
        return pixels


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("plan", [DecodePlan("exact", 2), DecodePlan("tiled", 2, (9, 9))])
@pytest.mark.parametrize("at, named", [(0, "frames 0 to 1"), (3, "frames 2 to 3"), (4, "frame 4;")])
def test_frames_that_are_not_finite_are_never_shown(value, plan, at, named):
    shown = []
    with pytest.raises(FloatingPointError, match=f"the decoder made NaN or infinity in {named}"):
        shown.extend(decode_frames(Overflowing(value, at).double(), latents(5), plan))
    assert sum(len(frames) for frames in shown) == at // 2 * 2


@pytest.mark.parametrize("plan", [DecodePlan(), DecodePlan("tiled", 1, (8, 8), 2)])
def test_a_resting_decode_leaves_its_caller_alone(plan):
    pieces = decode_frames(net(), latents(3, 9, 9), plan)
    next(pieces)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_only_one_video_is_decoded_at_a_time():
    with pytest.raises(ValueError, match="one video"):
        next(decode_frames(net(), torch.zeros(2, 2, 1, 3, 3)))
