"""What benchmarks need of each fork beside the product: reduced and hollow checkpoints, inputs, the peer's modules.

A module here, of the fork's name, or `benchmark` in the package of a fork from elsewhere. What a module lacks cannot be
measured for its models; the programs say so.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from common.registry.forks import Model, fork_of, get_model


def of(model: Model) -> Any:
    """The module of a model's fork."""
    fork = fork_of(model)
    if (Path(__file__).parent / f"{fork.name}.py").is_file():
        return importlib.import_module(f"{__name__}.{fork.name}")
    return fork.module("benchmark")


def function(model: Model, name: str) -> Any:
    """A function of that module. ValueError where it has none."""
    found = getattr(of(model), name, None)
    if found is None:
        raise ValueError(f"{model.name} has no {name} among its benchmarks")
    return found


def named(text: str) -> str:
    """The registered name for what a user typed, as an argparse type."""
    try:
        return get_model(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def narrowed(channels: tuple[int, ...], by: int) -> tuple[int, ...]:
    """A decoder's widths divided, in multiples of the 32 groups of its norms."""
    return tuple(max(32, c // by // 32 * 32) for c in channels)
