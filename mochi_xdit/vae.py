"""Mochi's video autoencoder: 8 x 8 pixels and 6 frames to one latent of 12 channels.

Parameter names are those of the native `decoder.safetensors` and `encoder.safetensors`. The numerics are the native
ones too: each temporal expansion drops its surplus first frames at once. (diffusers keeps them until the end, so its
causal padding sees other first frames and its first ~15 frames differ.)
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.video.causal import CausalConv3d, CausalStream, silu
from common.video.decode import VideoDecoder
from common.video.rows import Rows, group_norm
from mochi_xdit.config import MochiVAEConfig

# The encoder also sees sin and cos of 2 pi 2^k x.
FOURIER_OCTAVES = (6, 7)
# Rows of one attention call: CUDA kernels limit the batch dimension of a launch.
ATTENTION_ROWS = 2**15


class FrameNorm(nn.GroupNorm):
    """Group normalisation with the statistics of each frame alone, (B, C, T, H, W)."""

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # type: ignore[override]
        frames = x.transpose(1, 2).flatten(0, 1)
        frames = group_norm(frames, self.num_groups, self.weight, self.bias, self.eps, rows)
        return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class CausalAttention(nn.Module):
    """Each pixel attends to itself in this and earlier frames; q and k have unit length."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = channels // head_dim, head_dim
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)"""
        return torch.cat([self.attend(rows) for rows in x.split(ATTENTION_ROWS)])

    def attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, head_dim)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, groups: int, head_dim: int) -> None:
        super().__init__()
        self.norm = FrameNorm(groups, channels)
        self.attn = CausalAttention(channels, head_dim)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        b, _, _, h, w = x.shape
        pixels = self.norm(x, rows).permute(0, 3, 4, 2, 1).flatten(0, 2)  # (B * H * W, T, C)
        return x + self.attn(pixels).unflatten(0, (b, h, w)).permute(0, 4, 3, 1, 2)


class SiLU(nn.Module):
    """Takes the place that the checkpoint's names leave for it."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


class ResBlock(nn.Module):
    """Two convolutions around the residual; with a `head_dim`, attention over time after them."""

    def __init__(self, channels: int, groups: int, head_dim: int = 0) -> None:
        super().__init__()
        self.stack = nn.ModuleList(
            [
                FrameNorm(groups, channels),
                SiLU(),
                CausalConv3d(channels, channels, 3, padding_mode="replicate"),
                FrameNorm(groups, channels),
                SiLU(),
                CausalConv3d(channels, channels, 3, padding_mode="replicate"),
            ]
        )
        self.attn_block = AttentionBlock(channels, groups, head_dim) if head_dim else None

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:
        norm1, act1, conv1, norm2, act2, conv2 = self.stack
        h = conv1(act1(norm1(x, stream.rows)), stream)
        # The sum lies in memory as its first term does, which is the order that the next convolution wants.
        h = conv2(act2(norm2(h, stream.rows)), stream) + x
        return h if self.attn_block is None else self.attn_block(h, stream.rows)


class UpBlock(nn.Module):
    """Residual blocks, then channels become `time` x `space` x `space` new frames, rows and columns."""

    def __init__(self, channels_in: int, channels_out: int, depth: int, time: int, space: int, groups: int) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.blocks = nn.ModuleList(ResBlock(channels_in, groups) for _ in range(depth))
        self.proj = nn.Linear(channels_in, channels_out * time * space * space)

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:
        for block in self.blocks:
            x = block(x, stream)
        x = self.proj(x.movedim(1, -1))  # (B, T, H, W, C * st * sh * sw)
        x = x.unflatten(-1, (-1, self.time, self.space, self.space))
        # B T H W C st sh sw -> B C (T st) (H sh) (W sw)
        x = x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return stream.skip(x, self.time - 1)


class DownBlock(nn.Module):
    def __init__(
        self, channels_in: int, channels_out: int, depth: int, time: int, space: int, groups: int, head_dim: int
    ) -> None:
        super().__init__()
        shape = (time, space, space)
        down = CausalConv3d(channels_in, channels_out, shape, "replicate", stride=shape)
        self.layers = nn.ModuleList([down, *(ResBlock(channels_out, groups, head_dim) for _ in range(depth))])

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:
        for layer in self.layers:
            x = layer(x, stream)
        return x


