"""The options that ConsisID alone has."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import click

from cogvideox_xdit.options import DYNAMIC, SCHEDULER
from common.registry.checks import Rules
from common.registry.request import ForkOptions, Source, Video, needs_start
from common.run.help import EXPERT, OUTPUT, Option
from common.run.options import PATH, unreadable_image
from common.system.extras import install
from common.system.files import absence, writing_problem
from consisid_xdit.config import TRAINED

EXTRA = {"cv2": "opencv-python-headless", "onnxruntime": "onnxruntime"}


@dataclass(frozen=True)
class ConsisIDOptions(ForkOptions):
    id_embeddings: Path | None = None
    """A file of identity features, in place of `image`."""
    image: Path | None = None
    """A photograph of the person."""
    save_id_embeddings: Path | None = None
    """Where the photograph's identity features are kept."""
    scheduler: str | None = None
    """ddim or dpm; None: the checkpoint's own."""
    dynamic_cfg: bool = False
    """Guidance varies over the steps."""

    command_line: ClassVar = (
        Option(["--image"], type=PATH, help="Photograph of the person; of several faces the largest is taken."),
        Option(
            ["--id-embeddings"],
            type=PATH,
            help="What --save-id-embeddings kept of a photograph, in place of --image; no face models are needed then.",
        ),
        Option(
            ["--save-id-embeddings"],
            type=PATH,
            help="Keep what the model knows of the photograph in this .safetensors file.",
            group=OUTPUT,
        ),
        Option(["--scheduler"], type=click.Choice(["ddim", "dpm"]), help=SCHEDULER, group=EXPERT),
        Option(["--dynamic-cfg"], is_flag=True, help=DYNAMIC, group=EXPERT),
    )

    @property
    def written(self) -> Mapping[str, Path]:
        return {} if self.save_id_embeddings is None else {"--save-id-embeddings": self.save_id_embeddings}

    def problems(self, rules: Rules, source: Source, videos: Sequence[Video], dry_run: bool) -> list[str]:
        """What is wrong with the photograph and the files of identity features."""
        image, file, save = self.image, self.id_embeddings, self.save_id_embeddings
        problems = []
        if image is None and file is None and needs_start(source, videos, dry_run):
            problems.append("--image is missing; name a photograph of the person, or use --id-embeddings")
        if image is not None:
            problems += unreadable_image(image)
        if image is not None and file is not None:
            problems.append("--image and --id-embeddings exclude each other; give one of them")
        if image is not None and source.demo == TRAINED:
            problems.append(
                "--demo shapes has no face models; name a file with --id-embeddings, "
                "or use --demo face for a photograph"
            )
        if image is not None and (missing := missing_packages()):
            problems.append(
                f"--image needs {' and '.join(missing)}: {install('face')}; or make the features elsewhere "
                "with --save-id-embeddings and pass them with --id-embeddings"
            )
        if file is not None and (problem := absence(file, "file")):
            problems.append(f"--id-embeddings {problem}")
        if save is not None and (problem := writing_problem(save)):
            problems.append(f"--save-id-embeddings: {problem}")
        return problems


def missing_packages() -> list[str]:
    """Packages of the extra `face` that are not installed."""
    return [package for module, package in EXTRA.items() if importlib.util.find_spec(module) is None]
