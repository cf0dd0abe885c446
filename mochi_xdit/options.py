"""The options that Mochi alone has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from common.registry.checks import Rules
from common.registry.request import ForkOptions, Source, Video
from common.run.help import EXPERT, Option
from mochi_xdit.config import FAST, OFFICIAL


@dataclass(frozen=True)
class MochiOptions(ForkOptions):
    """Of the schedule, see `mochi_xdit.sampling.linear_quadratic_sigmas`; None: the checkpoint's own."""

    threshold_noise: float | None = None
    linear_steps: int | None = None

    command_line: ClassVar = (
        Option(
            ["--threshold-noise"],
            type=float,
            help="Mochi removes noise in equal steps first and in growing ones then: how much of it in the equal ones, "
            f"between 0 and 1. Default: {OFFICIAL.threshold_noise}, of FastMochi {FAST.threshold_noise}.",
            group=EXPERT,
        ),
        Option(
            ["--linear-steps"],
            type=int,
            help=f"How many of --num-steps are equal ones. Default: half, of FastMochi {FAST.linear_steps}.",
            group=EXPERT,
        ),
    )

    def problems(self, rules: Rules, source: Source, videos: Sequence[Video], dry_run: bool) -> list[str]:
        problems = []
        threshold, linear, steps = self.threshold_noise, self.linear_steps, videos[0].sampling.num_steps
        if threshold is not None and not 0 < threshold < 1:
            problems.append(f"--threshold-noise {threshold} must lie between 0 and 1")
        if linear is not None and not 1 <= linear < max(steps, 2):
            problems.append(f"--linear-steps {linear} must be at least 1 and less than --num-steps {steps}")
        return problems
