"""Finding and aligning faces: SCRFD and ArcFace (ONNX files of antelopev2) and RetinaFace.

Pictures here are BGR uint8 (H, W, 3), as OpenCV and both detectors have them. The decoding of
either detector's output is written here in a few lines; ONNX files run in onnxruntime on the CPU
(one picture, a fraction of a second). Needs the extra `face`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.system.extras import install
from common.weights.schema import CheckpointError
from consisid_xdit.weights import AGAIN, face_file

Picture = NDArray[np.uint8]
Floats = NDArray[np.float32]
Network = Callable[[Floats], list[Floats]]

# Five landmarks: left eye, right eye, nose, left and right corner of the mouth (as seen).
ARCFACE_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float32,
)
FFHQ_POINTS = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)


def require(module: str) -> ModuleType:
    """Import an optional package; ImportError names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"reading a face from a picture needs {module}: {install('face')} "
            "(or pass precomputed features with --id-embeddings)"
        ) from error


def onnx_network(path: Path | str) -> Network:
    """The ONNX file as a function of one float array, giving all its outputs in order."""
    runtime = require("onnxruntime")
    face_file(path)
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has one exception class per kind of damage
        message = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is not a usable ONNX file: {message}; {AGAIN}") from error
    name = session.get_inputs()[0].name
    return lambda blob: session.run(None, {name: blob})


@dataclass(frozen=True)
class Faces:
    """n faces of one picture, in pixels, most certain first."""

    boxes: Floats
    """(n, 5) left, top, right, bottom, score."""
    landmarks: Floats
    """(n, 5, 2) x, y."""

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def areas(self) -> Floats:
        return (self.boxes[:, 2] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 1])

    @property
    def centers(self) -> Floats:
        return (self.boxes[:, :2] + self.boxes[:, 2:4]) / np.float32(2)

    def take(self, index: NDArray[np.intp] | list[int]) -> Faces:
        return Faces(self.boxes[index], self.landmarks[index])


def suppress(boxes: Floats, threshold: float, border: float = 0.0) -> list[int]:
    """Greedy non-maximum suppression of (n, 5) boxes with scores; indices kept, best first.

    A box goes when its intersection over union with a better one exceeds `threshold`. `border` 1
    counts both edges of a box as pixels, the way SCRFD's own code does.
    """
    left, top, right, bottom, scores = boxes.T
    areas = (right - left + border) * (bottom - top + border)
    order = np.argsort(-scores, kind="stable")
    indices = []
    while order.size:
        best, rest = order[0], order[1:]
        indices.append(int(best))
        wide = np.minimum(right[best], right[rest]) - np.maximum(left[best], left[rest]) + border
        high = np.minimum(bottom[best], bottom[rest]) - np.maximum(top[best], top[rest]) + border
        intersection = np.maximum(wide, 0) * np.maximum(high, 0)
        order = rest[intersection / (areas[best] + areas[rest] - intersection) <= threshold]
    return indices


def finish(boxes: Floats, scores: Floats, landmarks: Floats, overlap: float, border: float) -> Faces:
    """Candidates (n, 4), (n,), (n, 10) -> the faces left after suppression, best first."""
    table = np.concatenate([boxes, scores[:, None]], axis=1).astype(np.float32)
    faces = Faces(table, landmarks.reshape(-1, 5, 2).astype(np.float32))
    return faces.take(suppress(table, overlap, border))


