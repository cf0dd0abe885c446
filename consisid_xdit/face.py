"""From a photograph to what ConsisID knows of a person, in the reference's order of operations.

The largest face is found by SCRFD and recognised by ArcFace; RetinaFace's landmarks bring it to a 512 x 512 crop;
BiSeNet whitens everything in it that is not face; the EVA02-CLIP tower looks at the crop in grey. The same crop in
colour becomes the pipeline's first frame. One picture, once per generation: rank 0 does it, the others receive it.

Needs the extra `face` and the checkpoint's folder `face_encoder`; `--id-embeddings` needs neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.weights.checkpoint import CheckpointError, open_checkpoint, write_file
from common.weights.schema import build, check_keys, read_object, shown
from consisid_xdit.config import ConsisIDConfig
from consisid_xdit.eva import EvaConfig, EvaTower, load_eva
from consisid_xdit.face_detect import (
    ArcFace,
    Faces,
    Picture,
    RetinaDetector,
    Scrfd,
    align,
    onnx_network,
    require,
)
from consisid_xdit.face_models import BiSeNet, RetinaFace, load_model

FOLDER = "face_encoder"
DETECTOR = "models/antelopev2/scrfd_10g_bnkps.onnx"
RECOGNISER = "models/antelopev2/glintr100.onnx"
LANDMARKS = "detection_Resnet50_Final.pth"
PARSER = "parsing_bisenet.pth"
TOWER = "EVA02_CLIP_L_336_psz14_s6B.pt"
CONFIG = "config.json"  # only where the models are not the published ones

LONGEST_SIDE = 1024
SMALLEST_FACE = 32  # pixels; below, recogniser and crop see interpolation only
SMALL_FACE = 112  # the recogniser's own input
BACKGROUND = (0, 7, 8, 9, 14, 15, 16, 18)  # BiSeNet's classes that are not face: ears, neck, cloth, hat, ...
HIDDEN = "id_vit_hidden"


@dataclass(frozen=True)
class IdentityFeatures:
    """What the transformer and the pipeline take of a person."""

    id_cond: Tensor
    """(1, 1280), ArcFace's 512 numbers as they come, then the image tower's 768 at length 1."""
    id_vit_hidden: tuple[Tensor, ...]
    """Five (1, 577, 1024), the tower's hidden states."""
    image: Tensor
    """(512, 512, 3) uint8 RGB, the aligned face on white."""
    face_kps: Tensor
    """(5, 2) fp32, eyes, nose and corners of the mouth in pixels of the photograph (at most 1024 long)."""

    def tensors(self) -> dict[str, Tensor]:
        hidden = {f"{HIDDEN}.{i}": h for i, h in enumerate(self.id_vit_hidden)}
        return {"id_cond": self.id_cond, "image": self.image, "face_kps": self.face_kps} | hidden

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> IdentityFeatures:
        hidden = sorted(
            (name for name in tensors if name.startswith(f"{HIDDEN}.")), key=lambda n: int(n.split(".")[-1])
        )
        return cls(tensors["id_cond"], tuple(tensors[name] for name in hidden), tensors["image"], tensors["face_kps"])


def save_identity(path: Path | str, identity: IdentityFeatures) -> None:
    """Write a safetensors file, whole or not at all."""
    views = {name: [tensor.detach().cpu().contiguous()] for name, tensor in identity.tensors().items()}
    write_file(Path(path), views, {"format": "pt", "kind": "consisid identity"})


def load_identity(path: Path | str, config: ConsisIDConfig | None = None) -> IdentityFeatures:
    """What `save_identity` wrote: one person, finite, of the widths that a model with `config` takes.

    CheckpointError says what else the file is.
    """
    checkpoint = open_checkpoint(path)
    names = set(checkpoint)
    hidden = {name for name in names if name.startswith(f"{HIDDEN}.")}
    if {"id_cond", "image", "face_kps"} != names - hidden or hidden != {f"{HIDDEN}.{i}" for i in range(len(hidden))}:
        raise CheckpointError(
            f"{path} holds no identity features (id_cond, {HIDDEN}.0 ..., image, face_kps); "
            "make such a file with --save-id-embeddings"
        )
    identity = IdentityFeatures.from_tensors({name: checkpoint.tensor(name).clone() for name in names})
    if problem := _problem(identity, config):
        raise CheckpointError(f"{path}: identity features of a wrong shape or kind ({problem}); make the file again")
    return identity