class MochiDecoder(VideoDecoder):
    """Latents of the autoencoder's own space (`denormalize` makes them) to pixels."""

    chunk_choices = (3, 2, 1)
    compiled_parts = (FrameNorm, AttentionBlock)

    def __init__(self, config: MochiVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MochiVAEConfig()
        widths, depths, groups = config.decoder_channels[::-1], config.layers[::-1], config.groups
        times, spaces = config.temporal[::-1], config.spatial[::-1]
        self.time_factor, self.spatial_factor = math.prod(times), math.prod(spaces)
        self.blocks = nn.ModuleList(
            [
                nn.ModuleList(
                    [
                        nn.Conv3d(config.latent_channels, widths[0], 1),
                        *(ResBlock(widths[0], groups) for _ in range(depths[0])),
                    ]
                ),
                *(
                    UpBlock(widths[i], widths[i + 1], depths[i + 1], times[i], spaces[i], groups)
                    for i in range(len(times))
                ),
                nn.ModuleList(ResBlock(widths[-1], groups) for _ in range(depths[-1])),
            ]
        )
        self.output_proj = nn.Linear(widths[-1], config.out_channels)

    def denormalize(self, latents: Tensor) -> Tensor:
        """From the transformer's space (unit variance) to the autoencoder's, (B, 12, t, h, w)."""
        mean, std = _stats(self.config, latents)
        return latents * std + mean

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        """z: (B, 12, t, h, w) -> (B, 3, num_frames(t), 8h, 8w) in [-1, 1]. Without a stream, z is the whole video."""
        stream = stream or CausalStream()
        groups = [group.children() if isinstance(group, nn.ModuleList) else [group] for group in self.blocks]
        conv_in, *blocks = itertools.chain.from_iterable(groups)
        x = conv_in(z)
        for block in blocks:
            x = block(x, stream)
        return self.output_proj(silu(x).movedim(1, -1)).movedim(-1, 1)


class MochiEncoder(nn.Module):
    """Pixels to the mean and log variance of the latents. Takes a video whole: its attention sees all frames before."""

    def __init__(self, config: MochiVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MochiVAEConfig()
        widths, depths, groups, attention = config.encoder_channels, config.layers, config.groups, config.attention
        dim = config.head_dim
        downs = [
            DownBlock(widths[i], widths[i + 1], depths[i + 1], time, space, groups, dim * attention[i + 1])
            for i, (time, space) in enumerate(zip(config.temporal, config.spatial))
        ]
        self.layers = nn.ModuleList(
            [
                nn.Linear(config.in_channels, widths[0]),
                *(ResBlock(widths[0], groups, dim * attention[0]) for _ in range(depths[0])),
                *downs,
                *(ResBlock(widths[-1], groups, dim * attention[-1]) for _ in range(depths[-1])),
            ]
        )
        self.output_norm = FrameNorm(groups, widths[-1])
        self.output_proj = nn.Linear(widths[-1], 2 * config.latent_channels, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, 3, 6(t - 1) + 1, 8h, 8w) in [-1, 1] -> mean and log variance, each (B, 12, t, h, w)."""
        stream = CausalStream()
        proj_in, *blocks = self.layers
        features = fourier_features(x, FOURIER_OCTAVES).to(self.output_proj.weight.dtype)
        x = proj_in(features.movedim(1, -1)).movedim(-1, 1)
        for block in blocks:
            x = block(x, stream)
        moments = self.output_proj(silu(self.output_norm(x, stream.rows)).movedim(1, -1)).movedim(-1, 1)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar


def fourier_features(x: Tensor, octaves: tuple[int, ...]) -> Tensor:
    """(B, C, ...) -> (B, C (1 + 2 len(octaves)), ...): x, then sin and cos of 2 pi 2^k x, in at least fp32."""
    x = x if x.dtype == torch.float64 else x.float()
    rates = 2 * math.pi * 2.0 ** torch.tensor(octaves, dtype=x.dtype, device=x.device)
    angles = (x.unsqueeze(2) * rates.view(-1, 1, 1, 1)).flatten(1, 2)
    return torch.cat([x, angles.sin(), angles.cos()], dim=1)


def _stats(config: MochiVAEConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (-1, 1, 1, 1)
    mean = torch.tensor(config.mean, dtype=like.dtype, device=like.device).view(shape)
    return mean, torch.tensor(config.std, dtype=like.dtype, device=like.device).view(shape) / config.scaling_factor


def normalize(latents: Tensor, config: MochiVAEConfig) -> Tensor:
    """From the autoencoder's space to the transformer's, (B, 12, t, h, w)."""
    mean, std = _stats(config, latents)
    return (latents - mean) / std
