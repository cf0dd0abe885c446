"""A photograph's way to identity features, against what the reference's own functions make of it, and over ranks.

`data/face_golden.py` made the expected tensors; see `test_face_models.py` for the networks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.parallel.mesh import Layout, distributed, on_main
from consisid_xdit.demo import demo_config, portrait
from consisid_xdit.face import FaceReader, IdentityFeatures, choose_face, load_identity, save_identity, shrink, warnings
from consisid_xdit.face_demo import write_face_models
from consisid_xdit.face_detect import ArcFace, Faces, RetinaDetector, Scrfd, onnx_network
from consisid_xdit.face_models import BiSeNet, RetinaFace
from tests.helpers.face import (
    DATA,
    STRICT,
    close,
    needs_cv2,
    needs_onnx,
    parser_state,
    photograph,
    retina_state,
    same_opencv,
    same_picture,
    stored,
    tiny_eva,
)
from tests.helpers.ranks import RankPool


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return stored()


def random_parser() -> BiSeNet:
    parser = BiSeNet().eval()
    parser.load_state_dict(parser_state({k: v.shape for k, v in parser.state_dict().items()}))
    return parser


@pytest.fixture(scope="module")
def reader() -> FaceReader:
    """The models that the reference's functions ran with; RetinaFace finds one face in `photograph`."""
    retina = RetinaFace().eval()
    retina.load_state_dict(retina_state({k: v.shape for k, v in retina.state_dict().items()}, STRICT))
    return FaceReader(
        Scrfd(onnx_network(DATA / "scrfd_small.onnx")),
        ArcFace(onnx_network(DATA / "arcface_small.onnx")),
        RetinaDetector(retina),
        random_parser(),
        tiny_eva(),
    )


def compare(identity: IdentityFeatures, golden: dict[str, Tensor], name: str) -> None:
    tolerance, of_picture = (1e-5, 5e-3) if same_opencv() else (3e-2, 3e-2)
    close(identity.id_cond[:, :512], golden[f"{name}.id_cond"][:, :512], tolerance)
    close(identity.id_cond[:, 512:], golden[f"{name}.id_cond"][:, 512:], of_picture)
    close(torch.stack(identity.id_vit_hidden), golden[f"{name}.hidden"], of_picture)
    close(identity.face_kps, golden[f"{name}.kps"], tolerance)
    same_picture(identity.image[::8, ::8], golden[f"{name}.image"])
    white = (identity.image == 255).all(-1).float().mean()
    assert 0.1 < white < 0.9, "both kinds of pixels are compared"


@needs_onnx
def test_features_match_the_reference(golden: dict[str, Tensor], reader: FaceReader) -> None:
    identity, said = reader.read(photograph())
    compare(identity, golden, "path")
    assert "faces in the picture; the largest one is used" in said[0]


@needs_onnx
def test_fallback_matches_the_reference(golden: dict[str, Tensor], reader: FaceReader) -> None:
    """SCRFD finds nothing: landmarks are RetinaFace's and the crop is recognised."""
    blind = FaceReader(
        lambda picture: faces_at(),  # type: ignore[arg-type]
        reader.recognise,
        reader.find_landmarks,
        reader.parser,
        reader.tower,
    )
    identity, said = blind.read(photograph())
    compare(identity, golden, "fallback")
    assert said[-1].startswith("the first detector found no face")


def faces_at(*boxes: tuple[float, float, float, float]) -> Faces:
    table = np.array([[*box, 0.9] for box in boxes], np.float32).reshape(-1, 5)
    return Faces(table, np.zeros((len(table), 5, 2), np.float32))


BIG, OTHER, LITTLE = (100, 100, 300, 300), (400, 100, 520, 230), (10, 10, 30, 35)


def test_which_face_is_used_and_what_is_said() -> None:
    found, landmarks = faces_at(OTHER, BIG), faces_at((395, 98, 522, 230), (102, 95, 299, 310), LITTLE)
    target, chosen = choose_face(found, landmarks)
    assert tuple(target.boxes[0, :4]) == BIG and chosen == 1
    assert (
        "3 faces" in warnings(found, landmarks, target)[0] and "x 100 to 300" in warnings(found, landmarks, target)[0]
    )
    one = faces_at(BIG)
    assert warnings(one, one, one) == []
    small = faces_at((0, 0, 60, 70))
    assert "only 60 pixels wide" in warnings(small, small, small)[0]


