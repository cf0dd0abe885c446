"""The networks of ConsisID's face path against tensors that the reference's own functions made.

`data/face_golden.py` made them (insightface 2.1, facexlib 0.3.0, consisid_eva_clip 1.0.2); weights
are drawn by name on either side, so that only inputs and outputs are stored.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.weights.schema import CheckpointError
from consisid_xdit.demo import demo_config
from consisid_xdit.eva import EvaTower, load_eva, rope_tables
from consisid_xdit.face import DETECTOR, FOLDER, LANDMARKS, PARSER, RECOGNISER, TOWER
from consisid_xdit.face_demo import write_face_models
from consisid_xdit.face_detect import ArcFace, RetinaDetector, Scrfd, align, onnx_network, suppress
from consisid_xdit.face_files import check_face_files
from consisid_xdit.face_models import BiSeNet, RetinaFace, load_model
from consisid_xdit.onnx_header import read_outline
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
    with pytest.raises(CheckpointError, match=r"none\.pt is missing; it is part of the checkpoint's face_encoder"):
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
    with pytest.raises(CheckpointError, match="face_encoder"):
        onnx_network(tmp_path / "none.onnx")


# --- files, before anything is loaded ---


@pytest.fixture(scope="module")
def face_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    write_face_models(folder, demo_config(), seed=0)
    return folder


def test_files_that_fit_are_not_loaded(face_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("loaded"))
    check_face_files(face_folder, demo_config())
    outline = read_outline(face_folder / FOLDER / DETECTOR)
    assert outline.outputs == 9 and outline.inputs >= 1 and outline.nodes > 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without_one(path: Path) -> None:
    state = torch.load(path)
    del state[sorted(name for name in state if "rope" not in name)[0]]
    torch.save(state, path)


def of_another_width(path: Path) -> None:
    state = torch.load(path)
    name = sorted(name for name, tensor in state.items() if tensor.ndim > 1)[0]
    torch.save(state | {name: torch.zeros(3, 3)}, path)


def whole_numbers(path: Path) -> None:
    torch.save({name: tensor.int() for name, tensor in torch.load(path).items()}, path)


def code(path: Path) -> None:
    torch.save({"x": Path("code")}, path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def page(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html>" * 30)


NETWORKS, TABLES = (DETECTOR, RECOGNISER), (LANDMARKS, PARSER, TOWER)
SPOILT = [
    *((name, Path.unlink, "is missing; it is part of") for name in (*NETWORKS, *TABLES)),
    *((name, empty, "is empty") for name in (DETECTOR, PARSER)),
    *((name, change, "is no ONNX file, or is damaged") for name in NETWORKS for change in (cut, page)),
    *((name, change, "damaged") for name in TABLES for change in (cut, page)),
    *((name, without_one, "does not fit") for name in TABLES),
    *((name, of_another_width, "is [3, 3], expected [") for name in TABLES),
    *((name, whole_numbers, "is of torch.int32, expected torch.float32") for name in TABLES),
    *((name, code, "no file of plain tensors") for name in TABLES),
]


@pytest.mark.parametrize(("name", "spoil", "said"), SPOILT)
def test_files_that_will_not_do_are_told_at_the_door(face_folder: Path, tmp_path: Path, name, spoil, said) -> None:
    shutil.copytree(face_folder, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / FOLDER / name)
    with pytest.raises(CheckpointError) as found:
        check_face_files(tmp_path, demo_config())
    line = str(found.value)
    assert said in line and name in line and "\n" not in line and len(line) < 600


def test_networks_in_each_others_place_and_a_folder_of_another_model(face_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(face_folder, tmp_path, dirs_exist_ok=True)
    shutil.copyfile(tmp_path / FOLDER / RECOGNISER, tmp_path / FOLDER / DETECTOR)
    with pytest.raises(
        CheckpointError, match=r"is another network: .* 1 outputs, this one would have 9; remove it and"
    ):
        check_face_files(tmp_path, demo_config())
    with pytest.raises(CheckpointError, match=r"its image tower gives .* both must come from one checkpoint"):
        check_face_files(face_folder, replace(demo_config(), vit_dim=2 * demo_config().vit_dim))


def test_no_cut_of_an_onnx_file_is_taken_for_one(face_folder: Path, tmp_path: Path) -> None:
    """Nor are bytes drawn at random: whatever they are, they end in one line."""
    whole = (face_folder / FOLDER / RECOGNISER).read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(300):
        content = whole[: draw.integers(0, len(whole))] if draw.random() < 0.5 else draw.bytes(draw.integers(0, 200))
        (tmp_path / "x.onnx").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.onnx"):
            read_outline(tmp_path / "x.onnx")
