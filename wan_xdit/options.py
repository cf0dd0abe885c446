"""The options that Wan alone has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import click

from common.registry.checks import FITS, Rules
from common.registry.request import ForkOptions, Source, Video, needs_start
from common.run.help import EXPERT, Option
from common.run.options import PATH, fit_option, unreadable_image
from wan_xdit.checkpoint import RESIDUALS, SOLVER, SOLVERS, WanRules

MAX_SHIFT = 100.0
MAX_SCALE = 1000.0


@dataclass(frozen=True)
class WanOptions(ForkOptions):
    image: Path | None = None
    """The first frame, for checkpoints that take one."""
    fit: str = FITS[0]
    """How a picture of another shape is brought to the video's."""
    cfg_scale_2: float | None = None
    """Guidance of the second expert; None: the checkpoint's own."""
    shift: float | None = None
    """How far the noise levels are moved up; None: the official one for the size."""
    solver: str = SOLVER
    residual: str = RESIDUALS[0]
    """Dtype of the stream between the blocks."""

    command_line: ClassVar = (
        Option(["--image"], type=PATH, help="Picture that the video begins with, for I2V and TI2V checkpoints."),
        fit_option("--image"),
        Option(
            ["--cfg-scale-2"],
            type=float,
            help="--cfg-scale for the second transformer of A14B checkpoints, which makes the later steps; diffusers' "
            "guidance_scale_2. Default: the authors', or --cfg-scale where that is given.",
        ),
        Option(
            ["--shift"],
            type=float,
            help="How long the steps stay at much noise; diffusers' flow_shift, ComfyUI's ModelSamplingSD3. Default: "
            "the authors' for checkpoint and size.",
            group=EXPERT,
        ),
        Option(
            ["--solver"],
            type=click.Choice(SOLVERS),
            default=SOLVER,
            help="Sampler: UniPC, which the authors use, DPM++ 2M, or Euler.",
            group=EXPERT,
        ),
        Option(
            ["--residual"],
            type=click.Choice(RESIDUALS),
            default=RESIDUALS[0],
            help="Precision in which the transformer's blocks are added up: fp32 as the authors do, or bf16, which "
            "takes less memory.",
            group=EXPERT,
        ),
    )

    def guided(self, rules: Rules, scale: float) -> bool:
        assert isinstance(rules, WanRules)
        return any(map(rules.guided, rules.scales(scale, self.cfg_scale_2)))

    def without_effect(self, rules: Rules) -> Mapping[str, str]:
        assert isinstance(rules, WanRules)
        unused = {} if rules.boundary else {"cfg_scale_2": "on this checkpoint, which has one transformer"}
        return unused | ({} if self.image or rules.needs_image else {"fit": "without --image"})

    def problems(self, rules: Rules, source: Source, videos: Sequence[Video], dry_run: bool) -> list[str]:
        assert isinstance(rules, WanRules)
        problems = [] if self.image is None else unreadable_image(self.image)
        image = self.image is not None or (rules.needs_image and not needs_start(source, videos, dry_run))
        if not problems and (problem := rules.task_problem(image)):
            problems.append(f"--image: {problem}")
        if self.shift is not None and not 0 < self.shift <= MAX_SHIFT:
            problems.append(f"--shift {self.shift} is not a number above 0 and up to {MAX_SHIFT}")
        if self.cfg_scale_2 is not None and not 0 <= self.cfg_scale_2 <= MAX_SCALE:
            problems.append(f"--cfg-scale-2 {self.cfg_scale_2} is not a number from 0 to {MAX_SCALE}")
        return problems
