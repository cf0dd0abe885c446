"""A job's request, read by the programs' own command line: when it is let in, and again when its turn comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.registry.request import Request
from common.run.command_line import parse
from xdit_serve.offers import Offer

INPUT = "input."
"""What the names of a client's files begin with; the option that they stand for follows."""


def build(offer: Offer, own: Sequence[str], arguments: Sequence[str], folder: Path, output: str) -> Request:
    """The checked request of a job. WrongUse says what is wrong, in the command line's words.

    own: words that the server gives to all jobs; those of the job come behind them. folder: the job's, with its files.
    """
    files = [f"--{path.name.removeprefix(INPUT)}={path}" for path in sorted(folder.glob(f"{INPUT}*"))]
    ends = [f"--output={folder / output}", "--overwrite"]
    request = parse(offer.fork, [*offer.weights, *own, *arguments, *files, *ends])
    return replace(request, ray_address=None)  # the groups know where they are
