"""CogVideoX's video autoencoder: 8 x 8 pixels and 4 frames to one latent of 16 channels.

Parameter names are those of `vae/diffusion_pytorch_model.safetensors` without `encoder.` or `decoder.`. Group
statistics span a chunk's frames, so the reference's chunks (2 latent frames, 8 frames; what is left over joins the
first) are part of the model: one full decode is something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvideox_xdit.config import VAEConfig
from common.video.causal import (
    LARGEST_CONVOLUTION,
    CausalConv3d,
    CausalStream,
    TimeSplit,
    empty_for,
    encode_moments,
    silu,
)
from common.video.decode import VideoDecoder
from common.video.rows import Borders, Rows, doubled, group_norm

LATENT_CHUNK = 2
FRAME_CHUNK = 8
# The reference's spatially conditioned norms and last norm do not take the config's epsilon.
EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)

Norm = Callable[[int], nn.Module]


class Conv(nn.Module):
    """A causal convolution under the name the checkpoint gives it."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels_in, channels_out, kernel)

    def forward(self, x: Tensor, stream: CausalStream) -> Tensor:
        return self.conv(x, stream)


class PlainNorm(nn.GroupNorm):
    """The encoder's norm, which looks at no latents."""

    def forward(self, x: Tensor, z: Tensor, stream: CausalStream) -> Tensor:  # type: ignore[override]
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, stream.rows)


class SpatialNorm(nn.Module):
    """Group norm, scaled and shifted by the latents at each place.

    The scale and shift are computed on the latents' own grid and spread over the features' by broadcasting: what a
    1x1 convolution makes of enlarged latents, without enlarging them.
    """

    def __init__(self, channels: int, latent_channels: int, groups: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, channels, eps=EPS)
        self.conv_y = Conv(latent_channels, channels, 1)
        self.conv_b = Conv(latent_channels, channels, 1)

    def forward(self, x: Tensor, z: Tensor, stream: CausalStream) -> Tensor:
        """x: (B, C, T, H, W). z: (B, 16, t, h, w), of which T, H and W are whole multiples; see `_apart`."""
        scale, shift = self.conv_y(z, stream), self.conv_b(z, stream)
        norm = self.norm_layer
        x = group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, stream.rows)
        parts = [_modulate(*part) for part in zip(_apart(x), _apart(scale), _apart(shift))]
        del x
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _apart(x: Tensor) -> list[Tensor]:
    """The first of an odd number of frames stands alone through every change of the frame rate."""
    if x.shape[2] > 1 and x.shape[2] % 2:
        return [x[:, :, :1], x[:, :, 1:]]
    return [x]


