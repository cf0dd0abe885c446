"""Weights of ConsisID: the transformer's checkpoint folder, and the `.pt`/`.pth` face models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cogvideox_xdit.weights import STEM
from cogvideox_xdit.weights import rename_table as cogvideox_table
from common.run.quantize import TransformerFiles
from common.system.files import reason
from common.weights.checkpoint import load_pickle
from common.weights.load import Rename, find_files, on_meta, open_checkpoint
from common.weights.schema import CheckpointError, quoted
from consisid_xdit.config import ConsisIDConfig, read_consisid
from consisid_xdit.transformer import ConsisIDTransformer, face_modules

AGAIN = "remove it and fetch it with xdit-download consisid, or make identity features elsewhere (--id-embeddings)"


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
    CheckpointError when the file is missing, and when it is no plain set of tensors.
    """
    state = load_pickle(face_file(path))
    for key in ("model", "module", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} does not hold a table of named tensors; {AGAIN}")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def face_file(path: Path | str) -> Path:
    """The path of a file of the folder face_encoder. CheckpointError where it is missing or empty."""
    path = Path(path)
    try:
        if path.stat().st_size and path.is_file():
            return path
        problem = "is empty" if path.is_file() else "is no file"
    except OSError as error:
        problem = "is missing" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else reason(error)
    raise CheckpointError(f"{path} {problem}; it is part of the checkpoint's face_encoder folder: {AGAIN}")


def require_fit(module: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """CheckpointError in one line unless the tensors of a file are the module's, by name, shape and kind."""
    module_state = module.state_dict()
    missing = [name for name in module_state if name not in state]
    extra = [name for name in state if name not in module_state]
    problems = [f"{what} {_some(names)}" for what, names in (("missing", missing), ("unexpected", extra)) if names]
    for name, tensor in module_state.items():
        entry = state.get(name)
        if entry is None:
            continue
        if entry.shape != tensor.shape:
            problems.append(f"{quoted(name)} is {list(entry.shape)}, expected {list(tensor.shape)}")
        elif entry.is_floating_point() != tensor.is_floating_point() or entry.layout != torch.strided:
            problems.append(f"{quoted(name)} is of {entry.dtype}, expected {tensor.dtype}")
    if problems:
        more = f" (and {len(problems) - 2} more)" if len(problems) > 2 else ""
        raise CheckpointError(f"{path} does not fit {type(module).__name__}: {'; '.join(problems[:2])}{more}; {AGAIN}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(quoted(name) for name in names[:2]) + more
