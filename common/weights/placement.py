"""Where a transformer's weights are while it runs: a frozen `Placement`, and `place`, which loads a model that way.

The outer layers (embeddings, the final layer) are resident always; what is placed is the blocks, nearly all of a
model. `stage` and `none` differ only in whether a model stays between stages
(`common.run.pipeline.Pipeline.stage_model`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from common.parallel.interleaver import Interleaver
from common.parallel.mesh import Axis
from common.parallel.usp import SequenceParallel
from common.registry.checks import OFFLOADS
from common.weights.blocks import BlockLayout, Blocks, FromFile, FromHost, FromShares, Source, Stream, bind
from common.weights.checkpoint import Checkpoint
from common.weights.float8 import has_float8_matmul, use_float8
from common.weights.load import Progress, Rename, WeightReader, check, load


@dataclass(frozen=True)
class Placement:
    """Where the weights of a transformer lie.

    ValueError for a combination that makes no sense.
    """

    offload: str = "stage"
    """`none` (every stage's model stays on the device), `stage` (one stage's at a time), `block` (blocks wait in host
    memory), `disk` (blocks are read from the files in every step)."""
    shard: bool = False
    """Every rank keeps 1/P of each block."""
    float8: bool = False
    """Matmul weights of the blocks are in eight bits."""

    def __post_init__(self) -> None:
        if self.offload not in OFFLOADS:
            raise ValueError(f"offload is {self.offload!r}; choose one of {', '.join(OFFLOADS)}")
        if self.shard and self.offload == "disk":
            raise ValueError("with offload disk no rank keeps weights, so there is nothing to shard; leave one of them")

    @property
    def streams(self) -> bool:
        """Whether blocks pass through the device instead of staying there."""
        return self.shard or self.offload in ("block", "disk")

    def __str__(self) -> str:
        words = {
            "none": "every stage stays loaded",
            "stage": "one stage at a time",
            "block": "blocks wait in host memory",
            "disk": "blocks are read from the checkpoint in every step",
        }[self.offload]
        words += ", sharded over the ranks" if self.shard else ""
        return words + (", matmul weights in float8" if self.float8 else "")


class Model(Protocol):
    """What `place` asks of a transformer."""

    blocks: Blocks
    sp: SequenceParallel
    matmuls: ClassVar[tuple[str, ...]]
    """Linear layers inside a block that may be held in eight bits."""


M = TypeVar("M", bound=nn.Module)


def place(
    model: M,
    checkpoint: Checkpoint,
    rename: Rename | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    keep_fp32: Collection[str] = (),
    placement: Placement | None = None,
    world: Axis | None = None,
    progress: Progress | None = None,
) -> M:
    """Load a transformer from `common.weights.load.on_meta` with its blocks where `placement` says; in eval mode.

    world: all ranks, which share the blocks with `shard` (one rank has nothing to share and keeps them whole). Other
    arguments and errors as for `common.weights.load.load`. Collective with `shard`, in what follows.
    """
    placement, world, device = placement or Placement(), world or Axis(), torch.device(device)
    blocks, sp = model.blocks, model.sp
    assert isinstance(blocks, Blocks) and isinstance(sp, SequenceParallel)
    if placement.float8 or has_float8(checkpoint):
        for block in blocks:
            use_float8(block, model.matmuls, has_float8_matmul(device))  # type: ignore[arg-type]
    if placement.offload in ("none", "stage") and not (placement.shard and world.size > 1):
        return load(model, checkpoint, rename, device, dtype, keep_fp32, progress=progress)
    on_device = WeightReader(model, checkpoint, rename, device, dtype, keep_fp32)
    with on_device:
        on_device.load(without="blocks.", progress=progress)
    if placement.offload == "disk":
        reader, source = on_device, None
    else:
        reader = WeightReader(model, checkpoint, rename, "cpu", dtype, keep_fp32)
        reader.done = on_device.done
        source = (
            FromShares(world, device, placement.offload == "block") if _shares(placement, world) else FromHost(device)
        )
    layouts = [BlockLayout.of(block, partial(_dtype_of, reader, i)) for i, block in enumerate(blocks)]
    stream = _stream(source, reader, layouts, world, device, sp.interleaver, progress)
    for i in range(len(blocks)):
        bind(blocks[i], stream.views(i))
    blocks.stream = stream
    return model.eval()


def check_model(model: nn.Module, checkpoint: Checkpoint, rename: Rename | None = None) -> None:
    """Raise what `place` would raise for these headers, and read nothing: for a check at the door."""
    assert isinstance(model.blocks, Blocks)
    for block in model.blocks if has_float8(checkpoint) else ():
        use_float8(block, model.matmuls)  # type: ignore[arg-type]
    check(model, checkpoint, rename)


def _dtype_of(reader: WeightReader, index: int, name: str) -> torch.dtype:
    return reader.dtype_of(f"blocks.{index}.{name}")


def _shares(placement: Placement, world: Axis) -> bool:
    return placement.shard and world.size > 1


def _stream(
    source: FromHost | FromShares | None,
    reader: WeightReader,
    layouts: list[BlockLayout],
    world: Axis,
    device: torch.device,
    interleaver: Interleaver | None,
    progress: Progress | None,
) -> Stream:
    """The stream of these blocks; a source in memory is filled first, block by block."""
    buffer_bytes = max(layout.nbytes for layout in layouts)
    if source is None:
        file_source: Source = FromFile(lambda i, tensors: reader.fill(f"blocks.{i}.", tensors), layouts, device)
        return Stream(file_source, layouts, device, buffer_bytes, wrap_around=True, interleaver=interleaver)
    if isinstance(source, FromShares):
        buffer_bytes = world.size * source.share_bytes(buffer_bytes, world.size)
    memory = torch.zeros(buffer_bytes, dtype=torch.uint8)
    with reader:
        for i, layout in enumerate(layouts):
            reader.fill(f"blocks.{i}.", layout.views(memory), progress)
            source.add(memory[: layout.nbytes])
    return Stream(source, layouts, device, buffer_bytes, wrap_around=True, interleaver=interleaver)


def has_float8(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's matmul weights lie in eight bits in its files."""
    return any(entry.dtype == torch.float8_e4m3fn for entry in checkpoint.values())


def resident_bytes(model: nn.Module) -> int:
    """Bytes that the model's weights take on the device: resident ones, shares and the two buffers."""
    sizes: dict[int, int] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        storage: torch.UntypedStorage = Tensor.untyped_storage(tensor)
        sizes[storage.data_ptr()] = storage.nbytes()
    for module in model.modules():
        if isinstance(module, Blocks) and module.stream is not None and isinstance(module.stream.source, FromShares):
            source = module.stream.source
            shares = [*source.shares, *([] if source.share is None else [source.share])]
            sizes |= {share.untyped_storage().data_ptr(): share.untyped_storage().nbytes() for share in shares}
    return sum(sizes.values())


def held_bytes(models: Iterable[Any]) -> int:
    """`resident_bytes` of all of these; of what is no module but has one, its `model`."""
    modules = (one if isinstance(one, nn.Module) else getattr(one, "model", None) for one in models)
    return sum(resident_bytes(module) for module in modules if isinstance(module, nn.Module))
