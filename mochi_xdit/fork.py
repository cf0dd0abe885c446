"""Mochi as the registry knows it: sizes, files and costs, from its config. No torch."""

from __future__ import annotations

from functools import partial

from common.registry.downloads import APACHE, GOOGLE_T5, Part, diffusers_files, file, t5_of
from common.registry.forks import (
    T5_XXL_PARAMETERS,
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
from mochi_xdit.config import DEMO, OFFICIAL, MochiConfig, MochiVAEConfig, official_rules
from mochi_xdit.options import MochiOptions

REPO = "genmo/mochi-1-preview"
TYPICAL_PROMPT = 60
"""T5 tokens of a two-sentence prompt: the model drops padding. A few more or less move nothing."""
CHUNK = 3
"""Latent frames that are decoded at once."""
COPIES = 4.0
"""Tensors as large as the largest activation that are alive at once, as counted in the running decoder."""
TAILS = 33.5
"""Frames of the last layers' width that the tails of all layers amount to, counted likewise."""


def stack(config: MochiConfig, latents: Latents, text: Text) -> Stack:
    """The asymmetric blocks. The last one leaves the text's output and feed-forward out."""
    x, y = config.hidden_x, config.hidden_y
    text_out = 2 * x * y + 2 * y * 3 * config.mlp_y
    once = 2 * (config.time_dim * x + x * x) + 2 * x * 2 * x  # time embedding, final modulation
    once += config.depth * 2 * x * 4 * x + (config.depth - 1) * 2 * x * 4 * y + 2 * x * y  # modulations
    return Stack(
        layers=config.depth,
        heads=config.heads,
        head_dim=config.head_dim,
        streams=(
            Stream(
                latents,
                block=2 * x * 3 * x + 2 * x * x + 2 * x * 3 * config.mlp_x,
                rest=2 * 2 * x * config.patch_dim,
                sampled=config.patch_dim,
            ),
            Stream(text, block=2 * y * 3 * x + text_out, rest=-text_out),
        ),
        once=once,
        feed_forward=3 * config.mlp_x,
    )


def decoding(vae: MochiVAEConfig, frames: int, rows: int, columns: int) -> Decoding:
    """Layer by layer, for so many latent frames, rows and columns."""
    latents, pixels, chunk = frames, rows * columns, min(CHUNK, frames)
    widths, depths = vae.decoder_channels[::-1], vae.layers[::-1]
    flops = 2 * vae.latent_channels * widths[0] * pixels * frames
    flops += depths[0] * 2 * 2 * 27 * widths[0] ** 2 * pixels * frames
    for i, (time, space) in enumerate(zip(vae.temporal[::-1], vae.spatial[::-1])):
        flops += depths[i + 1] * 2 * 2 * 27 * widths[i] ** 2 * pixels * frames
        flops += 2 * widths[i] * widths[i + 1] * time * space**2 * pixels * frames
        frames, pixels = frames * time - (time - 1), pixels * space**2
    flops += depths[-1] * 2 * 2 * 27 * widths[-1] ** 2 * pixels * frames
    flops += 2 * widths[-1] * vae.out_channels * pixels * frames
    peak = 2 * pixels * widths[-1] * (COPIES * chunk * vae.temporal_ratio + TAILS)
    return Decoding(flops, -(-latents // chunk), peak)


def preview(config: MochiConfig) -> Model:
    """Mochi 1 preview, or one of other numbers."""
    latents = Latents(
        config.channels, (1, config.patch, config.patch), config.vae.temporal_ratio, config.vae.spatial_ratio
    )
    text = Text(TYPICAL_PROMPT, 0, T5_XXL_PARAMETERS)
    return Model(
        name="mochi",
        title="Mochi-1",
        rules=OFFICIAL,
        latents=latents,
        text=(text,),
        stacks=(stack(config, latents, text),),
        parameters=10_027_677_744,
        decoder=Decoder(362_526_595, partial(decoding, config.vae)),
        files=(
            (Part("transformer", REPO, (file("dit.safetensors"),), APACHE),),
            (Part("decoder", REPO, (file("decoder.safetensors"),), APACHE),),
            # The repository's own copy is the encoder alone; Google's file holds the decoder half too.
            (t5_of(REPO), GOOGLE_T5),
        ),
        layouts=(diffusers_files(REPO, APACHE)[1:],),  # its settings are not read
        folder="mochi-1-preview",
        demo=Demo("default", Size(64, 64, 13, 4)),
        config=config,
    )


FORK = Fork(
    "mochi",
    "Mochi 1",
    "mochi_xdit",
    "mochi-xdit",
    (preview(MochiConfig()),),
    "MochiPipeline",
    read_rules=official_rules,
    demos={"default": DEMO},
    options=MochiOptions,
)
