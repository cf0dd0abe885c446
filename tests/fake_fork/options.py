"""How it misbehaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.registry.request import ForkOptions
from common.run.help import Option


@dataclass(frozen=True)
class FakeOptions(ForkOptions):
    fault: str | None = None
    pause: float = 0.0
    pids: str | None = None

    command_line: ClassVar = (
        Option(["--fault"], help="KIND@RANK"),
        Option(["--pause"], type=float, default=0.0, help="Seconds a step."),
        Option(["--pids"], help="Where each rank writes its process id."),
    )
