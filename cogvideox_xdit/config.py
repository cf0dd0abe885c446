"""The numbers of the five published CogVideoX checkpoints; a checkpoint's own json files win over them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from common.registry.checks import Rules, task_problem
from common.weights.schema import (
    MAX_LAYERS,
    CheckpointError,
    bounded,
    build,
    check_keys,
    numbers,
    one_of,
    read_object,
    shown,
)

PIXELS = 8  # rows and columns of the video per row and column of the latents
FRAME_STEP = 8
FRAME_OFFSETS = (0, 1)  # videos of 8k or 8k + 1 frames are whole latents: the autoencoder makes 4 frames of each of two


@dataclass(frozen=True)
class TransformerConfig:
    """`transformer/config.json`; the defaults are CogVideoX-2b's. Field names are ours."""

    heads: int = bounded(30, 1024)
    head_dim: int = bounded(64, 1024)
    layers: int = bounded(30, MAX_LAYERS)
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_length: int = 226
    time_dim: int = 512
    ofs_dim: int | None = None
    patch_size: int = bounded(2, 16)
    patch_time: int | None = bounded(None, 16)
    """Frames of a patch, None where a patch is one frame (1.0 checkpoints)."""
    time_compression: int = bounded(4, 16)
    sample_height: int = 60
    sample_width: int = 90
    """`sample_height`, `sample_width`: of the latents that the checkpoint was trained on."""
    sample_frames: int = 49
    """Frames of the videos that it was trained on."""
    rotary: bool = False
    """Rope on the video tokens, else a sine-cosine table is added."""
    learned: bool = False
    """A stored table is added to the tokens as well."""
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

    @property
    def official_size(self) -> tuple[int, int]:
        """Height and width in pixels that a video has by default."""
        if (self.sample_height, self.sample_width) == (300, 300):
            # Some 1.5 repositories name the largest grid here instead of the size of their videos.
            return 768, 1360
        return self.sample_height * PIXELS, self.sample_width * PIXELS

    def check_area(self, rows: int, columns: int) -> None:
        """ValueError unless the checkpoint has positions for latents of this size."""
        if self.learned and (rows, columns) != (self.sample_height, self.sample_width):
            height, width = self.official_size
            raise ValueError(
                f"this checkpoint has learned positions for videos of {height} x {width} pixels (height x width) "
                f"only, not {rows * PIXELS} x {columns * PIXELS}"
            )

    def check_task(self, image: bool, video: bool) -> None:
        """ValueError unless the checkpoint can start from what is given."""
        takes_image = bool(self.image_channels)
        if problem := task_problem(takes_image, takes_image, image, video):
            raise ValueError(problem)


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


class CogVideoXRules(Rules):
    """Guidance here starts above 1, as in the official program: a smaller scale is none."""

    def guided(self, scale: float) -> bool:
        return scale > 1


def official_rules(config: TransformerConfig) -> CogVideoXRules:
    """The official defaults of a checkpoint: 8 frames a second, 16 for the 1.5 line; half precision as published."""
    height, width = config.official_size
    return CogVideoXRules(
        heads=config.heads,
        width=width,
        height=height,
        num_frames=config.sample_frames,
        num_steps=50,
        cfg_scale=6.0,
        fps=16 if config.patch_time else 8,
        frame_step=FRAME_STEP,
        frame_offsets=FRAME_OFFSETS,
        dtype="bf16" if config.rotary else "fp16",
        sizes=((width, height),) if config.learned else (),
        takes=takes(config),
    )


def takes(config: TransformerConfig) -> tuple[str, ...]:
    """The option that names what a checkpoint can start from."""
    return ("image",) if config.image_channels else ("video",)


STRENGTH = 0.8
"""How much of the schedule is run on a video, where nobody says it."""
TRAINED = "shapes"
"""The demo that shows something: trained on moving shapes (`tools/demo` in the repository)."""
DEMO = CogVideoXRules(
    heads=6,
    width=64,
    height=64,
    num_frames=17,
    num_steps=25,
    cfg_scale=4.0,
    fps=8,
    default_prompt="A big red circle moves slowly to the right on a black background.",
    frame_step=FRAME_STEP,
    frame_offsets=FRAME_OFFSETS,
    takes=("video",),
)


