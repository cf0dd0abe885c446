"""How a video is made, as frozen values: each is resolved once and passed on whole.

A field has the name that its option has on the command line, in the json beside a video, and in Python. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from common.registry.checks import COMPILE_MODES, DECODE_MODES
from common.system.units import GIB

S = TypeVar("S")


def filled(cls: type[S], values: Mapping[str, Any], **more: Any) -> S:
    """A dataclass from the values of its fields' names, as a command line gives them; `more` goes before."""
    names = [one.name for one in fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: values[name] for name in names if name in values} | more)


def either(**aliases: Any) -> Any:
    """The value of two names that mean the same, ours and diffusers'; None where neither is given.

    ValueError where both are, and differ.
    """
    values = {name: value for name, value in aliases.items() if value is not None}
    first = next(iter(values.values()), None)
    if any(value != first for value in values.values()):
        contradiction = " and ".join(f"{name} is {value}" for name, value in values.items())
        raise ValueError(f"{contradiction}, which mean the same; give one of them")
    return first


@dataclass(frozen=True)
class DecodeOptions:
    """How latents become frames; see `common.video.decode_planning.decode_plans`. ValueError for an unknown mode."""

    vae: str = "auto"
    """`exact`, `tiled`, or `auto`: exact where it fits into memory."""
    vae_chunk: int | None = None
    """Latent frames decoded at once; None: as many as fit."""
    vae_tile: tuple[int, int] | None = None
    """Height and width of the largest tile in pixels; in Python one number stands for both."""

    def __post_init__(self) -> None:
        if self.vae not in DECODE_MODES:
            raise ValueError(f"vae is {self.vae!r}; choose one of {', '.join(DECODE_MODES)}")
        if isinstance(self.vae_tile, int):
            object.__setattr__(self, "vae_tile", (self.vae_tile, self.vae_tile))

    def tile(self, spatial_factor: int) -> tuple[int, int] | None:
        """The tile in cells of the latents, each `spatial_factor` pixels high and wide."""
        return (
            None if self.vae_tile is None else (self.vae_tile[0] // spatial_factor, self.vae_tile[1] // spatial_factor)
        )


@dataclass(frozen=True)
class CompileOptions:
    """What goes through torch.compile, and how; see `common.model.compile`. ValueError for an unknown mode."""

    compile: bool = False
    """The transformer's blocks."""
    compile_vae: bool = False
    """The decoder's parts that keep nothing between chunks."""
    compile_mode: str = "default"
    compile_dynamic: bool = True
    """One graph for all sizes and prompt lengths."""
    compile_fullgraph: bool = True
    """A graph break inside a region is an error."""
    backend: str | Callable[..., Any] = field(default="inductor", metadata={"internal": True})
    """torch.compile's, for tests."""

    def __post_init__(self) -> None:
        if self.compile_mode not in COMPILE_MODES:
            raise ValueError(f"compile_mode is {self.compile_mode!r}; choose one of {', '.join(COMPILE_MODES)}")


def default_dtype(device: str, own: str) -> str:
    """Where nobody says one: the checkpoint's own on a GPU, and fp32 on the CPU.

    Every CPU computes in that; half precision takes up to twenty times as long where there are no instructions for it.
    """
    return "fp32" if device == "cpu" else own


@dataclass(frozen=True)
class Runtime:
    """Where and how a pipeline computes."""

    device: Any = "cpu"
    """cpu or cuda, in Python also a torch.device; a mesh brings its own."""
    dtype: Any = None
    """Of the blocks: bf16, fp16, fp32, fp64 or a torch.dtype; fp8: bf16 with matmul weights in float8. None: see
    `default_dtype`."""
    attention: str = "auto"
    """Kernel, see `common.parallel.attention`."""
    engine: str = "native"
    """Who spreads attention over the ranks, see `common.parallel.xfuser`."""
    overlap_groups: int | None = 1
    """Groups of heads that travel apart, see `common.parallel.usp.SequenceParallel`. None: one; a program
    chooses."""
    offload: str | None = None
    """Where weights wait, see `common.weights.placement.Placement`. None: one stage's are on the device; a program
    chooses."""
    interleave_branches: bool | None = None
    """Guidance branches on the same ranks take turns, see `common.parallel.interleaver`. None: they do not; a program
    chooses."""
    shard_weights: bool = False
    """Every rank keeps a part of each block."""
    keep_loaded: bool = False
    """Models stay on the device between videos."""
    max_memory: float | None = None
    """GiB that a rank may use on its device; None: what is free."""
    text_encoder_dir: str | Path | None = None
    """The text encoder's folder, where it is not in the checkpoint's."""
    text_dtype: Any = None
    """Of the text encoder; None: as `dtype`, bf16 for fp8."""
    text_cache: str | Path | None = None
    """Folder that keeps text features between runs."""
    compiling: CompileOptions = CompileOptions()

    @property
    def max_bytes(self) -> int | None:
        """`max_memory` in bytes."""
        return None if self.max_memory is None else int(self.max_memory * GIB)


@dataclass(frozen=True)
class Sampling:
    """What is sampled: pixels, frames, steps, and the strength of classifier-free guidance."""

    width: int
    height: int
    num_frames: int
    num_steps: int
    cfg_scale: float
