"""Mochi's numbers. The defaults are Mochi 1 preview; a checkpoint's config.json, or the shapes in its header, win."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from common.registry.checks import Rules
from common.weights.headers import read_header
from common.weights.schema import MAX_LAYERS, CheckpointError, bounded, build, check_keys, read_object, shown

Shapes = Mapping[str, tuple[int, ...]]
_MAX_RATIO = 4096
_VAE = {
    "latent_channels": "latent_channels",
    "encoder_channels": "encoder_block_out_channels",
    "decoder_channels": "decoder_block_out_channels",
    "layers": "layers_per_block",
    "temporal": "temporal_expansions",
    "spatial": "spatial_expansions",
    "attention": "add_attention_block",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "mean": "latents_mean",
    "std": "latents_std",
    "scaling_factor": "scaling_factor",
}
_TRANSFORMER = {
    "depth": "num_layers",
    "heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "hidden_y": "pooled_projection_dim",
    "channels": "in_channels",
    "patch": "patch_size",
    "text_dim": "text_embed_dim",
    "time_dim": "time_embed_dim",
    "text_tokens": "max_sequence_length",
}


@dataclass(frozen=True)
class MochiVAEConfig:
    """The asymmetric causal VAE. Tuples run from the pixels to the latents; the decoder uses them back to front."""

    latent_channels: int = 12
    encoder_channels: tuple[int, ...] = (64, 128, 256, 384)
    decoder_channels: tuple[int, ...] = (128, 256, 512, 768)
    layers: tuple[int, ...] = bounded((3, 3, 4, 6, 3), most=64, least=0)
    """Residual blocks: at the pixels, in each of the stages, at the latents."""
    temporal: tuple[int, ...] = bounded((1, 2, 3), 16)
    spatial: tuple[int, ...] = bounded((2, 2, 2), 16)
    attention: tuple[bool, ...] = (False, True, True, True, True)
    """Which groups of the encoder's residual blocks have temporal attention. The decoder has none."""
    groups: int = 32
    head_dim: int = 32
    in_channels: int = 15
    """RGB and its Fourier features: 3 + 3 * 2 frequencies * (sin, cos)."""
    out_channels: int = 3
    mean: tuple[float, ...] = bounded(
        (
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
        ),
        most=1e6,
        least=-1e6,
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
        return prod(self.temporal)

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent pixel in each direction: 8."""
        return prod(self.spatial)

    def __post_init__(self) -> None:
        for channels in (self.encoder_channels, self.decoder_channels):
            # Only residual blocks have norms; those at the latents are as wide as the last stage's.
            wrong = [w for w, blocks in zip((*channels, *channels[-1:]), self.layers) if blocks and w % self.groups]
            if wrong:
                raise ValueError(f"a width of {wrong[0]} channels does not split into {self.groups} groups")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], where: str = "vae/config.json") -> MochiVAEConfig:
        """From the parsed `vae/config.json` of a diffusers folder. CheckpointError names what it cannot honour."""
        _check("AutoencoderKLMochi", config, _VAE.values(), {"act_fn": "silu"}, where)
        numbers = build(cls, _VAE, config, where)
        stages = len(numbers.temporal)
        for name, count in (
            ("spatial", stages),
            ("encoder_channels", stages + 1),
            ("decoder_channels", stages + 1),
            ("layers", stages + 2),
            ("attention", stages + 2),
            ("mean", numbers.latent_channels),
            ("std", numbers.latent_channels),
        ):
            if (have := len(getattr(numbers, name))) != count:
                basis = _VAE["latent_channels" if name in ("mean", "std") else "temporal"]
                raise CheckpointError(f"{where}: {_VAE[name]} has {have} values; {basis} asks for {count}")
        if numbers.spatial_ratio * numbers.temporal_ratio > _MAX_RATIO:
            raise CheckpointError(f"{where}: temporal_expansions and spatial_expansions are impossibly large")
        return numbers

    @classmethod
    def from_native(cls, shapes: Shapes, where: str = "the file") -> MochiVAEConfig:
        """From the tensor shapes of a native `decoder.safetensors` or `encoder.safetensors`, which carry no config.

        What the file does not show keeps its default. KeyError names a tensor that every such file has and this one
        lacks; CheckpointError a number that is impossible, with `where`, the file.
        """
        values = _native_decoder(shapes) if "blocks.0.0.weight" in shapes else _native_encoder(shapes)
        return build(cls, {name: name for name in values}, values, where)


@dataclass(frozen=True)
class MochiConfig:
    """The asymmetric joint transformer over video tokens (x) and text tokens (y)."""

    depth: int = bounded(48, MAX_LAYERS)
    heads: int = bounded(24, 1024)
    head_dim: int = bounded(128, 1024)
    hidden_y: int = 1536
    mlp_x: int = 8192
    mlp_y: int = 4096
    channels: int = 12
    patch: int = bounded(2, 16)
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
    def from_diffusers(
        cls,
        transformer: Mapping[str, Any],
        vae: Mapping[str, Any] | None = None,
        where: str = "transformer/config.json",
        vae_where: str = "vae/config.json",
    ) -> MochiConfig:
        """From the parsed config.json of a diffusers folder's `transformer/` (and `vae/`).

        CheckpointError names keys it does not know and values it cannot honour. where, vae_where: the files.
        """
        channels = (None, transformer.get("in_channels", cls().channels))
        fixed = {"qk_norm": "rms_norm", "activation_fn": "swiglu", "out_channels": channels}
        _check("MochiTransformer3DModel", transformer, _TRANSFORMER.values(), fixed, where)
        sizes = build(cls, _TRANSFORMER, transformer, where)
        # Widths are not in the file: two thirds of four times the stream's, which for Mochi 1 is already a multiple of
        # 256.
        widths = {"mlp_x": 4 * sizes.hidden_x * 2 // 3, "mlp_y": 4 * sizes.hidden_y * 2 // 3}
        numbers = replace(sizes, **widths, vae=MochiVAEConfig.from_diffusers(vae or {}, vae_where))
        if (have := numbers.vae.latent_channels) != numbers.channels:
            raise CheckpointError(f"{vae_where}: {have} latent channels, the transformer needs {numbers.channels}")
        return numbers

    @classmethod
    def from_native(cls, shapes: Shapes, where: str = "the file") -> MochiConfig:
        """From the tensor shapes of a native `dit.safetensors`, which carries no config.

        KeyError names a tensor that every such file has and this one lacks, CheckpointError a number that is
        impossible, with `where`, the file. Only what sets the numbers is looked at; whether every shape agrees is the
        loader's check.
        """
        _, heads, half = shapes["pos_frequencies"]
        hidden_y, text_dim = shapes["t5_yproj.weight"]
        _, channels, patch, _ = shapes["x_embedder.proj.weight"]
        depth = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=0)
        mlp_x = shapes["blocks.0.mlp_x.w2.weight"][1]
        # A single block is the last one, and the last one has no text feed-forward.
        mlp_y = shapes["blocks.0.mlp_y.w2.weight"][1] if depth > 1 else cls.mlp_y
        time_dim = shapes["t_embedder.mlp.0.weight"][1]
        values = {
            "depth": depth,
            "heads": heads,
            "head_dim": 2 * half,
            "hidden_y": hidden_y,
            "mlp_x": mlp_x,
            "mlp_y": mlp_y,
            "channels": channels,
            "patch": patch,
            "text_dim": text_dim,
            "time_dim": time_dim,
        }
        return build(cls, {name: name for name in values}, values, where)


@dataclass(frozen=True)
class MochiRules(Rules):
    """With the schedule that the model was trained for, see `mochi_xdit.sampling.linear_quadratic_sigmas`."""

    threshold_noise: float = 0.025
    """Noise that the linear steps remove altogether."""
    linear_steps: int | None = None
    """How many steps are linear, None for half."""

    def schedule(self, num_steps: int, threshold: float | None, linear: int | None) -> tuple[float, int | None]:
        """The threshold and the linear steps of so many steps; what is None is the model's own."""
        # As many linear steps as the distilled model has leave shorter schedules no quadratic one.
        own = self if self.linear_steps is None or num_steps > self.linear_steps else OFFICIAL
        return (
            own.threshold_noise if threshold is None else threshold,
            own.linear_steps if linear is None else linear,
        )


OFFICIAL = MochiRules(
    heads=MochiConfig.heads, width=848, height=480, num_frames=49, num_steps=64, cfg_scale=4.5, fps=30, frame_step=6
)
FAST = replace(OFFICIAL, num_steps=8, cfg_scale=1.5, threshold_noise=0.1, linear_steps=6)
"""Of FastMochi, the distilled model."""
DEMO = Rules(
    heads=4,
    width=64,
    height=64,
    num_frames=13,
    num_steps=20,
    cfg_scale=3.0,
    fps=8,
    default_prompt="A big red circle moves slowly to the right on a black background.",
)
NATIVE_TRANSFORMER = ("dit.safetensors", "dit.fast.safetensors")
"""Files of the native layout, of Mochi 1 preview and of FastMochi; the first that is there is taken."""


def official_rules(folder: Path) -> MochiRules:
    """The defaults of a checkpoint folder and the sizes it admits; ValueError when the folder is none. Reads headers.

    FastMochi is told from the official model by the name of its file.
    """
    for name, rules in zip(NATIVE_TRANSFORMER, (OFFICIAL, FAST)):
        if (folder / name).is_file():
            return replace(rules, heads=_native_heads(folder / name))
    if not (folder / "transformer" / "config.json").is_file():
        raise ValueError("no Mochi checkpoint: neither dit.safetensors nor transformer/config.json is there")
    config = read_config(folder)
    multiple = config.vae.spatial_ratio * config.patch
    return replace(OFFICIAL, heads=config.heads, size_multiple=multiple, frame_step=config.vae.temporal_ratio)


def _native_heads(file: Path) -> int:
    """Heads by the shape of `pos_frequencies`; the official number where the loader will find fault with the file."""
    try:
        entries, _ = read_header(file)
    except ValueError:
        return OFFICIAL.heads
    shape = next((entry.shape for name, entry in entries.items() if name.endswith("pos_frequencies")), ())
    return shape[1] if len(shape) == 3 and shape[1] else OFFICIAL.heads


def _count(shapes: Shapes, pattern: str, start: int) -> int:
    """How many of the names `pattern.format(start)`, `pattern.format(start + 1)`, ... there are."""
    n = 0
    while pattern.format(start + n) in shapes:
        n += 1
    return n


def _native_decoder(shapes: Shapes) -> dict[str, Any]:
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
    return {
        "latent_channels": latent_channels,
        "decoder_channels": tuple(reversed(channels)),
        "layers": tuple(reversed(layers)),
        "temporal": tuple(reversed(temporal)),
        "spatial": (2,) * stages,
        "out_channels": shapes["output_proj.weight"][0],
    }


def _native_encoder(shapes: Shapes) -> dict[str, Any]:
    width, in_channels = shapes["layers.0.weight"]
    first = _count(shapes, "layers.{}.stack.2.weight", 1)
    stages = _count(shapes, "layers.{}.layers.0.weight", first + 1)
    at = first + 1 + stages
    heads = [f"layers.{first + 1 + i}.layers" for i in range(stages)]
    convs = [shapes[f"{head}.0.weight"] for head in heads]
    members = [_count(shapes, head + ".{}.stack.2.weight", 1) for head in heads]
    groups = ["layers.1", *(f"{head}.1" for head in heads), f"layers.{at}"]
    return {
        "latent_channels": shapes["output_proj.weight"][0] // 2,
        "encoder_channels": (width, *(conv[0] for conv in convs)),
        "layers": (first, *members, _count(shapes, "layers.{}.stack.2.weight", at)),
        "temporal": tuple(conv[2] for conv in convs),
        "spatial": tuple(conv[3] for conv in convs),
        "attention": tuple(f"{name}.attn_block.norm.weight" in shapes for name in groups),
        "in_channels": in_channels,
    }


def _check(model: str, config: Mapping[str, Any], keys: Collection[str], fixed: Mapping[str, Any], where: str) -> None:
    if (kind := config.get("_class_name", model)) != model:
        raise CheckpointError(f"{where} describes a {shown(kind)}, expected a {model}")
    check_keys(config, keys, fixed, where)


def read_config(folder: Path) -> MochiConfig:
    """The numbers of a diffusers folder. CheckpointError names the file, and the key where there is one."""
    transformer, vae = (folder / part / "config.json" for part in ("transformer", "vae"))
    raw_vae = read_object(vae) if vae.is_file() else None
    return MochiConfig.from_diffusers(read_object(transformer), raw_vae, str(transformer), str(vae))
