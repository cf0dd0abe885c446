"""Makes face_golden.safetensors and the two small ONNX files with the reference's own functions.

Not run by the tests. It needs a throw-away environment with insightface 2.1, facexlib 0.3.0,
consisid_eva_clip 1.0.2, onnx, onnxruntime, opencv-python-headless, scikit-image, timm, einops, ftfy,
scipy, numba, filterpy and torchvision, then: PYTHONPATH=. python tests/data/face_golden.py

Weights are not stored: `seeded_state` draws them by name on either side.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent


def declare_torchvision_ops():
    """Let a CUDA build of torchvision import beside a CPU torch; nms gets a plain implementation."""
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    def nms(boxes, scores, iou_threshold):
        order, kept = scores.argsort(descending=True, stable=True).tolist(), []
        for i in order:
            good = True
            for j in kept:
                a, b = boxes[i], boxes[j]
                wide = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)
                high = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
                both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
                good &= bool(wide * high / (both - wide * high) <= iou_threshold)
            if good:
                kept.append(i)
        return torch.tensor(kept, dtype=torch.long)

    torchvision.ops.nms = nms
    return library


def reference_tower():
    from functools import partial

    from consisid_eva_clip.eva_vit_model import EVAVisionTransformer
    from consisid_eva_clip.transformer import LayerNorm

    from tests.helpers.face import EVA_TINY, seeded_state

    c = EVA_TINY
    tower = EVAVisionTransformer(
        img_size=c.image_size, patch_size=c.patch_size, num_classes=c.output, use_mean_pooling=False,
        embed_dim=c.width, depth=c.layers, num_heads=c.heads, mlp_ratio=2.6667, qkv_bias=True,
        norm_layer=partial(LayerNorm, eps=1e-6), xattn=True, rope=True, pt_hw_seq_len=c.rope_grid,
        intp_freq=True, naiveswiglu=True, subln=True,
    ).eval()  # fmt: skip
    state = tower.state_dict()
    fresh = seeded_state({k: v.shape for k, v in state.items() if ".rope." not in f".{k}"})
    tower.load_state_dict(state | fresh)
    return tower


def golden_eva(out):
    from consisid_eva_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import normalize, resize

    from tests.helpers.face import picture

    def prepare(rgb, size):
        x = torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255.0
        return normalize(resize(x, size, InterpolationMode.BICUBIC), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)

    tower = reference_tower()
    square = prepare(picture(50, 50, 4), tower.image_size)
    with torch.no_grad():
        embedding, hidden = tower(square, return_all_features=False, return_hidden=True, shuffle=False)
    out["eva.resize_336"] = prepare(picture(512, 512, 5), 336)[:, :, ::7, ::7]
    out["eva.input"], out["eva.embedding"] = square, embedding
    out["eva.rope_cos"], out["eva.rope_sin"] = tower.rope.freqs_cos, tower.rope.freqs_sin
    for i, h in enumerate(hidden):
        out[f"eva.hidden.{i}"] = h


def helper_around(model):
    """facexlib's helper with this detector instead of downloaded ones."""
    from unittest import mock

    from facexlib.utils.face_restoration_helper import FaceRestoreHelper

    where = "facexlib.utils.face_restoration_helper"
    with (
        mock.patch(f"{where}.init_detection_model", lambda *a, **k: model),
        mock.patch(f"{where}.init_parsing_model", lambda *a, **k: None),
    ):
        return FaceRestoreHelper(
            1, face_size=512, crop_ratio=(1, 1), det_model="retinaface_resnet50", save_ext="png", device="cpu"
        )


