"""Eight-bit tensors with one scale for a whole tensor, as ComfyUI's files have them, as `load` and `place` take them.

Beside a layer's `weight` in e4m3 lies the number by which its values are multiplied, under one of `SCALES`; a weight
without one stands for itself. Weights that a module holds in eight bits stay the very bytes they are, with the scale
repeated for each row; any other is widened to fp32 when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from common.weights.checkpoint import DTYPE_NAMES, Checkpoint, CheckpointError, Stored, quoted
from common.weights.float8 import FLOAT8, SCALE

SCALES = ("scale_weight", "weight_scale")
_DROPPED = ("scale_input", "input_scale", "comfy_quant")
"""What else lies beside a weight: how inputs would be rounded, and what the format is called."""
_MARK = "scaled_fp8"
_NARROW = (FLOAT8, torch.float8_e5m2)
_WIDE = (torch.float32, torch.float16, torch.bfloat16)


def with_row_scales(checkpoint: Checkpoint, keep: Callable[[str], bool] = lambda name: False) -> Checkpoint:
    """The checkpoint with its eight-bit tensors as `load` takes them, and without what it does not take.

    keep: says of a tensor's name whether a module holds that weight in eight bits. Checkpoints without eight bits, and
    those with a scale for each row, which this project writes, come back as they are. CheckpointError names the file
    and the tensor whose scale is no single number.
    """
    narrow = {name for name, entry in checkpoint.items() if entry.dtype in _NARROW and name != _MARK}
    if not narrow or any(_rows(checkpoint, name) for name in narrow):
        return checkpoint
    tensors: dict[str, Stored] = {}
    for name, entry in checkpoint.items():
        leaf = name.rpartition(".")[2]
        if name == _MARK or leaf in _DROPPED or (leaf in SCALES and _weight(name) in checkpoint):
            continue
        tensors[name] = entry
        if name in narrow:
            scale = _scale(checkpoint, name)
            if entry.dtype == FLOAT8 and len(entry.shape) == 2 and keep(name):
                tensors[_beside(name, SCALE)] = _repeated(_beside(name, SCALE), entry, scale)
            else:
                tensors[name] = replace(entry, dtype=torch.float32, make=partial(_widened, checkpoint, name, scale))
    return Checkpoint(tensors, checkpoint.label, checkpoint.metadata)


def _beside(name: str, leaf: str) -> str:
    return ".".join((*name.split(".")[:-1], leaf))


def _weight(name: str) -> str:
    return _beside(name, "weight")


def _rows(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a weight has a scale for each of its rows."""
    scale = checkpoint.get(_beside(name, SCALE))
    return scale is not None and scale.shape == (*checkpoint[name].shape[:1], 1)


def _scale(checkpoint: Mapping[str, Stored], name: str) -> Stored | None:
    """The one number that multiplies a tensor, where there is one."""
    if name.rpartition(".")[2] != "weight":
        return None
    scale = next((checkpoint[other] for leaf in SCALES if (other := _beside(name, leaf)) in checkpoint), None)
    if scale is not None and (scale.dtype not in _WIDE or any(side != 1 for side in scale.shape)):
        at = f"{scale.file}: tensor {quoted(scale.name)}"
        kind = DTYPE_NAMES.get(scale.dtype, str(scale.dtype))
        raise CheckpointError(f"{at} has shape {list(scale.shape)} and dtype {kind}, expected one floating number")
    return scale


def _number(scale: Stored | None) -> float:
    if scale is None:
        return 1.0
    return float(Checkpoint({scale.name: scale}, str(scale.file), {}).tensor(scale.name).float())


def _repeated(name: str, weight: Stored, scale: Stored | None) -> Stored:
    rows = weight.shape[0]
    return Stored(
        name, weight.file, torch.float32, (rows, 1), 0, 4 * rows, lambda: torch.full((rows, 1), _number(scale))
    )


def _widened(checkpoint: Checkpoint, name: str, scale: Stored | None) -> Tensor:
    return checkpoint.tensor(name).float() * _number(scale)
