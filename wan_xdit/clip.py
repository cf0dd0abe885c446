"""The image tower of 2.1's image models: CLIP's ViT-H/14, of which the last block but one is what they attend to.

Radford et al. 2021 (arXiv 2103.00020); the weights are open_clip's, trained with a text tower of XLM-RoBERTa.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.weights.load import Checkpoint, Concat, Rename, check, find_files, load, on_meta, open_checkpoint
from common.weights.schema import MAX_LAYERS, CheckpointError, bounded, build, read_object
from wan_xdit.layouts import CLIP_SIGNS
from wan_xdit.weights import behind

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of pixels from 0 to 1, as the tower was trained with them."""
STEM = "model"
HEAD_WIDTH = 80
"""Of the published tower; no tensor's shape shows it."""


@dataclass(frozen=True)
class ImageConfig:
    """`vision_config` of image_encoder/config.json; names are transformers'."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = bounded(32, MAX_LAYERS, least=2)
    num_attention_heads: int = bounded(16, 1024)
    image_size: int = bounded(224, 4096)
    patch_size: int = bounded(14, 512)
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not share {self.hidden_size} channels")

    @property
    def tokens(self) -> int:
        """Of the patches, and the one of the class."""
        return (self.image_size // self.patch_size) ** 2 + 1


class Layer(nn.Module):
    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, config.layer_norm_eps)
        self.ff_in = nn.Linear(width, config.intermediate_size)
        self.ff_out = nn.Linear(config.intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, W) -> (B, M, W)"""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each b h m d
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ff_out(F.gelu(self.ff_in(self.norm2(x))))


class ImageEncoder(nn.Module):
    """A picture's tokens after the last block but one; the last block, its norm and the projection are left out."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(3, width, patch, patch, bias=False)
        self.first = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(config.tokens, width))
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers - 1))

    def forward(self, picture: Tensor) -> Tensor:
        """(H, W, 3) uint8 of any size -> (1, M, W)."""
        x = self.patches(self.pixels(picture)).flatten(2).transpose(1, 2)
        x = self.norm(torch.cat((self.first.expand(1, 1, -1), x), dim=1) + self.positions)
        for layer in self.layers:
            x = layer(x)
        return x

    def pixels(self, picture: Tensor) -> Tensor:
        """The picture as the authors show it to the tower: stretched to its square, bicubic, and normalised."""
        weight, side = self.patches.weight, self.config.image_size
        x = picture.to(weight.device, torch.promote_types(weight.dtype, torch.float32)).permute(2, 0, 1)[None] / 255
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values, dtype=x.dtype, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
        return ((x - mean) / std).to(weight.dtype)


_TRANSFORMERS = {
    "patches": "vision_model.embeddings.patch_embedding",
    "first": "vision_model.embeddings.class_embedding",
    "positions": "vision_model.embeddings.position_embedding.weight",
    "norm": "vision_model.pre_layrnorm",
}
_TRANSFORMERS_LAYER: Mapping[str, str | tuple[str, ...]] = {
    "norm1": "layer_norm1",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "ff_in": "mlp.fc1",
    "ff_out": "mlp.fc2",
}
_ORIGINAL = {
    "patches": "visual.patch_embedding",
    "first": "visual.cls_embedding",
    "positions": "visual.pos_embedding",
    "norm": "visual.pre_norm",
}
_ORIGINAL_LAYER: Mapping[str, str | tuple[str, ...]] = {
    "norm1": "norm1",
    "qkv": "attn.to_qkv",
    "out": "attn.proj",
    "norm2": "norm2",
    "ff_in": "mlp.0",
    "ff_out": "mlp.2",
}
_LAYERS = {"original": "visual.transformer", "transformers": "vision_model.encoder.layers"}
_LEFT_OVER = {
    "original": ("visual.post_norm.*", "visual.head", "textual.*", "log_scale"),
    "transformers": ("vision_model.post_layernorm.*", "vision_model.embeddings.position_ids", "visual_projection.*"),
}
"""What files hold that is not of the tower up to the last block but one."""


def rename_table(config: ImageConfig, layout: str = "transformers") -> Rename:
    """Our modules -> those of a layout.

    `transformers` are CLIPVisionModel's, which diffusers' folders and ComfyUI's file have; `original` those of the
    authors' file, which holds the tower of text as well.
    """
    original = layout == "original"
    table: dict[str, str | Concat] = dict(_ORIGINAL if original else _TRANSFORMERS)
    names = _ORIGINAL_LAYER if original else _TRANSFORMERS_LAYER
    for i in range(config.num_hidden_layers - 1):
        table |= behind(f"layers.{i}", f"{_LAYERS[layout]}.{i}", names)
    return table


@dataclass(frozen=True)
class Tower:
    """A tower's numbers and tensors, by headers alone."""

    config: ImageConfig
    checkpoint: Checkpoint
    layout: str = "transformers"

    @property
    def rename(self) -> Rename:
        return rename_table(self.config, self.layout)

    @property
    def left_over(self) -> tuple[str, ...]:
        return f"{_LAYERS[self.layout]}.{self.config.num_hidden_layers - 1}.*", *_LEFT_OVER[self.layout]


