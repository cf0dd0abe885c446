"""FLOPs of the video decoders, layer by layer; the same numbers as FlopCounterMode counts in the running ones."""

from __future__ import annotations

from dataclasses import dataclass

from cogvideox_xdit.config import VAEConfig
from mochi_xdit.config import MochiConfig
from planner.models import Model, Size, decoded_frames

COGVIDEOX_CHUNK = 2
MOCHI_CHUNK = 3


@dataclass(frozen=True)
class Decoding:
    """What decoding a video takes: FLOPs in all, chunks it can be dealt in, bytes of the largest activation."""

    flops: float
    chunks: int
    activation: float


def decoding(model: Model, size: Size) -> Decoding:
    latents = decoded_frames(model, size)
    pixels = (size.height // 8) * (size.width // 8)
    if isinstance(model.config, MochiConfig):
        return _mochi(model.config, latents, pixels)
    return _cogvideox(VAEConfig(), latents, pixels)


def _mochi(config: MochiConfig, latents: int, pixels: int) -> Decoding:
    vae, chunk, frames = config.vae, min(MOCHI_CHUNK, latents), latents
    widths, depths = vae.decoder_channels[::-1], vae.layers[::-1]
    flops = 2 * vae.latent_channels * widths[0] * pixels * frames
    flops += depths[0] * 2 * 2 * 27 * widths[0] ** 2 * pixels * frames
    for i, (time, space) in enumerate(zip(vae.temporal[::-1], vae.spatial[::-1])):
        flops += depths[i + 1] * 2 * 2 * 27 * widths[i] ** 2 * pixels * frames
        flops += 2 * widths[i] * widths[i + 1] * time * space**2 * pixels * frames
        frames, pixels = frames * time - (time - 1), pixels * space**2
    flops += depths[-1] * 2 * 2 * 27 * widths[-1] ** 2 * pixels * frames
    flops += 2 * widths[-1] * vae.out_channels * pixels * frames
    return Decoding(flops, -(-latents // chunk), chunk * vae.temporal_ratio * pixels * widths[-1] * 2.0)


def _cogvideox(vae: VAEConfig, latents: int, pixels: int) -> Decoding:
    """Norms are steered by two 1x1 convolutions on the latents' own grid; frames are doubled after the convolution."""
    channels, grid, frames = vae.channels[::-1], pixels * latents, latents
    width, z = channels[0], vae.latent_channels

    def block(inputs: int, outputs: int) -> int:
        flops = 2 * 27 * (inputs + outputs) * outputs * pixels * frames + 2 * 2 * z * (inputs + outputs) * grid
        return flops + (2 * inputs * outputs * pixels * frames if inputs != outputs else 0)

    flops = 2 * 27 * z * width * pixels * frames + 2 * block(width, width)
    doublings = vae.time_compression.bit_length() - 1
    for i, out in enumerate(channels):
        flops += block(width, out) + vae.layers * block(out, out)
        width = out
        if i < len(channels) - 1:
            pixels *= 4
            flops += 2 * 9 * width * width * pixels * frames
            if i < doublings and frames > 1:
                frames = 2 * frames - frames % 2
    flops += 2 * 2 * z * width * grid + 2 * 27 * width * 3 * pixels * frames
    chunk = min(latents, COGVIDEOX_CHUNK)
    widest = channels[-2]
    return Decoding(flops, max(1, latents // chunk), chunk * vae.time_compression * pixels * widest * 2.0)
