"""Wan's video autoencoders: 8 x 8 (2.1) or 16 x 16 (2.2) pixels and 4 frames to one latent.

Norms look at one place of one frame, and convolutions at earlier frames only, so any chunks give the result of the
original's, which goes through a video latent by latent. The first frame stands alone: no change of the frame rate
touches it, and before the second one the convolutions that change it see zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.video.causal import CausalConv3d, CausalStream, TimeSplit, encode_moments, silu
from common.video.decode import VideoDecoder
from common.video.rows import Rows, doubled
from common.weights.dtypes import latent_dtype
from wan_xdit.config import VAEConfig


def conv(channels_in: int, channels_out: int, kernel: int = 3) -> CausalConv3d:
    """A causal convolution; the video begins after zeros."""
    return CausalConv3d(channels_in, channels_out, kernel, zeros_before=True)


class ChannelNorm(nn.Module):
    """Each place's channels scaled to length sqrt(C), times gamma; (B, C, T, H, W), or (B, C, H, W) with `dims` 2."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.gamma.shape[0] ** 0.5 * self.gamma


class ResBlock(nn.Module):
    """Two convolutions beside the stream, or beside a 1x1 convolution of it where the width changes."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(channels_in), conv(channels_in, channels_out)
        self.norm2, self.conv2 = ChannelNorm(channels_out), conv(channels_out, channels_out)
        self.shortcut = conv(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:
        h = self.conv1(silu(self.norm1(x)), stream)
        h = self.conv2(silu(self.norm2(h)), stream)
        return h + (x if self.shortcut is None else self.shortcut(x, stream))


class FrameAttention(nn.Module):
    """Every place of a frame attends to all places of it, with one head; frames are (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, dims=2)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """(B, C, T, H, W)"""
        frames = pictures(x)
        qkv = self.qkv(self.norm(frames)).flatten(2).transpose(1, 2).contiguous()  # b (h w) 3c
        q, kv = qkv.tensor_split([x.shape[1]], dim=-1)
        if not rows.alone:
            kv = torch.cat(rows.everyone(kv, dim=1), dim=1)
        # Fused kernels, which keep no scores in memory, are for tensors with a dimension of heads.
        h = F.scaled_dot_product_attention(q[:, None], *kv[:, None].chunk(2, dim=-1))[:, 0]
        return video(frames + self.out(h.transpose(1, 2).unflatten(2, frames.shape[2:])), x)


def pictures(x: Tensor) -> Tensor:
    """Every frame of (B, C, T, H, W) as a picture (B T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def video(frames: Tensor, like: Tensor) -> Tensor:
    """The reverse of `pictures`, for as many videos as `like` has."""
    return frames.unflatten(0, (like.shape[0], -1)).transpose(1, 2)


class Upsample(nn.Module):
    """Twice the rows and columns, and with `time` two frames of every one but the video's first."""

    def __init__(self, channels: int, channels_out: int, time: bool) -> None:
        super().__init__()
        self.time = CausalConv3d(channels, 2 * channels, (3, 1, 1), zeros_before=True) if time else None
        self.space = nn.Conv2d(channels, channels_out, 3, padding=(0, 1))

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:
        if self.time is not None:
            alone = x[:, :, :1] if stream.first else x[:, :, :0]
            x = self._double(x[:, :, alone.shape[2] :], stream)
            x = torch.cat([alone, x], dim=2) if alone.shape[2] else x
        borders = stream.rows.borders(x).wait()
        above, below = (side if side is None else pictures(side) for side in (borders.above, borders.below))
        return video(self.space(doubled(pictures(x), above, below)), x)

    def _double(self, x: Tensor, stream: CausalStream) -> Tensor:
        assert self.time is not None
        if x.shape[2] == 0:
            stream.before(self.time, x, 2, zeros=True)  # nothing to compute, but the next chunk begins after zeros
            return x
        pairs = self.time(x, stream).unflatten(1, (2, -1))  # b (p c) t h w
        return pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # b c (t p) h w