@pytest.mark.parametrize(
    ("found", "landmarks", "message"),
    [
        (faces_at(), faces_at(), "no face was found"),
        (faces_at(BIG), faces_at(), "no face was found"),
        (faces_at(LITTLE), faces_at(LITTLE), "only 20 pixels wide"),
        (faces_at(), faces_at(LITTLE), "only 20 pixels wide"),
        (faces_at(BIG), faces_at(OTHER), "two detectors disagree"),
    ],
)
def test_pictures_that_cannot_be_used(found: Faces, landmarks: Faces, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_face(found, landmarks)


@needs_onnx
def test_no_face_in_a_real_picture(reader: FaceReader) -> None:
    with pytest.raises(ValueError, match="no face was found"):
        reader.read(np.zeros((80, 60, 3), np.uint8))


@needs_cv2
def test_shrinking_rounds_down() -> None:
    assert shrink(np.zeros((1024, 10, 3), np.uint8)).shape == (1024, 10, 3)
    assert shrink(np.zeros((999, 2000, 3), np.uint8)).shape == (511, 1024, 3)
    assert shrink(np.zeros((1, 5000, 3), np.uint8)).shape == (1, 1024, 3)


def some_identity() -> IdentityFeatures:
    hidden = tuple(torch.full((1, 3, 4), float(i), dtype=torch.bfloat16) for i in range(12))
    return IdentityFeatures(
        torch.randn(1, 10), hidden, torch.arange(48, dtype=torch.uint8).view(4, 4, 3), torch.ones(5, 2)
    )


def test_identity_files(tmp_path: Path) -> None:
    identity = some_identity()
    save_identity(tmp_path / "who.safetensors", identity)
    again = load_identity(tmp_path / "who.safetensors")
    assert [int(h[0, 0, 0]) for h in again.id_vit_hidden] == list(range(12))
    assert all(torch.equal(a, b) for a, b in zip(identity.tensors().values(), again.tensors().values(), strict=True))
    (tmp_path / "text").write_text("hello, this is not a file of tensors")
    save_file({"latents": torch.ones(1)}, tmp_path / "latents.safetensors")
    save_file(identity.tensors() | {"face_kps": torch.ones(4, 2)}, tmp_path / "wrong.safetensors")
    for name, message in (
        ("text", "not a safetensors file"),
        ("latents.safetensors", "no identity features"),
        ("wrong.safetensors", "wrong shape or kind"),
        ("missing", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_identity(tmp_path / name)


def read_on_rank(fail: bool) -> object:
    mesh = distributed(Layout(ring=3))

    def make() -> tuple[IdentityFeatures, list[str]]:
        assert mesh.is_main, "only rank 0 reads the picture"
        if fail:
            raise FileNotFoundError("face_encoder is missing")
        torch.manual_seed(3)
        return some_identity(), ["two faces"]

    try:
        identity, said = on_main(mesh, make)
    except Exception as error:
        return type(error).__name__, str(error)
    return identity.tensors(), said


def test_ranks_receive_what_rank_0_reads(run_ranks: RankPool) -> None:
    results = run_ranks(3, read_on_rank, False)
    for named, said in results:
        assert said == ["two faces"]
        assert all(torch.equal(named[name], tensor) for name, tensor in results[0][0].items())
    failures = run_ranks(3, read_on_rank, True)
    assert [kind for kind, _ in failures] == ["FileNotFoundError"] * 3
    assert {text for _, text in failures} == {"face_encoder is missing"}


@needs_onnx
def test_the_demos_face_models_read_the_demos_portrait(tmp_path: Path) -> None:
    """Files under the published names, loaded by the published loader; its detectors see one face and agree."""
    config = demo_config()
    write_face_models(tmp_path, config, seed=1)
    reader = FaceReader.load(tmp_path, torch.device("cpu"), torch.bfloat16)
    identity, said = reader.read(np.asarray(portrait()))
    assert said == []
    assert identity.id_cond.shape == (1, config.id_dim) and identity.id_cond.dtype == torch.bfloat16
    assert [tuple(h.shape) for h in identity.id_vit_hidden] == [(1, 17, config.vit_dim)] * config.scales
    eyes, mouth = identity.face_kps[:2], identity.face_kps[3:]
    assert (eyes[:, 1] < mouth[:, 1]).all() and (identity.face_kps > 80).all() and (identity.face_kps < 240).all()
    assert not torch.equal(identity.image.float().mean((0, 1)), torch.full((3,), 255.0))
    (tmp_path / "face_encoder" / "config.json").write_text('{"tower": {"widht": 3}}')
    with pytest.raises(ValueError, match="widht"):
        FaceReader.load(tmp_path, torch.device("cpu"), torch.bfloat16)
