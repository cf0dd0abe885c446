"""The options that CogVideoX alone has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import click

from cogvideox_xdit.config import FRAME_OFFSETS, FRAME_STEP, STRENGTH
from common.registry.checks import FITS, Rules, nearest, task_problem
from common.registry.request import ForkOptions, Source, Video, needs_start
from common.run.help import EXPERT, Option
from common.run.options import PATH, fit_option, unreadable_image

SCHEDULER = "Sampler: ddim, or dpm, which draws noise in every step (CogVideoXDPMScheduler). Default: the checkpoint's."
DYNAMIC = "Let the guidance vary from step to step, as CogVideoX's own demo does with dpm."


@dataclass(frozen=True)
class CogVideoXOptions(ForkOptions):
    image: Path | None = None
    """The first frame, for image to video checkpoints."""
    video: Path | None = None
    """What a text checkpoint starts from."""
    fit: str = FITS[0]
    """How a picture of another shape is brought to the video's."""
    strength: float = STRENGTH
    """How much of the schedule is run on `video`, of (0, 1]."""
    scheduler: str | None = None
    """ddim or dpm; None: the checkpoint's own."""
    dynamic_cfg: bool = False
    """Guidance varies over the steps."""

    command_line: ClassVar = (
        Option(["--image"], type=PATH, help="Picture that the video begins with, for image checkpoints (I2V)."),
        Option(
            ["--video"],
            type=PATH,
            help="Video to change, for the other checkpoints: noise is added to it, and --prompt says what it becomes.",
        ),
        fit_option("--image or --video"),
        Option(
            ["--strength"],
            type=float,
            default=STRENGTH,
            help="How much of --video is made anew, above 0; 1 keeps nothing of it.",
        ),
        Option(["--scheduler"], type=click.Choice(["ddim", "dpm"]), help=SCHEDULER, group=EXPERT),
        Option(["--dynamic-cfg"], is_flag=True, help=DYNAMIC, group=EXPERT),
    )

    def problems(self, rules: Rules, source: Source, videos: Sequence[Video], dry_run: bool) -> list[str]:
        """What is wrong with the image, the video and the strength. They are read as far as they are used."""
        problems = []
        strength, sampling = self.strength, videos[0].sampling
        if self.image is not None and self.video is not None:
            problems.append("--image and --video exclude each other; give one of them")
        if self.image is not None:
            problems += unreadable_image(self.image)
        from_image = "image" in rules.takes
        image = self.image is not None or (from_image and not needs_start(source, videos, dry_run))
        if not problems and (problem := task_problem(from_image, from_image, image, self.video is not None)):
            problems.append(f"{'--video' if self.video is not None else '--image'}: {problem}")
        if strength is not None and not 0 < strength <= 1:
            problems.append(f"--strength {strength} must be above 0 and at most 1")
        elif self.video is not None and strength is not None and int(sampling.num_steps * strength) < 1:
            problems.append(
                f"--strength {strength} of --num-steps {sampling.num_steps} leaves no step; raise one of them"
            )
        return problems + ([] if self.video is None else _short_video(self.video, sampling.num_frames))

    def without_effect(self, rules: Rules) -> Mapping[str, str]:
        if self.video is not None:
            return {}
        pictured = self.image is not None or "image" in rules.takes
        return {"strength": "without --video"} | ({} if pictured else {"fit": "without --image or --video"})


def _short_video(path: Path, num_frames: int) -> list[str]:
    from common.video.files import read_frames

    try:
        count = sum(1 for _ in read_frames(path, num_frames))
    except ValueError as error:
        return [f"--video {error}"]
    if count >= num_frames:
        return []
    near = nearest(count, FRAME_STEP, FRAME_OFFSETS).split(" or ")[0]
    return [f"--video {path} has {count} frames, fewer than --num-frames {num_frames}; --num-frames {near} would do"]
