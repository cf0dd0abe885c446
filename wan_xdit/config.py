"""The numbers of Wan 2.1's and 2.2's transformers and autoencoders. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TransformerConfig:
    """One transformer; of Wan 2.2's A14B models, one expert."""

    width: int = 5120
    heads: int = 40
    layers: int = 40
    ffn: int = 13824
    in_channels: int = 16  # more than out_channels where latents of an image and its mask stand beside the noise
    out_channels: int = 16
    text_width: int = 4096
    text_length: int = 512  # positions that the cross-attention sees, padding included
    time_width: int = 256  # of the sinusoid
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_width: int | None = None  # of CLIP's tokens, which only 2.1's image checkpoints attend to
    image_tokens: int = 257

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def patch_volume(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2]

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
    "dim": "width",
    "num_heads": "heads",
    "num_layers": "layers",
    "ffn_dim": "ffn",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "text_dim": "text_width",
    "text_len": "text_length",
    "freq_dim": "time_width",
    "eps": "eps",
}
_DIFFUSERS = {
    "num_attention_heads": "heads",
    "num_layers": "layers",
    "ffn_dim": "ffn",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "text_dim": "text_width",
    "freq_dim": "time_width",
    "image_dim": "image_width",
    "eps": "eps",
}
# What the code takes for granted; another value means another model.
_FIXED: Mapping[str, Any] = {
    "cross_attn_norm": True,
    "qk_norm": (True, "rms_norm_across_heads"),
    "patch_size": ([1, 2, 2],),
    "window_size": ([-1, -1],),
}
OTHERS = {
    "flf2v": "first and last frame to video",
    "vace": "VACE",
    "animate": "Animate",
    "s2v": "speech to video",
}
"""Models of the family that are refused by name."""


def read_transformer(values: Mapping[str, Any]) -> TransformerConfig:
    """From a config.json's values, original or diffusers. ValueError for what this code would get wrong."""
    kind = str(values.get("model_type", "t2v"))
    if kind in OTHERS:
        raise ValueError(f"this is a Wan model for {OTHERS[kind]}, which is not supported; use t2v, i2v or ti2v")
    for name, allowed in _FIXED.items():
        options = allowed if isinstance(allowed, tuple) else (allowed,)
        value = values.get(name, options[0])
        value = list(value) if isinstance(value, tuple) else value
        if value not in options:
            raise ValueError(f"{name} is {value!r}; this code computes {' or '.join(repr(o) for o in options)}")
    names = _ORIGINAL if "dim" in values else _DIFFUSERS
    found = {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
    if "dim" not in values:
        try:
            found["width"] = values["num_attention_heads"] * values["attention_head_dim"]
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing, so this is no Wan transformer's config") from None
    elif kind == "i2v":
        found["image_width"] = values.get("image_dim", 1280)
    config = TransformerConfig(**found)
    if config.width % config.heads or config.head_width % 2:
        raise ValueError(f"{config.heads} heads do not share {config.width} channels in pairs")
    return config


@dataclass(frozen=True)
class VAEConfig:
    """An autoencoder. The defaults are 2.1's, which Wan 2.2's A14B models use too."""

    width: int = 96
    decoder_width: int = 96
    latent_channels: int = 16
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    depth: int = 2
    temporal: tuple[bool, ...] = (False, True, True)  # of the three halvings of the encoder, which also halve time
    fold: int = 1  # pixels of a side that are folded into channels before the encoder; 2 in Wan 2.2's
    shortcuts: bool = False  # averages and repeats beside the stages of Wan 2.2's
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def space(self) -> int:
        """Pixels of a side to one latent."""
        return self.fold * 2 ** len(self.temporal)

    @property
    def time(self) -> int:
        """Frames to one latent, but for the first."""
        return 2 ** sum(self.temporal)


VAE_2_2 = VAEConfig(width=160, decoder_width=256, latent_channels=48, fold=2, shortcuts=True)


def with_stats(config: VAEConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> VAEConfig:
    """The autoencoder with the mean and the spread of its latents. ValueError unless there is one for each channel."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != config.latent_channels:
            raise ValueError(f"latents_{name} has {len(values)} numbers, expected {config.latent_channels}")
    return replace(config, mean=mean, std=std)
