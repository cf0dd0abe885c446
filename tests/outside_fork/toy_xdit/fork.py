"""The toy as the registry knows it. No torch."""

from __future__ import annotations

from common.registry.forks import Decoder, Decoding, Demo, Fork, Model, Size, Stack, Stream, Text
from toy_xdit.config import LATENTS, RULES, Config, Sound, read_rules


def decoding(frames: int, rows: int, columns: int) -> Decoding:
    """One convolution with a kernel of three frames."""
    return Decoding(2 * 3 * 4 * 192 * frames * rows * columns, -(-frames // 4), 4e3 * min(frames, 4) * rows * columns)


def model(config: Config) -> Model:
    w, text = config.width, Text(config.text_tokens, config.text_tokens, 28_864)
    block = 24 * w * w
    picture = Stream(LATENTS, block, 2 * 2 * w * LATENTS.token_channels, sampled=LATENTS.token_channels)
    sound = Stream(Sound(), block, 2 * 2 * w * config.sound_channels, sampled=config.sound_channels)
    streams = (picture, sound, Stream(text, block))
    stack = Stack(config.layers, config.heads, w // config.heads, streams, once=2 * w, feed_forward=4 * w)
    demo = Demo("default", Size(64, 64, 1, 4, guided=False))
    decoder = Decoder(2_496, decoding)
    return Model("toy", "Toy", RULES, LATENTS, (text,), (stack,), 104_920, decoder, demo=demo, config=config)


FORK = Fork(
    "toy",
    "Toy",
    "toy_xdit",
    "toy-xdit",
    (model(Config()),),
    read_rules=read_rules,
    demos={"default": RULES},
)
