"""Which scenes there are, and running one with all its checks.

`COVER` has every value of every axis at least once, and all layers of one checkpoint of each fork; `full` has every
checkpoint in every layout with all layers, and every placement, kernel and card beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.registry.layout import Layout
from tests.helpers.fake_cuda import Machine
from tests.rehearsal import folders, pipelines
from tests.rehearsal.checks import check, check_result
from tests.rehearsal.models import MODELS
from tests.rehearsal.scene import WORDS, Ran, Scene, run_ranks

LAYOUTS = tuple(Layout(*degrees) for degrees in ((2, 3, 2), (1, 2, 4), (2, 3, 1), (2, 1, 3), (1, 1, 1)))
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0))
# An even number, which streams as the published numbers do: with an odd one the first block waits for the last.
STREAMED = 4

COVER = (
    Scene("mochi", output="latent"),
    Scene("cogvideox-5b", output="latent", capability=(10, 0), attention="cudnn"),
    Scene("consisid", output="latent", capability=(8, 0)),
    Scene("wan-1.3b", output="latent", capability=(8, 6)),
    Scene("mochi", Layout(2, 3, 2), layers=2, latents=4),
    Scene("cogvideox-5b-i2v", Layout(1, 2, 4), offload="block", shard=True, groups=2, output="latent", layers=STREAMED),
    Scene("cogvideox-2b", Layout(2, 3, 1), (10, 0), "auto", "fp16", "disk", scheduler="dpm", output="latent", layers=4),
    Scene("cogvideox-5b", Layout(ring=2), dtype="fp32", video=True, output="latent", layers=2, latents=5),
    Scene("consisid", Layout(2, 1, 3), (8, 9), dtype="fp8", shard=True, output="latent", layers=STREAMED),
    Scene("cogvideox-2b", Layout(ring=2), offload="none", vae="tiled", layers=2, latents=5),
    Scene("cogvideox-1.5-i2v", attention="flash3", output="latent", layers=2),
    Scene("cogvideox-1.5", Layout(ring=2), attention="sdpa", groups=2, output="latent", layers=2),
    Scene("mochi", Layout(ring=2), (8, 9), "flash2", "fp8", compiled=True, output="latent", layers=2),
    Scene("wan-i2v-14b", Layout(cfg=2), offload="block", output="latent", layers=STREAMED, latents=5),
    Scene("wan-ti2v-5b", Layout(ulysses=2), dtype="fp8", layers=2, latents=9),
    Scene("wan-a14b", Layout(ring=2), compiled=True, output="latent", layers=2),
    Scene("mochi", Layout(1, 2, 2), offload="block", shard=True, turns=True, output="latent", layers=STREAMED),
    Scene("cogvideox-2b", Layout(ulysses=3), (8, 9), compiled=True, turns=True, output="latent", layers=2),
)


def full() -> Iterator[Scene]:
    """Everything, for `make rehearsal`."""
    for model in MODELS:
        for layout in LAYOUTS:
            yield Scene(model, layout)
        for offload, shard in (("block", False), ("disk", False), ("stage", True), ("block", True)):
            yield Scene(model, Layout(ring=2), offload=offload, shard=shard, output="latent")
        yield Scene(model, Layout(1, 2, 2), (8, 9), dtype="fp8", groups=4, output="latent")
        yield Scene(model, Layout(ring=2), compiled=True, output="latent")
        yield Scene(model, Layout(ulysses=3), turns=True, output="latent")
        yield Scene(model, Layout(ring=2), dtype="fp32", output="latent")
        yield Scene(model, Layout(ring=2), vae="tiled", layers=2)
        for capability in CAPABILITIES:
            for attention in ("auto", "sdpa", "cudnn", "flash2", *(["flash3"] if capability == (9, 0) else [])):
                yield Scene(model, Layout(ring=2), capability, attention, output="latent", layers=2)
    for model in ("cogvideox-2b", "cogvideox-5b", "cogvideox-1.5"):
        yield Scene(model, Layout(ring=2), dtype="fp16", scheduler="dpm", output="latent")
        yield Scene(model, Layout(ring=3), groups=2, video=True)


def rehearse(scene: Scene, root: Path) -> list[Ran]:
    """Run a scene on all its ranks and check it. root: where folders of checkpoints are kept."""
    folder = root / f"{scene.model}-{scene.layers}"
    if not folder.exists():
        folders.write_folder(folder, scene.model, scene.layers)
    ran = run_ranks(scene, partial(pipelines.generate, scene, folder), ANSWERS)
    check(scene, ran)
    check_result(scene, ran, *shapes(scene))
    return ran


def shapes(scene: Scene) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the latents and of the frames that a scene gives."""
    model = MODELS[scene.model]
    _, rows, columns = model.size
    scale, channels, count = model.compression[0], model.patch // model.volume, scene.latents or model.decoded
    frames = (model.frames(scene.latents), rows * scale, columns * scale, 3)
    return (1, channels, count, rows, columns), frames


def _true(tensor: Tensor) -> bool:
    return True


ANSWERS = {
    "common/video/latents.py:require_finite": _true,
    "common/video/decode.py:require_finite_pixels": _true,
    "common/parallel/mesh.py:all_min": lambda tensor: Machine().free,
    "mochi_xdit/transformer.py:_valid": lambda tensor: False if tensor.dtype == torch.bool else WORDS,
}
"""What the host reads from a GPU in a whole generation: NaN once a step and once a chunk, free memory before a decode
is planned, and, of a prompt whose padding is dropped, how many tokens it has. Any other read fails."""
