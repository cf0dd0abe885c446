"""mochi-xdit: a prompt becomes an mp4. Also `python -m mochi_xdit`, `python mochi_xdit/cli.py`, and under torchrun."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: this folder's modules are not top-level names
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.entry import begin

    begin()

import click

from common import program
from common.checks import Rules
from common.options import Option
from common.request import Program, Setup, Source, Video, sampling_options
from mochi_xdit.config import OFFICIAL, official_rules
from mochi_xdit.fork import FORK

if TYPE_CHECKING:
    from torch import Tensor

    from common.estimate import Workload
    from common.parallel import Mesh
    from common.progress import Stages
    from common.quantize import TransformerFiles
    from mochi_xdit.pipeline import MochiPipeline

DEMO = Rules(
    heads=4,
    width=64,
    height=64,
    num_frames=13,
    num_steps=20,
    cfg_scale=3.0,
    fps=8,
    default_prompt="A big red circle moves slowly to the right on a black background.",
)


def rules(source: Source) -> Rules:
    """The admissible values for a checkpoint; ValueError when the folder is none. Reads a header, imports no torch."""
    if source.model_dir is not None:
        return official_rules(source.model_dir)
    return OFFICIAL if source.demo is None else DEMO


def check(options: Mapping[str, Any], videos: Sequence[Video]) -> list[str]:
    found = []
    threshold, linear = options["threshold_noise"], options["linear_steps"]
    if threshold is not None and not 0 < threshold < 1:
        found.append(f"--threshold-noise {threshold} must lie between 0 and 1")
    steps = videos[0].num_steps
    if linear is not None and not 1 <= linear < max(steps, 2):
        found.append(f"--linear-steps {linear} must be at least 1 and less than --num-steps {steps}")
    return found


def make_demo(name: str) -> Path:
    from mochi_xdit.demo import demo_checkpoint

    return demo_checkpoint(name)


def pipeline(setup: Setup, mesh: Mesh, stages: Stages) -> MochiPipeline:
    from mochi_xdit.pipeline import MochiPipeline

    assert setup.source.model_dir is not None
    if setup.source.demo is not None:
        from mochi_xdit.demo import is_trained

        if not is_trained(setup.source.model_dir):
            stages.note("the demo checkpoint has random weights: the picture is noise")
    return MochiPipeline.from_pretrained(
        setup.source.model_dir,
        mesh=mesh,
        stages=stages,
        **setup.pipeline_options() | ({"text_encoder_dir": own} if (own := setup.extra["t5_model_path"]) else {}),
    )


def check_weights(pipe: MochiPipeline, setup: Setup, videos: Sequence[Video]) -> None:
    said = any(video.prompt or (video.negative_prompt and setup.rules.guided(video.cfg_scale)) for video in videos)
    pipe.check_weights(sample=videos[0].latents is None, text=said)


def workload(setup: Setup, video: Video, mesh: Mesh) -> Workload:
    from common.choice import precision
    from mochi_xdit.pipeline import find_text_encoder
    from mochi_xdit.sampling import workload

    folder = setup.source.model_dir
    given = setup.extra["t5_model_path"] or setup.text_encoder_dir
    made = workload(
        *(folder, mesh, video.height, video.width, video.num_frames),
        guided=setup.rules.guided(video.cfg_scale),
        negative=bool(video.negative_prompt),
        dtype=precision(setup).dtype,
    )
    return made if folder is None else made.with_text(lambda: find_text_encoder(folder, given))


def transformer_files(folder: Path) -> TransformerFiles:
    from mochi_xdit.weights import transformer_files

    return transformer_files(folder)


def generate(pipe: MochiPipeline, video: Video, setup: Setup, stages: Stages) -> Tensor | None:
    assert video.seed is not None
    return pipe(
        video.prompt,
        threshold_noise=setup.extra["threshold_noise"],
        linear_steps=setup.extra["linear_steps"],
        **sampling_options(video),
        **setup.decode_options(),
    )


def decode(pipe: MochiPipeline, video: Video, setup: Setup, stages: Stages) -> Tensor | None:
    assert video.latents is not None
    latents = program.read_latents(video.latents, pipe.config.channels)
    return pipe.decode(latents, **setup.decode_options())


PROGRAM = Program(
    name=FORK.program,
    script=str(Path(__file__).resolve()),
    rules=rules,
    make_demo=make_demo,
    pipeline=pipeline,
    check_weights=check_weights,
    transformer=transformer_files,
    generate=generate,
    decode=decode,
    check=check,
    models=FORK.names,
    workload=workload,
    options=(
        Option(["--threshold-noise"], type=float, help="Noise that the linear part of the schedule removes."),
        Option(["--linear-steps"], type=int, help="Steps of the linear part; default: half."),
        Option(["--t5-model-path"], type=click.Path(path_type=Path), hidden=True, help="As --text-encoder-dir."),
        Option(["--max-t5-token-length"], type=int, hidden=True, help="Accepted; the model's own limit is used."),
    ),
)


def main() -> None:
    sys.exit(program.main(PROGRAM))


if __name__ == "__main__":
    main()
