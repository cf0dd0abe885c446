"""What the fork says of itself: what it makes, and three models of kinds that no fork here has, to be planned."""

from __future__ import annotations

from dataclasses import dataclass

from common.registry.checks import Rules
from common.registry.downloads import Part, file, weights
from common.registry.forks import CrossAttention, Decoder, Decoding, Fork, Latents, Model, Size, Stack, Stream, Text

# Relative: the package is copied to where a package of somebody else's lies, see `tests.helpers.outside`.
from .options import FakeOptions

RULES = Rules(heads=4, width=32, height=32, num_frames=7, num_steps=8, cfg_scale=4.5, fps=8, default_prompt="a test")
WIDTH = 512
BLOCK = 24 * WIDTH * WIDTH


class Picture(Rules):
    def problems(self, width: int, height: int, num_frames: int) -> list[str]:
        found = super().problems(width, height, 1)
        return found + ([] if num_frames == 1 else ["--num-frames must be 1: the toy makes a picture"])


@dataclass(frozen=True)
class Sound:
    per_second: int = 50
    fps: int = 24

    def tokens(self, size: Size) -> tuple[int, int]:
        count = size.num_frames * self.per_second // self.fps
        return count, count


def decoding(frames: int, rows: int, columns: int) -> Decoding:
    return Decoding(1e6 * frames * rows * columns, frames, 1e3 * rows * columns)


def model(
    name: str, rules: Rules, latents: Latents, text: Text, stacks: tuple[Stack, ...], parameters: int, repo: str
) -> Model:
    parts = ((Part("transformer", repo, (file("config.json"), weights("model")), "MIT"),),)
    return Model(name, name.title(), rules, latents, (text,), stacks, parameters, Decoder(10**6, decoding), parts)


def picture() -> Model:
    """Two kinds of blocks, no guidance."""
    latents, text = Latents(16, (1, 2, 2)), Text(256, 256, parameters=10**8)
    both = (Stream(latents, BLOCK, sampled=64), Stream(text, BLOCK))
    double = Stack(2, 8, 64, both, once=10**6, feed_forward=8 * WIDTH)
    single = Stack(4, 8, 64, (Stream(latents, BLOCK), Stream(text, BLOCK)), feed_forward=8 * WIDTH)
    rules = Picture(heads=8, width=1024, height=1024, num_frames=1, num_steps=4, cfg_scale=1.0, fps=1, frame_step=1)
    return model("toy-picture", rules, latents, text, (double, single), 3 * 10**7, "toys/picture")


def video() -> Model:
    """Text by cross attention, two transformers that take turns."""
    latents, text = Latents(16, (1, 2, 2), 4), Text(512, 512, parameters=10**8)
    cross = CrossAttention(layers=6, width=WIDTH, keys=512, matmul=4 * WIDTH * WIDTH)
    stack = Stack(6, 8, 64, (Stream(latents, BLOCK, sampled=64),), cross=(cross,))
    rules = Rules(heads=8, width=832, height=480, num_frames=81, num_steps=40, cfg_scale=4.0, fps=16, frame_step=4)
    return model("toy-video", rules, latents, text, (stack,), 2 * 10**7, "toys/video")


def sound() -> Model:
    """A second tower for the sound."""
    latents, text = Latents(16, (1, 2, 2), 4), Text(512, 512, parameters=10**8)
    seen = CrossAttention(layers=4, width=WIDTH, keys=403, matmul=4 * WIDTH * WIDTH)
    seeing = Stack(6, 8, 64, (Stream(latents, BLOCK, sampled=64),), cross=(seen,))
    hearing = Stack(4, 4, 64, (Stream(Sound(), BLOCK // 4, sampled=128),))
    rules = Rules(heads=8, width=640, height=352, num_frames=193, num_steps=50, cfg_scale=5.0, fps=24, frame_step=4)
    return model("toy-sound", rules, latents, text, (seeing, hearing), 2 * 10**7, "toys/sound")


def nothing(frames: int, rows: int, columns: int) -> Decoding:
    return Decoding(0.0, 1, 0.0)


MODEL = Model("fake", "Fake", RULES, Latents(4, (1, 1, 1)), (), (), 0, Decoder(0, nothing))
FORK = Fork(
    "fake",
    "Fake",
    __name__.rpartition(".")[0],
    "fake-xdit",
    (MODEL, picture(), video(), sound()),
    demos={"default": RULES},
    options=FakeOptions,
)