def golden_retina(out):
    from facexlib.detection.retinaface import RetinaFace

    from tests.helpers.face import crowd, retina_state

    model = RetinaFace("resnet50", device="cpu").eval()
    model.load_state_dict(retina_state({k: v.shape for k, v in model.state_dict().items()}))
    image = crowd()
    with torch.no_grad():
        x, _ = model.transform(image, True)
        loc, conf, points = model(x - model.mean_tensor)
        out["retina.scores"] = conf[0, :, 1]
        out["retina.boxes"], out["retina.points"] = loc[0, ::5], points[0, ::5]
        found = model.detect_faces(image, 0.97)
    print("retina", len(found), conf[0, :, 1].quantile(torch.tensor([0.0, 0.5, 0.9, 0.99, 1.0])))
    out["retina.found"] = torch.from_numpy(found)
    helper = helper_around(model)
    helper.read_image(image)
    helper.get_face_landmarks_5(only_center_face=True)
    helper.align_warp_face()
    out["retina.center_landmarks"] = torch.from_numpy(np.asarray(helper.all_landmarks_5[0]))
    out["retina.crop"] = torch.from_numpy(helper.cropped_faces[0][::8, ::8].copy())


def golden_bisenet(out):
    from facexlib.parsing.bisenet import BiSeNet

    from tests.helpers.face import picture, seeded_state

    model = BiSeNet(19).eval()
    model.load_state_dict(seeded_state({k: v.shape for k, v in model.state_dict().items()}))
    x = torch.from_numpy(picture(64, 96, 6)).permute(2, 0, 1)[None] / 255.0
    with torch.no_grad():
        out["bisenet.scores"] = model(x)[0][:, :, ::4, ::4]


