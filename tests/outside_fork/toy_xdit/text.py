"""The toy's text encoder: a small Llama of transformers with a tokenizer of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.text.encoder import TextWork
from common.weights.checkpoint import open_checkpoint
from common.weights.load import check
from common.weights.schema import read_object


def new_llama(config: dict) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**config)).eval()


def features_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Features (B, L, D). The mask is made here: transformers' own looks at its values, which have none on meta."""
    length, at = ids.shape[1], next(model.parameters())
    causal = torch.full((1, 1, length, length), float("-inf"), dtype=at.dtype, device=at.device).triu(1)
    return model(input_ids=ids, attention_mask=causal, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class LlamaFiles:
    """The encoder's files, found and not read; a `common.text.encoder.Encoder`."""

    folder: Path
    name: str = "llama"
    pad: int = 0

    @property
    def width(self) -> int:
        return int(read_object(self.folder / "config.json")["hidden_size"])

    def tokenize(self, prompt: str, limit: int) -> tuple[list[int], str]:
        from tokenizers import Tokenizer

        encoded = Tokenizer.from_file(str(self.folder / "tokenizer.json")).encode(prompt)
        end = encoded.offsets[limit - 1][1] if len(encoded.ids) > limit else len(prompt)
        return encoded.ids[:limit], prompt[end:]

    def fingerprint(self) -> str:
        parts = [path.read_bytes() for path in sorted(self.folder.iterdir())]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def check(self, width: int | None = None) -> None:
        with torch.device("meta"):
            model = new_llama(read_object(self.folder / "config.json"))
        check(model, open_checkpoint(self.folder / "model.safetensors"))
        if width is not None and self.width != width:
            raise ValueError(f"{self.folder}: features of {self.width}; the transformer takes {width}")

    def load(self, device: torch.device, dtype: torch.dtype, float8: bool = False, stream: bool = False) -> nn.Module:
        """So small that it is neither rounded nor streamed."""
        from transformers import LlamaModel

        return LlamaModel.from_pretrained(self.folder, dtype=dtype).to(device).eval()

    def run(self, model: nn.Module, ids: Tensor) -> Tensor:
        return features_of(model, ids)


def text_work(config: dict, tokens: int) -> TextWork:
    """The encoder at work, for `--dry-run`."""

    def new(dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            return new_llama(config).to(dtype)

    return TextWork(new, features_of, tokens)
