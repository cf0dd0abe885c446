"""The face models' files of a checkpoint, compared with the models by their headers before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from common.weights.schema import CheckpointError
from consisid_xdit.config import ConsisIDConfig
from consisid_xdit.eva import EvaTower, eva_state
from consisid_xdit.face import DETECTOR, FOLDER, LANDMARKS, PARSER, RECOGNISER, TOWER, FaceConfig
from consisid_xdit.face_models import BiSeNet, RetinaFace, model_state
from consisid_xdit.onnx_header import read_outline
from consisid_xdit.weights import AGAIN, face_file, require_fit

EMBEDDING = 512  # numbers of ArcFace's
DETECTIONS = 9  # arrays of SCRFD with landmarks: scores, boxes and landmarks at three strides


def check_face_files(model_dir: Path | str, config: ConsisIDConfig) -> None:
    """CheckpointError, naming the file and the way out, where a face model would not load or not fit the transformer.

    Of ONNX files and of files of `torch.save` since 1.6 the headers are read; older ones, which have none, are read.
    """
    folder = Path(model_dir) / FOLDER
    sizes = FaceConfig.read(folder)
    tower = sizes.tower
    have = tower.output, tower.width, len(tower.taps)
    need = config.id_dim - EMBEDDING, config.vit_dim, config.scales
    if have != need:
        raise CheckpointError(
            f"{folder}: its image tower gives {have[0]} numbers and {have[2]} states of width {have[1]}, the "
            f"transformer takes {need[0]} and {need[2]} of {need[1]}; both must come from one checkpoint"
        )
    for name, outputs in ((DETECTOR, DETECTIONS), (RECOGNISER, 1)):
        outline = read_outline(face_file(folder / name))
        if outline.outputs != outputs or not outline.nodes or not outline.inputs:
            raise CheckpointError(
                f"{folder / name} is another network: it has {outline.nodes} operations and {outline.outputs} outputs, "
                f"this one would have {outputs}; {AGAIN}"
            )
    with torch.device("meta"):
        models = RetinaFace(sizes.landmarks_base, sizes.landmarks_channels), BiSeNet(base=sizes.parser_base)
        eye = EvaTower(tower)
    for model, name in zip(models, (LANDMARKS, PARSER), strict=True):
        require_fit(model, model_state(folder / name), folder / name)
    require_fit(eye, eva_state(folder / TOWER), folder / TOWER)
