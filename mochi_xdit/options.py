"""The options that Mochi alone has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from common.registry.request import ForkOptions, Source, Video
from common.run.options import Option


@dataclass(frozen=True)
class MochiOptions(ForkOptions):
    """Of the schedule, see `mochi_xdit.sampling.linear_quadratic_sigmas`; None: the checkpoint's own."""

    threshold_noise: float | None = None
    linear_steps: int | None = None

    command_line: ClassVar = (
        Option(["--threshold-noise"], type=float, help="Noise that the linear part of the schedule removes."),
        Option(["--linear-steps"], type=int, help="Steps of the linear part; default: half."),
    )

    def problems(self, source: Source, videos: Sequence[Video], dry_run: bool) -> list[str]:
        found = []
        threshold, linear, steps = self.threshold_noise, self.linear_steps, videos[0].sampling.num_steps
        if threshold is not None and not 0 < threshold < 1:
            found.append(f"--threshold-noise {threshold} must lie between 0 and 1")
        if linear is not None and not 1 <= linear < max(steps, 2):
            found.append(f"--linear-steps {linear} must be at least 1 and less than --num-steps {steps}")
        return found
