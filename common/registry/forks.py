"""What each fork says of itself, as torch-free values: its models, their sizes and files, and what they compute.

A fork states one `Fork`, named `FORK`, in its module `fork`. Those of this repository are listed here; a package
outside of it registers by an entry point:

    [project.entry-points."xdit_zoo.forks"]
    toy = "toy_xdit.fork:FORK"

The planner, xdit-download, the benchmarks and the documentation go through `forks()`; none of them knows a model.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from common.registry.checks import Rules
from common.registry.downloads import Part
from common.registry.request import ForkOptions, Source
from common.registry.settings import Sampling

HERE = ("mochi_xdit", "cogvideox_xdit", "consisid_xdit", "wan_xdit")
GROUP = "xdit_zoo.forks"
T5_XXL_PARAMETERS = 4_762_310_656
"""Of T5 v1.1 XXL's encoder."""


@dataclass(frozen=True)
class Size:
    """What is to be made: pixels, frames, sampling steps; whether there is guidance (two branches) or not."""

    width: int
    height: int
    num_frames: int
    num_steps: int
    guided: bool = True

    @classmethod
    def of(cls, sampling: Sampling, guided: bool) -> Size:
        """Of what is sampled."""
        return cls(sampling.width, sampling.height, sampling.num_frames, sampling.num_steps, guided)


class Tokens(Protocol):
    """Where the number of tokens of a stream comes from."""

    def tokens(self, size: Size) -> tuple[int, int]:
        """Of all ranks together, in the branch of the prompt and in that of the negative prompt."""