def _modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift, every value of scale and shift for a block of t x h x w values of x."""
    blocks = x
    for dim in (4, 3, 2):
        blocks = blocks.unflatten(dim, (scale.shape[dim], x.shape[dim] // scale.shape[dim]))
    spread = (slice(None), slice(None)) + (slice(None), None) * 3
    blocks = torch.addcmul(shift[spread], blocks, scale[spread])
    return blocks.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class ResBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = norm(channels_in)
        self.norm2 = norm(channels_out)
        self.conv1 = Conv(channels_in, channels_out)
        self.conv2 = Conv(channels_out, channels_out)
        self.conv_shortcut = CausalConv3d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor, z: Tensor, stream: CausalStream) -> Tensor:
        h = self.conv1(silu(self.norm1(x, z, stream)), stream)
        h = self.conv2(silu(self.norm2(h, z, stream)), stream)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x, stream))


class Frames2d(nn.Module):
    """A 2D convolution on every frame, which `prepare` makes larger or smaller before it."""

    def __init__(self, channels: int, stride: int, padding: int | tuple[int, int], time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding)
        self.time = time

    def prepare(self, frames: Tensor, above: Tensor | None, below: Tensor | None) -> Tensor:
        """(N, C, H, W) and the rows beside them, what the convolution is given of the frames."""
        raise NotImplementedError

    def each(self, x: Tensor, rows: Rows) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H', W'), some frames at a time: see `LARGEST_CONVOLUTION`."""
        borders = rows.borders(x).wait()
        # An enlarged frame has four times the elements; what is made smaller is counted so too.
        most = max(1, LARGEST_CONVOLUTION // (4 * x[:, :, 0].numel()))
        if x.shape[2] <= most:
            return self._some(x, borders, slice(None))
        first = self._some(x, borders, slice(most))
        out = empty_for(self.conv.weight, (*first.shape[:2], x.shape[2], *first.shape[3:]), x)
        out[:, :, :most] = first
        del first
        for i in range(most, x.shape[2], most):
            out[:, :, i : i + most] = self._some(x, borders, slice(i, i + most))
        return out

    def _some(self, x: Tensor, borders: Borders, frames: slice) -> Tensor:
        def pictures(part: Tensor) -> Tensor:
            return part[:, :, frames].transpose(1, 2).flatten(0, 1)

        above, below = (None if rows is None else pictures(rows) for rows in (borders.above, borders.below))
        out = self.conv(self.prepare(pictures(x), above, below))
        return out.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Upsample(Frames2d):
    """Twice the rows and columns, and with `time` twice the frames but for the first of an odd number."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__(channels, stride=1, padding=(0, 1), time=time)

    def prepare(self, frames: Tensor, above: Tensor | None, below: Tensor | None) -> Tensor:
        return doubled(frames, above, below)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        x = self.each(x, rows)
        if not self.time:
            return x
        # Frames are doubled after the convolution, which treats each alone, not before it as in the reference.
        alone = x.shape[2] % 2
        return torch.cat([x[:, :, :alone], _twice(x[:, :, alone:], 2)], dim=2)


def _twice(x: Tensor, dim: int) -> Tensor:
    """Every slice along `dim` two times in a row."""
    return x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], 2, *x.shape[dim + 1 :]).flatten(dim, dim + 1)


class Downsample(Frames2d):
    """Half the rows and columns, and with `time` half the frames but for the first of an odd number."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__(channels, stride=2, padding=0, time=time)

    def prepare(self, frames: Tensor, above: Tensor | None, below: Tensor | None) -> Tensor:
        return F.pad(frames if below is None else torch.cat([frames, below], 2), (0, 1, 0, int(below is None)))

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        if self.time:
            alone = x.shape[2] % 2
            pairs = (x[:, :, alone::2] + x[:, :, alone + 1 :: 2]) / 2
            x = torch.cat([x[:, :, :alone], pairs], dim=2)
        return self.each(x, rows)


class Mid(nn.Module):
    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, norm) for _ in range(2))

    def forward(self, x: Tensor, z: Tensor, stream: CausalStream) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, z, stream)
        return x


class Stage(nn.Module):
    """Residual blocks, then a change of size under the name the checkpoint has for it."""

    def __init__(
        self, channels_in: int, channels_out: int, depth: int, norm: Norm, name: str, resize: nn.Module | None
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * depth
        self.resnets = nn.ModuleList(ResBlock(widths[i], widths[i + 1], norm) for i in range(depth))
        self.resize = name
        self.add_module(name, nn.ModuleList([] if resize is None else [resize]))

    def forward(self, x: Tensor, z: Tensor, stream: CausalStream) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, z, stream)
        for resize in self.get_submodule(self.resize).children():
            x = resize(x, stream.rows)
        return x


