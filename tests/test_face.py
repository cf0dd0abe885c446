"""The face path of ConsisID against tensors that the reference's own functions made.

`data/face_golden.py` made them (insightface 2.1, facexlib 0.3.0, consisid_eva_clip 1.0.2); weights
are drawn by name on either side, so that only inputs and outputs are stored.
"""

from __future__ import annotations

import importlib.util
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.parallel import Layout, distributed, on_main
from consisid_xdit.demo import demo_config, portrait
from consisid_xdit.eva import EvaConfig, EvaTower, load_eva, rope_tables
from consisid_xdit.face import (
    FaceReader,
    IdentityFeatures,
    choose_face,
    load_identity,
    save_identity,
    shrink,
    warnings,
)
from consisid_xdit.face_demo import write_face_models
from consisid_xdit.face_detect import ArcFace, Faces, RetinaDetector, Scrfd, align, onnx_network, suppress
from consisid_xdit.face_models import BiSeNet, RetinaFace, load_model
from tests.conftest import RankPool

DATA = Path(__file__).parent / "data"
needs_cv2 = pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="opencv is not installed (extra face)")
needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("cv2") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="opencv or onnxruntime is not installed (extra face)",
)
PHOTOGRAPH_SEED, STRICT = 7, 5.0  # a picture and a bias at which RetinaFace finds exactly one "face"
EVA_TINY = EvaConfig(image_size=42, width=32, heads=2, layers=24, hidden=85, output=12)


def seeded_state(shapes: dict[str, torch.Size | tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that depend on the name and the shape only, scaled to keep activations near 1."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.long)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        x = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            x = x.abs() * 0.2 + 0.9
        elif len(shape) > 1 and not name.endswith(("cls_token", "pos_embed")):
            x = x * (2 / x[0].numel()) ** 0.5
        elif name.endswith("weight"):
            x = 1 + 0.1 * x
        else:
            x = 0.1 * x
        state[name] = x
    return state


def retina_state(shapes: dict[str, torch.Size | tuple[int, ...]], strict: float = 0.0) -> dict[str, Tensor]:
    """As `seeded_state`, tempered so that some places, but not all, count as faces; fewer when `strict`."""
    state = seeded_state(shapes)
    state["body.conv1.weight"] *= 0.01  # the detector's input is in units of 255
    for name in state:
        if name.endswith("bn3.weight"):
            state[name] *= 0.3
    for i, bias in enumerate((-10.0, 4.0, 5.0)):
        state[f"ClassHead.{i}.conv1x1.weight"] *= 0.8
        state[f"ClassHead.{i}.conv1x1.bias"] = torch.tensor([0.0, bias - strict, 0.0, bias - strict])
    return state


def parser_state(shapes: dict[str, torch.Size | tuple[int, ...]]) -> dict[str, Tensor]:
    """As `seeded_state`, with the two classes that these weights see most made background and face."""
    state = seeded_state(shapes)
    weight = state["conv_out.conv_out.weight"]
    weight = weight - weight.mean(1, keepdim=True)
    weight[[0, 6]] = weight[[6, 0]]
    state["conv_out.conv_out.weight"] = weight
    return state


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth random RGB picture with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(rng.uniform(2, 20) * x + rng.uniform(2, 20) * y + c) for c in range(3)]
    noise = rng.normal(0, 0.1, (height, width, 3))
    return ((np.stack(waves, -1) + noise).clip(-1, 1) * 127 + 128).astype(np.uint8)


def photograph() -> np.ndarray:
    return picture(150, 1100, PHOTOGRAPH_SEED)


def crowd() -> np.ndarray:
    return picture(135, 180, 7)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "face_golden.safetensors")


@pytest.fixture(scope="module")
def retina() -> RetinaFace:
    model = RetinaFace().eval()
    model.load_state_dict(retina_state({k: v.shape for k, v in model.state_dict().items()}))
    return model


def tiny_eva() -> EvaTower:
    tower = EvaTower(EVA_TINY).eval()
    state = tower.state_dict()
    fresh = seeded_state({k: v.shape for k, v in state.items() if not k.startswith("rope.")})
    tower.load_state_dict(state | fresh)
    return tower


def close(ours: Tensor | np.ndarray, reference: Tensor, tolerance: float) -> None:
    """The largest difference is within `tolerance` of the largest number."""
    ours = torch.as_tensor(ours)
    assert ours.shape == reference.shape
    assert float((ours - reference).abs().max() / reference.abs().max()) < tolerance


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


def same_opencv() -> bool:
    """OpenCV 5, with which the reference ran, rounds interpolated pixels in another way than OpenCV 4."""
    import cv2

    return cv2.__version__.startswith("5.")


def same_picture(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape
    if same_opencv():
        # A value in ten thousand lies so that another CPU rounds it to the next grey level.
        assert (ours != reference).float().mean() < 1e-3
        assert (ours.int() - reference.int()).abs().max() <= 1
    else:
        assert (ours.float() - reference.float()).abs().mean() < 1


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


# --- a photograph's way to identity features ---


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
