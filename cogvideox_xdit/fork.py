"""CogVideoX as the registry knows it: sizes, files and costs, from its config. No torch."""

from __future__ import annotations

from functools import partial
from typing import Any

from cogvideox_xdit.config import CONFIGS, DEMOS, TransformerConfig, VAEConfig, official_rules, read_rules
from cogvideox_xdit.options import CogVideoXOptions
from common.registry.downloads import APACHE, diffusers_files
from common.registry.forks import (
    T5_XXL_PARAMETERS,
    CrossAttention,
    Decoder,
    Decoding,
    Demo,
    Fork,
    Latents,
    Model,
    Published,
    Size,
    Stack,
    Stream,
    Text,
)

LICENCE = "CogVideoX licence (see the model card: registration for commercial use)"
CHUNK = 2
"""Latent frames that are decoded at once; an odd number's first chunk has one more."""
COPIES = 4.9
"""Tensors as large as the largest activation that are alive at once, as counted in the running decoder."""
DECODER_PARAMETERS = 123_000_000


def stack(config: TransformerConfig, latents: Latents, text: Text, cross: tuple[CrossAttention, ...] = ()) -> Stack:
    """Video and text go through the same weights."""
    width, time = config.width, config.time_dim
    once = 2 * (width * time + time * time) + config.layers * 2 * 2 * time * 6 * width + 2 * time * 2 * width
    block = 24 * width * width
    ends = 2 * 2 * width * config.out_channels * config.patch_volume
    return Stack(
        layers=config.layers,
        heads=config.heads,
        head_dim=config.head_dim,
        streams=(Stream(latents, block, ends, latents.token_channels), Stream(text, block)),
        once=once,
        feed_forward=4 * width,
        cross=cross,
    )


def decoding(vae: VAEConfig, frames: int, rows: int, columns: int) -> Decoding:
    """Layer by layer, for so many latent frames, rows and columns.

    Norms are steered by two 1x1 convolutions on the latents' own grid; frames are doubled after the convolution.
    """
    latents, pixels = frames, rows * columns
    channels, grid = vae.channels[::-1], pixels * latents
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
    chunk_frames = vae.time_compression * CHUNK + 1 if latents > 1 else 1
    return Decoding(flops, max(1, latents // CHUNK), 2 * COPIES * chunk_frames * pixels * channels[-2])


def checkpoint(
    config: TransformerConfig, cross: tuple[CrossAttention, ...] = (), vae: VAEConfig | None = None, **more: Any
) -> Model:
    """A model of this kind. more: the other fields of `Model`."""
    vae = vae or VAEConfig()
    latents = Latents(config.out_channels, config.patch, vae.time_compression, vae.space_compression)
    text = Text(config.text_length, config.text_length, T5_XXL_PARAMETERS)  # the model attends to its padding
    return Model(
        rules=official_rules(config),
        latents=latents,
        text=(text,),
        stacks=(stack(config, latents, text, cross),),
        decoder=Decoder(DECODER_PARAMETERS, partial(decoding, vae)),
        published=Published(batched=True, splits_text=True, divides_rows=True),
        config=config,
        **more,
    )


def _published(name: str, variant: str, repo: str, parameters: int, licence: str = LICENCE) -> Model:
    title = repo.split("/")[1]
    return checkpoint(
        CONFIGS[variant],
        name=name,
        title=title,
        parameters=parameters,
        files=diffusers_files(repo, licence),
        folder=title,
        demo=Demo(variant, Size(96, 64, 17, 4)),
    )


FORK = Fork(
    "cogvideox",
    "CogVideoX",
    "cogvideox_xdit",
    "cogvideox-xdit",
    (
        _published("cogvideox-2b", "2b", "zai-org/CogVideoX-2b", 1_693_783_872, APACHE),
        _published("cogvideox-5b", "5b", "zai-org/CogVideoX-5b", 5_570_283_072),
        _published("cogvideox-5b-i2v", "5b-i2v", "zai-org/CogVideoX-5b-I2V", 5_625_087_552),
        _published("cogvideox-1.5-5b", "1.5", "zai-org/CogVideoX1.5-5B", 5_570_676_352),
        _published("cogvideox-1.5-5b-i2v", "1.5-i2v", "zai-org/CogVideoX1.5-5B-I2V", 5_571_594_880),
    ),
    "CogVideoXPipeline",
    read_rules=read_rules,
    demos=DEMOS,
    options=CogVideoXOptions,
)