@dataclass(frozen=True)
class Latents:
    """How a video becomes latents, and these become tokens. Also the `Tokens` of a stream.

    A picture is a video of one frame.
    """

    channels: int
    patch: tuple[int, int, int]
    """Latent frames, rows, columns of a token."""
    frame_step: int = 1
    """Frames per latent frame; the first stands alone."""
    pixels: int = 8
    """Rows and columns per row and column of the latents."""

    @property
    def token_channels(self) -> int:
        """Numbers of one packed token."""
        t, h, w = self.patch
        return self.channels * t * h * w

    def decoded(self, size: Size) -> tuple[int, int, int]:
        """Latent frames, rows, columns that the decoder sees."""
        return (size.num_frames - 1) // self.frame_step + 1, size.height // self.pixels, size.width // self.pixels

    def sampled(self, size: Size) -> tuple[int, int, int]:
        """Latent frames, rows, columns that are sampled: padded to whole patches in time."""
        frames, rows, columns = self.decoded(size)
        return -(-frames // self.patch[0]) * self.patch[0], rows, columns

    def tokens(self, size: Size) -> tuple[int, int]:
        count = 1
        for latents, patch in zip(self.sampled(size), self.patch):
            count *= latents // patch
        return count, count


@dataclass(frozen=True)
class Text:
    """A text encoder, and the tokens that it hands to the two branches. Also the `Tokens` of a stream.

    A model that attends to padding has its full length; one that drops it counts a prompt of usual length, and no token
    for a negative prompt that it does not encode when empty.
    """

    prompt: int
    negative: int
    parameters: int

    def tokens(self, size: Size) -> tuple[int, int]:
        return self.prompt, self.negative


@dataclass(frozen=True)
class Stream:
    """Tokens of one kind inside a stack of blocks, split evenly over the ranks."""

    source: Tokens
    block: int
    """FLOPs (2mnk) of a token in the matrix products of one block."""
    rest: int = 0
    """FLOPs of a token outside of the blocks; negative where the last block leaves some of its products out."""
    sampled: int = 0
    """Numbers of a token that guidance combines and the solver steps: those of the latents, in one of the stacks that
    they go through; 0 for text."""


@dataclass(frozen=True)
class CrossAttention:
    """Queries of the stack's first stream meet keys that every rank holds whole, so nothing is sent."""

    layers: int
    """Blocks that have it."""
    width: int
    """Heads x head width."""
    keys: int
    matmul: int
    """FLOPs of a query token in the matrix products of one of these layers; keys' and values' are made once."""


@dataclass(frozen=True)
class Stack:
    """Equal blocks in which the tokens of all `streams` attend to each other; the first stream is the video's.

    A model may run several in one forward pass: two kinds of blocks, or towers for picture and sound.
    """

    layers: int
    heads: int
    head_dim: int
    streams: tuple[Stream, ...]
    once: int = 0
    """FLOPs of a forward pass that do not depend on the tokens: time embedding, modulation vectors."""
    feed_forward: int = 0
    """Numbers of a token that are alive at the widest moment of the feed-forward, beside residual and its copies."""
    cross: tuple[CrossAttention, ...] = ()
    normed_whole: bool = False
    """Queries and keys are normed over all heads: none of them can leave before all are made."""

    @property
    def width(self) -> int:
        """Channels of a token in attention."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Decoding:
    """What decoding takes: FLOPs in all, chunks that it can be dealt in, bytes at the peak beside the weights."""

    flops: float
    chunks: int
    peak: float


@dataclass(frozen=True)
class Decoder:
    """The decoder of the latents."""

    parameters: int
    decoding: Callable[[int, int, int], Decoding]
    """(latent frames, rows, columns) -> its work."""


@dataclass(frozen=True)
class Published:
    """How the program ran that made the published tables, where there are any: the planner's reference scheme."""

    batched: bool = False
    """Both guidance branches go through as one batch where they are on one rank."""
    splits_text: bool = False
    """Text is split over the ranks where its number divides; else every rank carries all of it."""
    divides_rows: bool = False
    """The ranks must divide the rows of patches, rather than the tokens."""


@dataclass(frozen=True)
class Demo:
    """A small checkpoint of the model's kind: its name in the fork's `demo_checkpoint`, and its own size."""

    name: str
    size: Size


@dataclass(frozen=True)
class Model:
    """One published checkpoint."""

    name: str
    """As users type it."""
    title: str
    """As its publishers write it."""
    rules: Rules
    """Sizes that it admits, and its official defaults."""
    latents: Latents
    text: tuple[Text, ...]
    """The text encoders, in the order that they run; empty where there is none."""
    stacks: tuple[Stack, ...]
    parameters: int
    """Of the transformer; of one of them where several take turns."""
    decoder: Decoder
    files: tuple[tuple[Part, ...], ...] = ()
    """For each part of the checkpoint the places to take it from; the first that has all its files is taken."""
    layouts: tuple[tuple[tuple[Part, ...], ...], ...] = ()
    """Other files of the same repository that are the checkpoint too, as a hub cache may hold them; each as `files`."""
    folder: str = ""
    """The checkpoint folder's usual name."""
    aliases: tuple[str, ...] = ()
    published: Published = Published()
    demo: Demo | None = None
    config: Any = field(default=None, repr=False)
    """The fork's own configuration of its transformer."""

    @property
    def repo(self) -> str:
        """The repository of the first part, by which the hub knows the model; empty without files."""
        return self.files[0][0].repo if self.files else ""

    @property
    def heads(self) -> int:
        """The limit of the ulysses degree."""
        return self.rules.heads

    @property
    def default_size(self) -> Size:
        """The official one, which is that of the published tables."""
        rules = self.rules
        return Size(rules.width, rules.height, rules.num_frames, rules.num_steps, rules.guided(rules.cfg_scale))

    def video_tokens(self, size: Size) -> int:
        return self.latents.tokens(size)[0]

    def problems(self, size: Size) -> list[str]:
        """What is wrong with a size for this model, by the same rules as its program's; empty when it can be made."""
        problems = self.rules.problems(size.width, size.height, size.num_frames)
        if size.num_steps < 1:
            problems.append(f"--num-steps {size.num_steps} is not a positive number; at least 1")
        return problems


@dataclass(frozen=True)
class Fork:
    """One program and the models that it runs.

    What needs torch stands in modules of the package, and is imported when it is asked for:
    `demo.demo_checkpoint(name)` makes a demo's folder unless it is there, `sampling.workload(...)` says what a rank
    runs, for the estimates (`common.memory.estimate.Workload`), and `weights.transformer_files(folder)` what is
    rounded to eight bits, a `common.run.quantize.TransformerFiles` of every transformer. A fork without one of them
    cannot do what it is for.
    """

    name: str
    title: str
    package: str
    program: str
    models: tuple[Model, ...]
    """The first is the default."""
    pipeline: str = ""
    """The class that makes videos, in the package itself."""
    extras: tuple[str, ...] = ()
    """Optional dependencies of this project that its image has."""
    read_rules: Callable[[Path], Rules] | None = None
    """What a checkpoint folder admits, by its headers alone; ValueError when the folder is none of this fork's."""
    demos: Mapping[str, Rules] = field(default_factory=dict)
    """Small checkpoints for `--demo`, the default one first."""
    options: type[ForkOptions] = ForkOptions
    """Its own options on the command line."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.models)

    def rules(self, source: Source) -> Rules:
        """What a source of weights admits. ValueError when the folder is no checkpoint of this fork's."""
        if source.demo is not None:
            return self.demos[source.demo]
        if source.model_dir is not None and self.read_rules is not None:
            return self.read_rules(source.model_dir)
        return self.model(source.official).rules

    def model(self, name: str | None = None) -> Model:
        """The model of that name, title or alias; the default one for None. ValueError lists the names."""
        return _named(self.models, name) if name else self.models[0]

    def pipeline_class(self) -> Any:
        """Imports torch."""
        return getattr(importlib.import_module(self.package), self.pipeline)

    def demo_folder(self, name: str | None = None) -> Path:
        """The folder of a demo, the default one for None; made unless it is there."""
        return self.module("demo").demo_checkpoint(name or next(iter(self.demos)))

    def module(self, name: str) -> ModuleType:
        """A module of the fork's package, which may import torch."""
        return importlib.import_module(f"{self.package}.{name}")

    def has(self, name: str) -> bool:
        """Whether the package has a module of that name; imports nothing but the package."""
        return importlib.util.find_spec(f"{self.package}.{name}") is not None


def _named(models: tuple[Model, ...], name: str) -> Model:
    plain = _plain(name)
    for model in models:
        if plain in map(_plain, (model.name, model.title, model.repo, *model.aliases)):
            return model
    raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(model.name for model in models)}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


