"""What the planner knows of a model: the forks' own numbers, and how a video becomes tokens.

Imports the forks' config modules only: no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from cogvideox_xdit.config import CONFIGS, TransformerConfig
from consisid_xdit.config import PREVIEW
from mochi_xdit.config import MochiConfig

Config = MochiConfig | TransformerConfig

BYTES = 2
"""Of a weight or an activation in bf16 or fp16."""
T5_PARAMETERS = 4_762_310_656
"""T5 v1.1 XXL's encoder, which all models share."""


@dataclass(frozen=True)
class Model:
    """One checkpoint. `parameters` are the transformer's, `decoder_parameters` the video decoder's."""

    name: str
    title: str
    config: Config
    parameters: int
    decoder_parameters: int
    width: int
    height: int
    num_frames: int
    num_steps: int
    frame_step: int
    frame_multiple: int = 1
    """Latent frames come in multiples of this (1.5 checkpoints: 2 frames to a patch)."""
    variant: str = ""
    """CogVideoX's name of this configuration, in `cogvideox_xdit.config.CONFIGS`; ConsisID is made like 5b-i2v."""
    sizes: tuple[tuple[int, int], ...] = ()
    """The only (width, height) it can make; empty when any multiple of 16 will do."""

    @property
    def family(self) -> str:
        return "mochi" if isinstance(self.config, MochiConfig) else "cogvideox"

    @property
    def layers(self) -> int:
        return self.config.depth if isinstance(self.config, MochiConfig) else self.config.layers

    @property
    def heads(self) -> int:
        return self.config.heads

    @property
    def hidden(self) -> int:
        """Channels of a video token inside the blocks."""
        return self.config.heads * self.config.head_dim

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows, columns of a token."""
        if isinstance(self.config, MochiConfig):
            return (1, self.config.patch, self.config.patch)
        return self.config.patch

    @property
    def patch_dim(self) -> int:
        """Numbers of one packed token of the latents."""
        t, h, w = self.patch
        channels = self.config.channels if isinstance(self.config, MochiConfig) else self.config.out_channels
        return t * h * w * channels

    @property
    def text_tokens(self) -> tuple[int, int]:
        """Text tokens of the two guidance branches.

        CogVideoX attends to all its padding. Mochi drops it: a prompt of usual length, and none for an empty negative.
        """
        if isinstance(self.config, MochiConfig):
            return (TYPICAL_PROMPT, 0)
        return (self.config.text_length, self.config.text_length)

    def problems(self, size: Size) -> list[str]:
        """What is wrong with a size for this model; empty when it can be made."""
        found = []
        if self.sizes and (size.width, size.height) not in self.sizes:
            allowed = " or ".join(f"{w}x{h}" for w, h in self.sizes)
            found.append(f"{self.name} makes {allowed} only, not {size.width}x{size.height}")
        for name, value in (("--width", size.width), ("--height", size.height)):
            if value < 16 or value % 16:
                near = max(16, value // 16 * 16)
                found.append(f"{name} {value} is not a positive multiple of 16; nearest: {near} or {near + 16}")
        if size.num_frames < 1:
            found.append(f"--num-frames {size.num_frames} is not a positive number")
        elif (size.num_frames - 1) % self.frame_step and self.family == "mochi":
            near = (size.num_frames - 1) // self.frame_step * self.frame_step + 1
            found.append(
                f"--num-frames {size.num_frames} is not of the form {self.frame_step}k+1; "
                f"nearest: {near} or {near + self.frame_step}"
            )
        if size.num_steps < 1:
            found.append(f"--num-steps {size.num_steps} is not a positive number")
        return found


TYPICAL_PROMPT = 60
"""T5 tokens of a two-sentence prompt, for models that drop padding. A few more or less move nothing."""


@dataclass(frozen=True)
class Size:
    """What is to be made: pixels, frames, sampling steps; whether there is guidance (two branches) or not."""

    width: int
    height: int
    num_frames: int
    num_steps: int
    guided: bool = True


def default_size(model: Model) -> Size:
    """The size of the model's published tables."""
    return Size(model.width, model.height, model.num_frames, model.num_steps)


def latent_frames(model: Model, size: Size) -> int:
    """Latent frames that are sampled; 1.5 checkpoints add one where the count is odd, and drop it before decoding."""
    count = (size.num_frames - 1) // model.frame_step + 1
    return -(-count // model.frame_multiple) * model.frame_multiple


def decoded_frames(model: Model, size: Size) -> int:
    """Latent frames that the decoder sees."""
    return (size.num_frames - 1) // model.frame_step + 1


def video_tokens(model: Model, size: Size) -> int:
    """Tokens of the video in the transformer: latent frames x rows x columns of patches."""
    t, h, w = model.patch
    return latent_frames(model, size) // t * (size.height // 8 // h) * (size.width // 8 // w)


COGVIDEOX_DECODER = 123_000_000


def _cogvideox(name: str, title: str, variant: str, parameters: int) -> Model:
    config = CONFIGS[variant]
    later = config.patch_time == 2
    return Model(
        name,
        title,
        config,
        parameters,
        COGVIDEOX_DECODER,
        width=1360 if later else 720,
        height=768 if later else 480,
        num_frames=config.sample_frames,
        num_steps=50,
        frame_step=config.time_compression,
        frame_multiple=2 if later else 1,
        variant=variant,
        sizes=((720, 480),) if config.learned else (),
    )


def _mochi() -> Model:
    return Model("mochi", "Mochi-1", MochiConfig(), 10_027_677_744, 362_526_595, 848, 480, 49, 64, 6)


def _consisid() -> Model:
    sizes = ((720, 480),)
    return Model(
        "consisid",
        "ConsisID",
        PREVIEW,
        6_217_102_912,
        COGVIDEOX_DECODER,
        720,
        480,
        49,
        50,
        4,
        variant="5b-i2v",
        sizes=sizes,
    )


_MAKERS: Mapping[str, Callable[[], Model]] = {
    "mochi": _mochi,
    "cogvideox-2b": lambda: _cogvideox("cogvideox-2b", "CogVideoX-2b", "2b", 1_693_783_872),
    "cogvideox-5b": lambda: _cogvideox("cogvideox-5b", "CogVideoX-5b", "5b", 5_570_283_072),
    "cogvideox-5b-i2v": lambda: _cogvideox("cogvideox-5b-i2v", "CogVideoX-5b-I2V", "5b-i2v", 5_625_087_552),
    "cogvideox-1.5-5b": lambda: _cogvideox("cogvideox-1.5-5b", "CogVideoX1.5-5B", "1.5", 5_570_676_352),
    "cogvideox-1.5-5b-i2v": lambda: _cogvideox("cogvideox-1.5-5b-i2v", "CogVideoX1.5-5B-I2V", "1.5-i2v", 5_571_594_880),
    "consisid": _consisid,
}
MODELS = tuple(_MAKERS)


@cache
def get_model(name: str) -> Model:
    """The model of that name or title. ValueError lists the names."""
    for key, make in _MAKERS.items():
        if name == key or name == make().title:
            return make()
    raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(MODELS)}")
