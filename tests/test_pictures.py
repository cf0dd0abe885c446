"""Pictures brought to a video's size: cut, padded or stretched, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.registry.checks import FITS, Rules
from common.video.inputs import image_frames, video_frames
from common.video.pictures import fit_picture, fit_remark, misfit, seen_part

GREEN = (0, 255, 0)
FREE = Rules(heads=1, width=832, height=480, num_frames=49, num_steps=1, cfg_scale=1.0, fps=8)


def framed(height: int, width: int, bar: int, upright: bool) -> np.ndarray:
    """Grey with green bars of `bar` pixels on both sides, or at top and bottom."""
    picture = np.full((height, width, 3), 128, np.uint8)
    across = picture.swapaxes(0, 1) if upright else picture
    across[:bar] = across[-bar:] = GREEN
    return picture


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(24, 40), (48, 80), (12, 20), (36, 60)])
def test_the_right_shape_is_resized_whole(size):
    picture = noise(*size)
    reference = np.asarray(Image.fromarray(picture).resize((40, 24), Image.Resampling.LANCZOS))
    for fit in FITS:
        fitted, remark = fit_picture(picture, 24, 40, fit)
        assert np.array_equal(fitted, reference) and remark == ""
        assert torch.equal(image_frames(picture, 24, 40, fit)[0], torch.from_numpy(reference.copy()))
    assert np.array_equal(fit_picture(noise(24, 40), 24, 40)[0], noise(24, 40))


@pytest.mark.parametrize("upright", [True, False])
def test_crop_cuts_both_sides_alike(upright):
    size = (60, 100) if upright else (100, 60)
    picture = framed(*size, 13, upright)  # 20 are cut, the filter reaches 6 beyond
    fitted, remark = fit_picture(picture, 30, 30)
    assert fitted.shape == (30, 30, 3) and (fitted == 128).all()
    more, _ = fit_picture(framed(*size, 22, upright), 30, 30)
    across = more.swapaxes(0, 1) if upright else more
    assert (across[0, :, 1] > 240).all() and np.array_equal(across, across[::-1]) and (across[3:-3] == 128).all()
    side = "width" if upright else "height"
    assert remark == f"cropped from {picture.shape[1]}x{picture.shape[0]} to 30x30: 40.0% of its {side} is cut off"


@pytest.mark.parametrize("upright", [True, False])
def test_pad_keeps_all_between_black_bars(upright):
    picture = np.full((50, 100, 3) if upright else (100, 50, 3), 200, np.uint8)
    fitted, remark = fit_picture(picture, 40, 40, "pad")
    across = fitted if upright else fitted.swapaxes(0, 1)
    assert (across[:10] == 0).all() and (across[10:30] == 200).all() and (across[30:] == 0).all()
    assert f"50.0% of the {'height' if upright else 'width'} is black" in remark


def test_stretch_keeps_all_and_says_nothing():
    picture = noise(31, 77)
    fitted, remark = fit_picture(picture, 24, 40, "stretch")
    assert np.array_equal(fitted, np.asarray(Image.fromarray(picture).resize((40, 24), Image.Resampling.LANCZOS)))
    assert remark == ""


@pytest.mark.parametrize("size", [(1, 1), (1, 999), (999, 1), (2, 3), (719, 1281)])
def test_any_picture_fits(size):
    for fit in FITS:
        assert fit_picture(noise(*size), 48, 85, fit)[0].shape == (48, 85, 3)


def test_a_fit_that_is_none():
    with pytest.raises(ValueError, match="'zoom'; choose one of crop, stretch, pad"):
        fit_remark((2, 3), 2, 3, "zoom")


def test_inputs_fit_and_tell_once():
    told: list[str] = []
    picture = framed(60, 100, 13, True)
    assert (image_frames(picture, 30, 30, "crop", told.append) == 128).all()
    clip = np.stack([picture] * 3)
    assert (video_frames(clip, 30, 30, 3, "crop", told.append) == 128).all()
    assert [line.split(" to ")[0] for line in told] == [f"the {x} is cropped from 100x60" for x in ("image", "video")]
    assert torch.equal(image_frames(picture, 30, 30), image_frames(picture, 30, 30, "crop"))


@pytest.mark.parametrize("size", [(427, 640), (640, 427), (720, 1280), (500, 500), (1000, 30), (480, 833)])
def test_a_free_size_has_one_that_cuts_less(size):
    height, width = FREE.size_like(size, 480, 832)
    assert not FREE.problems(width, height, 49) and 0.75 <= height * width / (480 * 832) <= 1
    assert misfit(size, height, width) <= misfit(size, 480, 832)
    told: list[str] = []
    image_frames(noise(*size), 480, 832, note=told.append, rules=FREE)
    better = f"; with --width {width} --height {height}: {misfit(size, height, width):.1%}"
    assert told[0].endswith(better) == (size != (480, 833)), "what is as good as right already"


def test_a_fixed_size_cuts_what_it_must():
    told: list[str] = []
    image_frames(noise(50, 100), 480, 720, note=told.append, rules=replace(FREE, sizes=((720, 480),)))
    assert told == ["the image is cropped from 100x50 to 720x480: 25.0% of its width is cut off"]


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (7, 500), (24, 40)])
def test_the_part_that_is_seen_is_the_part_that_is_shown(size):
    picture = noise(*size)
    part = seen_part(picture, 24, 40)
    assert abs(part.shape[0] * 40 - part.shape[1] * 24) <= 2 * 40  # whole pixels: up to two more on a side
    for side in (0, 1):
        assert abs(size[side] - part.shape[side]) % 2 == 0, "alike on both sides"
    whole = 24 * size[1] == 40 * size[0]
    assert np.array_equal(part, picture) == whole
    assert seen_part(picture, 24, 40, "pad") is picture
