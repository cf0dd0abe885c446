"""The models that a server offers, and what each lets a client say. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click

from common.registry.checks import Rules
from common.registry.forks import Fork, forks
from common.registry.hub import checkpoint_folder
from common.registry.request import Source
from common.run.command_line import command
from common.run.options import SYNONYMS
from common.system.files import shown
from xdit_serve.errors import ApiError
from xdit_serve.records import Kind

SHARED = (
    *("prompt", "negative_prompt", "width", "height", "num_frames", "num_steps", "cfg_scale", "seed", "fps", "crf"),
)
"""Of the options that all programs share, those that are a client's to choose."""
INPUTS: Mapping[str, str] = {"image": "picture", "video": "video"}
"""Options of forks that a client's file can stand for, and what it has to be."""


@dataclass(frozen=True)
class Offer:
    """A model by the name that clients say."""

    name: str
    fork: Fork
    weights: tuple[str, ...]
    """The words of the command line that name it."""
    rules: Rules
    """What the model admits."""
    demo: bool = False
    """The model is small and draws shapes."""

    @property
    def kind(self) -> Kind:
        """What it makes."""
        return "image" if self.rules.num_frames == 1 else "video"

    @cached_property
    def fields(self) -> Mapping[str, click.Option]:
        """The option behind each field that a client may send; several names may lead to one."""
        own = {option.name for option in self.fork.options.command_line if not isinstance(option.type, click.Path)}
        options = {
            option.name: option
            for option in command(self.fork).params
            if isinstance(option, click.Option) and option.name and (option.name in SHARED or option.name in own)
        }
        if self.kind == "image":
            options = {name: option for name, option in options.items() if name not in ("num_frames", "fps", "crf")}
        synonyms = {name.replace("-", "_"): target.replace("-", "_") for name, target in SYNONYMS.items()}
        return options | {name: options[target] for name, target in synonyms.items() if target in options}

    @cached_property
    def inputs(self) -> Mapping[str, str]:
        """Options that take a file which this model starts from, with what the file has to be."""
        return {name: kind for name, kind in INPUTS.items() if name in self.rules.takes}


def demos() -> list[Offer]:
    """The small checkpoint of every fork's kind, each fork's default one first."""
    firsts = [(fork, name, not place) for fork in forks() for place, name in enumerate(fork.demos)]
    firsts.sort(key=lambda one: not one[2])
    return [
        Offer(f"{fork.name}-demo" if first else f"{fork.name}-demo-{name}", fork, ("--demo", name), rules, True)
        for fork, name, first in firsts
        for rules in [fork.demos[name]]
    ]


def checkpoint(path: Path, names: Iterable[str] = ()) -> Offer:
    """The model of a checkpoint folder or of a repository's name, called as its folder. names: those of others.

    ValueError says what is wrong.
    """
    problems = []
    for fork in forks():
        try:
            folder = checkpoint_folder(path, fork).resolve()
            rules = fork.rules(Source(model_dir=folder))
        except (ValueError, OSError) as error:
            problems.append(f"{fork.program}: {error}")
            continue
        return Offer(_free(path.absolute().name, set(names)), fork, ("--model-dir", str(folder)), rules)
    if len({line.partition(": ")[2] for line in problems}) == 1:  # nothing that is the matter of one program
        raise ValueError(f"--model-dir {problems[0].partition(': ')[2]}")
    raise ValueError(f"--model-dir {shown(path)} is no checkpoint of a program here ({'; '.join(problems)})")


def _free(name: str, names: set[str]) -> str:
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) or "model"
    return name if name not in names else next(f"{name}-{i}" for i in range(2, 10**6) if f"{name}-{i}" not in names)


def find(offers: Sequence[Offer], name: str | None, kind: Kind) -> Offer:
    """The model that a client names; without a name the first that makes such things. ApiError lists them."""
    candidates = [offer for offer in offers if offer.kind == kind]
    offer = next((offer for offer in (candidates if name is None else offers) if name in (None, offer.name)), None)
    names = ", ".join(offer.name for offer in candidates)
    makes = "pictures" if kind == "image" else "videos"
    if offer is None and not candidates:
        raise ApiError(400, f"no model here makes {makes}", "model", "model_not_found")
    if offer is None:
        raise ApiError(400, f"model {name!r} is unknown; choose one of {names}", "model", "model_not_found")
    if offer.kind != kind:
        where = "/v1/images/generations" if offer.kind == "image" else "/v1/videos"
        raise ApiError(400, f"model {offer.name} makes no {makes}: ask {where}, or choose one of {names}", "model")
    return offer
