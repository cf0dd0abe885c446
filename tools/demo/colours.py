"""`python -m tools.demo.colours [MODEL ...]`: what colours the latents of the trained demos have, for previews.

Learned as `common.video.previews` does of any checkpoint, from videos of held-out captions.
"""

from __future__ import annotations

import argparse
from functools import reduce
from operator import add

import torch

from common.video.previews import Sums, sums_of, write_sums
from tools.demo.evaluate import FRAMES, SEED, generator, pipeline, rules
from tools.demo.world import dataset

AUTOENCODERS = {"mochi": ("mochi",), "cogvideox": ("cogvideox", "consisid"), "wan": ("wan",)}
"""Whose videos are learned from, and who has this autoencoder."""
VIDEOS = 16
STEPS = 8


def learned(model: str) -> Sums:
    """What VIDEOS videos of a model's demo teach."""
    pipe = pipeline(model, rules(model)[0], dtype="fp32")
    latents_of = generator(model, pipe, num_steps=STEPS, output="latent")
    captions = [text for _, text in dataset(SEED, VIDEOS, FRAMES[model], test=True)]
    made = [latents_of(text, seed) for seed, text in enumerate(captions)]
    found = [sums_of(latents, pipe.decode(latents)) for latents in made]
    return reduce(add, [sums for sums in found if sums is not None])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.colours", description=__doc__)
    parser.add_argument("models", nargs="*", choices=[*AUTOENCODERS, []], default=[])
    torch.set_num_threads(1)
    for model in parser.parse_args().models or AUTOENCODERS:
        sums = learned(model)
        for name in AUTOENCODERS[model]:
            path = rules(name)[0] / "previews" / "colours.safetensors"
            write_sums(path, sums)
            print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
