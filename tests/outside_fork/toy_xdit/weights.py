"""Where the weights of a checkpoint folder lie."""

from __future__ import annotations

from pathlib import Path

import torch

from common.run.quantize import TransformerFiles
from common.weights.checkpoint import find_files, open_checkpoint
from common.weights.load import on_meta
from toy_xdit.config import read_config
from toy_xdit.transformer import ToyTransformer

FOLDERS = ("transformer", "transformer_2")
STEM = "model"


def transformer_files(folder: Path, dtype: torch.dtype | None = torch.bfloat16) -> tuple[TransformerFiles, ...]:
    """Both transformers, not loaded. Ours are the files' names: no table stands between them."""
    config = read_config(folder)
    checkpoints = [find_files(folder / name, STEM, dtype) for name in FOLDERS]
    return tuple(
        TransformerFiles(on_meta(ToyTransformer, config), open_checkpoint(file), None, file) for file in checkpoints
    )
