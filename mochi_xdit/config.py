"""Mochi's numbers. The defaults are Mochi 1 preview; a checkpoint's config.json, or the shapes in its header, win."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class MochiVAEConfig:
    """The asymmetric causal VAE. Tuples run from the pixels to the latents; the decoder uses them back to front."""

    latent_channels: int = 12
    encoder_channels: tuple[int, ...] = (64, 128, 256, 384)
    decoder_channels: tuple[int, ...] = (128, 256, 512, 768)
    layers: tuple[int, ...] = (3, 3, 4, 6, 3)
    """Residual blocks: at the pixels, in each of the stages, at the latents."""
    temporal: tuple[int, ...] = (1, 2, 3)
    spatial: tuple[int, ...] = (2, 2, 2)
    attention: tuple[bool, ...] = (False, True, True, True, True)
    """Which groups of the encoder's residual blocks have temporal attention. The decoder has none."""
    groups: int = 32
    head_dim: int = 32
    in_channels: int = 15
    """RGB and its Fourier features: 3 + 3 * 2 frequencies * (sin, cos)."""
    out_channels: int = 3
    mean: tuple[float, ...] = (
        -0.06730895953510081,
        -0.038011381506090416,
        -0.07477820912866141,
        -0.05565264470995561,
        0.012767231469026969,
        -0.04703542746246419,
        0.043896967884726704,
        -0.09346305707025976,
        -0.09918314763016893,
        -0.008729793427399178,
        -0.011931556316503654,
        -0.0321993391887285,
    )
    """Per latent channel: VAE latents = transformer latents * std + mean."""
    std: tuple[float, ...] = (
        0.9263795028493863,
        0.9248894543193766,
        0.9393059390890617,
        0.959253732819592,
        0.8244560132752793,
        0.917259975397747,
        0.9294154431013696,
        1.3720942357788521,
        0.881393668867029,
        0.9168315692124348,
        0.9185249279345552,
        0.9274757570805041,
    )
    scaling_factor: float = 1.0

    @property
    def temporal_ratio(self) -> int:
        """Frames per latent frame: 6. A video of F latent frames has 6 * (F - 1) + 1 frames."""
        ratio = 1
        for step in self.temporal:
            ratio *= step
        return ratio

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent pixel in each direction: 8."""
        ratio = 1
        for step in self.spatial:
            ratio *= step
        return ratio

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> MochiVAEConfig:
        """From the parsed `vae/config.json` of a diffusers folder. ValueError names what it cannot honour."""
        names = {
            "latent_channels": "latent_channels",
            "encoder_block_out_channels": "encoder_channels",
            "decoder_block_out_channels": "decoder_channels",
            "layers_per_block": "layers",
            "temporal_expansions": "temporal",
            "spatial_expansions": "spatial",
            "add_attention_block": "attention",
            "in_channels": "in_channels",
            "out_channels": "out_channels",
            "latents_mean": "mean",
            "latents_std": "std",
            "scaling_factor": "scaling_factor",
        }
        return cls(**_read("AutoencoderKLMochi", config, names, {"act_fn": ("silu",)}))

    @classmethod
    def from_native(cls, shapes: Shapes) -> MochiVAEConfig:
        """From the tensor shapes of a native `decoder.safetensors` or `encoder.safetensors`, which carry no config.

        What the file does not show keeps its default. KeyError names a tensor that every such file has and this one
        lacks.
        """
        return _native_decoder(shapes) if "blocks.0.0.weight" in shapes else _native_encoder(shapes)


@dataclass(frozen=True)
class MochiConfig:
    """The asymmetric joint transformer over video tokens (x) and text tokens (y)."""

    depth: int = 48
    heads: int = 24
    head_dim: int = 128
    hidden_y: int = 1536
    mlp_x: int = 8192
    mlp_y: int = 4096
    channels: int = 12
    patch: int = 2
    text_dim: int = 4096
    text_heads: int = 8
    """Heads of the attention pool over the text features."""
    text_tokens: int = 256
    """The longest prompt the model was trained with."""
    time_dim: int = 256
    vae: MochiVAEConfig = field(default_factory=MochiVAEConfig)

    def __post_init__(self) -> None:
        if self.text_dim % self.text_heads:
            raise ValueError(f"text width {self.text_dim} does not split into {self.text_heads} pooling heads")
        if self.head_dim % 2 or self.time_dim % 2:
            raise ValueError(f"head width {self.head_dim} and time width {self.time_dim} must be even")

    @property
    def hidden_x(self) -> int:
        """Width of the video stream: 3072."""
        return self.heads * self.head_dim

    @property
    def patch_dim(self) -> int:
        """Numbers in one packed video token: 48."""
        return self.channels * self.patch**2

    @classmethod
    def from_diffusers(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any] | None = None) -> MochiConfig:
        """From the parsed config.json of a diffusers folder's `transformer/` (and `vae/`).

        ValueError names keys it does not know and values it cannot honour.
        """
        names = {
            "num_layers": "depth",
            "num_attention_heads": "heads",
            "attention_head_dim": "head_dim",
            "pooled_projection_dim": "hidden_y",
            "in_channels": "channels",
            "patch_size": "patch",
            "text_embed_dim": "text_dim",
            "time_embed_dim": "time_dim",
            "max_sequence_length": "text_tokens",
        }
        channels = (None, transformer.get("in_channels", cls.channels))
        fixed = {"qk_norm": ("rms_norm",), "activation_fn": ("swiglu",), "out_channels": channels}
        numbers = _read("MochiTransformer3DModel", transformer, names, fixed)
        sizes = cls(**numbers)
        # Widths are not in the file: two thirds of four times the stream's, which for Mochi 1 is already a multiple of
        # 256.
        widths = {"mlp_x": 4 * sizes.hidden_x * 2 // 3, "mlp_y": 4 * sizes.hidden_y * 2 // 3}
        return cls(**numbers, **widths, vae=MochiVAEConfig.from_diffusers(vae or {}))

    @classmethod
    def from_native(cls, shapes: Shapes) -> MochiConfig:
        """From the tensor shapes of a native `dit.safetensors`, which carries no config.

        KeyError names a tensor that every such file has and this one lacks. Only what sets the numbers is looked at;
        whether every shape agrees is the loader's check.
        """
        _, heads, half = shapes["pos_frequencies"]
        hidden_y, text_dim = shapes["t5_yproj.weight"]
        _, channels, patch, _ = shapes["x_embedder.proj.weight"]
        depth = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=0)
        mlp_x = shapes["blocks.0.mlp_x.w2.weight"][1]
        # A single block is the last one, and the last one has no text feed-forward.
        mlp_y = shapes["blocks.0.mlp_y.w2.weight"][1] if depth > 1 else cls.mlp_y
        time_dim = shapes["t_embedder.mlp.0.weight"][1]
        return cls(
            depth=depth,
            heads=heads,
            head_dim=2 * half,
            hidden_y=hidden_y,
            mlp_x=mlp_x,
            mlp_y=mlp_y,
            channels=channels,
            patch=patch,
            text_dim=text_dim,
            time_dim=time_dim,
        )


def _count(shapes: Shapes, pattern: str, start: int) -> int:
    """How many of the names `pattern.format(start)`, `pattern.format(start + 1)`, ... there are."""
    n = 0
    while pattern.format(start + n) in shapes:
        n += 1
    return n


def _native_decoder(shapes: Shapes) -> MochiVAEConfig:
    stages = _count(shapes, "blocks.{}.proj.weight", 1)
    last = f"blocks.{stages + 1}"
    top, latent_channels = shapes["blocks.0.0.weight"][:2]
    layers, channels, temporal = [_count(shapes, "blocks.0.{}.stack.2.weight", 1)], [top], []
    for i in range(1, stages + 1):
        following = f"blocks.{i + 1}.blocks.0" if i < stages else f"{last}.0"
        (width,) = shapes[f"{following}.stack.0.weight"]
        layers.append(_count(shapes, f"blocks.{i}.blocks.{{}}.stack.2.weight", 0))
        channels.append(width)
        temporal.append(max(shapes[f"blocks.{i}.proj.weight"][0] // (4 * width), 1))
    layers.append(_count(shapes, last + ".{}.stack.2.weight", 0))
    return MochiVAEConfig(
        latent_channels=latent_channels,
        decoder_channels=tuple(reversed(channels)),
        layers=tuple(reversed(layers)),
        temporal=tuple(reversed(temporal)),
        spatial=(2,) * stages,
        out_channels=shapes["output_proj.weight"][0],
    )


def _native_encoder(shapes: Shapes) -> MochiVAEConfig:
    width, in_channels = shapes["layers.0.weight"]
    first = _count(shapes, "layers.{}.stack.2.weight", 1)
    stages = _count(shapes, "layers.{}.layers.0.weight", first + 1)
    at = first + 1 + stages
    heads = [f"layers.{first + 1 + i}.layers" for i in range(stages)]
    convs = [shapes[f"{head}.0.weight"] for head in heads]
    members = [_count(shapes, head + ".{}.stack.2.weight", 1) for head in heads]
    groups = ["layers.1", *(f"{head}.1" for head in heads), f"layers.{at}"]
    return MochiVAEConfig(
        latent_channels=shapes["output_proj.weight"][0] // 2,
        encoder_channels=(width, *(conv[0] for conv in convs)),
        layers=(first, *members, _count(shapes, "layers.{}.stack.2.weight", at)),
        temporal=tuple(conv[2] for conv in convs),
        spatial=tuple(conv[3] for conv in convs),
        attention=tuple(f"{name}.attn_block.norm.weight" in shapes for name in groups),
        in_channels=in_channels,
    )


def _read(
    model: str, config: Mapping[str, Any], names: Mapping[str, str], fixed: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The values of a diffusers config under our names. Keys with a leading underscore are notes, not numbers."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    kind = config.get("_class_name", model)
    if kind != model:
        raise ValueError(f"config.json describes a {kind}, expected a {model}")
    unknown = sorted(given.keys() - names.keys() - fixed.keys())
    if unknown:
        raise ValueError(f"config.json of {model} has unknown keys: {', '.join(unknown)}")
    for key, allowed in fixed.items():
        if key in given and given[key] not in allowed:
            choices = " or ".join(repr(value) for value in allowed)
            raise ValueError(f"config.json of {model}: {key} is {given[key]!r}, only {choices} is supported")
    values = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
