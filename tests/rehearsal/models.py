"""The published models at their true sizes, without weights: one name for each, and how to run a step of it.

All that the rehearsal knows of the forks' own interfaces is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

import wan_xdit.config as wan
from cogvideox_xdit.config import CONFIGS as COGVIDEOX
from cogvideox_xdit.transformer import CogVideoXTransformer
from common.memory.estimate import typed
from common.parallel.usp import SequenceParallel
from common.weights.load import assign, on_meta
from consisid_xdit.config import PREVIEW
from consisid_xdit.sampling import PATCHES
from consisid_xdit.transformer import ConsisIDTransformer
from mochi_xdit.config import MochiConfig
from mochi_xdit.transformer import MochiTransformer
from mochi_xdit.weights import KEEP_FP32
from wan_xdit.transformer import WanTransformer

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Model:
    """A transformer by its published numbers.

    config: a frozen dataclass; depth: its field with the number of blocks. build: (config, sp) -> module. size: latent
    frames, rows, columns of the published video. keep_fp32: weights held in fp32. prepare: (module, text, size) -> one
    branch's condition. tokens: the longest prompt. patch: numbers in one packed token. time: a time, as forward wants
    it.
    """

    config: Any
    depth: str
    build: Callable[..., nn.Module]
    size: Size
    patch: int
    tokens: int
    text_width: int
    prepare: Callable[[Any, Tensor, Size], Any]
    time: Callable[[torch.device], Any]
    volume: int = 4
    keep_fp32: tuple[str, ...] = ()
    compression: tuple[int, int] = (8, 4)
    """Pixels of a side, and frames, to one latent."""
    padding: int = 0
    """Latent frames that stand in front and are dropped at the end."""

    @property
    def decoded(self) -> int:
        """Latent frames that are decoded."""
        return self.size[0] - self.padding

    def frames(self, latents: int | None = None) -> int:
        """Frames of a video of so many decoded latents; default: of the published one."""
        return self.compression[1] * ((latents or self.decoded) - 1) + 1

    @property
    def layers(self) -> int:
        return getattr(self.config, self.depth)

    @property
    def video_tokens(self) -> int:
        return self.size[0] * self.size[1] * self.size[2] // self.volume

    def shallow(self, layers: int) -> Model:
        """The same with so many blocks."""
        return replace(self, config=replace(self.config, **{self.depth: layers}))

    def make(
        self, sp: SequenceParallel, dtype: torch.dtype = torch.bfloat16, float8: bool = False, multiplies: bool = False
    ) -> nn.Module:
        """The module with weights that are there in name only, on the device of `sp`; inside `fake_cuda`."""
        with unset_fake_temporarily():  # a module cannot be moved while its tensors are fake
            module = typed(on_meta(self.build, self.config, sp), dtype, self.keep_fp32, float8, multiplies)
        for name, slot in list(module.state_dict(keep_vars=True).items()):
            assign(module, name, torch.empty(slot.shape, dtype=slot.dtype, device=sp.device))
        return module.eval()

    def text(self, device: torch.device, tokens: int | None = None) -> Tensor:
        return torch.empty(1, self.tokens if tokens is None else tokens, self.text_width, device=device)

    def latent_tokens(self, sp: SequenceParallel) -> Tensor:
        """This rank's packed noisy latents, fp32."""
        return torch.empty(1, sp.lengths(self.video_tokens)[sp.rank], self.patch, device=sp.device)


def _mochi(size: Size) -> Model:
    config = MochiConfig()
    return Model(
        config,
        "depth",
        MochiTransformer,
        size,
        config.patch_dim,
        config.text_tokens,
        config.text_dim,
        lambda model, text, size: model.prepare(size, text),
        lambda device: torch.zeros(1, device=device),
        keep_fp32=tuple(KEEP_FP32),
        compression=(8, 6),
    )


def _image(config: Any, size: Size, device: torch.device) -> Tensor | None:
    """Image latents, where the checkpoint wants such."""
    return torch.empty(1, config.image_channels, *size, device=device) if config.image_channels else None


def _cogvideox(config: Any, size: Size) -> Model:
    return Model(
        config,
        "layers",
        CogVideoXTransformer,
        size,
        config.out_channels * config.patch_volume,
        config.text_length,
        config.text_dim,
        lambda model, text, size: model.prepare(text, size, _image(model.config, size, model.device)),
        lambda device: 500,
        config.patch_volume,
    )


def _face(model: Any) -> Any:
    config, device = model.config, model.device
    hidden = [torch.empty(1, PATCHES, config.vit_dim, device=device) for _ in range(config.scales)]
    return model.read_face(torch.empty(1, config.id_dim, device=device), hidden)


def _consisid(size: Size) -> Model:
    def prepare(model: Any, text: Tensor, size: Size) -> Any:
        return model.prepare(text, size, _image(model.config, size, model.device), face=_face(model))

    return replace(_cogvideox(PREVIEW, size), build=ConsisIDTransformer, prepare=prepare)


def _wan(config: wan.TransformerConfig, size: Size) -> Model:
    def prepare(model: Any, text: Tensor, size: Size) -> Any:
        width = config.image_width
        seen = None if width is None else torch.empty(1, config.image_tokens, width, device=model.device)
        return model.prepare(text, size, _image(config, size, model.device), seen)

    return Model(
        config,
        "layers",
        WanTransformer,
        size,
        config.out_channels * config.patch_volume,
        config.text_length,
        config.text_dim,
        prepare,
        lambda device: 500.0,
        config.patch_volume,
    )


MODELS: Mapping[str, Model] = {
    "mochi": _mochi((9, 60, 106)),  # 848x480, 49 frames
    "mochi-163": _mochi((28, 60, 106)),
    "cogvideox-2b": _cogvideox(COGVIDEOX["2b"], (13, 60, 90)),  # 720x480, 49 frames
    "cogvideox-5b": _cogvideox(COGVIDEOX["5b"], (13, 60, 90)),
    "cogvideox-5b-i2v": _cogvideox(COGVIDEOX["5b-i2v"], (13, 60, 90)),
    "cogvideox-1.5": replace(_cogvideox(COGVIDEOX["1.5"], (22, 96, 170)), padding=1),  # 1360x768, 81 frames
    "cogvideox-1.5-i2v": replace(_cogvideox(COGVIDEOX["1.5-i2v"], (22, 96, 170)), padding=1),
    "consisid": _consisid((13, 60, 90)),
    "wan-1.3b": _wan(wan.T2V_1_3B, (21, 60, 104)),  # 832x480, 81 frames
    "wan-14b": _wan(wan.T2V_14B, (21, 90, 160)),  # 1280x720, 81 frames
    "wan-i2v-14b": _wan(wan.I2V_14B, (21, 90, 160)),
    "wan-a14b": _wan(wan.T2V_14B, (21, 90, 160)),
    "wan-i2v-a14b": _wan(wan.I2V_A14B, (21, 90, 160)),
    "wan-ti2v-5b": replace(_wan(wan.TI2V_5B, (31, 44, 80)), compression=(16, 4)),  # 1280x704, 121 frames
}
