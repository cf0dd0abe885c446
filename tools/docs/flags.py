"""`python -m tools.docs.flags`: docs/flags.md from the command lines themselves.

What other programs call the same things stands in `coming-from.md` beside this file, written by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from common.registry.forks import Fork, forks
from common.run.command_line import command
from common.run.help import GROUPS, HEADS, defaults, grouped

TARGET = Path(__file__).resolve().parents[2] / "docs" / "flags.md"
COMING_FROM = Path(__file__).with_name("coming-from.md")


def described(option: click.Parameter) -> tuple[str, str]:
    """The flag with its values, and its help with the default."""
    assert isinstance(option, click.Option)
    names = "/".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    values = "" if option.is_flag or not isinstance(option.type, click.ParamType) else f" {option.type.name.upper()}"
    if isinstance(option.type, click.Choice):
        values = " " + ", ".join(map(str, option.type.choices))
    if option.metavar:
        values = f" {option.metavar}"
    if isinstance(option.default, bool) and option.secondary_opts:
        default: object = (option.opts if option.default else option.secondary_opts)[0]
    else:
        default = option.default if isinstance(option.default, (str, int, float)) and not option.is_flag else None
    shown = f" Default: {default}." if default not in (None, "") else ""
    return names + values, (option.help or "") + shown


def table(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> list[str]:
    lines = [" | ".join(cell.replace("|", " ") for cell in row) for row in (heads, *rows)]
    return [f"| {lines[0]} |", "|" + "---|" * len(heads), *(f"| {line} |" for line in lines[1:]), ""]


def in_groups(options: Sequence[click.Parameter]) -> list[str]:
    """A table for each group."""
    lines = []
    for name, members in grouped(options).items():
        lines += [f"### {name}", "", *([GROUPS[name], ""] if GROUPS[name] else [])]
        lines += table([described(option) for option in members], ("flag", "meaning"))
    return lines


def own(fork: Fork, options: Sequence[click.Parameter]) -> list[str]:
    """A program's own flags, and the defaults of its checkpoints."""
    rows = [described(option) for option in options]
    heads = [f"{HEADS[0]} of `{fork.program}`", *HEADS[1:]]
    return [f"## {fork.program}", "", *table(rows, ("flag", "meaning")), *table(defaults(fork), heads)]


def page() -> str:
    """The whole page."""
    commands = [[o for o in command(fork).params if not getattr(o, "hidden", False)] for fork in forks()]
    shared = set.intersection(*({described(o) for o in options} for options in commands))
    lines = ["# Flags", "", "Made by `python -m tools.docs.flags` from the programs' own command lines.", ""]
    lines += ["## All programs", ""]
    lines += in_groups([option for option in commands[0] if described(option) in shared])
    for fork, options in zip(forks(), commands):
        lines += own(fork, [option for option in options if described(option) not in shared])
    return "\n".join(lines) + "\n" + COMING_FROM.read_text()


if __name__ == "__main__":
    TARGET.write_text(page())
