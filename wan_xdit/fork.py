"""Wan 2.1 and 2.2 as the registry knows them: sizes, files and costs, from their configs. No torch."""

from __future__ import annotations

from functools import partial

from common.registry.downloads import APACHE, Part, Pick, diffusers_files, file, weights
from common.registry.forks import (
    CrossAttention,
    Decoder,
    Decoding,
    Demo,
    Fork,
    Latents,
    Model,
    Size,
    Stack,
    Stream,
    Text,
)
from common.registry.layout import split_evenly
from wan_xdit.checkpoint import DEMOS, PUBLISHED, RULES, official_rules
from wan_xdit.config import TransformerConfig, VAEConfig, vae_of
from wan_xdit.options import WanOptions

CHUNK = 4
"""Latent frames that are decoded at once."""
COPIES = {False: 5.0, True: 7.0}
"""Tensors of the last stage's pixels and of the decoder's width that are alive at once, as counted in the running
decoders of 2.1 and of 2.2 (shortcuts)."""
TAILS = {False: 32.0, True: 28.0}
"""Frames of that size that the tails of all layers amount to, counted likewise."""
UMT5_XXL_PARAMETERS = 5_680_910_336
"""Of UMT5-xxl's encoder."""
IMAGE_TOWER = (file("image_encoder/config.json"), weights("image_encoder/model"))
DECODER_PARAMETERS = {False: 73_295_603, True: 555_051_580}
"""Of the autoencoder of 2.1 and of 2.2."""


def stack(config: TransformerConfig, latents: Latents) -> Stack:
    """Self-attention over the video; text and image tokens are met by cross-attention alone."""
    width = config.width
    once = 2 * config.time_width * width + 2 * width * width + 2 * width * 6 * width
    ends = 2 * 2 * width * config.out_channels * config.patch_volume
    cross = [CrossAttention(config.layers, width, config.text_length, 4 * width * width)]
    if config.image_width:
        cross.append(CrossAttention(config.layers, width, config.image_tokens, 0))
    return Stack(
        layers=config.layers,
        heads=config.heads,
        head_dim=config.head_width,
        streams=(Stream(latents, 8 * width * width + 4 * width * config.ffn, ends, latents.token_channels),),
        once=once,
        feed_forward=config.ffn,
        cross=tuple(cross),
        normed_whole=True,
    )


def decoding(vae: VAEConfig, frames: int, rows: int, columns: int) -> Decoding:
    """Layer by layer, for so many latent frames, rows and columns."""
    latents, pixels = frames, rows * columns
    widths = [vae.decoder_width * m for m in (vae.multiples[-1], *vae.multiples[::-1])]
    width, z = widths[0], vae.latent_channels

    def block(inputs: int, outputs: int) -> int:
        flops = 2 * 27 * (inputs + outputs) * outputs
        return (flops + (2 * inputs * outputs if inputs != outputs else 0)) * pixels * frames

    flops = (2 * z * z + 2 * 27 * z * width) * pixels * frames + 2 * block(width, width)
    flops += (8 * width * width + 4 * width * pixels) * pixels * frames
    for i, time in enumerate((*vae.temporal[::-1], None)):
        channels_in = widths[i] if vae.shortcuts or i == 0 else widths[i] // 2
        width = widths[i + 1]
        flops += block(channels_in, width) + vae.depth * block(width, width)
        if time is None:
            break
        if time:
            flops += 2 * 3 * width * 2 * width * pixels * (frames - 1)
            frames = 2 * frames - 1
        pixels *= 4
        flops += 2 * 9 * width * (width if vae.shortcuts else width // 2) * pixels * frames
    flops += 2 * 27 * width * 3 * vae.fold**2 * pixels * frames
    return Decoding(flops, -(-latents // CHUNK), _peak(vae, latents, pixels))


def _peak(vae: VAEConfig, latents: int, pixels: int) -> float:
    """Bytes at the peak, which is at the last stage. pixels: of a frame before it is unfolded."""
    chunks = split_evenly(latents, -(-latents // CHUNK))
    tails = TAILS[vae.shortcuts] if len(chunks) > 1 else 0
    # The second chunk has no frame that stands alone.
    frames = max([chunks[0] * vae.time - (vae.time - 1)] + [chunk * vae.time for chunk in chunks[1:2]])
    return 2 * pixels * vae.decoder_width * (COPIES[vae.shortcuts] * frames + tails)


def published(kind: str, name: str, parameters: int, demo: str, *more: tuple[Pick, ...]) -> Model:
    """A published checkpoint. name: of its repository; that in the diffusers layout ends in -Diffusers."""
    config, repo = PUBLISHED[kind], f"Wan-AI/{name}-Diffusers"
    parts = (Part("image encoder (CLIP ViT-H/14)", repo, picks, APACHE) for picks in more)
    vae = vae_of(config)
    latents = Latents(config.out_channels, config.patch, vae.time, vae.space)
    return Model(
        name=name.lower(),
        title=name,
        rules=RULES[kind],
        latents=latents,
        text=(Text(config.text_length, config.text_length, UMT5_XXL_PARAMETERS),),
        stacks=(stack(config, latents),),
        parameters=parameters,
        decoder=Decoder(DECODER_PARAMETERS[vae.shortcuts], partial(decoding, vae)),
        files=diffusers_files(repo, APACHE, *parts),
        folder=f"{name}-Diffusers",
        aliases=(name.lower().replace("-t2v", ""),) if kind == "t2v-1.3b" else (),
        demo=Demo(demo, Size(96, 64, 17, 10)),
        config=config,
    )


FORK = Fork(
    "wan",
    "Wan 2.1 and 2.2",
    "wan_xdit",
    "wan-xdit",
    (
        published("t2v-14b", "Wan2.1-T2V-14B", 14_288_491_584, "t2v-1.3b"),
        published("t2v-1.3b", "Wan2.1-T2V-1.3B", 1_418_996_800, "t2v-1.3b"),
        published("i2v-14b-480p", "Wan2.1-I2V-14B-480P", 16_394_878_784, "i2v-14b-480p", IMAGE_TOWER),
        published("i2v-14b-720p", "Wan2.1-I2V-14B-720P", 16_394_878_784, "i2v-14b-480p", IMAGE_TOWER),
        published("t2v-a14b", "Wan2.2-T2V-A14B", 14_288_491_584, "t2v-a14b"),
        published("i2v-a14b", "Wan2.2-I2V-A14B", 14_288_901_184, "i2v-a14b"),
        published("ti2v-5b", "Wan2.2-TI2V-5B", 4_999_787_712, "ti2v-5b"),
    ),
    "WanPipeline",
    read_rules=official_rules,
    demos=DEMOS,
    options=WanOptions,
)