def _problem(identity: IdentityFeatures, config: ConsisIDConfig | None) -> str | None:
    """What is wrong with features from a file."""
    person, hidden, image, kps = identity.id_cond, identity.id_vit_hidden, identity.image, identity.face_kps
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != torch.uint8 or not image.numel():
        return f"image is {list(image.shape)}, not (H, W, 3) of bytes"
    if tuple(kps.shape) != (5, 2):
        return f"face_kps is {list(kps.shape)}, not (5, 2)"
    width = person.shape[-1] if config is None or person.ndim != 2 else config.id_dim
    if tuple(person.shape) != (1, width):
        return f"id_cond is {list(person.shape)}, not (1, {width})"
    if not hidden or any(h.ndim != 3 or h.shape != hidden[0].shape or len(h) != 1 or not h.numel() for h in hidden):
        return f"{HIDDEN} are not several of one shape (1, tokens, width)"
    if config is not None and (len(hidden), hidden[0].shape[-1]) != (config.scales, config.vit_dim):
        have = f"{len(hidden)} {HIDDEN} of width {hidden[0].shape[-1]}"
        return f"{have}, the model takes {config.scales} of {config.vit_dim}"
    for name, tensor in identity.tensors().items():
        if name != "image" and not (tensor.is_floating_point() and bool(torch.isfinite(tensor.float()).all())):
            return f"{name} is not of finite numbers"
    return None


@dataclass(frozen=True)
class FaceConfig:
    """Widths of the face models; the defaults are the published files'."""

    tower: EvaConfig = field(default_factory=EvaConfig)
    landmarks_base: int = 64
    landmarks_channels: int = 256
    parser_base: int = 64

    @classmethod
    def read(cls, folder: Path) -> FaceConfig:
        """What `folder`/config.json says; the published widths where there is none. ValueError for another file."""
        path = folder / CONFIG
        if not path.is_file():
            return cls()
        raw, own = read_object(path), {one.name: one.name for one in fields(cls) if one.name != "tower"}
        check_keys(raw, (*own, "tower"), {}, f"{path}, which should describe face models,")
        if not isinstance(tower := raw.get("tower", {}), dict):
            raise CheckpointError(f"{path} says tower={shown(tower)}; it must be an object")
        names = {one.name: one.name for one in fields(EvaConfig)}
        check_keys(tower, names, {}, f"{path} (tower)")
        return build(cls, own, raw, str(path), tower=build(EvaConfig, names, tower, f"{path} (tower)"))


