"""What a latents file says of how it was made, and what that fixes of a command that decodes it. No torch here.

Whoever samples writes its settings into the file (`common.run.outputs.Output.keep`); `--from-latents` takes them from
there, and only the decode and the output are the new command's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from common.registry.forks import Fork, forks
from common.registry.request import Request, Video
from common.registry.settings import Sampling
from common.system.files import shown
from common.weights.headers import read_header
from common.weights.schema import CheckpointError

SAMPLED = ("prompt", "negative_prompt", "seed", *(one.name for one in fields(Sampling)))
_KINDS: Mapping[str, type | tuple[type, ...]] = {"prompt": str, "negative_prompt": str, "cfg_scale": (int, float)}
_ONE_RUN = ("from_latents", "prompt_file", "num_videos", "output", "dry_run")


def fixed(fork: Fork) -> tuple[str, ...]:
    """Options of a fork that decide the latents, and so cannot be given once they are there."""
    return (*SAMPLED, *(one.name for one in fields(fork.options)))


def settings_of(path: Path, fork: Fork) -> dict[str, Any]:
    """How the latents of a file were made, empty where it does not say. ValueError when not by this fork."""
    try:
        _, metadata = read_header(path)
    except (CheckpointError, OSError):
        return {}  # what is wrong with such a file is told by `common.video.latents.load_latents`
    maker = metadata.get("program") or metadata.get("model") or fork.name
    if maker not in (fork.name, fork.program):
        owner = next((other for other in forks() if maker in (other.name, other.program)), None)
        source = f"{owner.title}; decode them with {owner.program}" if owner else shown(maker[:60])
        raise ValueError(f"{shown(path)} holds latents of {source}")
    try:
        # The pipelines, which Python calls, know of a seed and a prompt.
        plain: dict[str, Any] = {
            name: int(metadata[name]) if name == "seed" else metadata[name]
            for name in ("prompt", "seed")
            if name in metadata
        }
        settings = json.loads(metadata["settings"]) if "settings" in metadata else plain
        wrong = not isinstance(settings, dict) or any(
            not _is_kind(name, settings[name]) for name in SAMPLED if name in settings
        )
    except ValueError:
        wrong = True
    if wrong:
        raise ValueError(f"{shown(path)} holds settings that no program writes; take the file that was kept")
    return settings


def numbers_of(decoder: Any) -> str:
    """A decoder's dataclass of numbers as text, for the file of latents that are for it."""
    return json.dumps(asdict(decoder), sort_keys=True, default=str)


def check_decoder(path: Path, numbers: str, settings: Mapping[str, Any]) -> None:
    """ValueError where a latents file says that it is for a decoder of other `numbers`. settings: its settings."""
    _, metadata = read_header(path)
    if "decoder" not in metadata or metadata["decoder"] == numbers:
        return
    try:
        theirs = json.loads(metadata["decoder"])
        name, here = next((n, v) for n, v in json.loads(numbers).items() if theirs.get(n) != v)
        difference = f": {name} is {theirs.get(name)!s:.60} there, {here!s:.60} here"
    except (ValueError, AttributeError, StopIteration):
        difference = ""
    source = f"--demo {settings['demo']}" if settings.get("demo") else f"--model-dir {settings.get('model_dir')}"
    weights = (
        f"; give the weights they were made with: {source}" if settings.get("demo") or settings.get("model_dir") else ""
    )
    raise ValueError(shown(f"{path} holds latents for another decoder than this checkpoint's{difference}{weights}"))


def _is_kind(name: str, value: Any) -> bool:
    kind = _KINDS.get(name, int)
    return (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and (kind is not int or (isinstance(value, int) and 0 <= value < 2**63))
    )


def contradictions(path: Path, settings: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Options that were given with another value than the latents were made with."""
    problems = []
    for name, value in options.items():
        plain = str(value) if isinstance(value, Path) else value
        if name in settings and settings[name] != plain:
            was = f"--{name.replace('_', '-')}", shown(plain), shown(settings[name])
            problems.append(f"{was[0]} {was[1]}: {shown(path)} was made with {was[2]}; leave {was[0]} out")
    return problems


def given_options(context: click.Context) -> set[str]:
    """The parameters that the command line names."""
    names = (option.name for option in context.command.params if option.name)
    return {name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def decode_options(context: click.Context, without: Iterable[str]) -> tuple[str, ...]:
    """The options that were given, as one types them, but for `without` and what belongs to one run alone."""
    names = given_options(context) - {*without, *_ONE_RUN}
    words: list[str] = []
    for option in context.command.params:
        if option.name not in names:
            continue
        value, on = context.params[option.name], option.opts[-1]
        if isinstance(value, bool):
            words.append(on if value else option.secondary_opts[0])
        else:
            words += [on, _typed(value)]
    return tuple(words)


def _typed(value: Any) -> str:
    return f"{value[1]}x{value[0]}" if isinstance(value, tuple) else str(value)


def command_that_decodes(request: Request, video: Video, latents: Path) -> Sequence[str]:
    """The words of the command line that makes the video of latents that are kept."""
    output = ["--output", str(video.output), "--from-latents", str(latents)]
    return [request.program, *request.decode_options, *output]
