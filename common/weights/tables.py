"""Names and shapes of a checkpoint's tensors in any format of file, from headers alone. No torch here."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from common.weights.headers import read_header
from common.weights.pickles import read_pickle_header
from common.weights.schema import CheckpointError, quoted, read_object

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
"""What the names of `torch.save` files end in."""
Shapes = dict[str, tuple[int, ...]]


def read_shapes(file: Path) -> Shapes:
    """Of all tensors in a safetensors file, a `torch.save` file (since torch 1.6), or the shards that an index names.

    CheckpointError as for reading them.
    """
    if file.suffix == ".json":
        shards = [file.parent / name for name in dict.fromkeys(read_index(file).values())]
        return {name: shape for shard in shards for name, shape in read_shapes(shard).items()}
    entries = read_pickle_header(file) if file.suffix in PICKLES else read_header(file)[0]
    return {name: entry.shape for name, entry in entries.items()}


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, as an index says. CheckpointError for what is none, or leads out of its folder."""
    shards = read_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{path}: not an index of weights (weight_map does not map names to files)")
    for shard in dict.fromkeys(shards.values()):
        place = PurePosixPath(shard)
        if place.is_absolute() or ".." in place.parts or not place.name or "\0" in shard:
            raise CheckpointError(f"{path} names {quoted(shard)}; an index may name files of its own folder only")
    return shards
