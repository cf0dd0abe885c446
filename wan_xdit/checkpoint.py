# ruff: noqa: RUF001 (a Chinese sentence has wide commas)
"""A checkpoint's folder: its files, its kind among the published ones, and that kind's defaults. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from common.registry.checks import Rules, task_problem
from common.weights.schema import CheckpointError, read_object, shown
from wan_xdit.config import (
    I2V_14B,
    I2V_A14B,
    T2V_1_3B,
    T2V_14B,
    TI2V_5B,
    TransformerConfig,
    VAEConfig,
    check_kind,
    read_transformer,
    read_vae,
)
from wan_xdit.layouts import LOOKED_FOR, find_clip, find_parts

PUBLISHED: Mapping[str, TransformerConfig] = {
    "t2v-14b": T2V_14B,
    "t2v-1.3b": T2V_1_3B,
    "i2v-14b-480p": I2V_14B,
    "i2v-14b-720p": I2V_14B,
    "t2v-a14b": T2V_14B,
    "i2v-a14b": I2V_A14B,
    "ti2v-5b": TI2V_5B,
}
"""The published kinds and the numbers of their transformers."""
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""What the authors say against where nobody says anything else: garish, overexposed, still, blurred, deformed, ..."""
RESIDUALS = ("fp32", "bf16")
"""Dtypes of the stream between the blocks: the authors' program sums it up in fp32."""
SOLVERS = ("unipc", "dpm", "euler")
SOLVER = SOLVERS[0]
SHAKING = "镜头晃动，"
"""Which 2.1's image models have in front: a shaking camera."""
SMALL = 832 * 480
"""Pixels up to which the 14B models of 2.1 have another shift."""


@dataclass(frozen=True)
class WanRules(Rules):
    """With the schedule: see `wan_xdit.solver`."""

    shift: float = 5.0
    """How far the noise levels are moved up."""
    small_shift: float | None = None
    """The shift up to 832 x 480 pixels, None: as `shift`."""
    boundary: float | None = None
    """Of two experts the first has the noise levels from here up."""
    cfg_scale_2: float | None = None
    """The guidance of the second expert."""
    needs_image: bool = False
    """No video without a picture to begin with."""

    def task_problem(self, image: bool) -> str:
        """Why a video cannot be made with a picture, or without one; empty if it can."""
        return task_problem(self.needs_image, "image" in self.takes, image)

    def shift_of(self, width: int, height: int) -> float:
        """The official shift for a size in pixels."""
        small = self.small_shift is not None and width * height <= SMALL
        return self.small_shift if small and self.small_shift is not None else self.shift

    def scales(self, scale: float | None, second: float | None) -> tuple[float, float]:
        """Guidance of both experts: as given or the model's own; beside another first one the second has that."""
        scale = self.cfg_scale if scale is None else scale
        if second is None and scale == self.cfg_scale:
            second = self.cfg_scale_2
        return scale, scale if second is None else second


_T2V_14B = WanRules(
    heads=T2V_14B.heads,
    width=1280,
    height=720,
    num_frames=81,
    num_steps=50,
    cfg_scale=5.0,
    fps=16,
    frame_step=4,
    negative_prompt=NEGATIVE,
    small_shift=3.0,
)
_FROM_IMAGE = replace(_T2V_14B, num_steps=40, takes=("image",), needs_image=True)
_I2V_14B = replace(_FROM_IMAGE, negative_prompt=SHAKING + NEGATIVE)
RULES: Mapping[str, WanRules] = {
    "t2v-14b": _T2V_14B,
    "t2v-1.3b": replace(_T2V_14B, heads=T2V_1_3B.heads, width=832, height=480, small_shift=None),
    "i2v-14b-480p": replace(_I2V_14B, width=832, height=480),
    "i2v-14b-720p": _I2V_14B,
    "t2v-a14b": replace(
        _T2V_14B, num_steps=40, small_shift=None, shift=12.0, cfg_scale=4.0, cfg_scale_2=3.0, boundary=0.875
    ),
    "i2v-a14b": replace(_FROM_IMAGE, small_shift=None, cfg_scale=3.5, cfg_scale_2=3.5, boundary=0.9),
    "ti2v-5b": replace(
        _T2V_14B,
        heads=TI2V_5B.heads,
        height=704,
        num_frames=121,
        fps=24,
        size_multiple=32,
        small_shift=None,
        takes=("image",),
    ),
}
"""Official defaults of each kind, and the sizes that it admits."""

DEMO_KINDS = ("t2v-1.3b", "i2v-14b-480p", "t2v-a14b", "i2v-a14b", "ti2v-5b")
"""Kinds of which a demo with random weights can be made."""


def demo_rules(kind: str) -> WanRules:
    """Of the demo with random weights that has the traits of a published kind."""
    return replace(
        RULES[kind],
        heads=4,
        width=96,
        height=64,
        num_frames=17,
        num_steps=10,
        fps=8,
        dtype="fp32",
        negative_prompt="",
        default_prompt="A red circle moves slowly to the left on a black background.",
    )


TRAINED = "shapes"
"""The demo that shows something: trained on moving shapes (`tools/demo` in the repository), of TI2V-5B's kind."""
DEMO = replace(
    demo_rules("ti2v-5b"),
    width=64,
    num_frames=13,
    num_steps=20,
    cfg_scale=3.0,
    dtype=RULES["ti2v-5b"].dtype,
    size_multiple=16,
    default_prompt="A big red circle moves slowly to the right on a black background.",
)
DEMOS: Mapping[str, Rules] = {TRAINED: DEMO} | {kind: demo_rules(kind) for kind in DEMO_KINDS}


