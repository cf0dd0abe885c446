"""The networks of ConsisID's face path against tensors that the reference's own functions made.

`data/face_golden.py` made them (insightface 2.1, facexlib 0.3.0, consisid_eva_clip 1.0.2); weights
are drawn by name on either side, so that only inputs and outputs are stored.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from consisid_xdit.eva import EvaTower, load_eva, rope_tables
from consisid_xdit.face_detect import ArcFace, RetinaDetector, Scrfd, align, onnx_network, suppress
from consisid_xdit.face_models import BiSeNet, RetinaFace, load_model
from tests.helpers.face import (
    DATA,
    EVA_TINY,
    close,
    crowd,
    needs_cv2,
    needs_onnx,
    picture,
    retina_state,
    same_picture,
    seeded_state,
    stored,
    tiny_eva,
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return stored()


@pytest.fixture(scope="module")
def retina() -> RetinaFace:
    model = RetinaFace().eval()
    model.load_state_dict(retina_state({k: v.shape for k, v in model.state_dict().items()}))
    return model


# --- the image tower ---


def test_eva_matches_reference(golden: dict[str, Tensor]) -> None:
    tower = tiny_eva()
    with torch.no_grad():
        embedding, hidden = tower(golden["eva.input"])
    close(embedding, golden["eva.embedding"], 1e-5)
    assert len(hidden) == 5
    for i, h in enumerate(hidden):
        close(h, golden[f"eva.hidden.{i}"], 1e-5)


def test_eva_input_matches_torchvision(golden: dict[str, Tensor]) -> None:
    small = torch.from_numpy(picture(50, 50, 4)).permute(2, 0, 1)[None] / 255.0
    close(tiny_eva().preprocess(small), golden["eva.input"], 1e-5)
    big = torch.from_numpy(picture(512, 512, 5)).permute(2, 0, 1)[None] / 255.0
    with torch.device("meta"):
        tower = EvaTower()
    close(tower.preprocess(big)[:, :, ::7, ::7], golden["eva.resize_336"], 1e-5)


def test_eva_rope_matches_reference(golden: dict[str, Tensor]) -> None:
    cos, sin = rope_tables(EVA_TINY)
    close(cos, golden["eva.rope_cos"], 1e-6)
    close(sin, golden["eva.rope_sin"], 1e-6)


def test_eva_has_the_published_tensors() -> None:
    """The names and shapes of the file, less the rotary table that the file repeats in every block."""
    with torch.device("meta"):
        state = EvaTower().state_dict()
    published = json.loads((DATA / "eva_visual_shapes.json").read_text())
    expected = {k: tuple(v) for k, v in published.items() if ".attn.rope." not in k}
    assert {f"visual.{k}": tuple(v.shape) for k, v in state.items()} == expected
    assert sum(v.numel() for k, v in state.items() if "rope" not in k) == 304_432_832


def test_eva_loads_only_its_part_and_only_tensors(tmp_path: Path) -> None:
    tower = tiny_eva()
    state = {f"visual.{k}": v for k, v in tower.state_dict().items()}
    table = {f"visual.blocks.{i}.attn.rope.freqs_cos": tower.rope.freqs_cos for i in range(24)}
    torch.save({"module": state | table | {"text.x": torch.ones(1)}}, tmp_path / "eva.pt")
    loaded = load_eva(tmp_path / "eva.pt", config=EVA_TINY)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), state.values(), strict=True))
    state.pop("visual.norm.bias")
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"norm\.bias"):
        load_eva(tmp_path / "part.pt", config=EVA_TINY)
    torch.save({"x": Path("code")}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="plain tensors"):
        load_eva(tmp_path / "code.pt", config=EVA_TINY)
    with pytest.raises(FileNotFoundError, match="face_encoder"):
        load_eva(tmp_path / "none.pt", config=EVA_TINY)


# --- the convolutional models ---


def test_retina_network_matches_reference(golden: dict[str, Tensor], retina: RetinaFace) -> None:
    x = torch.from_numpy(crowd().astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        boxes, scores, points = retina(x - torch.tensor([104.0, 117.0, 123.0])[:, None, None])
    close(scores[0], golden["retina.scores"], 2e-5)
    close(boxes[0, ::5], golden["retina.boxes"], 2e-4)
    close(points[0, ::5], golden["retina.points"], 2e-4)


def test_bisenet_matches_reference(golden: dict[str, Tensor]) -> None:
    model = BiSeNet().eval()
    model.load_state_dict(seeded_state({k: v.shape for k, v in model.state_dict().items()}))
    x = torch.from_numpy(picture(64, 96, 6)).permute(2, 0, 1)[None] / 255.0
    with torch.no_grad():
        scores = model(x)[:, :, ::4, ::4]
    close(scores, golden["bisenet.scores"], 1e-5)
    assert torch.equal(scores.argmax(1), golden["bisenet.scores"].argmax(1))


def test_model_files_load_strictly(tmp_path: Path) -> None:
    model = BiSeNet(base=4)
    extra = {"conv_out16.conv_out.weight": torch.ones(1), "conv_out32.conv.bn.bias": torch.ones(1)}
    torch.save(model.state_dict() | extra, tmp_path / "a.pth")
    loaded = load_model(BiSeNet(base=4), tmp_path / "a.pth", "cpu")
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    torch.save(model.state_dict() | {"other": torch.ones(1)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="other"):
        load_model(BiSeNet(base=4), tmp_path / "b.pth", "cpu")


# --- detection ---


def test_suppression_keeps_the_best_of_each_heap() -> None:
    boxes = np.array([[0, 0, 10, 10, 0.5], [1, 0, 11, 10, 0.9], [30, 0, 40, 10, 0.2], [0, 0, 5, 5, 0.4]], np.float32)
    assert suppress(boxes, 0.4) == [1, 3, 2]
    assert suppress(boxes, 0.1) == [1, 2]
    assert suppress(boxes[:0], 0.4) == []


@needs_cv2
def test_retina_detection_matches_reference(golden: dict[str, Tensor], retina: RetinaFace) -> None:
    faces = RetinaDetector(retina)(crowd())
    found = np.concatenate([faces.boxes, faces.landmarks.reshape(-1, 10)], axis=1)
    assert len(found) == 46
    close(found, golden["retina.found"].float(), 2e-3)


@needs_cv2
def test_alignment_matches_reference(golden: dict[str, Tensor]) -> None:
    crop = align(crowd(), golden["retina.center_landmarks"].numpy())
    same_picture(torch.from_numpy(crop[::8, ::8].copy()), golden["retina.crop"])


@needs_onnx
def test_scrfd_matches_reference(golden: dict[str, Tensor]) -> None:
    detect = Scrfd(onnx_network(DATA / "scrfd_small.onnx"))
    wide, tall = detect(crowd()), detect(np.ascontiguousarray(crowd().transpose(1, 0, 2)))
    assert [len(wide), len(tall)] == golden["scrfd.count"].tolist()
    for faces, name in ((wide, ""), (tall, "tall_")):
        close(faces.boxes[:60], golden[f"scrfd.{name}boxes"], 1e-5)
        close(faces.landmarks[:60], golden[f"scrfd.{name}points"], 1e-5)


@needs_onnx
def test_arcface_matches_reference(golden: dict[str, Tensor]) -> None:
    recognise = ArcFace(onnx_network(DATA / "arcface_small.onnx"))
    close(recognise(crowd(), golden["arcface.landmarks"].numpy()), golden["arcface.embedding"], 1e-5)
    close(recognise.embed(crowd()), golden["arcface.unaligned"], 1e-5)


@needs_onnx
def test_onnx_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"bad\.onnx"):
        onnx_network(tmp_path / "bad.onnx")
    with pytest.raises(FileNotFoundError, match="face_encoder"):
        onnx_network(tmp_path / "none.onnx")
