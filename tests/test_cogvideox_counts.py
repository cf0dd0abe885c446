"""What the ranks compute and send at the sizes of the real checkpoints, counted on meta tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from cogvideox_xdit.config import CONFIGS, TransformerConfig
from cogvideox_xdit.transformer import CogVideoXTransformer
from common.memory.estimate import imagined
from common.parallel.mesh import Layout, Mesh
from common.parallel.usp import SequenceParallel
from common.weights.load import on_meta
from tests.helpers.counting import Counts, counting

TRUE_SIZES = {"2b": (13, 60, 90), "5b": (13, 60, 90), "1.5": (22, 96, 170)}  # latents; 1.5 with its padding frame
RANKS = {"2b": (4, 7, 12), "5b": (5, 8), "1.5": (4, 6, 8)}
MANY = 12  # what each of so many computes is counted in two layouts


def layouts(ranks: int) -> list[Layout]:
    rings = (3, 6) if ranks == MANY else range(1, ranks + 1)
    return [Layout(ring=ring, ulysses=ranks // ring) for ring in rings if ranks % ring == 0]


def count(config: TransformerConfig, size: tuple[int, int, int], layout: Layout, rank: int) -> Counts:
    """One step of one guidance branch on one rank: one layer is counted and taken `config.layers` times."""
    with imagined(layout, rank) as mesh:
        return count_step(config, size, mesh)


def count_step(config: TransformerConfig, size: tuple[int, int, int], mesh: Mesh) -> Counts:
    sp = SequenceParallel(mesh)
    model = on_meta(CogVideoXTransformer, replace(config, layers=1), sp).to(torch.bfloat16).requires_grad_(False)
    cond = model.prepare(torch.empty(1, config.text_length, config.text_dim, device="meta"), size)
    n = cond.lengths[sp.rank] - cond.n_text
    x = torch.empty(1, n, config.out_channels * config.patch_volume, device="meta")
    with counting(mesh) as whole:
        model(x, 999.0, cond)
    with counting(mesh) as layer:
        h = x.new_empty(1, cond.lengths[sp.rank], config.width, dtype=model.dtype)
        model.blocks[0](h, torch.empty(1, config.time_dim, dtype=model.dtype, device="meta"), cond)
    sent = {axis: config.layers * number for axis, number in layer.sent.items()}
    flops = whole.flops + (config.layers - 1) * layer.flops
    return replace(whole, flops=flops, sent=Counter(sent))


@pytest.mark.parametrize("kind", TRUE_SIZES)
@pytest.mark.slow
def test_work_is_shared_and_no_more_is_sent_than_the_formula_says(kind: str) -> None:
    config, size = CONFIGS[kind], TRUE_SIZES[kind]
    tokens = size[0] * size[1] * size[2] // config.patch_volume + config.text_length
    alone = count(config, size, Layout(), 0)
    assert not alone.sent
    for layout in (layout for ranks in RANKS[kind] for layout in layouts(ranks)):
        ranks = [count(config, size, layout, rank) for rank in range(layout.ranks)]
        assert sum(c.flops for c in ranks) == pytest.approx(alone.flops, rel=0.005), layout
        if config.heads % layout.ulysses == 0:
            assert max(c.flops for c in ranks) == pytest.approx(alone.flops / layout.ranks, rel=0.005), layout
        sent = sum(c.sent["ulysses"] for c in ranks)
        # q, k, v there and the output back: all but the rank's own heads of its own tokens; two bytes a number.
        assert sent == pytest.approx(8 * tokens * config.width * config.layers * (1 - 1 / layout.ulysses), rel=0.01)
        around = sum(c.sent["ring"] for c in ranks)
        # Each ring passes all keys and values of its heads ring - 1 times.
        assert around == pytest.approx(4 * tokens * config.width * config.layers * (layout.ring - 1), rel=0.01)


def test_true_models_are_as_large_as_the_published_ones() -> None:
    parameters = {"2b": 1_693_783_872, "5b": 5_570_283_072, "5b-i2v": 5_625_087_552}
    parameters |= {"1.5": 5_570_676_352, "1.5-i2v": 5_571_594_880}
    for kind, expected in parameters.items():
        assert sum(p.numel() for p in on_meta(CogVideoXTransformer, CONFIGS[kind]).parameters()) == expected
