"""ConsisID's numbers: CogVideoX-5b-I2V's and those of the face modules; a checkpoint's own config.json wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cogvideox_xdit.config import (
    CheckpointConfig,
    TransformerConfig,
    read_checkpoint,
    transformer_config,
    transformer_json,
)


@dataclass(frozen=True)
class ConsisIDConfig(TransformerConfig):
    """`transformer/config.json`. Defaults are the reference class's, so a key that is absent means what it means there.

    face: the face modules are there (`is_train_face`)
    kps: the checkpoint wants the drawn landmarks as its second image latent
    interval: face tokens are read after every `interval`-th block, beginning with the first
    cross_heads, cross_head_dim: of that cross attention
    id_dim, vit_dim: identity vector and image tower's hidden states
    depth, extractor_heads, extractor_head_dim, id_tokens, queries, ff_mult, scales: of the local facial extractor
    face_dim: width of the face tokens; the reference ties it to two thirds of the model's
    face_scale: factor on what is read from the face
    """

    face: bool = False
    kps: bool = False
    interval: int = 2
    cross_head_dim: int = 128
    cross_heads: int = 16
    id_dim: int = 1280
    vit_dim: int = 1024
    depth: int = 10
    extractor_head_dim: int = 64
    extractor_heads: int = 16
    id_tokens: int = 5
    queries: int = 32
    face_dim: int = 2048
    ff_mult: int = 4
    scales: int = 5
    face_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.face:
            return
        if self.layers % self.interval:
            raise ValueError(
                f"num_layers {self.layers} must be a multiple of cross_attn_interval {self.interval}: the checkpoint "
                "would have fewer cross attentions than the model uses"
            )
        tied = int(self.width / 3 * 2)
        if self.face_dim != tied:
            raise ValueError(
                f"LFE_output_dim is {self.face_dim}; a model {self.width} wide has face tokens {tied} wide"
            )
        if self.depth % self.scales:
            raise ValueError(f"LFE_depth {self.depth} must be a multiple of LFE_num_scale {self.scales}")

    @property
    def crossings(self) -> int:
        """How many times the video reads the face tokens in one prediction."""
        return self.layers // self.interval if self.face else 0


PREVIEW = ConsisIDConfig(heads=48, layers=42, in_channels=32, rotary=True, learned=True, face=True)

FACE_KEYS: Mapping[str, str] = {
    "face": "is_train_face",
    "kps": "is_kps",
    "interval": "cross_attn_interval",
    "cross_head_dim": "cross_attn_dim_head",
    "cross_heads": "cross_attn_num_heads",
    "id_dim": "LFE_id_dim",
    "vit_dim": "LFE_vit_dim",
    "depth": "LFE_depth",
    "extractor_head_dim": "LFE_dim_head",
    "extractor_heads": "LFE_num_heads",
    "id_tokens": "LFE_num_id_token",
    "queries": "LFE_num_querie",
    "face_dim": "LFE_output_dim",
    "ff_mult": "LFE_ff_mult",
    "scales": "LFE_num_scale",
    "face_scale": "local_face_scale",
}
# Written by early training code, read by nothing.
_LEFT_OVER = ("LFE_num_tokens", "LFE_heads")


def consisid_config(raw: Mapping[str, Any], where: str = "transformer/config.json") -> ConsisIDConfig:
    """A checkpoint's own numbers. ValueError names the key and the value that cannot be run."""
    names = {key: name for name, key in FACE_KEYS.items()}
    face = {names[key]: value for key, value in raw.items() if key in names and value is not None}
    rest = {key: value for key, value in raw.items() if key not in names and key not in _LEFT_OVER}
    kinds = {field.name: type(field.default) for field in fields(ConsisIDConfig)}
    for name, value in face.items():
        kind = kinds[name]
        good = (
            isinstance(value, bool) if kind is bool else isinstance(value, (int, kind)) and not isinstance(value, bool)
        )
        if not good or (kind is int and value < 1):
            meant = {bool: "true or false", int: "a whole number of at least 1", float: "a number"}[kind]
            raise ValueError(f"{where} says {FACE_KEYS[name]}={value!r}; it must be {meant}")
    base = transformer_config(rest, where)
    return ConsisIDConfig(**vars(base), **face)


def read_consisid(model_dir: Path) -> CheckpointConfig:
    """Read a checkpoint folder in the diffusers layout. ValueError names what is missing or cannot be run."""
    return read_checkpoint(model_dir, ("ConsisIDPipeline",), consisid_config)


def consisid_json(config: ConsisIDConfig) -> dict[str, Any]:
    """The reverse of `consisid_config`: what a checkpoint's config.json says."""
    raw = {
        key: value for key, value in transformer_json(config).items() if key not in ("patch_size_t", "ofs_embed_dim")
    }
    raw |= {key: getattr(config, name) for name, key in FACE_KEYS.items()}
    return raw | {"_class_name": "ConsisIDTransformer3DModel"}