class Scrfd:
    """SCRFD with landmarks (Guo et al., 2021), `scrfd_10g_bnkps.onnx` of antelopev2.

    The network maps (1, 3, size, size) RGB, (x - 127.5) / 128, to nine arrays: scores, box
    distances and landmark distances in units of the stride, each for the strides 8, 16, 32.
    """

    def __init__(self, network: Network, size: int = 640, threshold: float = 0.5, overlap: float = 0.4):
        self.network, self.size = network, size
        self.threshold, self.overlap = threshold, overlap

    def __call__(self, picture: Picture) -> Faces:
        cv2 = require("cv2")
        height, width = picture.shape[:2]
        if height > width:
            new = (max(1, int(self.size / (height / width))), self.size)
        else:
            new = (self.size, max(1, int(self.size * (height / width))))
        scale = new[1] / height
        canvas = np.zeros((self.size, self.size, 3), np.uint8)
        canvas[: new[1], : new[0]] = cv2.resize(picture, new)
        mean = (127.5, 127.5, 127.5)
        blob = cv2.dnn.blobFromImage(canvas, 1 / 128, (self.size, self.size), mean, swapRB=True)
        outputs = self.network(blob)
        levels = [self._level(outputs[i::3], stride) for i, stride in enumerate((8, 16, 32))]
        boxes, scores, landmarks = (np.concatenate(parts) for parts in zip(*levels, strict=True))
        return finish(boxes / scale, scores, landmarks / scale, self.overlap, border=1)

    def _level(self, outputs: list[Floats], stride: int) -> tuple[Floats, Floats, Floats]:
        scores = outputs[0].reshape(-1)
        distances, points = (a.reshape(len(scores), -1) * stride for a in outputs[1:])
        side = self.size // stride
        rows, columns = np.mgrid[:side, :side].astype(np.float32)
        grid = np.stack([columns, rows], axis=-1).reshape(-1, 2)
        centers = (grid * stride).repeat(len(scores) // side**2, axis=0)
        boxes = np.concatenate([centers - distances[:, :2], centers + distances[:, 2:]], axis=1)
        keep = scores >= self.threshold
        return boxes[keep], scores[keep], (points + np.tile(centers, 5))[keep]


class RetinaDetector:
    """`face_models.RetinaFace` on pictures in their own size."""

    def __init__(self, model: nn.Module, threshold: float = 0.97, overlap: float = 0.4):
        self.model = model
        self.threshold, self.overlap = threshold, overlap

    @torch.no_grad()
    def __call__(self, picture: Picture) -> Faces:
        device = next(self.model.parameters()).device
        x = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None].to(device)
        x = x - x.new_tensor([104.0, 117.0, 123.0])[:, None, None]
        offsets, scores, points = (t[0].float().cpu().numpy() for t in self.model(x))
        keep = scores > self.threshold
        priors = retina_priors(*picture.shape[:2])[keep]
        size = np.array(picture.shape[1::-1], np.float32)
        center, extent = np.hsplit(priors, 2)
        middle = center + offsets[keep, :2] * np.float32(0.1) * extent
        half = extent * np.exp(offsets[keep, 2:] * np.float32(0.2)) / 2
        boxes = np.concatenate([middle - half, middle + half], axis=1) * np.tile(size, 2)
        landmarks = np.tile(center, 5) + points[keep] * np.float32(0.1) * np.tile(extent, 5)
        return finish(boxes, scores[keep], landmarks * np.tile(size, 5), self.overlap, border=0)


def retina_priors(height: int, width: int) -> Floats:
    """RetinaFace's anchors (n, 4): centre x, y and extent x, y as fractions of the picture."""
    levels = []
    for stride, sizes in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512))):
        rows, columns = -(-height // stride), -(-width // stride)
        y, x, size = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, sizes, indexing="ij")
        level = np.stack([x * stride / width, y * stride / height, size / width, size / height], axis=-1)
        levels.append(level.reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def similarity(source: Floats, target: Floats) -> NDArray[np.float64]:
    """The 2x3 rotation, scaling and shift that brings `source` (n, 2) closest to `target`.

    Least squares, Umeyama (1991), eq. 40 to 42.
    """
    source, target = source.astype(np.float64), target.astype(np.float64)
    mean, goal = source.mean(0), target.mean(0)
    left, values, right = np.linalg.svd((target - goal).T @ (source - mean) / len(source))
    sign = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    rotation = left * sign @ right
    scale = (values * sign).sum() / source.var(0).sum()
    return np.column_stack([scale * rotation, goal - scale * rotation @ mean])


class ArcFace:
    """The recogniser `glintr100.onnx` of antelopev2: 112 x 112 pixels -> 512 numbers.

    They are not normalised, since ConsisID was trained on them as they come.
    """

    def __init__(self, network: Network, size: int = 112):
        self.network, self.size = network, size

    def embed(self, crop: Picture) -> Floats:
        """(512,) of an aligned picture, resized to 112 x 112 if it is not."""
        mean = (127.5, 127.5, 127.5)
        blob = require("cv2").dnn.blobFromImage(crop, 1 / 127.5, (self.size, self.size), mean, swapRB=True)
        return self.network(blob)[0].reshape(-1)

    def __call__(self, picture: Picture, landmarks: Floats) -> Floats:
        """(512,) of the face with these five landmarks (5, 2)."""
        matrix = similarity(landmarks, ARCFACE_POINTS * (self.size / 112))
        return self.embed(require("cv2").warpAffine(picture, matrix, (self.size, self.size), borderValue=0.0))


def align(picture: Picture, landmarks: Floats, size: int = 512) -> Picture:
    """The face (size, size, 3) brought to the FFHQ template; what lies outside is grey.

    Raises ValueError when the landmarks span no plane (all in one place).
    """
    cv2 = require("cv2")
    points = FFHQ_POINTS * (size / 512)
    matrix = cv2.estimateAffinePartial2D(landmarks, points, method=cv2.LMEDS)[0]
    if matrix is None or not np.isfinite(matrix).all():
        raise ValueError("the face's landmarks fall together, so it cannot be aligned; use a sharper picture")
    border = (135, 133, 132)
    return cv2.warpAffine(picture, matrix, (size, size), borderMode=cv2.BORDER_CONSTANT, borderValue=border)
