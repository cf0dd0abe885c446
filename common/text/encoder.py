"""Prompts -> features by an encoder that a model hands over as a value; loaded and freed inside."""

from __future__ import annotations

import gc
import hashlib
import os
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from common.weights.checkpoint import open_checkpoint


class Encoder(Protocol):
    """A text encoder whose files were found and not read: `common.text.t5.EncoderFiles` is one.

    What it does is its own affair; who calls it, caches what comes out and tells the ranks is this module's.
    """

    @property
    def name(self) -> str:
        """Short and of letters, digits and hyphens: cache files begin with it."""

    @property
    def width(self) -> int:
        """Numbers of one token's features."""

    @property
    def pad(self) -> int:
        """The id that fills a prompt up where the encoder is to see padding."""

    def tokenize(self, prompt: str, limit: int) -> tuple[list[int], str]:
        """At most `limit` ids, those that end a prompt included, and the text that was cut off."""

    def fingerprint(self) -> str:
        """A hash that changes with everything that features depend on."""

    def check(self, width: int | None = None) -> None:
        """Raise what `load` would raise, from headers alone. width: of the features that the model takes."""

    def load(self, device: torch.device, dtype: torch.dtype, float8: bool, stream: bool) -> nn.Module:
        """The model. float8: in eight bits where it can be; stream: through the device layer by layer."""

    def run(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Features (B, L, D) of ids (B, L), every one of which the model attends to."""


@dataclass(frozen=True)
class TextWork:
    """One text encoder at work, for estimates."""

    new: Callable[[torch.dtype], nn.Module]
    """The model on the meta device with weights of a dtype, its layers in `common.weights.blocks.Blocks` where they can
    stream."""
    run: Callable[[nn.Module, Tensor], Tensor]
    """As `Encoder.run`."""
    tokens: int
    """Tokens of the longest prompt."""
    matmuls: tuple[str, ...] = ()
    """Linear layers inside such a layer that may be held in eight bits."""


@dataclass(frozen=True)
class TextFeatures:
    """What an encoder makes of B prompts."""

    features: Tensor
    """(B, L, D) fp32, L = the token limit; rows of masked padding are zero."""
    mask: Tensor
    """(B, L) bool, True where a token of the prompt (its end mark included) stands."""
    num_tokens: tuple[int, ...]
    """Tokens of each prompt, at most L."""
    truncated: tuple[str, ...]
    """The end of each prompt that did not fit, "" where everything did."""

    @property
    def limit(self) -> int:
        return self.features.shape[1]


class TextEncoder:
    """An encoder that loads at the first prompt it has to run and is freed by `free`.

    dtype is that of the weights and of the arithmetic; features come out in fp32.
    cache_dir keeps features by hash of prompt and encoder, so that a known prompt loads nothing.
    float8, stream: see `Encoder.load`.
    """

    def __init__(
        self,
        encoder: Encoder,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        cache_dir: str | Path | None = None,
        float8: bool = False,
        stream: bool = False,
    ) -> None:
        self.encoder = encoder
        self.device, self.dtype = torch.device(device), dtype
        self.float8, self.stream = float8, stream
        kind = f"{dtype} float8" if float8 else str(dtype)
        self._cache = None if cache_dir is None else FeatureCache(cache_dir, encoder, kind)
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

        use_mask: the encoder sees the prompt's own tokens only (Mochi). Otherwise the prompt is padded to
        `max_length` and the encoder attends to the padding as to any token (CogVideoX).
        One prompt at a time, so that a prompt's features do not depend on its neighbours.
        """
        features = torch.zeros(len(prompts), max_length, self.encoder.width)
        mask = torch.zeros(len(prompts), max_length, dtype=torch.bool)
        truncated = []
        for b, prompt in enumerate(prompts):
            ids, rest = self.encoder.tokenize(prompt, max_length)
            mask[b, : len(ids)] = True
            truncated.append(rest)
            padded = ids if use_mask else ids + [self.encoder.pad] * (max_length - len(ids))
            hit = self._cache.get(padded) if self._cache else None
            rows = self._run(padded) if hit is None else hit
            if self._cache and hit is None:
                self._cache.put(padded, rows)
            features[b, : len(rows)] = rows
        num_tokens = tuple(int(n) for n in mask.sum(1))
        return TextFeatures(features, mask, num_tokens, tuple(truncated))

    @torch.no_grad()
    def _run(self, ids: list[int]) -> Tensor:
        if self.model is None:
            self.model = self.encoder.load(self.device, self.dtype, self.float8, self.stream)
        # The ids are exactly the tokens that may be attended to, so no mask is needed: masked padding
        # has weight zero in every softmax and leaves no trace in the other rows.
        out = self.encoder.run(self.model, torch.tensor([ids], device=self.device))
        return out[0].to("cpu", torch.float32)


class FeatureCache:
    """Features on disk, (L, width) fp32, one safetensors file per (encoder, dtype, token ids).

    The token ids carry prompt, limit and padding. A file that is damaged, or holds anything else, counts as unknown; a
    cache that cannot be written costs time, not the run.
    """

    def __init__(self, directory: str | Path, encoder: Encoder, dtype: str) -> None:
        self.directory, self.name, self.width = Path(directory).expanduser(), encoder.name, encoder.width
        self._base = f"{encoder.fingerprint()}:{dtype}".encode()

    def _path(self, ids: Sequence[int]) -> Path:
        key = hashlib.sha256(self._base + struct.pack(f"<{len(ids)}q", *ids)).hexdigest()
        return self.directory / f"{self.name}-{key[:40]}.safetensors"

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
    encoder: Encoder,
    max_length: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    use_mask: bool = True,
    cache_dir: str | Path | None = None,
) -> TextFeatures:
    """Load, encode, free. See TextEncoder.encode."""
    with TextEncoder(encoder, device, dtype, cache_dir) as text_encoder:
        return text_encoder.encode(prompts, max_length, use_mask)
