"""FLOPs of the video decoders, layer by layer; the same numbers as FlopCounterMode counts in the running ones."""

from __future__ import annotations

from dataclasses import dataclass

from cogvideox_xdit.config import VAEConfig
from mochi_xdit.config import MochiConfig
from planner.models import BYTES, Model, Size, decoded_frames

COGVIDEOX_CHUNK = 2
MOCHI_CHUNK = 3
COGVIDEOX_COPIES = 4.9
"""Tensors as large as the largest activation that are alive at once, as counted in the running decoder."""
MOCHI_COPIES = 4.0
MOCHI_TAILS = 33.5
"""Frames of the last layers' width that the tails of all layers amount to."""


@dataclass(frozen=True)
class Decoding:
    """What decoding a video takes: FLOPs in all, chunks it can be dealt in, bytes at the peak beside the weights."""

    flops: float
    chunks: int
    peak: float


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
    peak = pixels * BYTES * widths[-1] * (MOCHI_COPIES * chunk * vae.temporal_ratio + MOCHI_TAILS)
    return Decoding(flops, -(-latents // chunk), peak)


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
    # An odd number's first chunk has a frame more; an even one's second chunk has the tails of the first beside it.
    shown = vae.time_compression * COGVIDEOX_CHUNK + 1 if latents > 1 else 1
    peak = COGVIDEOX_COPIES * shown * pixels * channels[-2] * BYTES
    return Decoding(flops, max(1, latents // COGVIDEOX_CHUNK), peak)
