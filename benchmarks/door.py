"""What the benchmarks' command lines check before anything runs: numbers, files and devices.

Wrong use ends with exit status 2.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from common.registry.forks import get_model
from common.registry.layout import MOST_RANKS
from common.system import environment
from common.system.files import writing_problem


class Parser(argparse.ArgumentParser):
    """Its help shows the module's docstring as it stands; what is wrong is told as the programs tell it."""

    def __init__(self, text: str | None, **more: Any) -> None:
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(2, "".join(f"error: {line}\n" for line in message.splitlines()))


def whole(most: int, least: int = 1) -> Callable[[str], int]:
    """An argparse type: a whole number within these."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to {most}")
        return value

    return read


ranks = whole(MOST_RANKS)


def amount(most: float) -> Callable[[str], float]:
    """An argparse type: a number above 0."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to {most:g}")
        return value

    return read


def rate(text: str) -> float:
    """An argparse type: Mbit/s of a link, 0 for no limit."""
    return 0.0 if text == "0" else amount(10**6)(text)


def new_file(text: str) -> Path:
    """An argparse type: a file that can be written."""
    if (problem := writing_problem(Path(text))) is not None:
        raise argparse.ArgumentTypeError(problem)
    return Path(text)


def device_problem(device: str, wanted: int = 1) -> str | None:
    """Why so many ranks cannot run on cpu or cuda."""
    if device != "cuda" or (visible := environment.visible_gpus()) >= wanted:
        return None
    return f"--device cuda: {wanted} GPUs are wanted and {visible} are visible; use --device cpu, or fewer ranks"


class ModelName(click.ParamType):
    """A registered model by its name, title or alias."""

    name = "model"

    def convert(self, value: str, option: click.Parameter | None, context: click.Context | None) -> str:
        try:
            return get_model(value).name
        except ValueError as error:
            self.fail(str(error), option, context)


def writable(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """A click callback: a file that can be written."""
    if path is not None and (problem := writing_problem(path)) is not None:
        raise click.BadParameter(problem)
    return path
