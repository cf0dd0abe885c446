"""The toy's transformer: tokens of picture, sound and text attend to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.parallel.usp import SequenceParallel
from common.weights.blocks import Blocks, streamed
from toy_xdit.config import LATENTS, Config


@dataclass(frozen=True)
class Condition:
    """What no step changes. y: (1, l, D) text of this rank; positions: (1, n, D) of its picture tokens; lengths: tokens
    of every rank, all streams together."""

    y: Tensor
    positions: Tensor
    lengths: tuple[int, ...]


class Block(nn.Module):
    regions = ("before_attention", "after_attention")

    def __init__(self, config: Config, sp: SequenceParallel) -> None:
        super().__init__()
        self.sp, self.heads, D = sp, config.heads, config.width
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        q, k, v = self.before_attention(x)
        return self.after_attention(x, self.sp.attention(q, k, v, cond.lengths))

    def before_attention(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return q, k, v  # each (1, n, H, D / H)

    def after_attention(self, x: Tensor, heads: Tensor) -> Tensor:
        x = x + self.out(heads.flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))


class ToyTransformer(nn.Module):
    matmuls = ("qkv", "out", "up", "down")

    def __init__(self, config: Config, sp: SequenceParallel | None = None) -> None:
        super().__init__()
        self.config, self.sp = config, sp or SequenceParallel()
        self.sp.require_heads(config.heads)
        self.text_in = nn.Linear(config.text_dim, config.width)
        self.picture_in = nn.Linear(LATENTS.token_channels, config.width)
        self.sound_in = nn.Linear(config.sound_channels, config.width)
        self.time_in = nn.Linear(1, config.width)
        self.blocks = Blocks(Block(config, self.sp) for _ in range(config.layers))
        self.picture_out = nn.Linear(config.width, LATENTS.token_channels)
        self.sound_out = nn.Linear(config.width, config.sound_channels)

    def prepare(self, text: Tensor, picture: int, sound: int) -> Condition:
        """text: (1, L, text_dim) features of the whole prompt. picture, sound: tokens of all ranks together."""
        at, sp = self.text_in.weight, self.sp
        y = self.text_in(sp.shard(text).to(at))
        places = torch.arange(picture, device=at.device, dtype=torch.float32)[None, :, None]
        rates = torch.arange(1, self.config.width + 1, device=at.device) / self.config.width
        streams = zip(sp.lengths(picture), sp.lengths(sound), sp.lengths(text.shape[1]))
        return Condition(y, sp.shard((places * rates).sin()).to(at.dtype), tuple(map(sum, streams)))

    def forward(self, z: Tensor, s: Tensor, t: float, cond: Condition) -> tuple[Tensor, Tensor]:
        """This rank's picture tokens (1, n, 16) and sound tokens (1, m, 8) at time t: what leads to data."""
        dtype, n, m = self.picture_in.weight.dtype, z.shape[1], s.shape[1]
        x = self.picture_in(z.to(dtype)) + cond.positions
        x = torch.cat((x, self.sound_in(s.to(dtype)), cond.y), dim=1)
        x = x + self.time_in(torch.full((1, 1), t, dtype=dtype, device=x.device))
        for block in streamed(self.blocks):
            x = block(x, cond)
        return self.picture_out(x[:, :n]).to(z.dtype), self.sound_out(x[:, n : n + m]).to(s.dtype)


def pack(latents: Tensor) -> Tensor:
    """(1, C, T, h, w) to tokens (1, N, 4 C), a patch of 2 x 2 each."""
    _, C, T, h, w = latents.shape
    return latents.reshape(1, C, T, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 4, 6, 1).reshape(1, -1, 4 * C)


def unpack(tokens: Tensor, size: tuple[int, int, int]) -> Tensor:
    """The inverse of `pack`; size: (T, h, w)."""
    T, h, w = size
    z = tokens.reshape(1, T, h // 2, w // 2, 2, 2, -1)
    return z.permute(0, 6, 1, 2, 4, 3, 5).reshape(1, -1, T, h, w)
