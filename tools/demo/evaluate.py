"""`python -m tools.demo.evaluate`: what a demo checkpoint makes of held-out captions, read from the pixels.

Every caption names shape, colour and direction; `tools.demo.reading` reads them back from the frames. Size and
background count where the caption names them. The autoencoder is judged by its reconstruction of held-out clips.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.parallel.mesh import Mesh
from common.registry.forks import forks
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


FRAMES = {"mochi": 13, "cogvideox": 17, "consisid": 17, "wan": 13}
"""Models, and how many frames their demo clips have."""
_FORKS = {fork.name: fork for fork in forks()}


def rules(model: str) -> tuple[Path, Any]:
    """A model's demo checkpoint and its own number of steps and guidance."""
    fork = _FORKS[model]
    return fork.demo_folder(), next(iter(fork.demos.values()))


def pipeline(model: str, folder: Path, mesh: Mesh | None = None, **options: Any) -> Any:
    """The pipeline of `model` over a demo checkpoint, its parts kept loaded."""
    return _FORKS[model].pipeline_class().from_pretrained(folder, mesh, keep_loaded=True, **options)


def generator(model: str, pipe: Any, **settings: Any) -> Callable[..., Tensor]:
    """From a caption and a seed to frames; settings: num_steps, cfg_scale and how to decode.

    ConsisID's captions lose shape and colour, a reference picture has them. Wan takes an `image` as well.
    """
    settings |= {"height": 64, "width": 64, "num_frames": FRAMES[model], "negative_prompt": ""}
    if model == "consisid":
        return lambda text, seed: pipe(**_shown(text, pipe.config), seed=seed, **settings)
    return lambda text, seed, **more: pipe(text, seed=seed, **settings, **more)


def _shown(text: str, config: Any) -> dict[str, Any]:
    from consisid_xdit.demo import shape_identity
    from tools.demo.consisid import nameless, reference

    words = text.lower().strip(".").split()
    shape, colour = (next(w for w in words if w in VALUES[field]) for field in ("shape", "colour"))
    return {
        "prompt": nameless(text, shape, colour),
        "identity": shape_identity(reference(shape, colour), config),
    }


def from_pictures(generate: Callable[..., Tensor], count: int, frames: int) -> Callable[[str, int], Tensor]:
    """`generate` for `evaluate`, which also gives it the first frame of each caption's clip as `image`."""
    scenes = dataset(SEED, count, frames, test=True)
    return lambda text, seed: generate(text, seed, image=render(scenes[seed][0], frames)[0].numpy())


def reconstruction(model: str, pipe: Any) -> Callable[[Tensor], Tensor]:
    """From frames (T, H, W, 3) to what the autoencoder makes of them."""
    from common.video.inputs import pixels

    if model == "mochi":
        return _mochi_reconstruction(pipe)
    if model == "wan":
        from wan_xdit.vae import encode as wan_encode

        wan_encoder = pipe._load_encoder()
        return lambda clip: pipe.decode(wan_encode(wan_encoder, pixels(clip, torch.float32)).float())
    from cogvideox_xdit.vae import encode

    encoder, factor = pipe._load_encoder(), pipe.vae_config.scaling_factor
    return lambda clip: pipe.decode(encode(encoder, pixels(clip, torch.float32))[0].float() * factor)


def _mochi_reconstruction(pipe: Any) -> Callable[[Tensor], Tensor]:
    from common.weights.load import load, on_meta
    from mochi_xdit.vae import MochiEncoder, normalize
    from mochi_xdit.weights import find_encoder

    part = find_encoder(pipe.model_dir)
    encoder = load(on_meta(MochiEncoder, part.config), part.open(), part.rename, "cpu", torch.float32)

    @torch.no_grad()
    def reconstruct(clip: Tensor) -> Tensor:
        mean, _ = encoder((clip.float() / 127.5 - 1).movedim(-1, 0)[None])
        return pipe.decode(normalize(mean, part.config))

    return reconstruct


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.evaluate", description=__doc__)
    parser.add_argument("--model", choices=list(FRAMES), default="mochi")
    parser.add_argument("--model-dir", type=Path, help="default: the demo checkpoint of the package")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--num-steps", type=int, help="default: the demo's")
    parser.add_argument("--cfg-scale", type=float, help="default: the demo's")
    parser.add_argument("--from-pictures", action="store_true", help="start from each clip's first frame (wan)")
    parser.add_argument("--shift", type=float, help="how far the noise levels are moved up (wan)")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures and the misses")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shipped, own = rules(arguments.model)
    steps, scale = arguments.num_steps or own.num_steps, arguments.cfg_scale or own.cfg_scale
    folder = arguments.model_dir or shipped
    pipe, frames = pipeline(arguments.model, folder, dtype=arguments.dtype), FRAMES[arguments.model]
    given = {} if arguments.shift is None else {"shift": arguments.shift}
    generate = generator(arguments.model, pipe, num_steps=steps, cfg_scale=scale, **given)
    if arguments.from_pictures:
        generate = from_pictures(generate, arguments.count, frames)
    result: dict[str, Any] = {"psnr": round(psnr(reconstruction(arguments.model, pipe), 50, frames), 2)}
    result |= {"model": arguments.model, "steps": steps, "cfg_scale": scale, "dtype": arguments.dtype}
    result |= given | ({"from": "pictures"} if arguments.from_pictures else {})
    result |= evaluate(generate, arguments.count, frames)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "misses"}))


if __name__ == "__main__":
    main()
