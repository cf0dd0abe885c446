"""The transformer against the installed reference and against itself over layouts of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogvideox_xdit.transformer import pack, unpack
from tests.cogvideox import KINDS, SIZES, inputs, ours, reference, reference_output, small, stored

CASES = [(kind, size) for kind in KINDS for size in SIZES[kind]]


@pytest.mark.parametrize(("kind", "size"), CASES)
def test_agrees_with_the_reference_in_fp64(kind: str, size: tuple[int, int, int], tmp_path: Path) -> None:
    config = small(kind)
    oracle = reference(config)
    given = inputs(config, size, batch=2)
    with torch.no_grad():
        out = ours(config, stored(oracle, tmp_path)).denoise(**given)
    expected = reference_output(oracle, given)
    assert expected.std() > 0.1
    assert (out - expected).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference_in_fp32(kind: str, tmp_path: Path) -> None:
    config = small(kind)
    oracle = reference(config)
    given = inputs(config, SIZES[kind][-1])
    exact = reference_output(oracle, given)
    oracle.float()
    narrow = {name: x.float() if x.is_floating_point() else x for name, x in given.items()}
    with torch.no_grad():
        out = ours(config, stored(oracle, tmp_path)).denoise(**narrow)
    assert (out - reference_output(oracle, narrow)).norm() < 1e-5 * exact.norm()
    assert (out - exact).norm() < 1e-5 * exact.norm()


def test_pack_orders_tokens_by_frame_row_column_and_features_by_channel_first() -> None:
    z = torch.arange(3 * 4 * 6 * 8).reshape(1, 3, 4, 6, 8)
    x = pack(z, (2, 2, 2))
    assert x.shape == (1, 2 * 3 * 4, 3 * 8)
    assert torch.equal(x[0, 4 * 3 + 4 * 1 + 2], z[0, :, 2:4, 2:4, 4:6].flatten())
    assert torch.equal(unpack(x, (4, 6, 8), (2, 2, 2)), z)