class FaceReader:
    """The five face models. `read` a picture, then drop the reader to free them."""

    def __init__(
        self, detect: Scrfd, recognise: ArcFace, find_landmarks: RetinaDetector, parser: nn.Module, tower: EvaTower
    ) -> None:
        self.detect, self.recognise, self.find_landmarks = detect, recognise, find_landmarks
        self.parser, self.tower = parser, tower

    @classmethod
    def load(cls, model_dir: Path | str, device: torch.device, dtype: torch.dtype) -> FaceReader:
        """The models of `model_dir`/face_encoder; the tower in `dtype`, the small ones in fp32, detection on the CPU.

        Raises CheckpointError naming the file, ImportError naming the extra.
        """
        require("cv2")
        folder = Path(model_dir) / FOLDER
        sizes = FaceConfig.read(folder)
        landmarks = RetinaFace(sizes.landmarks_base, sizes.landmarks_channels)
        return cls(
            Scrfd(onnx_network(folder / DETECTOR)),
            ArcFace(onnx_network(folder / RECOGNISER)),
            RetinaDetector(load_model(landmarks, folder / LANDMARKS, device)),
            load_model(BiSeNet(base=sizes.parser_base), folder / PARSER, device),
            load_eva(folder / TOWER, device, dtype, sizes.tower),
        )

    def read(self, picture: Picture) -> tuple[IdentityFeatures, list[str]]:
        """Features of the largest face in an RGB picture (H, W, 3) uint8, and warnings for the user.

        The embedding and the crop are of the same person. (With several people the reference embeds the largest face
        and crops the most central one.) Raises ValueError when there is no face or too small a one.
        """
        bgr = np.ascontiguousarray(shrink(picture)[..., ::-1])
        faces, landmarks = self.detect(bgr), self.find_landmarks(bgr)
        target, index = choose_face(faces, landmarks)
        crop = align(bgr, landmarks.landmarks[index])
        if len(faces):
            kps, embedding = target.landmarks[0], self.recognise(bgr, target.landmarks[0])
        else:
            kps, embedding = landmarks.landmarks[index], self.recognise.embed(crop)
        grey, colour = self._whiten(crop)
        look, hidden = self._look(grey)
        person = torch.from_numpy(embedding)[None].to(look)
        identity = IdentityFeatures(
            torch.cat([person, look], dim=1),
            tuple(hidden),
            # Truncated, not rounded: the reference's way back to bytes.
            (colour[0].permute(1, 2, 0) * 255).to(torch.uint8),
            torch.from_numpy(np.asarray(kps, np.float32)),
        )
        return identity, warnings(faces, landmarks, target)

    @torch.no_grad()
    def _whiten(self, crop: Picture) -> tuple[Tensor, Tensor]:
        """The crop (512, 512, 3) BGR as grey and as colour (1, 3, 512, 512) in [0, 1], background 1."""
        device = next(self.parser.parameters()).device
        rgb = torch.from_numpy(crop[..., ::-1].copy()).permute(2, 0, 1)[None].to(device).float() / 255.0
        mean, std = (rgb.new_tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        labels = self.parser((rgb - mean) / std).argmax(1, keepdim=True)
        background = torch.isin(labels, labels.new_tensor(BACKGROUND))
        grey = 0.299 * rgb[:, 0:1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:3]
        white = torch.ones_like(rgb)
        return torch.where(background, white, grey), torch.where(background, white, rgb)

    @torch.no_grad()
    def _look(self, grey: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The tower's embedding at length 1, (1, 768), and its hidden states."""
        embedding, hidden = self.tower(self.tower.preprocess(grey).to(self.tower.pos_embed.dtype))
        return embedding / embedding.norm(2, 1, keepdim=True), hidden


def shrink(picture: Picture, longest: int = LONGEST_SIDE) -> Picture:
    """The picture with its longer side at most `longest`, sides rounded down."""
    height, width = picture.shape[:2]
    if max(height, width) <= longest:
        return picture
    cv2 = require("cv2")
    factor = longest / max(height, width)
    size = (max(1, int(width * factor)), max(1, int(height * factor)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_LANCZOS4)


def choose_face(detections: Faces, landmarks: Faces) -> tuple[Faces, int]:
    """The largest face as `detections` has it (as `landmarks` where nothing was found), and its index in `landmarks`.

    Raises ValueError when there is none, when it is tiny, and when the two detectors disagree where it is.
    """
    if not len(landmarks):
        raise ValueError(
            "no face was found in the picture; use one that shows a face from the front, well lit and not cut off"
        )
    faces = detections if len(detections) else landmarks
    target = faces.take(faces.areas.argsort(kind="stable")[-1:])
    side = face_side(target)
    if side < SMALLEST_FACE:
        raise ValueError(
            f"the largest face in the picture is only {side:.0f} pixels wide; use a picture (or a cut-out of it) "
            f"where it has at least {SMALL_FACE}"
        )
    left, top, right, bottom = target.boxes[0, :4]
    x, y = landmarks.centers.T
    distance = np.linalg.norm(landmarks.centers - target.centers, axis=1)
    distance[(x < left) | (x > right) | (y < top) | (y > bottom)] = np.inf
    if not np.isfinite(distance).any():
        raise ValueError("two detectors disagree where the largest face is; cut the picture to one face")
    return target, int(distance.argmin())


def face_side(face: Faces) -> float:
    """The shorter side of the first box, in pixels."""
    left, top, right, bottom = face.boxes[0, :4]
    return float(min(right - left, bottom - top))


def warnings(faces: Faces, landmarks: Faces, target: Faces) -> list[str]:
    """What the user should know of a picture that was used all the same."""
    remarks = []
    count = max(len(faces), len(landmarks))
    if count > 1:
        left, top, right, bottom = target.boxes[0, :4].round().astype(int)
        remarks.append(
            f"{count} faces in the picture; the largest one is used (x {left} to {right}, y {top} to {bottom}). "
            "Cut the picture to the face you mean if it is another"
        )
    if (side := face_side(target)) < SMALL_FACE:
        remarks.append(f"the face is only {side:.0f} pixels wide; likeness suffers below {SMALL_FACE}")
    if not len(faces):
        remarks.append("the first detector found no face; the person is recognised from the aligned crop instead")
    return remarks