class Downsample(nn.Module):
    """Half the rows and columns, and with `time` one frame of every two but the video's first."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.space = nn.Conv2d(channels, channels, 3, stride=2)
        self.time = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:
        below = stream.rows.borders(x).wait().below
        whole = F.pad(x if below is None else torch.cat([x, below], 3), (0, 1, 0, int(below is None)))
        x = video(self.space(pictures(whole)), x)
        if self.time is None:
            return x
        before = stream.before(self, x, 1)
        if not stream.first:
            return self.time(torch.cat([before, x], dim=2))
        rest = [self.time(x)] if x.shape[2] > 2 else []
        return torch.cat([x[:, :, :1], *rest], dim=2)


class Stage(nn.Module):
    """Residual blocks and a change of size; in 2.2 with averages or repeats of the stage's input beside them."""

    def __init__(self, blocks: list[ResBlock], resize: Upsample | Downsample | None, around: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.resize, self.around = nn.ModuleList(blocks), resize, around

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:
        h = x
        for block in self.blocks:
            h = block(h, stream)
        h = h if self.resize is None else self.resize(h, stream)
        return h if self.around is None else h + self.around(x, stream)


class Repeats(nn.Module):
    """The shortcut of an upward stage: channels become blocks of `time` x `space` x `space`, repeated to fit."""

    def __init__(self, channels_in: int, channels_out: int, time: int, space: int) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.channels, self.copies = channels_out, channels_out * time * space**2 // channels_in

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:
        x = x.repeat_interleave(self.copies, dim=1).unflatten(1, (self.channels, self.time, self.space, self.space))
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # b c p q r t h w -> b c t p h q w r
        return stream.skip(x.flatten(6).flatten(4, 5).flatten(2, 3), self.time - 1)


class Averages(nn.Module):
    """The shortcut of a downward stage: blocks of `time` x `space` x `space` become channels, averaged in groups."""

    def __init__(self, channels_in: int, channels_out: int, time: int, space: int) -> None:
        super().__init__()
        self.time, self.space, self.channels = time, space, channels_out

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:
        # The video's first frame makes a block of its own, with zeros in front.
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time, 0))
        x = x.unflatten(4, (-1, self.space)).unflatten(3, (-1, self.space)).unflatten(2, (-1, self.time))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # b c t p h q w r -> b (c p q r) t h w
        return x.unflatten(1, (self.channels, -1)).mean(2)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ResBlock(channels, channels)
        self.attention = FrameAttention(channels)
        self.last = ResBlock(channels, channels)

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:
        return self.last(self.attention(self.first(x, stream), stream.rows), stream)


