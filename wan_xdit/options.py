"""The options that Wan alone has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import click

from common.registry.request import ForkOptions, Source, Video
from common.run.options import Option, unreadable_image
from wan_xdit.checkpoint import RESIDUALS, SOLVER, SOLVERS

MAX_SHIFT = 100.0
MAX_SCALE = 1000.0


@dataclass(frozen=True)
class WanOptions(ForkOptions):
    image: Path | None = None
    """The first frame, for checkpoints that take one."""
    cfg_scale_2: float | None = None
    """Guidance of the second expert; None: the checkpoint's own."""
    shift: float | None = None
    """How far the noise levels are moved up; None: the official one for the size."""
    solver: str = SOLVER
    residual: str = RESIDUALS[0]
    """Dtype of the stream between the blocks."""

    command_line: ClassVar = (
        Option(["--image"], type=click.Path(path_type=Path), help="First frame, for I2V and TI2V checkpoints."),
        Option(
            ["--cfg-scale-2"],
            type=float,
            help="Guidance of the second expert (A14B). Default: the official one, or --cfg-scale where that is given.",
        ),
        Option(
            ["--shift"],
            type=float,
            help="How far the noise levels are moved up. Default: the official one for checkpoint and size, whatever "
            "scheduler_config.json says.",
        ),
        Option(["--solver"], type=click.Choice(SOLVERS), default=SOLVER, help="How a step follows from a prediction."),
        Option(
            ["--residual"],
            type=click.Choice(RESIDUALS),
            default=RESIDUALS[0],
            help="Dtype of the stream between the blocks: fp32 as in the authors' program, bf16 for the weights' own.",
        ),
    )

    def problems(self, source: Source, videos: Sequence[Video], dry_run: bool) -> list[str]:
        found = [] if self.image is None else unreadable_image(self.image)
        if self.shift is not None and not 0 < self.shift <= MAX_SHIFT:
            found.append(f"--shift {self.shift} is not a number above 0 and up to {MAX_SHIFT}")
        if self.cfg_scale_2 is not None and not 0 <= self.cfg_scale_2 <= MAX_SCALE:
            found.append(f"--cfg-scale-2 {self.cfg_scale_2} is not a number from 0 to {MAX_SCALE}")
        return found
