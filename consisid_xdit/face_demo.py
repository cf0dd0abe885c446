"""Face models for the demo: the published architectures, narrow, so that no download is needed.

Weights are random, but random weights find no face. So the detectors are given by hand what makes them fire on skin
colours: SCRFD's and ArcFace's small ONNX files come with the package, and one channel is led through RetinaFace
unchanged. Everything else (alignment, parsing, the image tower, the files and their loading) is as in earnest.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.run.demo import fill, write_json
from consisid_xdit.config import ConsisIDConfig
from consisid_xdit.eva import EvaConfig, EvaTower
from consisid_xdit.face import CONFIG, DETECTOR, FOLDER, LANDMARKS, PARSER, RECOGNISER, TOWER, FaceConfig
from consisid_xdit.face_models import BiSeNet, Residual, RetinaFace

SHIPPED = {DETECTOR: "demo_scrfd.onnx", RECOGNISER: "demo_arcface.onnx"}
# Eyes, nose, corners of the mouth around the middle of a face, in units of a prior's extent over ten.
LAYOUT = (-1.4, -0.9, 1.4, -0.9, 0.0, 0.5, -1.1, 2.0, 1.1, 2.0)


def face_config(config: ConsisIDConfig) -> FaceConfig:
    """Small models whose outputs are as wide as the transformer of the demo wants them."""
    tower = EvaConfig(image_size=56, width=config.vit_dim, heads=2, hidden=48, output=config.id_dim - 512)
    return FaceConfig(tower, landmarks_base=8, landmarks_channels=16, parser_base=8)


def write_face_models(model_dir: Path, config: ConsisIDConfig, seed: int) -> None:
    """The folder `face_encoder` under the published names, with a config.json that says how narrow they are."""
    sizes, folder = face_config(config), model_dir / FOLDER
    write_json(folder / CONFIG, asdict(sizes))
    for name, shipped in SHIPPED.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(__file__).with_name(shipped), folder / name)
    tower = EvaTower(sizes.tower)
    detector = RetinaFace(sizes.landmarks_base, sizes.landmarks_channels)
    parser = BiSeNet(base=sizes.parser_base)
    for i, model in enumerate((tower, detector, parser)):
        fill(model, seed + i)
    fire_on_skin(detector)
    torch.save({f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}, folder / TOWER)
    torch.save(detector.state_dict(), folder / LANDMARKS)
    torch.save(parser.state_dict(), folder / PARSER)


@torch.no_grad()
def fire_on_skin(model: Any) -> None:
    """Lead red, which skin has much of, as channel 0 to the coarsest class head, and put the landmarks in place."""
    _pass_on(model.body.conv1, source=2)  # the input is BGR
    for module in model.body.modules():
        if isinstance(module, Residual):
            module.bn3.weight[0] = 0
            if isinstance(module.downsample, nn.Sequential):
                _pass_on(module.downsample[0])
    _pass_on(model.fpn.output3[0])
    _pass_on(model.ssh3.conv3X3[0])
    for level, head in enumerate(model.ClassHead):
        head.conv1x1.weight.zero_()
        # Two numbers (other, face) for each of two sizes; the smaller size of the coarsest level may fire.
        head.conv1x1.bias.copy_(torch.tensor([0.0, -20.0, 0.0, -20.0]))
        if level == 2:
            head.conv1x1.weight[1, 0] = 0.3  # red reaches about 100 above the mean on skin
    # Boxes are drawn out so that those of one face overlap and all but the best go.
    for heads, values in ((model.BboxHead, (0.0, 0.0, 1.0, 3.0)), (model.LandmarkHead, LAYOUT)):
        for head in heads:
            head.conv1x1.weight.zero_()
            head.conv1x1.bias.copy_(torch.tensor(values * 2))


def _pass_on(conv: Any, source: int = 0) -> None:
    """Output channel 0 is the mean of input channel `source` under the kernel."""
    conv.weight[0] = 0
    conv.weight[0, source] = 1 / (conv.kernel_size[0] * conv.kernel_size[1])
