"""What one command asks for, as frozen values: which weights, how, and which videos; and what a fork adds as `Program`.

No torch here: these values exist before the first rank does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from common.checks import Rules
from common.files import spare_file
from common.layout import Layout


class WrongUse(ValueError):
    """A command that cannot run: exit status 2, one line per problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Source:
    """Where the weights come from: a checkpoint directory, or the name of a demo checkpoint (made on first use).

    official: for a dry run, the name of a model of which only its numbers are there.
    """

    model_dir: Path | None = None
    demo: str | None = None
    official: str | None = None


@dataclass(frozen=True)
class Video:
    """One video to make. latents: decode this file instead of sampling.

    seed None: rank 0 draws one for the whole command, and the video's is that plus `take`, its place among the videos
    of the same prompt.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    num_steps: int
    cfg_scale: float
    fps: int
    output: Path
    seed: int | None = None
    take: int = 0
    latents: Path | None = None

    @property
    def latents_file(self) -> Path:
        """Where the pipeline leaves the final latents before it decodes; removed once the mp4 is complete."""
        return self.output.with_suffix(".latents.safetensors")

    @property
    def sidecar(self) -> Path:
        return self.output.with_suffix(".json")

    @property
    def files(self) -> tuple[Path, ...]:
        """All that is written of this video."""
        return self.output, self.sidecar, self.latents_file

    @property
    def latents_files(self) -> tuple[Path, Path]:
        """Where the latents may be: beside the output, or, when its folder does not take them, elsewhere."""
        return self.latents_file, spare_file(self.latents_file)


@dataclass(frozen=True)
class Setup:
    """How the videos of one command are made. chosen: why the program chose this layout; empty where it did not.

    device: cpu or cuda. vae_tile: height, width in pixels. offload None: what fits is chosen, see `common.choice`.
    max_memory: GiB a device may use, None for what is free. extra: the fork's own options by name.
    """

    source: Source
    rules: Rules
    ranks: int
    layout: Layout
    chosen: str
    device: str = "cpu"
    dtype: str = "bf16"
    attention: str = "auto"
    engine: str = "native"
    vae: str = "auto"
    vae_chunk: int | None = None
    vae_tile: tuple[int, int] | None = None
    keep_loaded: bool = False
    offload: str | None = None
    shard_weights: bool = False
    max_memory: float | None = None
    text_dtype: str | None = None
    text_cache: Path | None = None
    overlap_groups: int = 1
    compile: bool = False
    compile_vae: bool = False
    compile_mode: str = "default"
    compile_dynamic: bool = True
    compile_fullgraph: bool = True
    timeout: float = 1800.0
    debug: bool = False
    text_encoder_dir: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def pipeline_options(self) -> dict[str, Any]:
        """What every fork's pipeline takes by the same names, see `common.pipeline.Pipeline`."""
        names = ["dtype", "attention", "engine", "keep_loaded", "offload", "shard_weights", "overlap_groups"]
        names += ["text_encoder_dir", "text_dtype", "text_cache", "max_memory"]
        compiling = {
            "blocks": self.compile,
            "vae": self.compile_vae,
            "mode": self.compile_mode,
            "dynamic": self.compile_dynamic,
            "fullgraph": self.compile_fullgraph,
        }
        return {name: getattr(self, name) for name in names} | {"compiling": compiling}

    def decode_options(self) -> dict[str, Any]:
        """How to decode, by the names of `common.pipeline.Pipeline.decode`."""
        return {name: getattr(self, name) for name in ("vae", "vae_chunk", "vae_tile")}


@dataclass(frozen=True)
class Request:
    """A whole command: how, what, and remarks for the user. output: as given; several videos add numbers to it.

    dry_run: only say what would be done.
    """

    setup: Setup
    output: Path
    videos: tuple[Video, ...]
    remarks: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True)
class Program:
    """What a fork adds to the shared program.

    name: the console command. script: the fork's cli.py, which the ranks run. demos: names for `--demo`, default first.
    rules: a checkpoint's Rules, and the official one's for an empty Source. Raises ValueError when the directory is no
        checkpoint of this model. Without torch.
    make_demo: makes the demo checkpoint unless it is cached, returns its directory. Runs on one rank per machine.
    pipeline: (setup, mesh, stages) -> the pipeline; cheap, stages load later.
    check_weights: (pipeline, setup, videos); raises CheckpointError for a tensor that these videos need and that is
        missing or of the wrong shape or kind, by headers alone.
    generate, decode: (pipeline, video, setup, stages) -> frames, uint8 (T, H, W, 3) on rank 0 and None elsewhere;
        `decode` starts from `video.latents`.
    check: the fork's own options and the videos -> problems.
    transformer: a checkpoint's `common.quantize.TransformerFiles`.
    workload: (setup, video, mesh) -> `common.estimate.Workload`, from a checkpoint's headers or, for an official model,
        from nothing. None: weights are placed as the options say, and there is no dry run.
    models: names for `--dry-run`, default first.
    """

    name: str
    script: str
    rules: Callable[[Source], Rules]
    make_demo: Callable[[str], Path]
    pipeline: Callable[..., Any]
    transformer: Callable[[Path], Any]
    generate: Callable[..., Any]
    decode: Callable[..., Any]
    demos: tuple[str, ...] = ("default",)
    demo_ranks: int = 2
    models: tuple[str, ...] = ()
    workload: Callable[..., Any] | None = None
    options: tuple[click.Option, ...] = ()
    check_weights: Callable[..., None] = lambda pipeline, setup, videos: None
    check: Callable[[Mapping[str, Any], Sequence[Video]], list[str]] = lambda options, videos: []


def sampling_options(video: Video) -> dict[str, Any]:
    """What every fork's pipeline takes by the same names when it is called for one video."""
    names = ("negative_prompt", "height", "width", "num_frames", "num_steps", "cfg_scale", "seed", "latents_file")
    return {name: getattr(video, name) for name in names}


def draw_seeds(videos: Sequence[Video]) -> list[Video]:
    """The videos with seeds. Rank 0 draws for all ranks, then sends the list."""
    drawn = random.SystemRandom().randrange(2**32)
    return [replace(v, seed=drawn + v.take) if v.seed is None else v for v in videos]


def settings(setup: Setup, video: Video) -> dict[str, Any]:
    """Every setting of one video, plain values for the json."""
    flat = asdict(setup) | asdict(video) | dict(setup.extra)
    for name in ("source", "rules", "layout", "chosen", "extra", "debug", "take"):
        flat.pop(name)
    flat |= {"model_dir": setup.source.model_dir, "demo": setup.source.demo}
    flat["layout"] = asdict(setup.layout) | {"ranks": setup.ranks}
    return {name: str(value) if isinstance(value, Path) else value for name, value in sorted(flat.items())}