def random_demo_rules(kind: str) -> CogVideoXRules:
    """Of the demo with random weights that has the traits of a published kind."""
    return replace(
        DEMO,
        heads=4,
        width=96,
        num_steps=10,
        cfg_scale=6.0,
        dtype="fp32",
        sizes=((96, 64),) if CONFIGS[kind].learned else (),
        default_prompt="A red circle moves slowly to the left on a black background.",
        takes=takes(CONFIGS[kind]),
    )


DEMOS: Mapping[str, Rules] = {TRAINED: DEMO} | {kind: random_demo_rules(kind) for kind in CONFIGS}

_TRANSFORMER = {
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
# What this code does, so a checkpoint that says otherwise must not be run.
_TRANSFORMER_FIXED = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True,
}
# The 1.5 checkpoints say patch_bias false and have the bias all the same.
_TRANSFORMER_IGNORED = ("patch_bias",)


@dataclass(frozen=True)
class VAEConfig:
    """`vae/config.json`; the defaults are CogVideoX-2b's, the others have a scaling_factor of 0.7."""

    channels: tuple[int, ...] = (128, 256, 256, 512)
    """Of the blocks, from the pixels to the latents."""
    latent_channels: int = 16
    layers: int = bounded(3, 64)
    eps: float = 1e-6
    groups: int = 32
    time_compression: int = bounded(4, 16)
    """Frames per latent frame."""
    sample_height: int = 480
    sample_width: int = 720
    """`sample_height`, `sample_width`: pixels, half of them make a tile."""
    scaling_factor: float = 1.15258426
    """Transformer latents = VAE latents * factor."""
    inverted: bool = False
    """Image latents are divided by it instead (1.5)."""

    @property
    def space_compression(self) -> int:
        """Pixels per latent pixel in each direction: 8."""
        return 2 ** (len(self.channels) - 1)


_MAX_BLOCKS = 8
_VAE = {
    "channels": "block_out_channels",
    "latent_channels": "latent_channels",
    "layers": "layers_per_block",
    "eps": "norm_eps",
    "groups": "norm_num_groups",
    "time_compression": "temporal_compression_ratio",
    "sample_height": "sample_height",
    "sample_width": "sample_width",
    "scaling_factor": "scaling_factor",
    "inverted": "invert_scale_latents",
}
_VAE_FIXED = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# Names of the blocks are always these four; force_upcast speaks of the reference's own dtype handling.
_VAE_IGNORED = ("down_block_types", "up_block_types", "force_upcast", "mid_block_add_attention", "sample_size")


def transformer_config(
    raw: Mapping[str, Any], where: str = "transformer/config.json", ignored: Sequence[str] = ()
) -> TransformerConfig:
    """A checkpoint's own numbers. CheckpointError names the key and the value that cannot be run.

    ignored: keys that the caller reads itself.
    """
    check_keys(raw, (*_TRANSFORMER.values(), *_TRANSFORMER_IGNORED, *ignored), _TRANSFORMER_FIXED, where)
    return build(TransformerConfig, _TRANSFORMER, raw, where)


def vae_config(raw: Mapping[str, Any], where: str = "vae/config.json") -> VAEConfig:
    """As `transformer_config`, for the autoencoder."""
    check_keys(raw, (*_VAE.values(), *_VAE_IGNORED), _VAE_FIXED, where)
    config = build(VAEConfig, _VAE, raw, where)
    if wrong := [width for width in config.channels if width % config.groups]:
        raise CheckpointError(f"{where}: a block of {wrong[0]} channels does not split into {config.groups} groups")
    if len(config.channels) > _MAX_BLOCKS:
        raise CheckpointError(
            f"{where} says block_out_channels of {len(config.channels)}; at most {_MAX_BLOCKS} are read"
        )
    if config.time_compression & (config.time_compression - 1):
        ratio = config.time_compression
        raise CheckpointError(f"{where} says temporal_compression_ratio={ratio}; it must be a power of two")
    return config


