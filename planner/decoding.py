"""FLOPs of the video decoders' convolutions, layer by layer; the same numbers as FlopCounterMode counts."""

from __future__ import annotations

from dataclasses import dataclass

from mochi_xdit.config import MochiConfig
from planner.models import Model, Size, decoded_frames

COGVIDEOX_CHANNELS = (512, 256, 256, 128)
COGVIDEOX_LATENTS = 16
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
    return _cogvideox(latents, pixels)


def _mochi(config: MochiConfig, frames: int, pixels: int) -> Decoding:
    vae, chunk = config.vae, min(MOCHI_CHUNK, frames)
    widths, depths = vae.decoder_channels[::-1], vae.layers[::-1]
    times, spaces = vae.temporal[::-1], vae.spatial[::-1]
    latents = frames
    flops = 2 * vae.latent_channels * widths[0] * pixels * frames
    flops += depths[0] * 2 * 2 * 27 * widths[0] ** 2 * pixels * frames
    for i, (time, space) in enumerate(zip(times, spaces)):
        flops += depths[i + 1] * 2 * 2 * 27 * widths[i] ** 2 * pixels * frames
        flops += 2 * widths[i] * widths[i + 1] * time * space**2 * pixels * frames
        frames, pixels = frames * time - (time - 1), pixels * space**2
    flops += depths[-1] * 2 * 2 * 27 * widths[-1] ** 2 * pixels * frames
    flops += 2 * widths[-1] * vae.out_channels * pixels * frames
    return Decoding(flops, -(-latents // chunk), chunk * vae.temporal_ratio * pixels * widths[-1] * 2.0)


def _cogvideox(frames: int, pixels: int) -> Decoding:
    """Two residual blocks in the middle, four in each stage; every norm is steered by two 1x1 convolutions of z."""
    width, latents = COGVIDEOX_CHANNELS[0], frames
    flops = 2 * 27 * COGVIDEOX_LATENTS * width * pixels * frames
    flops += 2 * _residual(width, width, pixels * frames)
    for i, out in enumerate(COGVIDEOX_CHANNELS):
        flops += _residual(width, out, pixels * frames) + 3 * _residual(out, out, pixels * frames)
        width = out
        if i < 3:
            frames, pixels = (2 * frames - frames % 2 if i < 2 and frames > 1 else frames), 4 * pixels
            flops += 2 * 9 * width * width * pixels * frames
    flops += _norm(width, pixels * frames) + 2 * 27 * width * 3 * pixels * frames
    chunk = min(latents, COGVIDEOX_CHUNK)
    return Decoding(flops, max(1, latents // chunk), chunk * 4 * pixels * 256 * 2.0)


def _residual(inputs: int, outputs: int, points: int) -> int:
    flops = 2 * 27 * (inputs + outputs) * outputs * points + _norm(inputs, points) + _norm(outputs, points)
    return flops + (2 * inputs * outputs * points if inputs != outputs else 0)


def _norm(width: int, points: int) -> int:
    return 2 * 2 * COGVIDEOX_LATENTS * width * points