class WanDecoder(VideoDecoder):
    """Latents of the autoencoder's own space (`denormalize` makes them) to pixels."""

    chunk_choices = (4, 3, 2, 1)
    compiled_parts = (ChannelNorm, FrameAttention)
    rounding = "nearest"

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VAEConfig()
        self.spatial_factor, self.time_factor = config.space, config.time
        widths = [config.decoder_width * m for m in (config.multiples[-1], *config.multiples[::-1])]
        self.latents = conv(config.latent_channels, config.latent_channels, 1)
        self.conv_in = conv(config.latent_channels, widths[0])
        self.middle = Middle(widths[0])
        self.stages = nn.ModuleList(self._stages(config, widths))
        self.norm = ChannelNorm(widths[-1])
        self.conv_out = conv(widths[-1], 3 * config.fold**2)

    @staticmethod
    def _stages(config: VAEConfig, widths: list[int]) -> list[Stage]:
        stages = []
        doublings = (*config.temporal[::-1], None)  # None: the last stage keeps its size
        for i, time in enumerate(doublings):
            # 2.1 halves the channels when it doubles the size, 2.2 in the blocks that follow.
            channels_in = widths[i] if config.shortcuts or i == 0 else widths[i] // 2
            inside = [channels_in] + [widths[i + 1]] * (config.depth + 1)
            blocks = [ResBlock(inside[k], inside[k + 1]) for k in range(config.depth + 1)]
            resize = around = None
            if time is not None:
                resize = Upsample(inside[-1], inside[-1] if config.shortcuts else inside[-1] // 2, time)
                around = Repeats(channels_in, inside[-1], 1 + time, 2) if config.shortcuts else None
            stages.append(Stage(blocks, resize, around))
        return stages

    def denormalize(self, latents: Tensor) -> Tensor:
        """From the transformer's space to the autoencoder's, (B, C, t, h, w)."""
        mean, std = _stats(self.config, latents)
        return latents * std + mean

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        """z: (B, C, t, h, w) -> (B, 3, num_frames(t), scale h, scale w), in [-1, 1] when clamped."""
        stream = stream or CausalStream()
        x = self.middle(self.conv_in(self.latents(z, stream), stream), stream)
        for stage in self.stages:
            x = stage(x, stream)
        return unfold(self.conv_out(silu(self.norm(x)), stream), self.config.fold)


class WanEncoder(nn.Module):
    """Pixels to the means of the latents, of the autoencoder's own space."""

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VAEConfig()
        widths = [config.width * m for m in (1, *config.multiples)]
        self.conv_in = conv(3 * config.fold**2, widths[0])
        self.stages = nn.ModuleList(self._stages(config, widths))
        self.middle = Middle(widths[-1])
        self.norm = ChannelNorm(widths[-1])
        self.conv_out = conv(widths[-1], 2 * config.latent_channels)
        self.moments = conv(2 * config.latent_channels, 2 * config.latent_channels, 1)

    @staticmethod
    def _stages(config: VAEConfig, widths: list[int]) -> list[Stage]:
        stages = []
        for i, time in enumerate((*config.temporal, None)):  # None: the last stage keeps its size
            inside = [widths[i]] + [widths[i + 1]] * config.depth
            blocks = [ResBlock(inside[k], inside[k + 1]) for k in range(config.depth)]
            resize = None if time is None else Downsample(inside[-1], time)
            space = 1 if time is None else 2
            around = Averages(inside[0], inside[-1], 1 + bool(time), space) if config.shortcuts else None
            stages.append(Stage(blocks, resize, around))
        return stages

    def chunks(self, frames: int, chunk: int = 4) -> list[int]:
        """The first frame with the first `chunk` that follow, then chunks of `chunk`: whole latents each."""
        whole, rest = divmod(max(frames - 1, 0), chunk)
        return [1 + chunk * (whole > 0)] + [chunk] * (whole - 1) + [rest] * (rest > 0)

    def forward(self, x: Tensor, stream: CausalStream | None = None) -> Tensor:
        """One chunk (B, 3, frames, H, W) in [-1, 1] -> (B, 2 C, t, h, w): means, then log variances."""
        stream = stream or CausalStream()
        x = self.conv_in(fold(x, self.config.fold), stream)
        for stage in self.stages:
            x = stage(x, stream)
        x = self.conv_out(silu(self.norm(self.middle(x, stream))), stream)
        return self.moments(x, stream)


def fold(x: Tensor, side: int) -> Tensor:
    """b c t (h q) (w r) -> b (c r q) t h w: blocks of side x side pixels become channels, columns slowest."""
    if side == 1:
        return x
    return x.unflatten(4, (-1, side)).unflatten(3, (-1, side)).permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unfold(x: Tensor, side: int) -> Tensor:
    """The reverse of `fold`: b (c r q) t h w -> b c t (h q) (w r)."""
    if side == 1:
        return x
    return x.unflatten(1, (-1, side, side)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def _stats(config: VAEConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(v, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1) for v in (config.mean, config.std)
    )
    return mean, std


def encode(encoder: WanEncoder, video: Tensor, split: TimeSplit | None = None) -> Tensor:
    """A video's latents (1, C, t, h, w) in the transformer's space, on every rank: the means, no sample.

    video: (1, 3, T, H, W) in [-1, 1], the same on every rank. The chunks, or parts of their height, are dealt over the
    ranks of `split`, which makes this collective. Statistics are taken in fp32 at least.
    """
    weight = encoder.conv_out.weight
    video = video.to(weight.device, weight.dtype)
    chunks = encoder.chunks(video.shape[2])
    moments = encode_moments(encoder, video, chunks, split or TimeSplit(), encoder.config.space)
    return normalize(moments.chunk(2, dim=1)[0].to(latent_dtype(weight.dtype)), encoder.config)


def normalize(latents: Tensor, config: VAEConfig) -> Tensor:
    """From the autoencoder's space to the transformer's, (B, C, t, h, w)."""
    mean, std = _stats(config, latents)
    return (latents - mean) / std
