"""Checks at the door, as plain functions: each returns what is wrong, with the nearest values that would do.

Nothing here imports torch: a mistake on the command line is told in a fraction of a second.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.registry.layout import Layout, as_options, guidance_first, layouts_of
from common.system.extras import install

ENGINES = ("native", "xfuser")
DTYPES = ("bf16", "fp16", "fp32", "fp64", "fp8")
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
"""Of `torch.compile`'s, those without CUDA graphs: blocks share their code but not the addresses of their weights."""
OFFLOADS = ("none", "stage", "block", "disk")
DECODE_MODES = ("auto", "exact", "tiled")
FITS = ("crop", "stretch", "pad")
"""How a picture of another shape is brought to the video's, see `common.video.pictures.fit_picture`."""


@dataclass(frozen=True)
class Rules:
    """What one checkpoint admits, and its official defaults. A fork states its numbers in one of these.

    Sizes are pixels; an admissible frame count is `frame_step * k` plus one of `frame_offsets`, and at least 1.
    """

    heads: int
    """Attention heads, the limit of the ulysses degree."""
    width: int
    height: int
    num_frames: int
    num_steps: int
    cfg_scale: float
    fps: int
    size_multiple: int = 16
    frame_step: int = 6
    frame_offsets: tuple[int, ...] = (1,)
    sizes: tuple[tuple[int, int], ...] = ()
    """The only (width, height), where not every one will do."""
    dtype: str = "bf16"
    default_prompt: str | None = None
    negative_prompt: str = ""
    """`default_prompt`, `negative_prompt`: what is said where nobody says it."""
    takes: tuple[str, ...] = ()
    """The options, `image` or `video`, that name a file which the checkpoint can start from."""

    def size_of(self, height: int | None, width: int | None, num_frames: int | None) -> tuple[int, int, int]:
        """Height, width and frames: what is None is the checkpoint's own."""
        choices = ((height, self.height), (width, self.width), (num_frames, self.num_frames))
        size = [own if value is None else value for value, own in choices]
        return size[0], size[1], size[2]

    def size_like(self, shape: Sequence[int], height: int, width: int) -> tuple[int, int]:
        """Of the admissible sizes (height, width) the one whose shape is nearest to a picture's, rows and columns.

        It has no more pixels than height x width, and at least three quarters of them.
        """
        multiple, (rows, columns) = self.size_multiple, shape
        most = height * width
        heights = range(multiple, most // multiple + 1, multiple)
        candidates = ((h, max(1, round(h * columns / rows / multiple)) * multiple) for h in heights)
        sizes = [(h, w) for w, h in self.sizes] or [*candidates, (height, width)]

        def loss(size: tuple[int, int]) -> tuple[float, int]:
            return abs(math.log(size[0] * columns / (size[1] * rows))), -size[0] * size[1]

        return min((size for size in sizes if 3 * most <= 4 * size[0] * size[1] <= 4 * most), key=loss)

    def guided(self, scale: float) -> bool:
        """Whether this guidance scale needs the branch of the negative prompt."""
        return scale != 1

    def problems(self, width: int, height: int, num_frames: int) -> list[str]:
        """What is wrong with a size and a frame count."""
        problems = []
        for name, value in (("--width", width), ("--height", height)):
            if value < 1 or value % self.size_multiple:
                near = nearest(value, self.size_multiple, at_least=self.size_multiple)
                problems.append(f"{name} {value} is not a positive multiple of {self.size_multiple}; nearest: {near}")
        if self.sizes and not problems and (width, height) not in self.sizes:
            choices = " or ".join(f"{w} x {h}" for w, h in self.sizes)
            problems.append(f"this checkpoint makes videos of {choices} pixels only")
        if num_frames < 1 or all((num_frames - offset) % self.frame_step for offset in self.frame_offsets):
            forms = " or ".join(f"{self.frame_step}k+{offset}".removesuffix("+0") for offset in self.frame_offsets)
            near = nearest(num_frames, self.frame_step, self.frame_offsets, at_least=1)
            problems.append(f"--num-frames {num_frames} is not of the form {forms}; nearest: {near}")
        return problems


def nearest(value: int, step: int, offsets: Sequence[int] = (0,), at_least: int = 1) -> str:
    """The admissible values `step * k + offset` on both sides of `value`, as "19 or 25"."""
    below = [(value - offset) // step * step + offset for offset in offsets]
    values = [v for v in (max(below), min(below) + step) if v >= at_least] or [at_least]
    return " or ".join(str(v) for v in values)


def task_problem(needs_image: bool, takes_image: bool, image: bool, video: bool = False) -> str:
    """Why a checkpoint cannot start from the image and the video that are given, or are not; empty if it can."""
    if needs_image and not image:
        return "this checkpoint makes a video from an image; give one (--image)"
    if needs_image and video:
        return "this checkpoint starts from an image, not from a video; use a text to video checkpoint"
    if image and not takes_image:
        return "this is a text to video checkpoint, which takes no image; use an image checkpoint (I2V)"
    return ""


@dataclass(frozen=True)
class Ranks:
    """How many processes, and who said so: `source` reads after the number ("8 GPUs are visible")."""

    count: int
    source: str


def choose_degrees(
    ranks: int,
    heads: int,
    guided: bool,
    cfg: int | None = None,
    ring: int | None = None,
    ulysses: int | None = None,
) -> Layout:
    """Fill in the degrees that are None so that cfg * ring * ulysses == ranks, by
    `common.registry.layout.guidance_first`.

    Raises ValueError, with the nearest layouts that fit, when there is no such product.
    """
    degrees = (cfg, ring, ulysses)
    fitting = [
        layout
        for layout in layouts_of(ranks)
        if layout.ulysses <= heads
        and all(want in (None, have) for want, have in zip(degrees, layout.degrees))
        # Without guidance there is no second branch to compute.
        and (guided or layout.cfg == 1)
    ]
    if not fitting:
        raise ValueError(f"layouts of {ranks} {_ranks(ranks)}: {near_layouts(ranks, heads, degrees)}")
    return min(fitting, key=guidance_first(guided))


def near_layouts(ranks: int, heads: int, degrees: tuple[int | None, ...], count: int = 3) -> str:
    """The layouts of `ranks` nearest to what was asked, as options one can type."""

    def distance(layout: Layout) -> float:
        return sum(abs(math.log(have / want)) for have, want in zip(layout.degrees, degrees) if want)

    layouts = [layout for layout in layouts_of(ranks) if layout.ulysses <= heads]
    return "; ".join(as_options(layout) for layout in sorted(layouts, key=distance)[:count])


def _ranks(count: int) -> str:
    return "rank" if count == 1 else "ranks"


def layout_problems(
    ranks: Ranks, heads: int, guided: bool, cfg: int | None, ring: int | None, ulysses: int | None
) -> list[str]:
    """What is wrong with the degrees that were given, for this many ranks."""
    problems = [
        f"{name} {degree} is not a positive number; 1 turns it off"
        for name, degree in (("--ulysses-degree", ulysses), ("--ring-degree", ring))
        if degree is not None and degree < 1
    ]
    if problems:
        return problems
    if ulysses and ulysses > heads:
        problems.append(
            f"--ulysses-degree {ulysses} is more than the model's {heads} attention heads; "
            f"at most {heads}, the rest can go to --ring-degree"
        )
    if cfg == 2 and not guided:
        problems.append(
            "--cfg-parallel shares out two guidance branches, and without guidance (--cfg-scale 1) there is one: half "
            "of the ranks would compute what is thrown away; leave --cfg-parallel out, or guide by another --cfg-scale"
        )
        return problems
    degrees = (
        f"--ulysses-degree {ulysses or 1} x --ring-degree {ring or 1}{' x 2 for --cfg-parallel' if cfg == 2 else ''}"
    )
    needed = (ulysses or 1) * (ring or 1) * (cfg or 1)
    if needed > ranks.count or ranks.count % needed or (ring and ulysses and cfg and needed != ranks.count):
        near = near_layouts(ranks.count, heads, (cfg, ring, ulysses))
        problems.append(f"{degrees} = {needed} {_ranks(needed)}, but {ranks.source}; these would do: {near}")
    elif not problems:
        try:
            choose_degrees(ranks.count, heads, guided, cfg, ring, ulysses)
        except ValueError as error:
            problems.append(f"{degrees} = {needed} {_ranks(needed)}, but {ranks.source}; {error}")
    return problems


def interleave_problems(interleave: bool | None, cfg: int, engine: str) -> list[str]:
    """Why guidance branches cannot take turns as asked. cfg: the degree, as far as it is given."""
    if not interleave:
        return []
    problems = []
    if cfg == 2:
        problems.append(
            "--interleave-branches lets guidance branches take turns on the same ranks, and --cfg-parallel puts each "
            "on ranks of its own; leave one of them out"
        )
    if engine == "xfuser":
        problems.append(
            "--interleave-branches with --engine xfuser, whose exchanges are inside its attention: nothing could pass "
            "the turn where it waits; use --engine native"
        )
    return problems


def kernel_problems(kernel: str, device: str, dtype: str) -> list[str]:
    """Why `--attention` cannot be this kernel, as far as that is known without a look at the GPU. device: cpu or cuda.

    The rest (packages, compute capability, head width) is `common.parallel.attention.check_kernel`'s.
    """
    if kernel in ("auto", "sdpa"):
        return []
    if device != "cuda":
        return [f"--attention {kernel} needs an NVIDIA GPU; use sdpa or auto here"]
    if dtype in ("fp32", "fp64"):
        return [f"--attention {kernel} computes in bf16 or fp16, not in {dtype}; use sdpa or auto, or --dtype bf16"]
    return []


def xfuser_problems(
    device: str, attention: str = "auto", dtype: str = "bf16", heads: int = 1, ulysses: int = 1
) -> list[str]:
    """Why `--engine xfuser` cannot run this. device: cpu or cuda. heads, ulysses: the model's and the degree."""
    native = "use --engine native"
    if device != "cuda":
        return [f"--engine xfuser needs GPUs: xfuser's attention does not exist without one; {native}"]
    problems = []
    for module in ("xfuser", "yunchang"):
        if importlib.util.find_spec(module) is None:
            problems.append(f"--engine xfuser needs the package {module}: {install('xfuser')}; or {native}")
    if dtype not in ("bf16", "fp16"):
        problems.append(
            f"--engine xfuser runs in bf16 or fp16, not in {dtype}: its kernels are half precision; {native}"
        )
    if attention == "cudnn":
        problems.append(f"--engine xfuser cannot use --attention cudnn: it gives its ring no log-sum-exp; {native}")
    if heads % ulysses:
        fitting = ", ".join(str(degree) for degree in range(1, heads + 1) if heads % degree == 0)
        problems.append(
            f"--engine xfuser gives every ulysses rank equally many heads, but {heads} do not divide by "
            f"--ulysses-degree {ulysses}; degrees that do: {fitting}; or {native}"
        )
    return problems
