"""What one command asks for, as frozen values: which weights, how, and which videos.

No torch here: these values exist before the first rank does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import click

from common.registry.checks import Rules
from common.registry.layout import Layout
from common.registry.settings import DecodeOptions, Runtime, Sampling
from common.system.files import spare_file


class WrongUse(ValueError):
    """A command that cannot run: exit status 2, one line per problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@contextmanager
def as_wrong_use() -> Iterator[None]:
    """Where a plain ValueError means that the command asks for what this machine or checkpoint does not have."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise WrongUse([str(error)]) from error


@dataclass(frozen=True)
class Source:
    """Where the weights come from. None of the three: the fork's first model, by its official numbers alone."""

    model_dir: Path | None = None
    """A checkpoint directory; for a demo it is filled in when that has been made."""
    demo: str | None = None
    """The name of a demo checkpoint."""
    official: str | None = None
    """For a dry run: the name of a model of which only its numbers are there."""


def beside(output: Path, folder: bool, suffix: str) -> Path:
    """The file of this suffix that belongs to an output, and to no other of the same stem.

    `.json` is x.json for x.mp4, x.gif.json for x.gif, and x.frames.json for the folder x, of whose name no part is a
    suffix.
    """
    if output.suffix.lower() == ".mp4" and not folder:
        return output.with_suffix(suffix)
    return output.with_name(f"{output.name}{'.frames' if folder else ''}{suffix}")


@dataclass(frozen=True)
class Video:
    """One video to make."""

    prompt: str
    negative_prompt: str
    sampling: Sampling
    fps: int
    output: Path
    folder: bool = field(default=False, metadata={"internal": True})
    """Whether the output is a folder of PNGs, whatever its name looks like."""
    crf: int | None = None
    """Quality, see `common.video.files.VideoFile`; None: the format's own."""
    save_latents: bool = False
    """Whether the latents stay when the output is complete."""
    seed: int | None = None
    """None: one is drawn for the whole command before any rank starts, and the video's is that plus `index`."""
    index: int = 0
    """Its place among the videos of the same prompt."""
    latents: Path | None = None
    """Decode this file instead of sampling."""
    made: Mapping[str, Any] | None = None
    """Of `latents`: the settings that they were made with, as far as they are known."""

    @property
    def target(self) -> str | Path:
        """The output as `common.video.formats.suffix_of` understands it."""
        return f"{self.output}/" if self.folder else self.output

    @property
    def latents_file(self) -> Path:
        """Where the pipeline leaves the final latents before it decodes; removed once the output is complete."""
        return self._beside(".latents.safetensors")

    @property
    def sidecar(self) -> Path:
        return self._beside(".json")

    @property
    def beside(self) -> tuple[Path, ...]:
        """What is written beside the output."""
        return self.sidecar, self.latents_file

    def _beside(self, suffix: str) -> Path:
        return beside(self.output, self.folder, suffix)

    @property
    def latents_files(self) -> tuple[Path, Path]:
        """Where the latents may be: beside the output, or, when its folder does not take them, elsewhere."""
        return self.latents_file, spare_file(self.latents_file)


@dataclass(frozen=True)
class Unfinished:
    """Where an interrupted command goes on: `video` videos are whole, and `step` of the next one's `steps` are done."""

    path: Path
    """Of the file that holds the state of its sampling; see `common.run.states`."""
    video: int
    step: int
    steps: int
    seed: int
    """Of the first video."""
    done: frozenset[int] = frozenset()
    """Which videos after that one are whole, where several were made at the same time; from 0."""

    def left(self, videos: int) -> list[int]:
        """The indices of the videos that are not whole, of so many."""
        return [index for index in range(self.video, videos) if index not in self.done]


def needs_start(source: Source, videos: Sequence[Video], dry_run: bool) -> bool:
    """Whether a command has to name the file that its videos start from, of a checkpoint that wants one.

    A demo brings its own; latents that are kept, and a dry run, need none.
    """
    return source.demo is None and videos[0].latents is None and not dry_run


@dataclass(frozen=True)
class ForkOptions:
    """A fork's own options: a subclass has a field for each, of the option's name."""

    command_line: ClassVar[tuple[click.Option, ...]] = ()

    def problems(self, rules: Rules, source: Source, videos: Sequence[Video], dry_run: bool) -> list[str]:
        """What is wrong with them for these videos of a checkpoint that admits `rules`. Without torch."""
        return []

    def guided(self, rules: Rules, scale: float) -> bool:
        """Whether the branch of the negative prompt is computed in any step."""
        return rules.guided(scale)

    def without_effect(self, rules: Rules) -> Mapping[str, str]:
        """Options that would do nothing here, by their fields: why, in words that go on after "has no effect"."""
        return {}

    @property
    def written(self) -> Mapping[str, Path]:
        """Files that the run writes besides the videos, by the options that name them."""
        return {}