def small_onnx(path, outputs, size, seed, pool):
    """A network of two convolutions: `outputs` maps a name to (channels, stride, values, sigmoid)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    nodes, weights, values = [], [], []

    def constant(name, array):
        weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    for name, (channels, stride, count, sigmoid, scale) in outputs.items():
        # The coarse level finds things as large as the picture.
        base = -3 if sigmoid else 20 if name == "bbox_32" else 5
        kernel = constant(f"{name}.w", (rng.normal(size=(channels, 3, 1, 1)) * scale).astype(np.float32))
        bias = constant(f"{name}.b", (rng.normal(size=channels) * 0.3 + base).astype(np.float32))
        cell = [stride, stride]
        nodes.append(helper.make_node("AveragePool", ["x"], [f"{name}.a"], strides=cell, kernel_shape=cell))
        nodes.append(helper.make_node("Conv", [f"{name}.a", kernel, bias], [f"{name}.c"], kernel_shape=[1, 1]))
        last = f"{name}.c"
        if pool:
            nodes.append(helper.make_node("Tanh", [last], [f"{name}.t"]))
            nodes.append(helper.make_node("GlobalAveragePool", [f"{name}.t"], [f"{name}.p"]))
            nodes.append(helper.make_node("Flatten", [f"{name}.p"], [f"{name}.f"]))
            matrix = constant(f"{name}.m", rng.normal(size=(channels, count)).astype(np.float32))
            nodes.append(helper.make_node("MatMul", [f"{name}.f", matrix], [name]))
            values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, count]))
            continue
        nodes.append(helper.make_node("Transpose", [last], [f"{name}.t"], perm=[2, 3, 0, 1]))
        shape = constant(f"{name}.s", np.array([-1, count], dtype=np.int64))
        nodes.append(helper.make_node("Reshape", [f"{name}.t", shape], [f"{name}.r" if sigmoid else name]))
        if sigmoid:
            nodes.append(helper.make_node("Sigmoid", [f"{name}.r"], [name]))
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, count]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size or "h", size or "w"])
    graph = helper.make_graph(nodes, "small", [x], values, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def golden_onnx(out):
    from insightface.app.common import Face
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX
    from insightface.model_zoo.scrfd import SCRFD

    from tests.helpers.face import crowd

    heads = {}
    for kind, values, sigmoid, scale in (("score", 1, True, 3.0), ("bbox", 4, False, 1.0), ("kps", 10, False, 1.0)):
        for stride in (8, 16, 32):
            heads[f"{kind}_{stride}"] = (2 * values, stride, values, sigmoid, scale)
    small_onnx(HERE / "scrfd_small.onnx", heads, None, 1, pool=False)
    small_onnx(HERE / "arcface_small.onnx", {"embedding": (8, 8, 512, False, 1.0)}, 112, 2, pool=True)
    image = crowd()
    detector = SCRFD(str(HERE / "scrfd_small.onnx"))
    detector.prepare(-1, input_size=(640, 640), det_thresh=0.5)
    boxes, points = detector.detect(image, input_size=(640, 640))
    tall = np.ascontiguousarray(image.transpose(1, 0, 2))
    tall_boxes, tall_points = detector.detect(tall, input_size=(640, 640))
    print("scrfd", boxes.shape, tall_boxes.shape, boxes[:3])
    n = 60
    out["scrfd.boxes"], out["scrfd.points"] = torch.from_numpy(boxes[:n]), torch.from_numpy(points[:n])
    out["scrfd.tall_boxes"], out["scrfd.tall_points"] = (
        torch.from_numpy(tall_boxes[:n]),
        torch.from_numpy(tall_points[:n]),
    )
    out["scrfd.count"] = torch.tensor([len(boxes), len(tall_boxes)])
    recogniser = ArcFaceONNX(str(HERE / "arcface_small.onnx"))
    assert recogniser.input_mean == 127.5
    landmarks = np.array([[60, 70], [110, 66], [88, 95], [66, 120], [108, 117]], dtype=np.float32)
    face = Face(kps=landmarks)
    out["arcface.landmarks"] = torch.from_numpy(landmarks)
    out["arcface.embedding"] = torch.from_numpy(recogniser.get(image, face))
    out["arcface.unaligned"] = torch.from_numpy(recogniser.get_feat(image)[0])


def golden_path(out):
    """diffusers' own process_face_embeddings_infer with the small models, from a picture that has to shrink."""
    from types import SimpleNamespace

    from consisid_eva_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from diffusers.pipelines.consisid.consisid_utils import process_face_embeddings_infer
    from facexlib.detection.retinaface import RetinaFace
    from facexlib.parsing.bisenet import BiSeNet
    from insightface.app.common import Face
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX
    from insightface.model_zoo.scrfd import SCRFD

    from tests.helpers.face import STRICT, parser_state, photograph, retina_state

    retina, parser = RetinaFace("resnet50", device="cpu").eval(), BiSeNet(19).eval()
    retina.load_state_dict(retina_state({k: v.shape for k, v in retina.state_dict().items()}, STRICT))
    parser.load_state_dict(parser_state({k: v.shape for k, v in parser.state_dict().items()}))
    tower = reference_tower()
    detector = SCRFD(str(HERE / "scrfd_small.onnx"))
    detector.prepare(-1, input_size=(640, 640), det_thresh=0.5)
    recogniser = ArcFaceONNX(str(HERE / "arcface_small.onnx"))

    def get(image):
        boxes, points = detector.detect(image, input_size=(640, 640))
        faces = [Face(bbox=b[:4], kps=k, det_score=b[4]) for b, k in zip(boxes, points)]
        for face in faces:
            recogniser.get(image, face)
        return faces

    face_helper = helper_around(retina)
    face_helper.face_parse = parser
    for name, app in (("path", SimpleNamespace(get=get)), ("fallback", SimpleNamespace(get=lambda image: []))):
        with torch.no_grad():
            id_cond, hidden, image, kps = process_face_embeddings_infer(
                face_helper, tower, recogniser, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, app,
                torch.device("cpu"), torch.float32, photograph(), is_align_face=True,
            )  # fmt: skip
        out[f"{name}.id_cond"], out[f"{name}.kps"] = id_cond, torch.from_numpy(np.asarray(kps, dtype=np.float32))
        out[f"{name}.hidden"] = torch.stack(hidden)
        out[f"{name}.image"] = torch.from_numpy(np.asarray(image)[::8, ::8].copy())


def main():
    from safetensors.torch import save_file

    keep = declare_torchvision_ops()
    out = {}
    golden_onnx(out)
    golden_eva(out)
    golden_retina(out)
    golden_bisenet(out)
    golden_path(out)
    save_file({k: v.contiguous().clone() for k, v in out.items()}, HERE / "face_golden.safetensors")
    print(sum(v.numel() * v.element_size() for v in out.values()), "bytes", keep is not None)


if __name__ == "__main__":
    main()
