"""The transformer against the installed reference and against itself over layouts of ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from cogvideox_xdit.transformer import CogVideoXTransformer, pack, unpack
from common.memory.estimate import imagined
from common.parallel.mesh import Layout, distributed
from common.parallel.usp import SequenceParallel
from tests.helpers.cogvideox import (
    KINDS,
    SIZES,
    TEXT,
    denoise,
    inputs,
    ours,
    reference,
    reference_output,
    small,
    stored,
)
from tests.helpers.ranks import RankPool

CASES = [(kind, size) for kind in KINDS for size in SIZES[kind]]


@pytest.mark.parametrize(("kind", "size"), CASES)
def test_agrees_with_the_reference_in_fp64(kind: str, size: tuple[int, int, int], tmp_path: Path) -> None:
    config = small(kind)
    oracle = reference(config)
    given = inputs(config, size, batch=2)
    with torch.no_grad():
        out = denoise(ours(config, stored(oracle, tmp_path)), **given)
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
        out = denoise(ours(config, stored(oracle, tmp_path)), **narrow)
    assert (out - reference_output(oracle, narrow)).norm() < 1e-5 * exact.norm()
    assert (out - exact).norm() < 1e-5 * exact.norm()


def test_pack_orders_tokens_by_frame_row_column_and_features_by_channel_first() -> None:
    z = torch.arange(3 * 4 * 6 * 8).reshape(1, 3, 4, 6, 8)
    x = pack(z, (2, 2, 2))
    assert x.shape == (1, 2 * 3 * 4, 3 * 8)
    assert torch.equal(x[0, 4 * 3 + 4 * 1 + 2], z[0, :, 2:4, 2:4, 4:6].flatten())
    assert torch.equal(unpack(x, (4, 6, 8), (2, 2, 2)), z)


# ranks -> layouts (ring, ulysses); the small model has three heads, so no ulysses degree above three
LAYOUTS = {
    2: ((1, 2), (2, 1)),
    3: ((1, 3), (3, 1)),
    4: ((2, 2), (4, 1)),
    5: ((5, 1),),
    6: ((2, 3), (3, 2), (6, 1)),
    8: ((4, 2), (8, 1)),
}


def outputs(folder: Path, sp: SequenceParallel, sizes: slice) -> dict[str, torch.Tensor]:
    """Every variant; 1.0 with odd grids, and all but 2b with a shorter text than they were trained on."""
    found = {}
    for kind in KINDS:
        config = small(kind)
        model = ours(config, folder / kind / "diffusion_pytorch_model.safetensors", sp)
        for size in SIZES[kind][sizes]:
            given = inputs(config, size)
            given["text"] = given["text"][:, : TEXT - 2 * (kind != "2b")]
            with torch.no_grad():
                found[f"{kind} {size}"] = denoise(model, **given)
    return found


def on_rank(layout: Layout, folder: str) -> dict[str, torch.Tensor]:
    sizes = slice(0, 2) if layout.sequence in (3, 8) else slice(1, 2)
    return outputs(Path(folder), SequenceParallel(distributed(layout)), sizes)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cogvideox")
    for kind in KINDS:
        (folder / kind).mkdir()
        stored(reference(small(kind)), folder / kind)
    return folder


@pytest.mark.parametrize("ranks", LAYOUTS)
@pytest.mark.slow
def test_every_layout_gives_what_one_rank_gives(ranks: int, checkpoints: Path, run_ranks: RankPool) -> None:
    alone = one_rank(checkpoints)
    for ring, ulysses in LAYOUTS[ranks]:
        for found in run_ranks(ranks, on_rank, Layout(ring=ring, ulysses=ulysses), str(checkpoints)):
            assert found.keys() <= alone.keys() and len(found) >= len(KINDS)
            for case, out in found.items():
                assert (out - alone[case]).abs().max() < 1e-10, (ring, ulysses, case)


@cache
def one_rank(folder: Path) -> dict[str, torch.Tensor]:
    return outputs(folder, SequenceParallel(), slice(0, 2))


def test_more_ulysses_ranks_than_heads_are_refused() -> None:
    with (
        imagined(Layout(ulysses=4)) as mesh,
        pytest.raises(ValueError, match="ulysses degree 4 is more than the model's 3 attention heads"),
    ):
        CogVideoXTransformer(small("2b"), SequenceParallel(mesh))


@pytest.mark.parametrize(
    ("kind", "size", "text", "image", "message"),
    [
        ("2b", (3, 7, 12), TEXT, False, "not whole patches of 1 x 2 x 2"),
        ("1.5", (3, 8, 12), TEXT, False, "not whole patches of 2 x 2 x 2"),
        ("5b-i2v", (3, 8, 14), TEXT, True, r"64 x 96 pixels \(height x width\) only, not 64 x 112"),
        ("5b-i2v", (3, 8, 12), TEXT + 1, True, "positions for 7 text tokens, not 8"),
        ("5b-i2v", (3, 8, 12), TEXT, False, "makes a video from an image"),
        ("5b", (3, 8, 12), TEXT, True, "takes no image"),
    ],
)
def test_what_a_checkpoint_cannot_take_is_refused(
    kind: str, size: tuple[int, int, int], text: int, image: bool, message: str
) -> None:
    model = CogVideoXTransformer(small(kind))
    with pytest.raises(ValueError, match=message):
        model.prepare(torch.zeros(1, text, 12), size, torch.zeros(1, 4, *size) if image else None)
