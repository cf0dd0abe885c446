"""Words of a command line that no option takes: what was meant, whose they are, or that it is not here."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

import click

from common.registry.forks import Fork, forks
from common.run.options import SYNONYMS

CUTOFF = 0.7
"""How alike a name has to be to be offered; below that nearly any two are."""
ABSENT = {
    "lora": "LoRA weights are not loaded by this program",
    "teacache": "caches that leave steps out are not here: they change the picture",
    "fbcache": "caches that leave steps out are not here: they change the picture",
    "pipefusion": "PipeFusion is not here: it changes the picture",
    "data-parallel": "--replicas makes several videos at a time, each on GPUs of its own",
    "tensor-parallel": "tensor parallelism is not here; --shard-weights keeps a share of the weights on each GPU",
}
"""What others offer, by a part of their options' names."""


def unknown_words(fork: Fork, arguments: Sequence[str], options: Sequence[click.Parameter]) -> list[str]:
    """What is wrong with the words that were left over. options: those of the program."""
    option_names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    problems = []
    for i, argument in enumerate(arguments):
        if argument.startswith("-"):
            name = argument.split("=")[0].replace("_", "-")
            hint = next((hint for part, hint in ABSENT.items() if part in name), "") or _elsewhere(fork, name)
            problems.append(f"no such option: {name}" + (f"; {hint}" if hint else _meant(name, option_names)))
        elif i == 0 or not arguments[i - 1].startswith("-"):
            problems.append(f"unexpected argument {argument!r}; quote a prompt that has spaces")
    return problems


def _meant(name: str, option_names: Collection[str]) -> str:
    name, names = name.lstrip("-"), [*sorted(one.lstrip("-") for one in option_names), *SYNONYMS]
    completions = [one for one in names if len(name) > 2 and one.startswith(name)]
    near = completions or difflib.get_close_matches(name, names, n=1, cutoff=CUTOFF)
    return f"; did you mean --{near[0]}?" if near else ""


def _elsewhere(fork: Fork, name: str) -> str:
    """The other programs that have an option of this name."""
    others = [o.program for o in forks() if o.name != fork.name and _has(o, name)]
    return f"it is one of {', '.join(others)}" if others else ""


def _has(fork: Fork, name: str) -> bool:
    return any(name in option.opts for option in fork.options.command_line)
