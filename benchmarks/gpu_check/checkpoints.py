"""Checkpoint folders of the official widths with few blocks and random numbers in them.

Blocks repeat, so a few show what all would take. The numbers are in the files: every way of loading and placing them
is then the ordinary one.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import true_size
from common.registry.forks import Model
from common.weights.checkpoint import open_checkpoint

_POOL = 1 << 22
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16}
SMALL_T5 = {"d_model": 4096, "layers": 1, "heads": 64, "d_kv": 64, "d_ff": 128}


def reduced(model: Model, depth: int) -> Model:
    """The model with `depth` blocks, in its configuration and in its costs. ValueError where they cannot be found."""
    if len(model.stacks) != 1:
        raise ValueError(f"{model.name} has {len(model.stacks)} stacks of blocks; only one can be shortened")
    stack, config = model.stacks[0], model.config
    depth = min(depth, stack.layers)
    names = ("depth", "layers", "num_layers")
    name = next((f.name for f in fields(config) if f.name in names and getattr(config, f.name) == stack.layers), None)
    if name is None:
        raise ValueError(f"the configuration of {model.name} has no number of blocks by a usual name")
    cross = tuple(replace(one, layers=max(1, one.layers * depth // stack.layers)) for one in stack.cross)
    stack = replace(stack, layers=depth, cross=cross)
    return replace(model, config=replace(config, **{name: depth}), stacks=(stack,))


def make(model: Model, folder: Path) -> Path:
    """A folder for a (reduced) model: transformer and autoencoder with random numbers, a T5 of one layer."""
    if (folder / "random").is_file():
        return folder
    true_size.make(model, folder, text=SMALL_T5)
    for part in ("transformer", "vae"):
        for file in sorted((folder / part).glob("*.safetensors")):
            fill(file)
    (folder / "random").touch()
    return folder


def fill(file: Path, seed: int = 0) -> None:
    """Random numbers into a safetensors file: weights ~ 1 / sqrt(inputs), biases 0, the other vectors 1.

    From one pool of numbers, again and again: what matters is that no matrix is of zeros, which multiply faster.
    """
    pool = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32)
    for stored in open_checkpoint(file).values():
        count = int(np.prod(stored.shape))
        if len(stored.shape) > 1:
            values = np.resize(pool, min(count, _POOL)) * (count / stored.shape[0]) ** -0.5
        else:
            values = np.full(min(count, _POOL), 0.0 if stored.name.endswith("bias") else 1.0, dtype=np.float32)
        raw = values.astype(_NUMPY[stored.dtype]) if stored.dtype in _NUMPY else _bf16(values)
        target = np.memmap(file, dtype=raw.dtype, mode="r+", offset=stored.offset, shape=(count,))
        for at in range(0, count, raw.size):
            target[at : at + raw.size] = raw[: count - at]
        target.flush()


def _bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
