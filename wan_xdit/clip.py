"""The image tower of 2.1's image models: CLIP's ViT-H/14, of which the last block but one is what they attend to.

Radford et al. 2021 (arXiv 2103.00020); the weights are open_clip's, trained with a text tower of XLM-RoBERTa.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.weights.load import Checkpoint, Concat, Rename, check, find_files, load, on_meta, open_checkpoint
from common.weights.schema import MAX_LAYERS, CheckpointError, bounded, build, read_object

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of pixels from 0 to 1, as the tower was trained with them."""
STEM = "model"


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


def rename_table(config: ImageConfig) -> Rename:
    """Our modules -> those of transformers' CLIPVisionModel, as diffusers' folders have them."""
    top = "vision_model"
    table: dict[str, str | Concat] = {
        "patches": f"{top}.embeddings.patch_embedding",
        "first": f"{top}.embeddings.class_embedding",
        "positions": f"{top}.embeddings.position_embedding.weight",
        "norm": f"{top}.pre_layrnorm",
    }
    names = {"norm1": "layer_norm1", "out": "self_attn.out_proj", "norm2": "layer_norm2"}
    names |= {"ff_in": "mlp.fc1", "ff_out": "mlp.fc2"}
    for i in range(config.num_hidden_layers - 1):
        theirs = f"{top}.encoder.layers.{i}"
        table |= {f"layers.{i}.{ours}": f"{theirs}.{name}" for ours, name in names.items()}
        table[f"layers.{i}.qkv"] = Concat(tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv"))
    return table


def read_config(folder: Path) -> ImageConfig:
    """The numbers of an image_encoder/ folder. CheckpointError names the file, and the key where there is one."""
    path = folder / "config.json"
    raw = read_object(path)
    raw = raw.get("vision_config", raw) if isinstance(raw.get("vision_config", raw), dict) else raw
    if (activation := raw.get("hidden_act", "gelu")) != "gelu":
        raise CheckpointError(f"{path} says hidden_act={activation!r}; supported is 'gelu'")
    return build(ImageConfig, {one.name: one.name for one in fields(ImageConfig)}, raw, str(path))


def open_image_encoder(folder: Path, dtype: torch.dtype | None = None) -> tuple[ImageConfig, Checkpoint]:
    """The numbers and the tensors of an image_encoder/ folder, by headers alone."""
    return read_config(folder), open_checkpoint(find_files(folder, STEM, dtype))


def check_image_encoder(folder: Path, width: int | None, dtype: torch.dtype | None = None) -> None:
    """Raise what `load_image_encoder` would raise for the headers. width: of the tokens that the transformer takes."""
    config, checkpoint = open_image_encoder(folder, dtype)
    if width is not None and config.hidden_size != width:
        raise CheckpointError(f"{folder}: tokens of {config.hidden_size} channels, the transformer takes {width}")
    check(on_meta(ImageEncoder, config), checkpoint, rename_table(config), _left_over(config))


def load_image_encoder(
    folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> ImageEncoder:
    """The image tower of a checkpoint, strictly."""
    config, checkpoint = open_image_encoder(folder, dtype)
    module = on_meta(ImageEncoder, config)
    return load(module, checkpoint, rename_table(config), device, dtype, ignore=_left_over(config))


def _left_over(config: ImageConfig) -> tuple[str, ...]:
    last = f"vision_model.encoder.layers.{config.num_hidden_layers - 1}.*"
    return last, "vision_model.post_layernorm.*", "vision_model.embeddings.position_ids", "visual_projection.*"
