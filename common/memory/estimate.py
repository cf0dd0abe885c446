"""What a video takes before anything is loaded: memory of each stage on a rank, FLOPs and bytes of a step.

A fork says what a rank runs as a `Workload`: its modules on the meta device and one sampling step. `Estimator` runs
that without data, counts what lives at once, what is multiplied and what is sent, and adds the weights as a
`Placement` lays them out. So the figures are those of the code that runs, not of formulas beside it.

Not counted: the CUDA context (0.5 GB, gone from free memory before it is asked for), NCCL's buffers, the workspaces
and rounding of kernels and allocators (the margin of `common.parallel.device_memory` is for those), and the layout
encoders of some models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from common.parallel.device_memory import wanted
from common.parallel.interleaver import Interleaver
from common.parallel.mesh import Axis, Layout, Mesh, build_mesh
from common.registry.settings import DecodeOptions
from common.text.encoder import TextWork
from common.video.decode import DecodePlan, VideoDecoder
from common.video.decode_planning import PeakMemory, decode_memory, decode_plans, plan_decode, warning
from common.weights.blocks import BlockLayout, Blocks, FromShares
from common.weights.dtypes import Precision
from common.weights.float8 import Float8Linear, plans_float8_matmul, use_float8
from common.weights.load import assign
from common.weights.placement import Placement

STAGES = ("text", "sampling", "decode")
BUFFERS = 2


@dataclass(frozen=True)
class Workload:
    """What one rank runs for one video."""

    transformer: nn.Module
    """On the meta device, with `blocks` and `matmuls`; parameters of any floating dtype."""
    step: Callable[[Any], object]
    """(model) -> None; prepares and computes one sampling step as the pipeline does, on the meta device."""
    decoder: VideoDecoder
    """On the meta device."""
    latents: tuple[int, int, int, int]
    """(C, T, h, w) that it decodes."""
    frames: tuple[int, int, int]
    """(T, H, W) that come out."""
    text: tuple[TextWork, ...] = ()
    """The work of every text encoder, in the order that they run; empty where there is none."""
    keep_fp32: tuple[str, ...] = ()
    """Names of the transformer's parameters that are held in fp32 at least."""
    experts: int = 1
    """How many transformers like this one take turns; where models stay on the device, all of them do."""
    kept: int = 0
    """Bytes that `step` keeps from step to step, which a pipeline whose blocks stream computes anew instead."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the device at a stage's peak: weights that are resident, and tensors made on the way."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations

    @property
    def wanted(self) -> int:
        """Free bytes with the margin."""
        return wanted(self.weights, self.activations)


@dataclass(frozen=True)
class Estimate:
    """One rank with one placement."""

    placement: Placement
    keep: bool
    stages: Mapping[str, StageMemory]
    host: int
    """Bytes of weights in host memory."""
    flops: int
    sent: Mapping[str, int]
    """Bytes a step sends, by axis."""
    plan: DecodePlan
    warning: str = ""
    """Of the decode: what `common.video.decode_planning.warning` says of the plan."""

    @property
    def fullest(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=lambda name: self.stages[name].total)

    @property
    def peak(self) -> int:
        return self.stages[self.fullest].total


class Traffic(TorchDispatchMode):
    """Counts the bytes that functional collectives inside it hand to other ranks: `sent`, by the axis' name."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.axes: dict[str, tuple[str, int]] = {}
        for name in ("world", "sequence", "cfg", "ring", "ulysses"):
            axis: Axis = getattr(mesh, name)
            if axis.group is not None:
                self.axes[axis.group.group_name] = (name, axis.rank)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            send, _, input_splits, group = args
            name, own = self.axes[group]
            rows = sum(input_splits) - input_splits[own]
            self.sent[name] += rows * (send.nbytes // max(send.shape[0], 1))
        return func(*args, **(kwargs or {}))


def imagined(layout: Layout, rank: int = 0) -> Mesh:
    """The mesh that a rank of `layout` would have, over process groups that send nothing. Left by `with`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if layout.ranks == 1:
        return Mesh(layout=layout)
    dist.init_process_group("fake", rank=rank, world_size=layout.ranks, store=FakeStore())
    return build_mesh(layout, torch.device("cpu"))


class Estimator:
    """Counts a rank's workload once; any number of placements are then sums.

    mesh: the rank's place, real or `imagined`; nothing is sent. With an interleaver the step is run in turn.
    device: cpu or cuda, where it would run.
    """

    def __init__(
        self,
        work: Workload,
        mesh: Mesh,
        precision: Precision | None = None,
        device: str = "cuda",
        decode: DecodeOptions | None = None,
    ) -> None:
        self.work, self.mesh, self.device = work, mesh, device
        self.precision = precision = precision or Precision()
        self.multiplies = plans_float8_matmul(device)
        self.model = typed(work.transformer, precision.dtype, work.keep_fp32, precision.float8, self.multiplies)
        self.layouts = block_layouts(self.model)
        self.outer = _nbytes(self.model, without="blocks.")
        self.text = [self._encoder(text) for text in work.text] if mesh.is_main else []
        self.activations, self.flops, self.sent = self._step()
        self.decoder = work.decoder.to(precision.dtype)
        self.peaks: dict[DecodePlan, int] = {}
        options = decode or DecodeOptions()
        tile = options.tile(self.decoder.spatial_factor)
        self.plans = decode_plans(self.decoder, work.latents, mesh.world.size, options.vae, options.vae_chunk, tile)

    def estimate(self, placement: Placement, keep: bool = False, free: float = float("inf")) -> Estimate:
        """keep: models stay on the device from one stage to the next. free: bytes, for the choice of a decode plan."""
        placement = replace(placement, float8=self.precision.float8)
        transformer, host = placed_bytes(self.outer, self.layouts, placement, self.mesh.world.size)
        text = self._text_memory(placement, keep)
        decoder = _nbytes(self.decoder)
        decode_free = free - decoder - (text.weights + self.work.experts * transformer if keep else 0)
        plan, frames = self._decode(decode_free)
        weights = {"text": text.weights, "sampling": transformer, "decode": decoder}
        if keep:
            all_of_them = text.weights + self.work.experts * transformer + decoder
            weights = dict.fromkeys(STAGES, all_of_them)
        sampling = self.activations - (self.work.kept if placement.streams else 0)
        working = {"text": text.activations, "sampling": sampling, "decode": frames}
        stages = {name: StageMemory(weights[name], working[name]) for name in STAGES}
        traffic = Counter(self.sent)
        if placement.shard and self.mesh.world.size > 1:
            shares = sum(FromShares.share_bytes(i.nbytes, self.mesh.world.size) for i in self.layouts)
            fetches = self.passes if self.mesh.interleaver is None else 1  # in turn all use a block while it is there
            traffic["weights"] = fetches * shares * (self.mesh.world.size - 1)
        message = warning(plan, self.plans, decode_free, self._plan_bytes)
        return Estimate(placement, keep, stages, host, self.flops, traffic, plan, message)

    @torch.inference_mode()
    def _step(self) -> tuple[int, int, Counter[str]]:
        """Bytes at the peak of one step, its FLOPs, what it sends; counts the forward passes in `passes` too."""
        self.passes = 0

        def count(*_: object) -> None:
            self.passes += 1

        hooks = [self.model.register_forward_pre_hook(count)]
        if (turns := self.mesh.interleaver) is not None:  # as a stream does, which this model has not
            for i, block in enumerate(self.model.blocks):  # type: ignore[arg-type]
                hooks.append(block.register_forward_pre_hook(partial(_reach, turns, i)))
        with (
            FlopCounterMode(display=False, custom_mapping=FUSED) as flops,
            Traffic(self.mesh) as traffic,
            PeakMemory() as memory,
        ):
            self.work.step(self.model)
        for hook in hooks:
            hook.remove()
        return memory.peak, flops.get_total_flops(), traffic.sent

    @torch.inference_mode()
    def _encoder(self, work: TextWork) -> tuple[int, list[BlockLayout], int]:
        """A text encoder's bytes outside of its layers, the layers' layouts, bytes at the peak of encoding a prompt."""
        model = work.new(self.precision.text)
        name, layers = next(((n, m) for n, m in model.named_modules() if isinstance(m, Blocks)), ("", Blocks()))
        for layer in layers if self.precision.text_float8 else ():
            use_float8(layer, work.matmuls, self.multiplies)
        with PeakMemory() as memory:
            work.run(model, torch.zeros(1, work.tokens, dtype=torch.long, device="meta"))
        layouts = [BlockLayout.of(layer, partial(_dtype_of, layer)) for layer in layers]
        return _nbytes(model, without=f"{name}." if name else None), layouts, memory.peak

    def _text_memory(self, placement: Placement, keep: bool) -> StageMemory:
        """Of the encoder that needs most; where models stay, beside the others' weights."""
        # They are on one rank: what streams comes from their files.
        where = Placement("disk" if placement.streams else "stage")
        stages = [StageMemory(placed_bytes(outer, layers, where, 1)[0], peak) for outer, layers, peak in self.text]
        if keep:
            return StageMemory(sum(one.weights for one in stages), max((one.activations for one in stages), default=0))
        return max(stages, key=lambda one: one.total, default=StageMemory(0, 0))

    def _decode(self, free: float) -> tuple[DecodePlan, int]:
        """The first plan that fits, and bytes at its peak; frames are gathered on rank 0's CPU."""
        tries = self.device == "cuda"
        plan = plan_decode(self.decoder, self.work.latents, free, self.plans, self._plan_bytes, tries)[0]
        frames, height, width = self.work.frames
        # Chunks lie beside the whole while they are joined.
        frame_bytes = 2 * frames * height * width * 3 if self.device == "cpu" and self.mesh.is_main else 0
        return plan, self._plan_bytes(plan) + frame_bytes

    def _plan_bytes(self, plan: DecodePlan) -> int:
        if plan not in self.peaks:
            self.peaks[plan] = decode_memory(self.decoder, self.work.latents, plan, self.device, self.mesh.world.size)
        return self.peaks[plan]


def _reach(turns: Interleaver, place: int, *_: object) -> None:
    turns.reach(place)


def typed(
    model: nn.Module,
    dtype: torch.dtype,
    keep_fp32: tuple[str, ...] = (),
    float8: bool = False,
    multiplies: bool = False,
) -> nn.Module:
    """A model on the meta device with the dtypes that its weights get when they are loaded; changed in place.

    multiplies: as for `common.weights.float8.Float8Linear`.
    """
    model.to(dtype).requires_grad_(False)
    for name in keep_fp32:
        slot = model.get_parameter(name)
        assign(model, name, torch.empty_like(slot, dtype=torch.promote_types(dtype, torch.float32)))
    blocks = model.blocks
    assert isinstance(blocks, Blocks)
    for block in blocks if float8 else ():
        use_float8(block, model.matmuls, multiplies)  # type: ignore[arg-type]
        for layer in block.modules():
            if isinstance(layer, Float8Linear) and layer.bias is not None:
                assign(layer, "bias", torch.empty_like(layer.bias, dtype=dtype))
    return model


def _dtype_of(module: nn.Module, name: str) -> torch.dtype:
    return module.state_dict(keep_vars=True)[name].dtype


def block_layouts(model: nn.Module) -> list[BlockLayout]:
    """How each block's bytes lie when they stream."""
    assert isinstance(model.blocks, Blocks)
    return [BlockLayout.of(block, partial(_dtype_of, block)) for block in model.blocks]


def _nbytes(model: nn.Module, without: str | None = None) -> int:
    """Bytes of a module's tensors, each once, but for names that start with `without`."""
    sizes: dict[int, int] = {}
    for name, slot in model.state_dict(keep_vars=True).items():
        if without is None or not name.startswith(without):
            sizes[id(slot)] = slot.nbytes
    return sum(sizes.values())


def placed_bytes(outer: int, layouts: list[BlockLayout], placement: Placement, ranks: int) -> tuple[int, int]:
    """Bytes of a model on a rank's device and in its host memory; see `common.weights.placement.place`."""
    whole = sum(entry.nbytes for layout in layouts for entry in layout.entries.values())
    buffer_bytes = max((layout.nbytes for layout in layouts), default=0)
    count = min(BUFFERS, len(layouts))
    if placement.shard and ranks > 1:
        shares = [FromShares.share_bytes(layout.nbytes, ranks) for layout in layouts]
        buffers = count * ranks * FromShares.share_bytes(buffer_bytes, ranks)
        if placement.offload == "block":
            return outer + buffers + max(shares), sum(shares)
        return outer + buffers + sum(shares), 0
    if placement.offload in ("none", "stage"):
        return outer + whole, 0
    host_bytes = sum(layout.nbytes for layout in layouts) if placement.offload == "block" else 0
    return outer + count * buffer_bytes, host_bytes


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""What `FlopCounterMode` does not know: the kernel that stands for attention on the meta device."""
