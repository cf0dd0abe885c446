"""What `--help` shows: options in groups, each with its text, and the defaults that depend on the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from common.registry.checks import Rules
from common.registry.forks import Fork

WHAT, GPUS, MEMORY, SPEED = "What to make", "How many GPUs", "Memory", "Speed"
OUTPUT, EXPERT = "Output", "For experts"
GROUPS: Mapping[str, str] = {
    WHAT: "",
    GPUS: "The work on one video is split in up to three ways, whose degrees multiply to the number of GPUs. Degrees "
    "that are left out are chosen, and printed.",
    MEMORY: "Where nothing is said the fastest way that fits is chosen, and printed. Of these options --dtype, "
    "--text-dtype and --vae tiled change the picture, the others only time and memory.",
    SPEED: "",
    OUTPUT: "",
    EXPERT: "",
}
"""The groups in the order of the help, with what is said of each as a whole."""
_COLUMN = 26
"""Characters of the widest name that has its text beside it; longer ones have it below."""
_UNBROKEN = "\N{NON-BREAKING HYPHEN}"
HEADS = ("checkpoint", "size", "frames", "steps", "cfg", "fps", "dtype")
"""Of the columns of `defaults`."""


class _Formatter(click.HelpFormatter):
    """Breaks no line at a hyphen: names of options and repositories stay in one piece."""

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _UNBROKEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(name, text.replace("-", _UNBROKEN)) for name, text in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        return super().getvalue().replace(_UNBROKEN, "-")


class _Context(click.Context):
    formatter_class = _Formatter


class Option(click.Option):
    """An option that notes what is wrong with its value in `ctx.meta` and lets the others be read.

    group: the one of GROUPS that it is shown in.
    """

    def __init__(self, *names: Any, group: str = WHAT, **more: Any) -> None:
        super().__init__(*names, **more)
        self.group = group

    def handle_parse_result(self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]) -> Any:
        try:
            return super().handle_parse_result(ctx, opts, args)
        except click.UsageError as error:
            ctx.meta.setdefault("problems", []).append(error.format_message())
            ctx.params[self.name] = None
            return None, args


class Command(click.Command):
    """A command whose help has groups, and then a table of the defaults that the models of `fork` have."""

    context_class = _Context

    def __init__(self, fork: Fork, **more: Any) -> None:
        super().__init__(fork.program, **more)
        self.fork = fork

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for name, options in grouped(self.get_params(ctx)).items():
            rows = [row for option in options if (row := option.get_help_record(ctx))]
            rows[0] = rows[0][0].ljust(_COLUMN), rows[0][1]  # all groups have their texts in one column
            with formatter.section(name):
                if GROUPS[name]:
                    formatter.write_text(GROUPS[name])
                    formatter.write_paragraph()
                formatter.write_dl(rows, col_max=_COLUMN)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Defaults of each checkpoint"):
            for line in aligned([HEADS, *defaults(self.fork)]):
                formatter.write(f"  {line}\n")


def grouped(options: Sequence[click.Parameter]) -> dict[str, list[click.Parameter]]:
    """The options that are shown, by their groups; what click adds itself is for experts."""
    visible = [option for option in options if not getattr(option, "hidden", False)]
    groups = {name: [o for o in visible if getattr(o, "group", EXPERT) == name] for name in GROUPS}
    return {name: members for name, members in groups.items() if members}


def defaults(fork: Fork) -> list[tuple[str, ...]]:
    """Of each checkpoint that a program knows: name, size, frames, steps, guidance, frames a second, dtype."""
    checkpoints = [(model.name, model.rules) for model in fork.models]
    return [_row(*one) for one in checkpoints + [(f"--demo {name}", rules) for name, rules in fork.demos.items()]]


def _row(name: str, rules: Rules) -> tuple[str, ...]:
    numbers = (rules.num_frames, rules.num_steps, rules.cfg_scale, rules.fps, rules.dtype)
    return (name, f"{rules.width}x{rules.height}", *map(str, numbers))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
