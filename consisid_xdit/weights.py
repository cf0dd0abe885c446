"""Weights of ConsisID: the transformer's checkpoint folder, and the `.pt`/`.pth` face models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from cogvideox_xdit.weights import STEM
from cogvideox_xdit.weights import rename_table as cogvideox_table
from common.run.quantize import TransformerFiles
from common.weights.checkpoint import load_pickle
from common.weights.load import Rename, find_files, on_meta, open_checkpoint
from consisid_xdit.config import ConsisIDConfig, read_consisid
from consisid_xdit.transformer import ConsisIDTransformer, face_modules


def rename_table(config: ConsisIDConfig) -> Rename:
    """Our modules -> theirs: CogVideoX's table; the face modules bear the checkpoint's own names."""
    face = nn.ModuleDict(on_meta(face_modules, config))
    return {**cogvideox_table(config), **{name: name for name in face.state_dict()}}


def transformer_files(folder: Path, dtype: torch.dtype | None = torch.bfloat16) -> tuple[TransformerFiles, ...]:
    """What `quantize` and checks read: the folder's transformer, not loaded. CheckpointError as for loading."""
    config = read_consisid(folder).transformer
    assert isinstance(config, ConsisIDConfig)
    file = find_files(folder / "transformer", STEM, dtype)
    module = on_meta(ConsisIDTransformer, config)
    return (TransformerFiles(module, open_checkpoint(file), rename_table(config), file),)


def load_pth(path: Path | str) -> dict[str, Tensor]:
    """Tensors of a pickled checkpoint, on the CPU, without running any code in it.

    Unwraps a `model`, `module` or `state_dict` entry and a `module.` prefix. Raises
    FileNotFoundError when the file is missing and ValueError when it is no plain set of tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; it is part of the checkpoint's face_encoder folder")
    state = load_pickle(Path(path))
    for key in ("model", "module", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} does not hold a table of named tensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
