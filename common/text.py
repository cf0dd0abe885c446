"""T5: prompts -> features, loaded and freed inside.

Token ids are those of the sentencepiece model followed by `</s>` (id 1) and padded with 0, which is
what upstream's slow T5 tokenizer with `legacy=False` gives; no tokenizer of another library stands
between, so ids do not change with its version.
"""

from __future__ import annotations

import gc
import hashlib
import os
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import open_checkpoint
from common.t5 import EncoderFiles, load_t5

EOS, PAD = 1, 0
Codec = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]


@dataclass(frozen=True)
class TextFeatures:
    """What T5 makes of B prompts.

    features: (B, L, D) fp32, L = the token limit; rows of masked padding are zero
    mask: (B, L) bool, True where a token of the prompt (its `</s>` included) stands
    used: tokens of each prompt, at most L
    cut: the end of each prompt that did not fit, "" where everything did
    """

    features: Tensor
    mask: Tensor
    used: tuple[int, ...]
    cut: tuple[str, ...]

    @property
    def limit(self) -> int:
        return self.features.shape[1]


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


class TextEncoder:
    """A T5 encoder that loads at the first prompt it has to run and is freed by `free`.

    dtype is that of the weights and of the arithmetic; features come out in fp32.
    cache_dir keeps features by hash of prompt and encoder, so that a known prompt loads nothing.
    float8, stream: see `load_t5`.
    """

    def __init__(
        self,
        directory: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        cache_dir: str | Path | None = None,
        float8: bool = False,
        stream: bool = False,
    ) -> None:
        self.files = EncoderFiles.find(directory)
        self.tokenizer = Tokenizer(self.files.tokenizer)
        self.device, self.dtype = torch.device(device), dtype
        self.width = self.files.numbers().d_model
        self.options = {"float8": float8, "stream": stream}
        kind = f"{dtype} float8" if float8 else str(dtype)
        self._cache = None if cache_dir is None else FeatureCache(cache_dir, self.files, kind, self.width)
        self.model: nn.Module | None = None

    def __enter__(self) -> TextEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def free(self) -> None:
        """Drop the weights and hand their memory back to the device."""
        self.model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, prompts: Sequence[str], max_length: int, use_mask: bool) -> TextFeatures:
        """Features of every prompt, cut to `max_length` tokens.

        use_mask: T5 sees the prompt's own tokens only (Mochi). Otherwise the prompt is padded to
        `max_length` and T5 attends to the padding as to any token (CogVideoX).
        One prompt at a time, so that a prompt's features do not depend on its neighbours.
        """
        features = torch.zeros(len(prompts), max_length, self.width)
        mask = torch.zeros(len(prompts), max_length, dtype=torch.bool)
        cuts = []
        for b, prompt in enumerate(prompts):
            ids, cut = self.tokenizer(prompt, max_length)
            mask[b, : len(ids)] = True
            cuts.append(cut)
            padded = ids if use_mask else ids + [PAD] * (max_length - len(ids))
            known = self._cache.get(padded) if self._cache else None
            rows = self._run(padded) if known is None else known
            if self._cache and known is None:
                self._cache.put(padded, rows)
            features[b, : len(rows)] = rows
        used = tuple(int(n) for n in mask.sum(1))
        return TextFeatures(features, mask, used, tuple(cuts))

    @torch.no_grad()
    def _run(self, ids: list[int]) -> Tensor:
        if self.model is None:
            self.model = load_t5(self.files, self.device, self.dtype, **self.options)
        # The ids are exactly the tokens T5 may attend to, so no mask is needed: masked padding
        # has weight zero in every softmax and leaves no trace in the other rows.
        out = self.model(input_ids=torch.tensor([ids], device=self.device)).last_hidden_state
        return out[0].to("cpu", torch.float32)


class FeatureCache:
    """Features on disk, (L, width) fp32, one safetensors file per (encoder, dtype, token ids).

    The token ids carry prompt, limit and padding. A file that is damaged, or holds anything else, counts as unknown; a
    cache that cannot be written costs time, not the run.
    """

    def __init__(self, directory: str | Path, files: EncoderFiles, dtype: str, width: int) -> None:
        self.directory, self.width = Path(directory).expanduser(), width
        self._base = f"{files.fingerprint()}:{dtype}".encode()

    def _path(self, ids: Sequence[int]) -> Path:
        key = hashlib.sha256(self._base + struct.pack(f"<{len(ids)}q", *ids)).hexdigest()
        return self.directory / f"t5-{key[:40]}.safetensors"

    def get(self, ids: Sequence[int]) -> Tensor | None:
        try:
            rows = open_checkpoint(self._path(ids)).tensor("features").clone()
        except (OSError, ValueError, KeyError):
            return None
        whole = rows.shape == (len(ids), self.width) and rows.dtype == torch.float32
        return rows if whole and bool(torch.isfinite(rows).all()) else None

    def put(self, ids: Sequence[int], rows: Tensor) -> None:
        from safetensors.torch import save

        path = self._path(ids)
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                temporary = file.name
                file.write(save({"features": rows.contiguous()}))
            os.replace(temporary, path)
        except OSError:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)


def encode(
    prompts: Sequence[str],
    directory: str | Path,
    max_length: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    use_mask: bool = True,
    cache_dir: str | Path | None = None,
) -> TextFeatures:
    """Load, encode, free. See TextEncoder.encode."""
    with TextEncoder(directory, device, dtype, cache_dir) as encoder:
        return encoder.encode(prompts, max_length, use_mask)
