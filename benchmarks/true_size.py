"""Checkpoint folders of the true sizes without weights: every file has its true header and length, and is sparse.

They load through the programs' own path in the time of reading zeros; the worker then draws random values on the
device, because a GPU multiplies zeros at a higher clock than numbers. A folder takes a few MB of disk.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import forks
from common.registry.forks import Model
from common.run.demo import t5_config, train_tokenizer
from common.text.t5 import new_t5
from common.weights.checkpoint import DTYPE_NAMES
from common.weights.load import Rename, _source, _writes

T5_XXL = {"d_model": 4096, "layers": 24, "heads": 64, "d_kv": 64, "d_ff": 10240}
T5_VOCABULARY = 32128
CAPTIONS = [
    f"A {what} moves slowly to the {side}." for what in ("boat", "bird", "circle") for side in ("left", "right")
]


def hollow(path: Path, state: Mapping[str, Tensor], rename: Rename | None = None) -> None:
    """A sparse safetensors file with the names and shapes of `state` (meta tensors) in the layout of `rename`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    pieces = {k: v for name in state for k, v in _writes(_source(rename, name), name).items()}
    for name, parts in sorted(pieces.items()):
        views = [part.rows(state[part.name]) for part in parts]
        shape = list(views[0].shape)
        if len(views) > 1:
            shape[0] = sum(view.shape[0] for view in views)
        size = sum(view.numel() * view.dtype.itemsize for view in views)
        header[name] = {"dtype": DTYPE_NAMES[views[0].dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def bf16(module: nn.Module, prefix: str = "", keep_fp32: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The module's tensors as bf16, but for the names that stay fp32."""
    return {prefix + n: t if n in keep_fp32 else t.to(torch.bfloat16) for n, t in module.state_dict().items()}


def write_text_encoder(folder: Path, limit: int, sizes: Mapping[str, int] = T5_XXL) -> None:
    """T5 v1.1 XXL by its shapes, or a T5 of other sizes; the tokenizer is a real one with a small vocabulary."""
    with tempfile.TemporaryDirectory() as work:
        spiece = Path(work) / "spiece.model"
        train_tokenizer(CAPTIONS, spiece)
        target = folder / "tokenizer" / "spiece.model"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(spiece.read_bytes())
    settings = {"tokenizer_class": "T5Tokenizer", "legacy": False, "model_max_length": limit, "extra_ids": 0}
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _json(folder / "tokenizer" / "tokenizer_config.json", settings | tokens)
    config = t5_config(T5_VOCABULARY, **sizes)
    _json(folder / "text_encoder" / "config.json", config)
    named = {name: p.to(torch.bfloat16) for name, p in new_t5(config).named_parameters()}
    hollow(folder / "text_encoder" / "model.safetensors", named)


@dataclass(frozen=True)
class Hollow:
    """A checkpoint folder without weights, as a fork's benchmarks describe it."""

    weights: Mapping[str, tuple[Mapping[str, Tensor], Rename | None]]
    """For each file its tensors (on the meta device) and rename table."""
    jsons: Mapping[str, Mapping[str, Any]]
    """By file name."""
    index: Mapping[str, Any]
    """What model_index.json says."""
    text_tokens: int
    """Of the longest prompt."""


def make(model: Model, folder: Path, text: Mapping[str, int] = T5_XXL) -> Path:
    """A folder in the diffusers layout for this model; an existing one is used again. text: sizes of its T5."""
    if (folder / "model_index.json").is_file():
        return folder
    made: Hollow = forks.function(model, "true_size")(model)
    for name, (state, rename) in made.weights.items():
        hollow(folder / name, state, rename)
    for name, value in made.jsons.items():
        _json(folder / name, value)
    write_text_encoder(folder, made.text_tokens, text)
    partial = folder / f"model_index.json.{os.getpid()}"
    _json(partial, made.index)  # last, and at once: its presence means that the folder is complete
    os.replace(partial, folder / "model_index.json")
    return folder


@torch.no_grad()
def draw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in place of the zeros, on the module's own device: latency must not see an all-zero matrix."""
    for i, p in enumerate(module.parameters()):
        generator = torch.Generator(p.device).manual_seed(seed + i)
        if p.ndim < 2:
            p.zero_() if p.is_floating_point() and i % 2 else p.fill_(1.0)
        else:
            p.normal_(std=p[0].numel() ** -0.5, generator=generator)
    return module
