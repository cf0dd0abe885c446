"""The numbers of the five published CogVideoX checkpoints; a checkpoint's own json files win over them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TransformerConfig:
    """`transformer/config.json`; the defaults are CogVideoX-2b's. Field names are ours, `KEYS` maps them.

    sample_height, sample_width: of the latents the checkpoint was trained on; sample_frames: of the video
    patch_time: frames of a patch, None where a patch is one frame (1.0 checkpoints)
    rotary: rope on video tokens, else a sine-cosine table is added; learned: a stored table is added as well
    """

    heads: int = 30
    head_dim: int = 64
    layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_length: int = 226
    time_dim: int = 512
    ofs_dim: int | None = None
    patch_size: int = 2
    patch_time: int | None = None
    time_compression: int = 4
    sample_height: int = 60
    sample_width: int = 90
    sample_frames: int = 49
    rotary: bool = False
    learned: bool = False
    space_scale: float = 1.875
    time_scale: float = 1.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.head_dim % 16:
            raise ValueError(f"attention_head_dim is {self.head_dim}; the position code needs a multiple of 16")
        if self.ofs_dim is not None and self.ofs_dim != self.time_dim:
            raise ValueError(f"ofs_embed_dim is {self.ofs_dim}; it is added to the time embedding of {self.time_dim}")
        if self.learned and not self.rotary:
            raise ValueError("use_learned_positional_embeddings without use_rotary_positional_embeddings is unknown")
        if self.in_channels not in (self.out_channels, 2 * self.out_channels):
            raise ValueError(
                f"in_channels is {self.in_channels}; known are {self.out_channels} (text to video) and "
                f"{2 * self.out_channels} (image to video)"
            )

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of one token."""
        return (self.patch_time or 1, self.patch_size, self.patch_size)

    @property
    def patch_volume(self) -> int:
        return self.patch[0] * self.patch_size**2

    @property
    def image_channels(self) -> int:
        """Channels of the image latents that stand beside the noise: 0 for a text to video checkpoint."""
        return self.in_channels - self.out_channels

    @property
    def latent_frames(self) -> int:
        """Latent frames of `sample_frames`."""
        return (self.sample_frames - 1) // self.time_compression + 1


_2B = TransformerConfig()
_5B = replace(_2B, heads=48, layers=42, rotary=True)
# The 1.5 repositories disagree about the sample size; it bounds nothing here (rope counts from 0 on every axis).
_15 = replace(_5B, patch_time=2, sample_height=96, sample_width=170, sample_frames=81)
CONFIGS: Mapping[str, TransformerConfig] = {
    "2b": _2B,
    "5b": _5B,
    "5b-i2v": replace(_5B, in_channels=32, learned=True),
    "1.5": _15,
    "1.5-i2v": replace(_15, in_channels=32, ofs_dim=512),
}

KEYS: Mapping[str, str] = {
    "heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "layers": "num_layers",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "text_dim": "text_embed_dim",
    "text_length": "max_text_seq_length",
    "time_dim": "time_embed_dim",
    "ofs_dim": "ofs_embed_dim",
    "patch_size": "patch_size",
    "patch_time": "patch_size_t",
    "time_compression": "temporal_compression_ratio",
    "sample_height": "sample_height",
    "sample_width": "sample_width",
    "sample_frames": "sample_frames",
    "rotary": "use_rotary_positional_embeddings",
    "learned": "use_learned_positional_embeddings",
    "space_scale": "spatial_interpolation_scale",
    "time_scale": "temporal_interpolation_scale",
    "norm_eps": "norm_eps",
}

# What this code does, so a checkpoint that says otherwise must not be run. patch_bias is not here: the 1.5
# checkpoints say false and have the bias all the same.
_FIXED: Mapping[str, Any] = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True,
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; ValueError when it is missing or holds none."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; a CogVideoX checkpoint in the diffusers layout has it")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no JSON object")
    return raw


def check_keys(raw: Mapping[str, Any], known: Collection[str], fixed: Mapping[str, Any], where: str) -> None:
    """Raise ValueError naming key and value of what the code behind `known` and `fixed` would get wrong.

    Keys beginning with `_` are notes of the library that wrote the file; an unknown key that is off (None, false)
    asks for nothing.
    """
    for key, value in raw.items():
        if key in fixed:
            if value != fixed[key]:
                raise ValueError(f"{where} says {key}={value!r}; supported is {fixed[key]!r}")
        elif key not in known and not key.startswith("_") and value not in (None, False):
            raise ValueError(f"{where} says {key}={value!r}, which is unknown here; this checkpoint needs newer code")


def transformer_config(raw: Mapping[str, Any], where: str = "transformer/config.json") -> TransformerConfig:
    """A checkpoint's own numbers. ValueError names the key and the value that cannot be run."""
    check_keys(raw, {*KEYS.values(), "patch_bias"}, _FIXED, where)
    return TransformerConfig(**_typed(raw, where))


def _typed(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    kinds = {field.name: str(field.type) for field in fields(TransformerConfig)}
    found = {}
    for name, key in KEYS.items():
        if key not in raw or (raw[key] is None and "None" not in kinds[name]):
            continue
        value = raw[key]
        kind = kinds[name].split(" ")[0]
        good = isinstance(value, bool) if kind == "bool" else _positive(value, kind) or value is None
        if not good:
            raise ValueError(f"{where} says {key}={value!r}; it must be {_MEANT[kind]}")
        found[name] = value
    return found


_MEANT = {"bool": "true or false", "int": "a whole number of at least 1", "float": "a number above 0"}


def _positive(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value > 0 and (kind == "float" or isinstance(value, int))


def transformer_json(config: TransformerConfig) -> dict[str, Any]:
    """The reverse of `transformer_config`: what a checkpoint's config.json says."""
    raw = {key: getattr(config, name) for name, key in KEYS.items()}
    return {"_class_name": "CogVideoXTransformer3DModel", **raw, **_FIXED}
