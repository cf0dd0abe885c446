"""The numbers of Wan 2.1's and 2.2's transformers and autoencoders. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from common.weights.schema import MAX_LAYERS, CheckpointError, bounded, build, check_keys


@dataclass(frozen=True)
class TransformerConfig:
    """One transformer; of Wan 2.2's A14B models, one expert."""

    width: int = 5120
    heads: int = bounded(40, 1024)
    layers: int = bounded(40, MAX_LAYERS)
    ffn: int = 13824
    in_channels: int = 16
    """More than out_channels where latents of an image and its mask stand beside the noise."""
    out_channels: int = 16
    text_dim: int = 4096
    text_length: int = 512
    """Positions that the cross-attention sees, padding included."""
    time_width: int = 256
    """Of the sinusoid."""
    eps: float = 1e-6
    image_width: int | None = None
    """Of CLIP's tokens, which only 2.1's image checkpoints attend to."""
    image_tokens: int = 257
    patch: ClassVar[tuple[int, int, int]] = (1, 2, 2)

    def __post_init__(self) -> None:
        if self.width % self.heads or self.head_width % 2:
            raise ValueError(f"{self.heads} heads do not share {self.width} channels in pairs")
        if self.in_channels < self.out_channels:
            raise ValueError(f"{self.in_channels} channels go in and {self.out_channels} come out")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def patch_volume(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def kept_numbers(self) -> int:
        """Keys and values of the text's and the image's tokens in all blocks, for one guidance branch."""
        tokens = self.text_length + (self.image_tokens if self.image_width else 0)
        return self.layers * 2 * tokens * self.width

    @property
    def image_channels(self) -> int:
        """Channels beside the noise: 4 of the mask and 16 of the image's latents, or none."""
        return self.in_channels - self.out_channels


T2V_1_3B = TransformerConfig(width=1536, heads=12, layers=30, ffn=8960)
T2V_14B = TransformerConfig()
I2V_14B = TransformerConfig(in_channels=36, image_width=1280)
I2V_A14B = TransformerConfig(in_channels=36)
TI2V_5B = TransformerConfig(width=3072, heads=24, layers=30, ffn=14336, in_channels=48, out_channels=48)

# Fields by their names in the original config.json and in diffusers'.
_ORIGINAL = {
    "width": "dim",
    "heads": "num_heads",
    "layers": "num_layers",
    "ffn": "ffn_dim",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "text_dim": "text_dim",
    "text_length": "text_len",
    "time_width": "freq_dim",
    "eps": "eps",
    "image_width": "image_dim",
}
_DIFFUSERS = {
    "heads": "num_attention_heads",
    "layers": "num_layers",
    "ffn": "ffn_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "text_dim": "text_dim",
    "time_width": "freq_dim",
    "eps": "eps",
    "image_width": "image_dim",
    "text_length": "text_len",
}
# What the code takes for granted; another value means another model.
_FIXED: Mapping[str, Any] = {
    "cross_attn_norm": True,
    "qk_norm": (True, "rms_norm_across_heads"),
    "patch_size": ([1, 2, 2], (1, 2, 2)),
    "window_size": ([-1, -1], (-1, -1)),
    "pos_embed_seq_len": None,
}
_TYPES = ("t2v", "i2v", "ti2v")
_READ_ELSEWHERE = ("model_type", "attention_head_dim", "added_kv_proj_dim", "rope_max_seq_len")
OTHERS = {
    "flf2v": "first and last frame to video",
    "vace": "VACE",
    "animate": "Animate",
    "s2v": "speech to video",
}
"""Models of the family that are refused by name."""


def check_kind(name: str, where: str) -> None:
    """CheckpointError for a name that says of one of `OTHERS` that it is one."""
    other = next((title for part, title in OTHERS.items() if part in name.lower().replace("_", "")), None)
    if other is not None:
        raise CheckpointError(f"{where} is a Wan model for {other}, which is not supported; use T2V, I2V or TI2V")


def read_transformer(values: Mapping[str, Any], where: str = "config.json") -> TransformerConfig:
    """From a config.json's values, original or diffusers. CheckpointError for what this code would get wrong."""
    check_kind(f"{values.get('model_type', '')} {values.get('_class_name', '')}", where)
    original = "dim" in values
    names = _ORIGINAL if original else _DIFFUSERS
    # The image checkpoints of 2.1 say i2v, their `image_dim` is in no original file; 2.2's have no CLIP.
    fixed = {**_FIXED, "model_type": _TYPES, "rope_max_seq_len": 1024}
    if values.get("pos_embed_seq_len") is not None:
        check_kind("flf2v", where)
    check_keys(values, (*names.values(), *_READ_ELSEWHERE), fixed, where)
    if original:
        return build(TransformerConfig, names, values, where)
    try:
        width = values["num_attention_heads"] * values["attention_head_dim"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{where} has no num_attention_heads times attention_head_dim") from None
    return build(TransformerConfig, names | {"width": "width"}, {**values, "width": width}, where)


def transformer_json(config: TransformerConfig) -> dict[str, Any]:
    """The reverse of `read_transformer`: what a diffusers folder's config.json says."""
    raw = {key: getattr(config, name) for name, key in _DIFFUSERS.items()}
    raw |= {"attention_head_dim": config.head_width, "patch_size": list(config.patch), "cross_attn_norm": True}
    raw |= {"qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024}
    raw["added_kv_proj_dim"] = config.width if config.image_width else None
    if config.text_length == TransformerConfig.text_length:
        del raw["text_len"]  # the pipeline's affair in diffusers, which knows no such key
    return {"_class_name": "WanTransformer3DModel", **raw}


@dataclass(frozen=True)
class VAEConfig:
    """An autoencoder. The defaults are 2.1's, which Wan 2.2's A14B models use too; `VAE_2_1` has its statistics."""

    width: int = 96
    decoder_width: int = 96
    latent_channels: int = bounded(16, 1024)
    multiples: tuple[int, ...] = bounded((1, 2, 4, 4), 64)
    depth: int = bounded(2, 64)
    temporal: tuple[bool, ...] = (False, True, True)
    """Which of the three halvings of the encoder also halve time."""
    fold: int = bounded(1, 16)
    """Pixels of a side that are folded into channels before the encoder; 2 in Wan 2.2's."""
    shortcuts: bool = False
    """Averages and repeats beside the stages of Wan 2.2's."""
    mean: tuple[float, ...] = bounded((), 1e6, -1e6)
    """Per latent channel: VAE latents = transformer latents * std + mean."""
    std: tuple[float, ...] = bounded((), 1e6, 0)

    @property
    def space(self) -> int:
        """Pixels of a side to one latent."""
        return self.fold * 2 ** len(self.temporal)

    @property
    def time(self) -> int:
        """Frames to one latent, but for the first."""
        return 2 ** sum(self.temporal)


VAE_2_1 = VAEConfig(
    mean=(
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ),
    std=(
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ),
)
VAE_2_2 = VAEConfig(
    width=160,
    decoder_width=256,
    latent_channels=48,
    fold=2,
    shortcuts=True,
    mean=(
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
        *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
        *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
        *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
        *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ),
    std=(
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
        *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
        *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
        *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
        *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
)


def vae_of(config: TransformerConfig) -> VAEConfig:
    """The autoencoder that a published transformer comes with."""
    return VAE_2_2 if config.out_channels == VAE_2_2.latent_channels else VAE_2_1


_VAE = {
    "width": "base_dim",
    "decoder_width": "decoder_base_dim",
    "latent_channels": "z_dim",
    "multiples": "dim_mult",
    "depth": "num_res_blocks",
    "temporal": "temperal_downsample",
    "fold": "patch_size",
    "shortcuts": "is_residual",
    "mean": "latents_mean",
    "std": "latents_std",
}
_VAE_FIXED: Mapping[str, Any] = {"attn_scales": [], "clip_output": (None, True)}
_VAE_READ_ELSEWHERE = ("dropout", "in_channels", "out_channels", "scale_factor_temporal", "scale_factor_spatial")


def read_vae(values: Mapping[str, Any], where: str = "vae/config.json") -> VAEConfig:
    """From a diffusers folder's vae/config.json. CheckpointError for what this code would get wrong."""
    check_keys(values, (*_VAE.values(), *_VAE_READ_ELSEWHERE), _VAE_FIXED, where)
    both = {"decoder_base_dim": values.get("base_dim"), **{k: v for k, v in values.items() if v is not None}}
    config = build(VAEConfig, _VAE, both, where)
    try:
        return with_stats(config, config.mean or VAE_2_1.mean, config.std or VAE_2_1.std)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def vae_json(config: VAEConfig) -> dict[str, Any]:
    """The reverse of `read_vae`."""
    raw = {key: getattr(config, name) for name, key in _VAE.items()}
    raw |= {"patch_size": config.fold if config.fold > 1 else None, "attn_scales": [], "dropout": 0.0}
    raw |= {"in_channels": 3 * config.fold**2, "out_channels": 3 * config.fold**2}
    raw |= {"scale_factor_temporal": config.time, "scale_factor_spatial": config.space}
    return {"_class_name": "AutoencoderKLWan", **raw}


def with_stats(config: VAEConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> VAEConfig:
    """The autoencoder with the mean and the spread of its latents. ValueError unless there is one for each channel."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != config.latent_channels:
            raise ValueError(f"latents_{name} has {len(values)} numbers, expected {config.latent_channels}")
    return replace(config, mean=mean, std=std)
