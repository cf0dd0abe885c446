"""Token ids as T5 and UMT5 count them: those of the sentencepiece model followed by `</s>` (id 1), padded with 0.

For T5 that is what upstream's slow tokenizer with `legacy=False` gives; no tokenizer of another library stands between,
so ids do not change with its version.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.weights.checkpoint import open_checkpoint

SENTENCEPIECE = "spiece_model"
"""The tensor that holds the sentencepiece model in files of an encoder which have it in them, as ComfyUI's."""
EOS, PAD = 1, 0
Codec = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]


class Tokenizer:
    """Prompt -> token ids, from `spiece.model`, `tokenizer.json` or a file of weights, without network."""

    def __init__(self, path: Path) -> None:
        read = _tokenizer_json if path.suffix == ".json" else _sentencepiece
        self._encode, self._decode = read(path)

    def __call__(self, prompt: str, limit: int) -> tuple[list[int], str]:
        """Ids ending in `</s>`, at most `limit` of them, and the text that was cut off."""
        if limit < 1:
            raise ValueError(f"the token limit must be at least 1, not {limit}")
        ids = self._encode(prompt)
        rest = self._decode(ids[limit - 1 :]) if len(ids) >= limit else ""
        return [*ids[: limit - 1], EOS], rest


def content(path: Path) -> bytes:
    """The bytes of a tokenizer's file, or of the one in a file of weights. ValueError where there is none in it."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    checkpoint = open_checkpoint(path)
    if SENTENCEPIECE not in checkpoint:
        raise ValueError(f"{path} has no tokenizer in it (no tensor {SENTENCEPIECE})")
    return checkpoint.tensor(SENTENCEPIECE).numpy().tobytes()


def _sentencepiece(path: Path) -> Codec:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=content(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is no sentencepiece model: {error}") from None
    return model.encode, model.decode


def _tokenizer_json(path: Path) -> Codec:
    from tokenizers import Tokenizer as Fast

    try:
        model = Fast.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is no tokenizer.json: {error}") from None
    model.no_truncation()
    model.no_padding()
    return lambda text: model.encode(text, add_special_tokens=False).ids, model.decode