def transformer_json(config: TransformerConfig) -> dict[str, Any]:
    """The reverse of `transformer_config`: what a checkpoint's config.json says."""
    raw = {key: getattr(config, name) for name, key in _TRANSFORMER.items()}
    return {"_class_name": "CogVideoXTransformer3DModel", **raw, **_TRANSFORMER_FIXED}


def vae_json(config: VAEConfig) -> dict[str, Any]:
    """The reverse of `vae_config`."""
    raw = {key: getattr(config, name) for name, key in _VAE.items()}
    count = len(config.channels)
    blocks = {"down_block_types": ["CogVideoXDownBlock3D"] * count, "up_block_types": ["CogVideoXUpBlock3D"] * count}
    return {"_class_name": "AutoencoderKLCogVideoX", **raw, **_VAE_FIXED, **blocks}


@dataclass(frozen=True)
class SchedulerNumbers:
    """What the schedulers take of `scheduler_config.json`; names and defaults are theirs."""

    num_train_timesteps: int = bounded(1000, 100_000)
    beta_start: float = bounded(0.00085, 1, least=0)
    beta_end: float = bounded(0.012, 1, least=0)
    beta_schedule: str = one_of("scaled_linear", "linear", "squaredcos_cap_v2")
    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: int = bounded(0, 1000, least=0)
    prediction_type: str = one_of("v_prediction", "epsilon", "sample")
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = one_of("leading", "trailing", "linspace")
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 3.0


def scheduler_config(path: Path) -> dict[str, Any]:
    """A checkpoint's scheduler_config.json without keys that are null. CheckpointError names key and value."""
    raw = {key: value for key, value in read_object(path).items() if value is not None}
    if "trained_betas" in raw:
        raise CheckpointError(f"{path} says trained_betas={shown(raw['trained_betas'])}; supported is null")
    return raw | numbers(SchedulerNumbers, {one.name: one.name for one in fields(SchedulerNumbers)}, raw, str(path))


@dataclass(frozen=True)
class CheckpointConfig:
    """What the json files of a checkpoint folder say."""

    transformer: TransformerConfig
    vae: VAEConfig
    scheduler: Mapping[str, Any]
    """What scheduler_config.json says, with the class to use."""


_PIPELINES = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline")


def read_checkpoint(
    model_dir: Path,
    pipelines: Collection[str] = _PIPELINES,
    transformer_config: Callable[[Mapping[str, Any], str], TransformerConfig] = transformer_config,
) -> CheckpointConfig:
    """Read a checkpoint folder in the diffusers layout. CheckpointError names what is missing or cannot be run.

    A fork on this model states its own `pipelines` of model_index.json and its reading of transformer/config.json.
    """
    index_file = model_dir / "model_index.json"
    if not index_file.is_file():
        raise CheckpointError(f"{index_file} is missing; a checkpoint in the diffusers layout has it")
    index = read_object(index_file)
    if index.get("_class_name") not in tuple(pipelines):
        kind = shown(index.get("_class_name"))
        raise CheckpointError(f"{index_file} says _class_name={kind}; known: {', '.join(pipelines)}")
    raw = [read_object(model_dir / part / "config.json") for part in ("transformer", "vae")]
    transformer = transformer_config(raw[0], str(model_dir / "transformer" / "config.json"))
    vae = vae_config(raw[1], str(model_dir / "vae" / "config.json"))
    have, need = vae.latent_channels, transformer.out_channels
    if have != need:
        raise CheckpointError(f"{model_dir}: the VAE has {have} latent channels, the transformer needs {need}")
    scheduler = scheduler_config(model_dir / "scheduler" / "scheduler_config.json")
    # The pipeline's index says which class is to be used; the config file notes which one wrote it.
    if isinstance(entry := index.get("scheduler"), list) and len(entry) == 2 and isinstance(entry[1], str):
        scheduler = scheduler | {"_class_name": entry[1]}
    return CheckpointConfig(transformer, vae, scheduler)


def read_rules(model_dir: Path) -> Rules:
    """The admissible values for a checkpoint; ValueError when the folder is none."""
    return official_rules(read_checkpoint(model_dir).transformer)
