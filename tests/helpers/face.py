"""Seeded weights, pictures and comparisons for the face path of ConsisID; `data/face_golden.py` uses the same."""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from consisid_xdit.eva import EvaConfig, EvaTower

DATA = Path(__file__).parents[1] / "data"
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


def stored() -> dict[str, Tensor]:
    """What the reference's functions made."""
    return load_file(DATA / "face_golden.safetensors")


def crowd() -> np.ndarray:
    return picture(135, 180, 7)


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