@dataclass(frozen=True)
class CheckpointFiles:
    """A folder's numbers and where its parts lie, found and not read."""

    layout: str
    """Whose names the tensors have, `original` or `diffusers`."""
    config: TransformerConfig
    vae_config: VAEConfig
    experts: tuple[Path, ...]
    """The transformer's folder or file, of two experts the one for high noise first."""
    vae: Path
    """The autoencoder's."""
    boundary: float | None = None
    """Where the second expert takes over."""
    per_token: bool = False
    """A first frame that is given stays as it is, and its tokens are at time 0."""
    small: bool = False
    """A kind that is published for two sizes, in its smaller one."""
    image_encoder: Path | None = None
    """The folder or the file of CLIP's image tower, for checkpoints that attend to its tokens."""

    @property
    def kind(self) -> str:
        """The published kind whose defaults are this checkpoint's."""
        if self.per_token:
            return "ti2v-5b"
        if len(self.experts) > 1:
            return "i2v-a14b" if self.config.image_channels else "t2v-a14b"
        if self.config.image_channels:
            return "i2v-14b-480p" if self.small else "i2v-14b-720p"
        return "t2v-1.3b" if self.config.heads <= T2V_1_3B.heads else "t2v-14b"

    @property
    def rules(self) -> WanRules:
        """The kind's defaults, with this checkpoint's own numbers."""
        vae, config = self.vae_config, self.config
        boundary = self.boundary if len(self.experts) > 1 else None
        official = RULES[self.kind]
        return replace(
            official,
            heads=config.heads,
            size_multiple=vae.space * config.patch[1],
            frame_step=vae.time,
            boundary=boundary,
        )

    def check_task(self, image: bool) -> None:
        """ValueError unless the checkpoint can start from what is given."""
        if problem := self.rules.task_problem(image):
            raise ValueError(problem)
        if self.config.image_width is not None and self.image_encoder is None:
            raise ValueError(
                "this checkpoint sees its image through CLIP, whose weights are missing; put beside the others "
                "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth (the authors'), "
                "clip_vision/clip_vision_h.safetensors (ComfyUI's), or the folder image_encoder/ of "
                "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
            )


PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")


def find_checkpoint(folder: Path) -> CheckpointFiles:
    """What lies in a checkpoint's folder, in any layout. CheckpointError names what is missing or cannot be run.

    Reads json and headers alone.
    """
    index_file = folder / "model_index.json"
    if index_file.is_file():
        return _diffusers(folder, read_object(index_file), str(index_file))
    parts = find_parts(folder)
    if parts is None:
        raise CheckpointError(f"{folder}: no Wan checkpoint; looked for {LOOKED_FOR}")
    small = any("480p" in path.name.lower() for path in (folder.resolve(), *parts.experts))
    files = CheckpointFiles(
        "original",
        parts.config,
        parts.vae_config,
        parts.experts,
        parts.vae,
        per_token=parts.per_token,
        small=small,
        image_encoder=find_clip(folder) if parts.config.image_width else None,
    )
    return checked(replace(files, boundary=RULES[files.kind].boundary), str(folder))


def _diffusers(folder: Path, index: Mapping[str, object], where: str) -> CheckpointFiles:
    kind = str(index.get("_class_name"))
    if kind not in PIPELINES:
        check_kind(kind, where)
        raise CheckpointError(f"{where} says _class_name={shown(kind)}; known: {', '.join(PIPELINES)}")
    boundary, per_token = index.get("boundary_ratio"), bool(index.get("expand_timesteps"))
    names = ("transformer", "transformer_2") if _named(index, "transformer_2") else ("transformer",)
    if len(names) > 1 and not (isinstance(boundary, (int, float)) and 0 < boundary < 1):
        raise CheckpointError(f"{where} says boundary_ratio={shown(boundary)}; two experts need one between 0 and 1")
    paths = [folder / name / "config.json" for name in names]
    configs = [read_transformer(read_object(path), str(path)) for path in paths]
    if any(config != configs[0] for config in configs):
        raise CheckpointError(f"{paths[-1]}: this expert's numbers are not those of {paths[0]}")
    vae = folder / "vae" / "config.json"
    files = CheckpointFiles(
        "diffusers",
        configs[0],
        read_vae(read_object(vae), str(vae)),
        tuple(folder / name for name in names),
        folder / "vae",
        float(boundary) if isinstance(boundary, (int, float)) else None,
        per_token,
        "480p" in folder.resolve().name.lower(),
        folder / "image_encoder" if configs[0].image_width else None,
    )
    return checked(files, str(folder))


def _named(index: Mapping[str, object], part: str) -> bool:
    """Whether a model_index.json says that there is such a part."""
    value = index.get(part)
    return isinstance(value, list) and len(value) == 2 and value[1] is not None


def checked(files: CheckpointFiles, where: str) -> CheckpointFiles:
    """The checkpoint, whose parts fit each other; else CheckpointError."""
    config, have = files.config, files.vae_config.latent_channels
    if have != config.out_channels:
        raise CheckpointError(
            f"{where}: the VAE has {have} latent channels, the transformer needs {config.out_channels}"
        )
    if config.image_channels not in (0, files.vae_config.time + have):
        channels = config.out_channels + files.vae_config.time + have
        raise CheckpointError(
            f"{where}: in_channels is {config.in_channels}; known are {config.out_channels} (text to video) and "
            f"{channels} (image to video)"
        )
    return files


def official_rules(folder: Path) -> WanRules:
    """The admissible values for a checkpoint; ValueError when the folder is none."""
    return find_checkpoint(folder).rules
