"""Token ids as T5 and UMT5 count them: those of the sentencepiece model followed by `</s>` (id 1), padded with 0.

For T5 that is what upstream's slow tokenizer with `legacy=False` gives; no tokenizer of another library stands between,
so ids do not change with its version.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

EOS, PAD = 1, 0
Codec = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]


class Tokenizer:
    """Prompt -> token ids, from `spiece.model` or `tokenizer.json`, without network."""

    def __init__(self, path: Path) -> None:
        read = _sentencepiece if path.suffix == ".model" else _tokenizer_json
        self._encode, self._decode = read(path)

    def __call__(self, prompt: str, limit: int) -> tuple[list[int], str]:
        """Ids ending in `</s>`, at most `limit` of them, and the text that was cut off."""
        if limit < 1:
            raise ValueError(f"the token limit must be at least 1, not {limit}")
        ids = self._encode(prompt)
        cut = self._decode(ids[limit - 1 :]) if len(ids) >= limit else ""
        return [*ids[: limit - 1], EOS], cut


def _sentencepiece(path: Path) -> Codec:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
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