@cache
def forks() -> tuple[Fork, ...]:
    """This repository's, then those of installed packages; one that cannot be read is named and left out."""
    registered = [importlib.import_module(f"{package}.fork").FORK for package in HERE]
    for entry in metadata.entry_points(group=GROUP):
        try:
            fork = entry.load()
            if not isinstance(fork, Fork):
                raise TypeError(f"it is a {type(fork).__name__}, not a Fork of common.registry.forks")
            duplicates = {fork.name}.intersection(f.name for f in registered) or set(fork.names).intersection(
                name for f in registered for name in f.names
            )
            if duplicates:
                raise ValueError(f"the name {min(duplicates)} is taken")
        except Exception as error:  # someone else's package must not keep these programs from running
            print(f"note: the fork {entry.name} ({entry.value}) is left out: {error}", file=sys.stderr)
            continue
        registered.append(fork)
    return tuple(registered)


def version() -> str:
    """Of the installed package, which all programs are of."""
    try:
        return metadata.version("xdit-zoo")
    except metadata.PackageNotFoundError:
        return "0 (not installed)"


def models() -> tuple[Model, ...]:
    """Of all forks."""
    return tuple(model for fork in forks() for model in fork.models)


def model_names() -> tuple[str, ...]:
    return tuple(model.name for model in models())


def get_model(name: str) -> Model:
    """The model of that name, title, repository or alias. ValueError lists the names."""
    return _named(models(), name)


def fork_of(model: Model) -> Fork:
    """The fork that runs a model."""
    return next(fork for fork in forks() if model.name in fork.names)


def official(fork: Fork, name: str, weights: object) -> str | None:
    """The name of the model whose numbers `--dry-run NAME` takes, the first of a bare one; None beside weights.

    ValueError goes on after "--dry-run": whose model that is, or which there are.
    """
    if not fork.models:
        raise ValueError("is not possible: this program does not say what it would run")
    if not name:
        return None if weights else fork.names[0]
    try:
        model = get_model(name)
    except ValueError:
        names = ", ".join(fork.names)
        raise ValueError(f"{name} is no model of this program; choose one of {names}") from None
    if model.name not in fork.names:
        raise ValueError(f"{name} is no model of this program; use {fork_of(model).program}")
    if weights:
        raise ValueError(f"{name} and {weights} exclude each other; leave one of them out")
    return model.name