@dataclass(frozen=True)
class Request:
    """A whole command: how, what, and remarks for the user."""

    program: str
    source: Source
    rules: Rules
    """What the checkpoint admits."""
    layout: Layout
    runtime: Runtime
    decode: DecodeOptions
    options: Any
    """The fork's `ForkOptions`."""
    videos: tuple[Video, ...]
    output: Path
    """As given; several videos add numbers to it."""
    layout_chosen: str = ""
    """Why the program chose this layout; empty where it did not."""
    groups_chosen: str = ""
    """Why the program chose this number of head groups; empty where it did not."""
    turns_chosen: str = ""
    """Why guidance branches should take turns if memory allows; empty where nobody knows that they should."""
    groups_in_turn: int | None = None
    """Of heads, where the branches take turns for that reason."""
    replicas: int = 1
    """Groups of this layout, each of which makes one video at a time."""
    ray_address: str | None = None
    """Of the Ray cluster on which they are; `auto`: where RAY_ADDRESS says."""
    timeout: float = 1800.0
    debug: bool = False
    overwrite: bool = False
    """Outputs that are there already are replaced."""
    dry_run: bool = False
    """Only say what would be done."""
    remarks: tuple[str, ...] = ()
    decode_options: tuple[str, ...] = ()
    """The words of the command line that a decode of kept latents needs again."""
    cpu_by_default: bool = False
    """The CPU computes because no GPU is visible, not because the command says so."""
    save_every: float = 60.0
    """Seconds between two states of a sampling that are written to a file."""
    digest: str = ""
    """Of all that decides the videos, see `common.run.unfinished`."""
    unfinished: Unfinished | None = None
    slots: tuple[tuple[int, ...], ...] = ()
    """Descriptors of the `common.run.states.Slots` of each rank of a sequence, or of rank 0 alone."""
    colours: Path | None = None
    """Where it is learned what colours latents have, for previews, see `common.video.previews`; None: nowhere."""

    @property
    def on_cpu(self) -> bool:
        return self.runtime.device == "cpu"

    @property
    def folder(self) -> Path:
        """The checkpoint's, where there is one: at the latest when a demo has been made."""
        assert self.source.model_dir is not None
        return self.source.model_dir

    @property
    def left(self) -> list[int]:
        """The indices of the videos that are not made yet."""
        every = len(self.videos)
        return list(range(every)) if self.unfinished is None else self.unfinished.left(every)

    @property
    def sampled(self) -> bool:
        """Whether anything is sampled, not only decoded."""
        return any(video.latents is None for video in self.videos)

    def guided(self, video: Video) -> bool:
        """Whether the branch of the negative prompt is computed."""
        return self.rules.guided(video.sampling.cfg_scale)


def draw_seeds(videos: Sequence[Video], seed: int | None = None) -> list[Video]:
    """The videos with seeds. seed: of the first one, where it has none; None: it is drawn here."""
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    return [replace(v, seed=seed + v.index) if v.seed is None else v for v in videos]


def settings(request: Request, video: Video) -> dict[str, Any]:
    """Every setting of one video, plain values for the json.

    Of latents that were read from a file: what they were made with, None where the file does not say; the output and
    how it is decoded are this run's, whose place and precision are told under `decoding`.
    """
    parts = (request.runtime, request.runtime.compiling, request.decode, request.options, video.sampling, video)
    flat: dict[str, Any] = {}
    for part in parts:
        public_fields = (one for one in fields(part) if not one.metadata.get("internal"))
        flat |= {one.name: getattr(part, one.name) for one in public_fields}
    for name in ("compiling", "sampling", "index", "made"):
        del flat[name]
    source = request.source
    # Where a demo was made is of no use on another machine: its name is.
    flat |= {"model_dir": None if source.demo else source.model_dir, "demo": source.demo, "timeout": request.timeout}
    flat |= {"ranks": request.layout.ranks, "layout": asdict(request.layout) | {"ranks": request.layout.ranks}}
    flat = {name: str(value) if isinstance(value, Path) else value for name, value in sorted(flat.items())}
    return flat if video.made is None else _as_made(flat, video.made, request)


def _as_made(flat: dict[str, Any], original: Mapping[str, Any], request: Request) -> dict[str, Any]:
    here = {one.name for one in fields(request.decode)} | {"fps", "output", "latents"}
    place = {one.name for part in (request.runtime, request.runtime.compiling) for one in fields(part)}
    place |= {"model_dir", "demo", "timeout", "ranks", "layout"}
    record = {**dict.fromkeys(flat), **original} | {name: flat[name] for name in here}
    return record | {"decoding": {name: value for name, value in flat.items() if name in place}}
