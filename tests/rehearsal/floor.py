"""The least that a block of a published model can move on one GPU, and how far each is from it.

python -m tests.rehearsal.floor

A floor counts matrix products and attention with their inputs, weights and outputs once; every norm (with the
modulation that follows it), rotation, and gate with its residual as one read and one write of what it works on.
Activations of feed-forwards cost nothing: they fit into the product before or after them.
"""

from __future__ import annotations

from torch import nn

from common.parallel.mesh import Mesh
from common.parallel.usp import SequenceParallel
from common.weights.load import on_meta
from tests.rehearsal.blocks import count_block
from tests.rehearsal.models import MODELS, Model

HALF = 2  # bytes of a number in bf16
PASSES = {"mochi": 8, "cogvideox": 8, "consisid": 8, "wan": 11}
"""2 modulated norms, 2 gates, norms and rotations of queries and keys; Wan also has another norm, and the norm of the
queries and the residual of its cross attention."""
ONCE = ("mod_x", "mod_y", "mod1", "mod2")
"""Layers of the conditioning: one row."""
KEPT = ("cross.kv", "cross.image_kv")
"""Run once a video."""


def floor_of(name: str, wide: bool = False) -> float:
    """Bytes of one block, in bf16, one sample; ConsisID's includes half a reading of the face.

    wide: Wan with fp32 between its blocks, which three norms read, and two gates and a sum read and write.
    """
    model, fork = MODELS[name], name.split("-")[0]
    module = on_meta(model.build, model.shallow(4).config, SequenceParallel(Mesh()))
    video, text = model.video_tokens, model.tokens if fork != "wan" else 0
    joint = video + (0 if fork == "mochi" else text)
    numbers = 0
    for path, layer in module.blocks[0].named_modules():  # type: ignore[index, union-attr]
        if isinstance(layer, nn.Linear) and path not in KEPT:
            rows = 1 if path in ONCE else text if "_y" in path else joint
            numbers += rows * (layer.in_features + layer.out_features) + layer.in_features * layer.out_features
    numbers += 9 * joint * _width(model) if wide else 0
    return HALF * (numbers + _attention(model, video + text) + _passes(model, fork, joint, text))


def _width(model: Model) -> int:
    return model.config.hidden_x if hasattr(model.config, "hidden_x") else model.config.width


def _attention(model: Model, tokens: int) -> int:
    """Queries, keys, values and output; Wan's cross attention as well."""
    width, config = _width(model), model.config
    cross = 2 * (tokens + model.tokens) * width if hasattr(config, "ffn") else 0
    if getattr(config, "image_width", None):
        cross += 2 * (tokens + config.image_tokens) * width
    return 4 * tokens * width + cross


def _passes(model: Model, fork: str, joint: int, text: int) -> int:
    width, passes = _width(model), PASSES[fork]
    if fork == "cogvideox" and not model.config.rotary:
        passes -= 2
    numbers = 2 * passes * joint * width
    if fork == "mochi":  # four of the text's own width, two norms of heads, no rotation
        numbers += 2 * text * (4 * model.config.hidden_y + 2 * width)
    if fork == "consisid":  # after every second block: queries, attention, output, norm, sum
        inner, video = model.config.cross_heads * model.config.cross_head_dim, model.video_tokens
        numbers += (2 * video * (width + inner) + 2 * width * inner + 2 * video * inner + 4 * video * width) // 2
    return numbers


def main() -> None:
    print("| model | kernels | GB | matmuls and attention | floor | of the floor |\n|---|---|---|---|---|---|")
    for name, wide in [*((name, False) for name in MODELS), *((name, True) for name in MODELS if "wan" in name)]:
        counted, floor = count_block(name, wide=wide), floor_of(name, wide)
        sizes = (counted.bytes, counted.multiplies, floor)
        gb = " | ".join(f"{size / 1e9:.2f}" for size in sizes)
        said = f"{name}, fp32 between blocks" if wide else name
        print(f"| {said} | {counted.kernels:.0f} | {gb} | {counted.bytes / floor:.2f} |")


if __name__ == "__main__":
    main()
