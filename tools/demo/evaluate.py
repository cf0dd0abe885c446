"""`python -m tools.demo.evaluate`: what a demo checkpoint makes of held-out captions, read from the pixels.

Every caption names shape, colour and direction; `tools.demo.reading` reads them back from the frames. Size and
background count where the caption names them. The autoencoder is judged by its reconstruction of held-out clips.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.request import Source
from tools.demo.reading import read
from tools.demo.text_encoder import named
from tools.demo.world import FIELDS, VALUES, Scene, dataset, render

READ = ("colour", "direction", "shape", "size", "background")
SEED = 4242


def evaluate(generate: Callable[[str, int], Tensor], count: int, frames: int) -> dict[str, Any]:
    """generate(caption, seed) -> uint8 frames (T, 64, 64, 3). Shares of attributes that came true, and the misses."""
    right, asked, misses = Counter(), Counter(), []
    for i, (scene, text) in enumerate(dataset(SEED, count, frames, test=True)):
        result = read(generate(text, i))
        said = _said(scene, text)
        wrong = {field: getattr(result, field) for field in said if getattr(result, field) != said[field]}
        asked.update(said.keys())
        right.update(said.keys() - wrong.keys())
        if wrong:
            misses.append({"caption": text, "read": wrong})
    shares = {field: round(right[field] / asked[field], 3) for field in READ if asked[field]}
    return {"captions": count, "right": shares, "misses": misses}


def _said(scene: Scene, text: str) -> dict[str, str]:
    """The attributes that the caption names and the pixels can show."""
    indices = zip(FIELDS, named(scene, text), strict=True)
    return {f: VALUES[f][k] for f, k in indices if f in READ and k < len(VALUES[f])}


def psnr(reconstruct: Callable[[Tensor], Tensor], count: int, frames: int) -> float:
    """Mean over held-out clips of the reconstruction's PSNR in dB; reconstruct: uint8 (T, H, W, 3) to the same."""
    values = []
    for scene, _ in dataset(SEED + 1, count, frames, test=True):
        clip = render(scene, frames)
        error = (reconstruct(clip).float() - clip.float()).square().mean()
        values.append(10 * torch.log10(255**2 / error))
    return float(torch.stack(values).mean())


def mochi(folder: Path, steps: int, scale: float, dtype: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    from common.weights import load, on_meta
    from mochi_xdit import MochiPipeline
    from mochi_xdit.vae import MochiEncoder, normalize
    from mochi_xdit.weights import find_encoder

    pipe = MochiPipeline.from_pretrained(folder, dtype=dtype, keep_loaded=True)
    part = find_encoder(folder)
    encoder = load(on_meta(MochiEncoder, part.config), part.open(), part.rename, "cpu", torch.float32)

    def generate(text: str, seed: int) -> Tensor:
        return pipe(text, height=64, width=64, num_frames=13, num_steps=steps, cfg_scale=scale, seed=seed)

    @torch.no_grad()
    def reconstruct(clip: Tensor) -> Tensor:
        mean, _ = encoder((clip.float() / 127.5 - 1).movedim(-1, 0)[None])
        return pipe.decode(normalize(mean, part.config))

    return generate, reconstruct


def cogvideox(
    folder: Path, steps: int, scale: float, dtype: str
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """As `mochi`, for CogVideoX's demo."""
    from cogvideox_xdit import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(folder, dtype=dtype, keep_loaded=True)

    def generate(text: str, seed: int) -> Tensor:
        return pipe(text, height=64, width=64, num_frames=17, num_steps=steps, cfg_scale=scale, seed=seed)

    return generate, _reconstruction(pipe)


def _reconstruction(pipe: Any) -> Callable[[Tensor], Tensor]:
    from cogvideox_xdit.inputs import pixels
    from cogvideox_xdit.vae import encode

    encoder, factor = pipe._load_encoder(), pipe.vae_config.scaling_factor
    return lambda clip: pipe.decode(encode(encoder, pixels(clip, torch.float32))[0].float() * factor)


def consisid(folder: Path, steps: int, scale: float, dtype: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """As `mochi`, for ConsisID's demo: the caption loses shape and colour, a reference picture has them."""
    from consisid_xdit import ConsisIDPipeline
    from consisid_xdit.demo import shape_identity
    from tools.demo.consisid import nameless, reference
    from tools.demo.world import COLOURS, SHAPES

    pipe = ConsisIDPipeline.from_pretrained(folder, dtype=dtype, keep_loaded=True)

    def generate(text: str, seed: int) -> Tensor:
        words = text.lower().strip(".").split()
        shape, colour = (next(w for w in words if w in known) for known in (SHAPES, COLOURS))
        who, said = shape_identity(reference(shape, colour), pipe.config), nameless(text, shape, colour)
        size = {"height": 64, "width": 64, "num_frames": 17}
        return pipe(said, identity=who, **size, num_steps=steps, cfg_scale=scale, seed=seed)

    return generate, _reconstruction(pipe)


MODELS: dict[str, tuple[Callable[..., Any], int]] = {
    "mochi": (mochi, 13),
    "cogvideox": (cogvideox, 17),
    "consisid": (consisid, 17),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.evaluate", description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="mochi")
    parser.add_argument("--model-dir", type=Path, help="default: the demo checkpoint of the package")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--num-steps", type=int, help="default: the demo's")
    parser.add_argument("--cfg-scale", type=float, help="default: the demo's")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures and the misses")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    make, frames = MODELS[arguments.model]
    program = import_module(f"{arguments.model}_xdit.cli").PROGRAM
    rules = program.rules(Source(demo=program.demos[0]))
    steps, scale = arguments.num_steps or rules.num_steps, arguments.cfg_scale or rules.cfg_scale
    folder = arguments.model_dir or program.make_demo(program.demos[0])
    generate, reconstruct = make(folder, steps, scale, arguments.dtype)
    result = {"psnr": round(psnr(reconstruct, 50, frames), 2)}
    result |= {"model": arguments.model, "steps": steps, "cfg_scale": scale, "dtype": arguments.dtype}
    result |= evaluate(generate, arguments.count, frames)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "misses"}))


if __name__ == "__main__":
    main()
