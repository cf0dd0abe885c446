"""What the fork says of itself."""

from __future__ import annotations

from common.registry.checks import Rules
from common.registry.forks import Decoder, Decoding, Fork, Latents, Model
from tests.fake_fork.options import FakeOptions

RULES = Rules(heads=4, width=32, height=32, num_frames=7, num_steps=8, cfg_scale=4.5, fps=8, default_prompt="a test")


def decoding(frames: int, rows: int, columns: int) -> Decoding:
    return Decoding(0.0, 1, 0.0)


MODEL = Model("fake", "Fake", RULES, Latents(4, (1, 1, 1)), (), (), 0, Decoder(0, decoding))
FORK = Fork("fake", "Fake", "tests.fake_fork", "fake-xdit", (MODEL,), demos={"default": RULES}, options=FakeOptions)