class CogVideoXDecoder(VideoDecoder):
    """Latents of the autoencoder's own space (transformer latents / scaling_factor) to pixels."""

    chunk_choices = (LATENT_CHUNK,)
    compiled_parts = (SpatialNorm,)
    chunks_fixed = True
    rounding = "nearest"  # the reference pipelines' frames go through images

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VAEConfig()
        self.spatial_factor = config.space_compression
        self.doublings = int(math.log2(config.time_compression))
        widths = config.channels[::-1]
        last = len(widths) - 1

        def norm(channels: int) -> nn.Module:
            return SpatialNorm(channels, config.latent_channels, config.groups)

        self.conv_in = Conv(config.latent_channels, widths[0])
        self.mid_block = Mid(widths[0], norm)
        self.up_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                width,
                config.layers + 1,
                norm,
                "upsamplers",
                Upsample(width, time=i < self.doublings) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = norm(widths[-1])
        self.conv_out = Conv(widths[-1], 3)

    def denormalize(self, latents: Tensor) -> Tensor:
        """From the transformer's space to the autoencoder's, (B, 16, t, h, w)."""
        return latents / self.config.scaling_factor

    def chunks(self, latents: int, chunk: int = LATENT_CHUNK) -> list[int]:
        """The reference's chunks: 13 latent frames are 3, 2, 2, 2, 2, 2. `chunk` is the model's, whatever is given."""
        return _chunks(latents, LATENT_CHUNK)

    def num_frames(self, latents: int, first: bool = True) -> int:
        """Frames that a chunk becomes: 4n, or 4n - 3 when n is odd, which only a first chunk's is."""
        for _ in range(self.doublings):
            latents = 2 * latents - latents % 2
        return latents

    def forward(self, z: Tensor, stream: CausalStream | None = None) -> Tensor:
        """One chunk (B, 16, t, h, w) -> (B, 3, num_frames(t), 8h, 8w) in [-1, 1]."""
        stream = stream or CausalStream()
        x = self.mid_block(self.conv_in(z, stream), z, stream)
        for stage in self.up_blocks:
            x = stage(x, z, stream)
        return self.conv_out(silu(self.norm_out(x, z, stream)), stream)


class CogVideoXEncoder(nn.Module):
    """Pixels to the moments of the latents."""

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VAEConfig()
        halvings = int(math.log2(config.time_compression))
        widths = config.channels
        last = len(widths) - 1

        def norm(channels: int) -> nn.Module:
            return PlainNorm(config.groups, channels, eps=config.eps)

        self.conv_in = Conv(3, widths[0])
        self.down_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                width,
                config.layers,
                norm,
                "downsamplers",
                Downsample(width, time=i < halvings) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = Mid(widths[-1], norm)
        self.norm_out = PlainNorm(config.groups, widths[-1], eps=EPS)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels)

    def chunks(self, frames: int) -> list[int]:
        """The reference's chunks: 49 frames are 9, 8, 8, 8, 8, 8."""
        return _chunks(frames, FRAME_CHUNK)

    def forward(self, x: Tensor, stream: CausalStream | None = None) -> Tensor:
        """One chunk (B, 3, t, H, W) in [-1, 1] -> (B, 32, t', H / 8, W / 8): means, then log variances."""
        stream = stream or CausalStream()
        x = self.conv_in(x, stream)
        for block in [*self.down_blocks, self.mid_block]:
            x = block(x, x, stream)
        return self.conv_out(silu(self.norm_out(x, x, stream)), stream)


def _chunks(frames: int, size: int) -> list[int]:
    """Chunks of `size`; what is left over joins the first."""
    count = max(frames // size, 1)
    return [frames - size * (count - 1)] + [size] * (count - 1)


def encode(encoder: CogVideoXEncoder, video: Tensor, split: TimeSplit | None = None) -> tuple[Tensor, Tensor]:
    """Mean and log variance of a video's latents, each (1, 16, t, h, w), on every rank; no scaling_factor.

    video: (1, 3, T, H, W) in [-1, 1], the same on every rank; T is 1 or more, H and W multiples of 8. The chunks, or
    parts of their height, are dealt over the ranks of `split`, which makes this collective. A sample is
    mean + exp(logvar / 2) * noise.
    """
    weight = encoder.conv_out.conv.weight
    with torch.inference_mode():
        video = video.to(weight.device, weight.dtype)
        chunks = encoder.chunks(video.shape[2])
        moments = encode_moments(encoder, video, chunks, split or TimeSplit(), encoder.config.space_compression)
    mean, logvar = moments.chunk(2, dim=1)
    return mean.clone(), logvar.clamp(*LOGVAR_RANGE)