def read_config(folder: Path) -> ImageConfig:
    """The numbers of an image_encoder/ folder. CheckpointError names the file, and the key where there is one."""
    path = folder / "config.json"
    raw = read_object(path)
    raw = raw.get("vision_config", raw) if isinstance(raw.get("vision_config", raw), dict) else raw
    if (activation := raw.get("hidden_act", "gelu")) != "gelu":
        raise CheckpointError(f"{path} says hidden_act={activation!r}; supported is 'gelu'")
    return build(ImageConfig, {one.name: one.name for one in fields(ImageConfig)}, raw, str(path))


def open_image_encoder(place: Path, dtype: torch.dtype | None = None) -> Tower:
    """The tower in an image_encoder/ folder, or in one file of the authors' or of ComfyUI's. CheckpointError."""
    if place.is_dir():
        return Tower(read_config(place), open_checkpoint(find_files(place, STEM, dtype)))
    checkpoint = open_checkpoint(place)
    layout = next((layout for layout, sign in CLIP_SIGNS.items() if sign in checkpoint), None)
    if layout is None:
        raise CheckpointError(f"{place}: no image tower of CLIP; it has no tensor {' or '.join(CLIP_SIGNS.values())}")
    # The authors' embeddings stand in a batch of one, that of the class in a row as well.
    places = {_ORIGINAL["first"]: (1, 1), _ORIGINAL["positions"]: (1,)}
    flat = {
        name: replace(checkpoint[name], shape=checkpoint[name].shape[len(ones) :])
        for name, ones in places.items()
        if name in checkpoint and checkpoint[name].shape[: len(ones)] == ones
    }
    whole = Checkpoint({**checkpoint, **flat}, checkpoint.label, checkpoint.metadata)
    return Tower(_from_shapes(whole, layout, str(place)), whole, layout)


def _from_shapes(checkpoint: Checkpoint, layout: str, where: str) -> ImageConfig:
    """The numbers of a file without a config.json."""
    top, layer = (_ORIGINAL, _ORIGINAL_LAYER) if layout == "original" else (_TRANSFORMERS, _TRANSFORMERS_LAYER)
    layers = 0
    while f"{_LAYERS[layout]}.{layers}.{layer['norm1']}.weight" in checkpoint and layers <= MAX_LAYERS:
        layers += 1
    try:
        width, _, patch, _ = checkpoint[f"{top['patches']}.weight"].shape
        inner, _ = checkpoint[f"{_LAYERS[layout]}.0.{layer['ff_in']}.weight"].shape
        tokens, _ = checkpoint[top["positions"]].shape
    except (KeyError, ValueError):
        raise CheckpointError(f"{where}: no image tower of CLIP; tensors of it are missing or flat") from None
    raw = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_WIDTH,
        "image_size": isqrt(max(tokens - 1, 0)) * patch,
        "patch_size": patch,
    }
    return build(ImageConfig, {name: name for name in raw}, raw, where)


def check_image_encoder(place: Path, width: int | None, dtype: torch.dtype | None = None) -> None:
    """Raise what `load_image_encoder` would raise for the headers. width: of the tokens that the transformer takes."""
    tower = open_image_encoder(place, dtype)
    if width is not None and tower.config.hidden_size != width:
        raise CheckpointError(f"{place}: tokens of {tower.config.hidden_size} channels, the transformer takes {width}")
    check(on_meta(ImageEncoder, tower.config), tower.checkpoint, tower.rename, tower.left_over)


def load_image_encoder(
    place: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> ImageEncoder:
    """The image tower of a checkpoint, strictly."""
    tower = open_image_encoder(place, dtype)
    module = on_meta(ImageEncoder, tower.config)
    return load(module, tower.checkpoint, tower.rename, device, dtype, ignore=tower.left_over)
