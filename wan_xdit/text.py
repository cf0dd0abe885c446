"""Wan's text: the original's cleaning of a prompt, and UMT5-xxl's files in the original, in diffusers' and in ComfyUI's
layout.

The original's weights have names of their own, so that `RENAME` stands between them and transformers' UMT5EncoderModel.
The names are those of the modules in `wan/modules/t5.py` of Wan-Video/Wan2.1; the true file, 11 GB, has not been read
here.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from common.text.t5 import UMT5, EncoderFiles, UMT5Numbers
from common.text.tokenizer import SENTENCEPIECE
from common.weights.checkpoint import CheckpointError, load_pickle, open_checkpoint
from common.weights.schema import MAX_LAYERS, build
from wan_xdit.layouts import find_umt5

TOKENS = 512
"""Positions of the text that the transformer sees: features, then zeros."""
UMT5_XXL: Mapping[str, Any] = asdict(
    UMT5Numbers(vocab_size=256384, d_model=4096, d_ff=10240, num_layers=24, num_heads=64)
)
"""The numbers of the one that the published checkpoints come with."""
TOKENIZER = Path("google/umt5-xxl")
WEIGHTS = ("models_t5_*.pth", "models_t5_*.safetensors")
_TOP = {"shared": "token_embedding", "encoder.final_layer_norm": "norm"}
_BLOCK = {
    # transformers' modules, the original's.
    **{f"layer.0.SelfAttention.{name}": f"attn.{name}" for name in "qkvo"},
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.layer_norm": "norm1",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    "layer.1.layer_norm": "norm2",
}
_PLAIN = {
    # What ftfy replaces: ligatures, wide and half-wide forms, curly quotes.
    **{
        code: unicodedata.normalize("NFKC", chr(code))
        for first, last in ((0x132, 0x133), (0x1C4, 0x1CC), (0x1F1, 0x1F3), (0xFB00, 0xFB06), (0xFF01, 0xFFEF))
        for code in range(first, last + 1)
    },
    **dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
}


def clean(prompt: str) -> str:
    """A prompt as the original hands it to the tokenizer: HTML's entities undone twice, white space made single.

    The original lets ftfy repair the text first. What that does to characters one by one is done here too: straight
    quotes for curly ones, plain letters and marks for ligatures and wide forms (the commas of Wan's own negative
    prompt), composed accents. Text that was decoded by a wrong code page, which ftfy guesses, stays as it is.
    """
    text = html.unescape(html.unescape(prompt))
    text = unicodedata.normalize("NFC", text.translate(_PLAIN))
    return re.sub(r"\s+", " ", text).strip()


def find_text_encoder(directory: str | Path) -> EncoderFiles:
    """UMT5's files in a folder of any layout. ValueError says what is missing, and where it belongs."""
    root = Path(directory).expanduser()
    files = sorted(path for pattern in WEIGHTS for path in root.glob(pattern))
    if not files:
        return _comfyui(root) or EncoderFiles.find(root, UMT5)
    tokenizers = [root / TOKENIZER / name for name in UMT5.tokenizers]
    tokenizer = next((path for path in tokenizers if path.is_file()), None)
    if tokenizer is None:
        names = " or ".join(UMT5.tokenizers)
        raise ValueError(f"no tokenizer for the UMT5 text encoder: put {names} into {root / TOKENIZER}")
    numbers = read_numbers(files[0])
    return EncoderFiles(files[0], tokenizer, (files[0],), UMT5, numbers, rename_table(numbers.num_layers))


def _comfyui(root: Path) -> EncoderFiles | None:
    """ComfyUI's one file, whose tensors have transformers' names and one of which is the tokenizer."""
    file = None if (root / "text_encoder").is_dir() else find_umt5(root)
    if file is None or (file.parent == root and (root / "config.json").is_file()):
        return None
    tokenizers = [root / folder / name for folder in ("tokenizer", TOKENIZER) for name in UMT5.tokenizers]
    tokenizer = next((path for path in tokenizers if path.is_file()), file)
    if tokenizer == file and SENTENCEPIECE not in open_checkpoint(file):
        names = " or ".join(UMT5.tokenizers)
        raise ValueError(f"{file} has no tokenizer in it (no {SENTENCEPIECE}); put {names} into {root / 'tokenizer'}")
    return EncoderFiles(file, tokenizer, (file,), UMT5, read_numbers(file, original=False))


def rename_table(layers: int) -> dict[str, str]:
    """transformers' modules of UMT5EncoderModel -> the original's, as `common.weights.load.save` takes it."""
    blocks = {
        f"encoder.block.{i}.{ours}": f"blocks.{i}.{theirs}" for i in range(layers) for ours, theirs in _BLOCK.items()
    }
    return _TOP | blocks


def read_numbers(path: Path, original: bool = True) -> UMT5Numbers:
    """The numbers of an encoder without a config.json, by the shapes of its tensors.

    original: they have the original's names, not transformers'. CheckpointError names the file that is no such encoder.
    """
    shapes, names = _shapes(path), rename_table(MAX_LAYERS)
    kind = "the original's UMT5 encoder" if original else "a UMT5 encoder"

    def named(module: str) -> str:
        return f"{names[module] if original else module}.weight"

    def shape(module: str) -> tuple[int, ...]:
        if len(dims := shapes.get(named(module), ())) != 2:
            raise CheckpointError(f"{path}: no matrix {named(module)}; this is not {kind}")
        return dims

    layers, block = 0, "encoder.block.0.layer"
    while layers < MAX_LAYERS and named(f"encoder.block.{layers}.layer.0.layer_norm") in shapes:
        layers += 1
    (vocab, width), (inner, _) = shape("shared"), shape(f"{block}.0.SelfAttention.q")
    (buckets, heads) = shape(f"{block}.0.SelfAttention.relative_attention_bias")
    ff, _ = shape(f"{block}.1.DenseReluDense.wi_1")
    raw = {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": inner // max(heads, 1),
        "d_ff": ff,
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
    return build(UMT5Numbers, {name: name for name in raw}, raw, str(path))


def _shapes(path: Path) -> Mapping[str, tuple[int, ...]]:
    if path.suffix == ".safetensors":
        return {name: entry.shape for name, entry in open_checkpoint(path).items()}
    state = load_pickle(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} does not hold a table of named tensors")
    return {str(name): tuple(part.shape) for name, part in state.items() if isinstance(part, Tensor)}
