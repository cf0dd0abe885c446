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
    """A model by the name that clients say.

    weights: the words of the command line that name it. rules: what it admits. demo: it is small and draws shapes.
    """

    name: str
    fork: Fork
    weights: tuple[str, ...]
    rules: Rules
    demo: bool = False

    @property
    def kind(self) -> Kind:
        """What it makes."""
        return "image" if self.rules.num_frames == 1 else "video"

    @cached_property
    def fields(self) -> Mapping[str, click.Option]:
        """The option behind each field that a client may send; several names may lead to one."""
        own = {option.name for option in self.fork.options.command_line if not isinstance(option.type, click.Path)}
        found = {
            option.name: option
            for option in command(self.fork).params
            if isinstance(option, click.Option) and option.name and (option.name in SHARED or option.name in own)
        }
        if self.kind == "image":
            found = {name: option for name, option in found.items() if name not in ("num_frames", "fps", "crf")}
        known = {name.replace("-", "_"): target.replace("-", "_") for name, target in SYNONYMS.items()}
        return found | {name: found[target] for name, target in known.items() if target in found}

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


def checkpoint(named: Path, taken: Iterable[str] = ()) -> Offer:
    """The model of a checkpoint folder or of a repository's name, called as its folder. taken: names of others.

    ValueError says what is wrong.
    """
    said = []
    for fork in forks():
        try:
            folder = checkpoint_folder(named, fork).resolve()
            rules = fork.rules(Source(model_dir=folder))
        except (ValueError, OSError) as error:
            said.append(f"{fork.program}: {error}")
            continue
        return Offer(_free(named.absolute().name, set(taken)), fork, ("--model-dir", str(folder)), rules)
    if len({line.partition(": ")[2] for line in said}) == 1:  # nothing that is the matter of one program
        raise ValueError(f"--model-dir {said[0].partition(': ')[2]}")
    raise ValueError(f"--model-dir {shown(named)} is no checkpoint of a program here ({'; '.join(said)})")


def _free(name: str, taken: set[str]) -> str:
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) or "model"
    return name if name not in taken else next(f"{name}-{i}" for i in range(2, 10**6) if f"{name}-{i}" not in taken)


def find(offers: Sequence[Offer], name: str | None, kind: Kind) -> Offer:
    """The model that a client names; without a name the first that makes such things. ApiError lists them."""
    fitting = [offer for offer in offers if offer.kind == kind]
    found = next((offer for offer in (fitting if name is None else offers) if name in (None, offer.name)), None)
    names = ", ".join(offer.name for offer in fitting)
    makes = "pictures" if kind == "image" else "videos"
    if found is None and not fitting:
        raise ApiError(400, f"no model here makes {makes}", "model", "model_not_found")
    if found is None:
        raise ApiError(400, f"model {name!r} is unknown; choose one of {names}", "model", "model_not_found")
    if found.kind != kind:
        where = "/v1/images/generations" if found.kind == "image" else "/v1/videos"
        raise ApiError(400, f"model {found.name} makes no {makes}: ask {where}, or choose one of {names}", "model")
    return found
