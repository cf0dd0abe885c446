"""Positions: what is easily got wrong about them, each against numbers that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvideox_xdit.config import CONFIGS
from cogvideox_xdit.positions import crop_region, rope, sine_cosine
from cogvideox_xdit.transformer import CogVideoXTransformer
from common.memory.estimate import imagined
from common.parallel.mesh import Layout
from common.parallel.usp import SequenceParallel
from tests.helpers.cogvideox import TEXT, denoise, inputs, ours, reference, reference_output, small, stored

ALONE, CPU = SequenceParallel(), torch.device("cpu")


def test_2b_has_time_then_column_then_row() -> None:
    table = sine_cosine(CONFIGS["2b"], (2, 3, 4), ALONE, CPU).view(2, 3, 4, 1920)
    first = table[0, 0, 0]
    t, h, w = table[1, 0, 0], table[0, 1, 0], table[0, 0, 1]
    parts = (slice(0, 480), slice(480, 1200), slice(1200, 1920))
    moved = [[bool((token[part] != first[part]).any()) for part in parts] for token in (t, w, h)]
    assert moved == [[True, False, False], [False, True, False], [False, False, True]]
    # Sines before cosines; the first frequency is 1 and space is counted in units of 1.875.
    assert t[0] == pytest.approx(torch.tensor(1.0).sin().item())
    assert w[480] == pytest.approx(torch.tensor(1 / 1.875).sin().item(), abs=1e-6)
    assert h[1200 + 360] == pytest.approx(torch.tensor(1 / 1.875).cos().item(), abs=1e-6)


def test_grids_are_laid_into_the_trained_one() -> None:
    assert crop_region(30, 45, 30, 45) == ((0, 0), (30, 45))
    assert crop_region(48, 85, 30, 45) == ((2, 0), (27, 45))
    # Taller than the trained grid: 30 / 60 x 30 = 15 columns in the middle of 45.
    assert crop_region(60, 30, 30, 45) == ((0, 15), (30, 30))
    # Halves are rounded to the even neighbour: (45 - 22) / 2 = 11.5 and (45 - 32) / 2 = 6.5.
    assert crop_region(30, 22, 30, 45)[0] == (0, 12)
    assert crop_region(30, 32, 30, 45)[0] == (0, 6)


def angles(kind: str, grid: tuple[int, int, int]) -> torch.Tensor:
    cos, sin = rope(CONFIGS[kind], grid, ALONE, CPU)
    assert cos.shape == (grid[0] * grid[1] * grid[2], 32)
    return torch.atan2(sin, cos).view(*grid, 32)


def test_1_0_positions_are_whole_numbers_at_480_x_720_and_not_elsewhere() -> None:
    found = angles("5b", (2, 30, 45))
    # The first frequency of each axis is 1: 8 angles for time, 12 for rows, 12 for columns.
    assert torch.allclose(found[1, 0, 0, [0, 8, 20]], torch.tensor([1.0, 0, 0]))
    assert torch.allclose(found[0, 3, 2, [0, 8, 20]], torch.tensor([0.0, 3, 2]), atol=1e-6)
    # 768 x 1360 ends at row 27 x 47/48, offset included, although it starts at 2.
    rows = torch.linspace(2, 27 * 47 / 48, 48)
    wide = angles("5b", (1, 48, 85))[0, :, 0, 8]
    assert torch.allclose(wide.cos(), rows.cos(), atol=1e-5)


def test_1_5_counts_on_every_axis_whatever_the_sample_size_says() -> None:
    for config in (CONFIGS["1.5"], replace(CONFIGS["1.5"], sample_height=4, sample_width=4)):
        cos, _ = rope(config, (11, 48, 85), ALONE, CPU)
        cos = cos.view(11, 48, 85, 32)
        assert torch.equal(cos[:, 0, 0, 0], torch.arange(11.0).cos())
        assert torch.equal(cos[0, :, 0, 8], torch.arange(48.0).cos())
        assert torch.equal(cos[0, 0, :, 20], torch.arange(85.0).cos())


def test_1_5_takes_portrait_grids_larger_than_its_sample() -> None:
    config = small("1.5", sample_height=8, sample_width=12)
    model = CogVideoXTransformer(config)
    assert model.prepare(torch.zeros(1, TEXT, 12), (2, 16, 8)).rope is not None


def test_ranks_make_only_the_positions_of_their_own_tokens() -> None:
    whole = rope(CONFIGS["5b"], (3, 5, 7), ALONE, CPU)[1]
    parts = []
    for rank in range(4):
        with imagined(Layout(ring=4), rank) as mesh:
            parts.append(rope(CONFIGS["5b"], (3, 5, 7), SequenceParallel(mesh), CPU)[1])
    assert [len(part) for part in parts] == [27, 26, 26, 26]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", ["5b", "1.5"])
def test_text_of_another_length_agrees_with_the_reference(kind: str, tmp_path: Path) -> None:
    """No table knows the text's length: 224 tokens, as 1.5 was trained with, or any other."""
    config = small(kind)
    oracle = reference(config)
    given = inputs(config, (2, 8, 12))
    given["text"] = given["text"][:, : TEXT - 2]
    with torch.no_grad():
        out = denoise(ours(config, stored(oracle, tmp_path)), **given)
    assert (out - reference_output(oracle, given)).abs().max() < 1e-10


def test_the_learned_table_is_added_to_text_and_video() -> None:
    config = small("5b-i2v")
    model = CogVideoXTransformer(config)
    table = torch.randn(model.positions.shape, generator=torch.Generator().manual_seed(0))
    text, image = torch.zeros(1, TEXT, 12), torch.zeros(1, 4, 3, 8, 12)
    with torch.no_grad():
        without = model.prepare(text, (3, 8, 12), image)
        model.positions.copy_(table)
        cond = model.prepare(text, (3, 8, 12), image)
        assert torch.allclose(cond.y - without.y, table[:, :TEXT], atol=1e-6)
        assert torch.allclose(cond.video - without.video, table[:, TEXT:], atol=1e-6)
        # Another number of frames than the table has: the fixed sines and cosines on video, nothing on text.
        other = model.prepare(text, (2, 8, 12), image[:, :, :2])
        assert torch.equal(other.y, without.y)
        fixed = sine_cosine(config, (2, 4, 6), ALONE, CPU).float()[None]
        assert torch.allclose(other.video - without.video[:, : other.video.shape[1]], fixed, atol=1e-6)


def test_rope_turns_video_and_leaves_text() -> None:
    model = CogVideoXTransformer(small("5b"))
    cond = model.prepare(torch.zeros(1, TEXT, 12), (1, 4, 4))
    assert cond.rope is not None and cond.rope.shape == (2, TEXT + 4, 1, 8, 2)
    assert torch.equal(torch.view_as_complex(cond.rope[0, :TEXT, 0]), torch.ones(TEXT, 8, dtype=torch.complex64))
    assert CogVideoXTransformer(small("2b")).prepare(torch.zeros(1, TEXT, 12), (1, 4, 4)).rope is None
