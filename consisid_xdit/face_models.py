"""The two convolutional face models of ConsisID's reference, for inference: RetinaFace and BiSeNet.

Both have the names of the published files (`detection_Resnet50_Final.pth`, `parsing_bisenet.pth`),
so that these load strictly and neither facexlib nor torchvision is needed. Architectures: RetinaFace
with a ResNet-50 and a feature pyramid (Deng et al., 2019), BiSeNet with a ResNet-18 whose 1/8
feature stands in for the spatial path (Yu et al., 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consisid_xdit.weights import load_pth, require_fit

Model = TypeVar("Model", bound=nn.Module)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def _conv_bn(inputs: int, outputs: int, kernel: int, relu: bool = True) -> nn.Sequential:
    layers = [_conv(inputs, outputs, kernel), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class Residual(nn.Module):
    """A residual block; with `expansion` 4 the bottleneck of ResNet-50 (stride in the 3x3)."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int):
        super().__init__()
        self.bottleneck = expansion > 1
        outputs = width * expansion
        if self.bottleneck:
            self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        else:
            self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = (
            nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(self.downsample(x) + y)


class ResNet(nn.Module):
    """Picture -> features at 1/8, 1/16 and 1/32. `depths` (3, 4, 6, 3) with expansion 4 is ResNet-50."""

    def __init__(self, depths: Sequence[int], expansion: int, base: int = 64):
        super().__init__()
        self.conv1, self.bn1 = _conv(3, base, 7, 2), nn.BatchNorm2d(base)
        channels = base
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append(Residual(channels, base * 2**i, stride, expansion))
                channels = base * 2**i * expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.channels = tuple(base * 2**i * expansion for i in (1, 2, 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        features = []
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
            features.append(x)
        return features[1:]


class Pyramid(nn.Module):
    def __init__(self, inputs: Sequence[int], channels: int):
        super().__init__()
        self.output1, self.output2, self.output3 = (_conv_bn(n, channels, 1) for n in inputs)
        self.merge1, self.merge2 = (_conv_bn(channels, channels, 3) for _ in range(2))

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        fine, middle, coarse = self.output1(x[0]), self.output2(x[1]), self.output3(x[2])
        middle = self.merge2(middle + F.interpolate(coarse, middle.shape[2:], mode="nearest"))
        fine = self.merge1(fine + F.interpolate(middle, fine.shape[2:], mode="nearest"))
        return [fine, middle, coarse]


class ContextModule(nn.Module):
    """RetinaFace's SSH module: three receptive fields side by side."""

    def __init__(self, channels: int):
        super().__init__()
        quarter = channels // 4
        self.conv3X3 = _conv_bn(channels, channels // 2, 3, relu=False)
        self.conv5X5_1 = _conv_bn(channels, quarter, 3)
        self.conv5X5_2 = _conv_bn(quarter, quarter, 3, relu=False)
        self.conv7X7_2 = _conv_bn(quarter, quarter, 3)
        self.conv7x7_3 = _conv_bn(quarter, quarter, 3, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv5X5_1(x)
        wide = self.conv7x7_3(self.conv7X7_2(features))
        return F.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(features), wide], dim=1))


class Head(nn.Module):
    def __init__(self, channels: int, values: int, anchors: int = 2):
        super().__init__()
        self.values = values
        self.conv1x1 = nn.Conv2d(channels, values * anchors, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, positions * anchors, values)
        return self.conv1x1(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.values)


class RetinaFace(nn.Module):
    """Face detector. `forward`: BGR pictures (B, 3, H, W), 0..255 minus (104, 117, 123) ->
    box offsets (B, priors, 4), face probability (B, priors), landmark offsets (B, priors, 10);
    priors run over the strides 8, 16, 32, then rows, columns and two sizes.
    """

    def __init__(self, base: int = 64, channels: int = 256):
        super().__init__()
        self.body = ResNet((3, 4, 6, 3), expansion=4, base=base)
        self.fpn = Pyramid(self.body.channels, channels)
        self.ssh1, self.ssh2, self.ssh3 = (ContextModule(channels) for _ in range(3))
        self.ClassHead = nn.ModuleList(Head(channels, 2) for _ in range(3))
        self.BboxHead = nn.ModuleList(Head(channels, 4) for _ in range(3))
        self.LandmarkHead = nn.ModuleList(Head(channels, 10) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pyramid = self.fpn(self.body(x))
        features = [ssh(level) for ssh, level in zip((self.ssh1, self.ssh2, self.ssh3), pyramid, strict=True)]
        boxes, scores, landmarks = (
            torch.cat([head(f) for head, f in zip(heads, features, strict=True)], dim=1)
            for heads in (self.BboxHead, self.ClassHead, self.LandmarkHead)
        )
        return boxes, scores.softmax(-1)[..., 1], landmarks


class ConvBn(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3):
        super().__init__()
        self.conv, self.bn = _conv(inputs, outputs, kernel), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Refinement(nn.Module):
    """Scales channels by what the whole picture says of them."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = ConvBn(inputs, outputs)
        self.conv_atten, self.bn_atten = _conv(outputs, outputs, 1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.bn_atten(self.conv_atten(x.mean((2, 3), keepdim=True))).sigmoid()


class ContextPath(nn.Module):
    def __init__(self, base: int):
        super().__init__()
        self.resnet = ResNet((2, 2, 2, 2), expansion=1, base=base)
        width = 2 * base
        self.arm16, self.arm32 = Refinement(4 * base, width), Refinement(8 * base, width)
        self.conv_head16, self.conv_head32 = ConvBn(width, width), ConvBn(width, width)
        self.conv_avg = ConvBn(8 * base, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x8, x16, x32 = self.resnet(x)
        y = self.arm32(x32) + self.conv_avg(x32.mean((2, 3), keepdim=True))
        y = self.conv_head32(F.interpolate(y, x16.shape[2:], mode="nearest"))
        y = self.conv_head16(F.interpolate(self.arm16(x16) + y, x8.shape[2:], mode="nearest"))
        return x8, y


class Fusion(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.convblk = ConvBn(channels, channels, 1)
        self.conv1 = _conv(channels, channels // 4, 1)
        self.conv2 = _conv(channels // 4, channels, 1)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        x = self.convblk(torch.cat([detail, context], dim=1))
        weight = self.conv2(F.relu(self.conv1(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x + x * weight


class Classifier(nn.Module):
    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.conv, self.conv_out = ConvBn(channels, channels), _conv(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv(x))


class BiSeNet(nn.Module):
    """Face parsing. RGB pictures (B, 3, H, W), ImageNet-normalised -> class scores (B, 19, H, W)."""

    def __init__(self, classes: int = 19, base: int = 64):
        super().__init__()
        self.cp = ContextPath(base)
        self.ffm = Fusion(4 * base)
        self.conv_out = Classifier(4 * base, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.conv_out(self.ffm(*self.cp(x)))
        return F.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=True)


def model_state(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a published file. CheckpointError for a file that is missing or no table of tensors.

    BiSeNet's two auxiliary classifiers (`conv_out16`, `conv_out32`) serve training only and are
    left out.
    """
    auxiliary = ("conv_out16.", "conv_out32.")
    return {name: tensor for name, tensor in load_pth(path).items() if not name.startswith(auxiliary)}


def load_model(model: Model, path: Path | str, device: torch.device | str) -> Model:
    """`model` with the file's weights, fp32, ready for inference; every key must fit.

    Raises CheckpointError naming keys that are missing, unknown or of another shape.
    """
    state = model_state(path)
    require_fit(model, state, path)
    model.load_state_dict(state, strict=True)
    return model.to(device).eval().requires_grad_(False)
