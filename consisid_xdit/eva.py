"""The image tower of EVA02-CLIP-L-14-336, which sees the aligned face for ConsisID.

Written for inference only, with the checkpoint's own names (`visual.*` of
`EVA02_CLIP_L_336_psz14_s6B.pt`), so that neither the reference package nor torchvision is needed.
The architecture is EVA-02 (Fang et al., 2023): pre-norm blocks, sub-layer norms inside attention
and SwiGLU, two-dimensional rotary positions on the patch tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.parallel.attention import attention
from common.weights.schema import MAX_LAYERS, bounded
from consisid_xdit.weights import load_pth, require_fit

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class EvaConfig:
    """Numbers of the tower; the defaults are EVA02-CLIP-L-14-336."""

    image_size: int = bounded(336, 2048)
    patch_size: int = bounded(14, 256, least=4)
    width: int = 1024
    heads: int = bounded(16, 1024)
    layers: int = bounded(24, MAX_LAYERS)
    hidden: int = 2730
    output: int = 768
    taps: tuple[int, ...] = bounded(
        (4, 8, 12, 16, 20), MAX_LAYERS, least=0
    )  # hidden states are what enters these blocks
    rope_grid: int = 16  # positions are stretched to the 224 px grid of the pre-training
    eps: float = 1e-6

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


def rope_tables(config: EvaConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of the patch positions, (grid^2, head dim): first half rows, second half columns.

    Frequencies 10000^(-2k/d) with d half the head dimension, each repeated for an interleaved pair.
    """
    half = config.width // config.heads // 2
    freqs = 10000.0 ** -(torch.arange(0, half, 2) / half)
    positions = torch.arange(config.grid) / config.grid * config.rope_grid
    angles = (positions[:, None] * freqs).repeat_interleave(2, dim=-1)
    rows = angles[:, None].expand(-1, config.grid, -1)
    columns = angles[None].expand(config.grid, -1, -1)
    table = torch.cat([rows, columns], dim=-1).reshape(config.grid**2, 2 * half)
    return table.cos(), table.sin()


class Rope(nn.Module):
    """Rotates every token but the first (the class token has no position)."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, config: EvaConfig):
        super().__init__()
        cos, sin = rope_tables(config)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1 + patches, H, D)
        patches = x[:, 1:]
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
        patches = patches * self.freqs_cos[:, None] + turned * self.freqs_sin[:, None]
        return torch.cat([x[:, :1], patches.to(x.dtype)], dim=1)


class EvaAttention(nn.Module):
    def __init__(self, config: EvaConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        # The checkpoint keeps these two apart from their linear layers; keys have no bias.
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, config.eps)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        q, k, v = (
            F.linear(x, layer.weight, bias).unflatten(-1, (self.heads, -1))
            for layer, bias in (
                (self.q_proj, self.q_bias),
                (self.k_proj, None),
                (self.v_proj, self.v_bias),
            )
        )
        out = attention(rope(q), rope(k), v).flatten(-2)
        return self.proj(self.inner_attn_ln(out))


class SwiGlu(nn.Module):
    def __init__(self, config: EvaConfig):
        super().__init__()
        self.w1 = nn.Linear(config.width, config.hidden)
        self.w2 = nn.Linear(config.width, config.hidden)
        self.ffn_ln = nn.LayerNorm(config.hidden, config.eps)
        self.w3 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class EvaBlock(nn.Module):
    def __init__(self, config: EvaConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.eps)
        self.attn = EvaAttention(config)
        self.norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = SwiGlu(config)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class EvaTower(nn.Module):
    """`forward(x)`: normalised pictures (B, 3, S, S) -> class embedding (B, 768) and the five
    hidden states (B, 1 + patches, 1024) that enter blocks 4, 8, 12, 16 and 20, without a final norm.
    """

    def __init__(self, config: EvaConfig = EvaConfig()):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, config.patch_size, config.patch_size)})
        self.rope = Rope(config)
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.output)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        hidden = []
        for i, block in enumerate(self.blocks):
            if i in self.config.taps:
                hidden.append(x)
            x = block(x, self.rope)
        return self.head(self.norm(x)[:, 0]), hidden

    def preprocess(self, picture: Tensor) -> Tensor:
        """RGB pictures (B, 3, H, W) in [0, 1] -> this tower's input (B, 3, S, S), same dtype.

        Bicubic with antialiasing on the float tensor, which is what torchvision's tensor `resize`
        computes since 0.17.
        """
        size = (self.config.image_size,) * 2
        picture = F.interpolate(picture, size, mode="bicubic", antialias=True, align_corners=False)
        mean, std = (picture.new_tensor(v)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD))
        return (picture - mean) / std


def eva_state(path: Path | str) -> dict[str, Tensor]:
    """The tower's tensors in the published file. CheckpointError for a file that is missing or no table of tensors."""
    return {
        name.removeprefix("visual."): tensor
        for name, tensor in load_pth(path).items()
        if name.startswith("visual.") and ".attn.rope." not in name
    }


def load_eva(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: EvaConfig = EvaConfig(),
) -> EvaTower:
    """The tower with the weights of `path`; text keys are left out, everything else must fit.

    The file repeats the rotary table in every block; the copies are dropped, the first is used.
    Raises CheckpointError naming keys that are missing, unknown or of another shape.
    """
    state = eva_state(path)
    with torch.device("meta"):
        tower = EvaTower(config)
    require_fit(tower, state, path)
    tower.load_state_dict(state, strict=True, assign=True)
    return tower.to(device, dtype).eval().requires_grad_(False)
