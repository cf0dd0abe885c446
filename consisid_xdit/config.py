"""ConsisID's numbers: CogVideoX-5b-I2V's and those of the face modules; a checkpoint's own config.json wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogvideox_xdit.config import DEMO as COGVIDEOX_DEMO
from cogvideox_xdit.config import (
    CheckpointConfig,
    TransformerConfig,
    official_rules,
    random_demo_rules,
    read_checkpoint,
    transformer_config,
    transformer_json,
)
from common.registry.checks import Rules
from common.weights.schema import MAX_LAYERS, bounded, build


@dataclass(frozen=True)
class ConsisIDConfig(TransformerConfig):
    """`transformer/config.json`. Defaults are the reference class's, so an absent key means what it means there."""

    face: bool = False
    """The face modules are there (`is_train_face`)."""
    kps: bool = False
    """The checkpoint wants the drawn landmarks as its second image latent."""
    interval: int = bounded(2, MAX_LAYERS)
    """Face tokens are read after every `interval`-th block, beginning with the first."""
    cross_head_dim: int = bounded(128, 1024)
    cross_heads: int = bounded(16, 1024)
    """`cross_heads`, `cross_head_dim`: of the cross attention to face tokens."""
    id_dim: int = 1280
    vit_dim: int = 1024
    """`id_dim`, `vit_dim`: widths of the identity vector and of the image tower's hidden states."""
    depth: int = bounded(10, MAX_LAYERS)
    extractor_head_dim: int = bounded(64, 1024)
    extractor_heads: int = bounded(16, 1024)
    id_tokens: int = bounded(5, 1024)
    queries: int = bounded(32, 4096)
    face_dim: int = 2048
    """Width of the face tokens; the reference ties it to two thirds of the model's."""
    ff_mult: int = bounded(4, 64)
    scales: int = bounded(5, MAX_LAYERS)
    """`depth`, `extractor_heads`, `extractor_head_dim`, `id_tokens`, `queries`, `ff_mult`, `scales`: of the local
    facial extractor."""
    face_scale: float = bounded(1.0, most=1e6, least=-1e6)
    """Factor on what is read from the face."""

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
TRAINED = "shapes"
"""The demo that shows something: a picture of a shape stands for the face (`tools/demo` in the repository)."""
DEMOS: Mapping[str, Rules] = {
    TRAINED: replace(
        COGVIDEOX_DEMO,
        heads=5,
        cfg_scale=1.5,  # the guidance that the model card's figures were measured with
        sizes=((64, 64),),
        default_prompt="A big shape moves slowly to the right on a black background.",
        takes=(),  # there are no face models for it
    ),
    "face": random_demo_rules("5b-i2v"),
}

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
    """A checkpoint's own numbers. CheckpointError names the key and the value that cannot be run."""
    rest = {key: value for key, value in raw.items() if key not in FACE_KEYS.values() and key not in _LEFT_OVER}
    base = transformer_config(rest, where)
    return build(ConsisIDConfig, FACE_KEYS, raw, where, **vars(base))


def read_consisid(model_dir: Path) -> CheckpointConfig:
    """Read a checkpoint folder in the diffusers layout. CheckpointError names what is missing or cannot be run."""
    return read_checkpoint(model_dir, ("ConsisIDPipeline",), consisid_config)


def consisid_json(config: ConsisIDConfig) -> dict[str, Any]:
    """The reverse of `consisid_config`: what a checkpoint's config.json says."""
    raw = {
        key: value for key, value in transformer_json(config).items() if key not in ("patch_size_t", "ofs_embed_dim")
    }
    raw |= {key: getattr(config, name) for name, key in FACE_KEYS.items()}
    return raw | {"_class_name": "ConsisIDTransformer3DModel"}


def read_rules(model_dir: Path) -> Rules:
    """The admissible values for a checkpoint; ValueError when the folder is none."""
    return official_rules(read_consisid(model_dir).transformer)
