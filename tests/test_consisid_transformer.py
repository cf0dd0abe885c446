"""ConsisID's transformer against the installed reference, against itself over layouts, and its cost."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideox_xdit.transformer import CogVideoXTransformer
from common.memory.estimate import imagined
from common.parallel.mesh import Layout, Mesh, distributed
from common.parallel.usp import SequenceParallel
from common.weights.load import load, on_meta, open_checkpoint, save
from consisid_xdit.config import PREVIEW, ConsisIDConfig, consisid_config, consisid_json
from consisid_xdit.facial import LocalFacialExtractor
from consisid_xdit.transformer import ConsisIDTransformer
from consisid_xdit.weights import rename_table
from tests.helpers import cogvideox
from tests.helpers.consisid import denoise, identity, inputs, ours, reference, reference_output, small, stored
from tests.helpers.counting import counting
from tests.helpers.ranks import RankPool

DATA = Path(__file__).parent / "data"
FACE = {"with a face": True, "without a face": False}


def narrow(value: object) -> object:
    """fp64 tensors, and lists of them, as fp32."""
    if isinstance(value, list):
        return [narrow(v) for v in value]
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("face", FACE.values(), ids=FACE)
def test_agrees_with_the_reference_in_fp64(face: bool, tmp_path: Path) -> None:
    config = small(face=face, face_scale=0.7)
    oracle = reference(config)
    given, who = inputs(config, batch=2), identity(config) if face else {}
    with torch.no_grad():
        out = denoise(ours(config, stored(oracle, tmp_path)), **given, **who)
    expected = reference_output(oracle, given, who)
    assert expected.std() > 0.1
    assert (out - expected).abs().max() < 1e-10


@pytest.mark.parametrize("face", FACE.values(), ids=FACE)
def test_agrees_with_the_reference_in_fp32(face: bool, tmp_path: Path) -> None:
    config = small(face=face)
    oracle = reference(config).float()
    given = {key: narrow(value) for key, value in inputs(config).items()}
    who = {key: narrow(value) for key, value in (identity(config) if face else {}).items()}
    with torch.no_grad():
        out = denoise(ours(config, stored(oracle, tmp_path)), **given, **who)
    expected = reference_output(oracle, given, who)
    assert (out - expected).norm() < 1e-5 * expected.norm()


def test_the_face_matters_and_only_the_face_modules_see_it(tmp_path: Path) -> None:
    config = small()
    model = ours(config, stored(reference(config), tmp_path))
    given = inputs(config)
    with torch.no_grad():
        one, other = (denoise(model, **given, **identity(config, seed)) for seed in (2, 3))
        none = denoise(model, **given)
        plain = CogVideoXTransformer(config).double()
        state = model.state_dict()
        # The same tensors: copies elsewhere in memory may be multiplied in another order.
        plain.load_state_dict({name: state[name] for name in plain.state_dict()}, assign=True)
        bare = cogvideox.denoise(plain, **given)
    assert (one - other).abs().max() > 1e-2
    assert torch.equal(none, bare)


LAYOUTS = {  # ranks -> (cfg, ring, ulysses) of the published H100 table; cfg splits the branches outside the model
    1: ((1, 1, 1),),
    2: ((1, 1, 2), (1, 2, 1), (2, 1, 1)),
    3: ((1, 1, 3), (1, 3, 1)),
    4: ((2, 1, 2), (2, 2, 1)),
    6: ((1, 3, 2), (1, 2, 3), (2, 3, 1), (2, 1, 3)),
}
PUBLISHED = [layout for layouts in LAYOUTS.values() for layout in layouts]


def on_rank(layout: Layout, path: str) -> Tensor:
    config = small()
    model = ours(config, Path(path), SequenceParallel(distributed(layout)))
    with torch.no_grad():
        return denoise(model, **inputs(config), **identity(config))


@cache
def one_rank(path: str) -> Tensor:
    return on_rank(Layout(), path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(stored(reference(small()), tmp_path_factory.mktemp("consisid")))


@pytest.mark.parametrize("ranks", list(LAYOUTS)[1:])
@pytest.mark.slow
def test_every_published_layout_gives_what_one_rank_gives(ranks: int, checkpoint: str, run_ranks: RankPool) -> None:
    for cfg, ring, ulysses in LAYOUTS[ranks]:
        for out in run_ranks(ranks, on_rank, Layout(cfg, ring, ulysses), checkpoint):
            assert (out - one_rank(checkpoint)).abs().max() < 1e-10, (cfg, ring, ulysses)


@pytest.mark.slow
def test_a_rank_may_hold_no_video_token(tmp_path: Path, run_ranks: RankPool) -> None:
    config = small(sample_height=2, sample_width=4, sample_frames=1)
    path = str(stored(reference(config), tmp_path))
    for out in run_ranks(6, tiny_on_rank, Layout(ring=2, ulysses=3), path):
        assert (out - tiny_on_rank(Layout(), path)).abs().max() < 1e-10


def tiny_on_rank(layout: Layout, path: str) -> Tensor:
    config = small(sample_height=2, sample_width=4, sample_frames=1)
    model = ours(config, Path(path), SequenceParallel(distributed(layout)))
    with torch.no_grad():
        return denoise(model, **inputs(config, (1, 2, 4)), **identity(config))


def test_published_tensors() -> None:
    """Names and shapes of the official layout: all that ConsisID adds, and how many there are in all."""
    model = on_meta(ConsisIDTransformer, PREVIEW)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    published = json.loads((DATA / "consisid_face_shapes.json").read_text())
    ours_only = {name: shapes[name] for name in shapes if name.startswith(("local_facial", "perceiver"))}
    assert ours_only == published
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 6_217_102_912
    assert len(rename_table(PREVIEW)) > len(published)


def test_weights_go_there_and_back(tmp_path: Path) -> None:
    config = small()
    oracle = reference(config)
    model = ours(config, stored(oracle, tmp_path))
    save(model.state_dict(), tmp_path / "again.safetensors", rename_table(config))
    again = open_checkpoint(tmp_path / "again.safetensors")
    assert again.keys() == oracle.state_dict().keys()
    assert all(torch.equal(again.tensor(name), tensor) for name, tensor in oracle.state_dict().items())
    with pytest.raises(ValueError, match="unexpected tensors local_facial_extractor"):
        load(on_meta(ConsisIDTransformer, small(face=False)), again, rename_table(small(face=False)))


def test_config_there_and_back() -> None:
    assert consisid_config(consisid_json(PREVIEW)) == PREVIEW
    assert consisid_config({}) == ConsisIDConfig(), "absent keys mean what the reference class says"
    old = consisid_json(PREVIEW) | {"LFE_num_tokens": 32, "LFE_heads": 16}
    assert consisid_config(old) == PREVIEW


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 41}, "multiple of cross_attn_interval"),
        ({"LFE_output_dim": 1024}, "face tokens 2048 wide"),
        ({"LFE_depth": 9}, "LFE_depth 9"),
        ({"LFE_num_scale": "5"}, "LFE_num_scale='5'; it must be a whole number"),
        ({"is_train_face": 1}, "is_train_face=1; it must be true or false"),
        ({"new_thing": 3}, "new_thing=3"),
    ],
)
def test_config_that_cannot_be_run(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        consisid_config(consisid_json(PREVIEW) | changes)


def test_identity_that_does_not_fit() -> None:
    config = small()
    model = ConsisIDTransformer(config)
    who = identity(config)
    with pytest.raises(ValueError, match="it takes"):
        model.read_face(who["id_cond"][:, :4], who["id_vit_hidden"])
    with pytest.raises(ValueError, match="it takes"):
        model.read_face(who["id_cond"], who["id_vit_hidden"][:2])
    with pytest.raises(ValueError, match="no face modules"):
        ConsisIDTransformer(small(face=False)).read_face(**who)


def test_extractor_and_keys_are_not_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    model = ConsisIDTransformer(config).double()
    calls = []
    forward = LocalFacialExtractor.forward
    monkeypatch.setattr(LocalFacialExtractor, "forward", lambda *a: calls.append("extractor") or forward(*a))
    for cross in model.perceiver_cross_attention:
        cross.to_kv.register_forward_hook(lambda *a: calls.append("keys"))
    given = inputs(config)
    with torch.no_grad():
        face = model.read_face(**identity(config))
        assert calls == ["extractor"] + ["keys"] * config.crossings
        x = model.sp.shard(torch.randn(1, 3 * 4 * 6, 16, dtype=torch.float64))
        for _ in range(2):
            cond = model.prepare(given["text"], (3, 8, 12), given["image"], face=face)
            for t in (999, 500):
                model(x, t, cond)
    assert len(calls) == 1 + config.crossings


# --- what a step costs at the published size: 480 x 720, 49 frames, bf16 ---

VIDEO, TEXT_TOKENS = 13 * 30 * 45, 226


def step_costs(layout: Layout, rank: int, layers: int) -> tuple[int, dict[str, int]]:
    """FLOPs and bytes sent of one prediction on one rank, counted on meta tensors."""
    with imagined(layout, rank) as mesh:
        return counted_step(mesh, layers)


def counted_step(mesh: Mesh, layers: int) -> tuple[int, dict[str, int]]:
    sp = SequenceParallel(mesh)
    model = on_meta(ConsisIDTransformer, replace(PREVIEW, layers=layers), sp).to(torch.bfloat16).requires_grad_(False)

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    with torch.no_grad():
        face = model.read_face(empty(1, 1280), [empty(1, 577, 1024)] * 5)
        cond = model.prepare(empty(1, TEXT_TOKENS, 4096), (13, 60, 90), empty(1, 16, 13, 60, 90), face=face)
        with counting(mesh) as counts:
            model(sp.shard(empty(1, VIDEO, 64)), torch.empty(1, device="meta"), cond)
    return counts.flops, dict(counts.sent)


def formula_flops(layers: int) -> int:
    """FLOPs of one prediction, all ranks together, a multiply-add being two."""
    w, n = 3072, VIDEO + TEXT_TOKENS
    block = 2 * n * w * w * (4 + 8) + 4 * n * n * w
    cross = 2 * VIDEO * w * 2048 * 2 + 4 * VIDEO * 32 * 2048
    ends = 2 * VIDEO * 64 * w * 2
    return layers * block + layers // 2 * cross + ends


def test_flops_of_the_whole_model() -> None:
    flops, sent = step_costs(Layout(), 0, PREVIEW.layers)
    assert formula_flops(42) <= flops <= formula_flops(42) * 1.001
    assert not sent


@pytest.mark.parametrize(("cfg", "ring", "ulysses"), PUBLISHED)
@pytest.mark.slow
def test_flops_and_bytes_at_the_published_size(cfg: int, ring: int, ulysses: int) -> None:
    """Two of the 42 layers, which are all alike; the modulations, which every rank repeats, are below 0.1 %."""
    layout, layers = Layout(cfg, ring, ulysses), 2
    costs = [step_costs(layout, rank, layers) for rank in range(layout.sequence)]
    total = sum(flops for flops, _ in costs)
    assert formula_flops(layers) <= total <= formula_flops(layers) * 1.001
    assert max(flops for flops, _ in costs) <= total / layout.sequence * 1.001
    n, w = VIDEO + TEXT_TOKENS, 3072
    sent = {axis: sum(found.get(axis, 0) for _, found in costs) for axis in ("ulysses", "ring", "sequence")}
    assert sent["ulysses"] == pytest.approx(layers * 4 * n * w * 2 * (ulysses - 1) / ulysses, rel=0.01)
    assert sent["ring"] == pytest.approx(layers * 2 * n * w * 2 * (ring - 1), rel=0.01)
    assert sent["sequence"] == 0, "the face needs no communication"
