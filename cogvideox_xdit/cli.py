"""cogvideox-xdit: a prompt, with an image or a video or without, becomes an mp4. Also `python -m cogvideox_xdit`,
`python cogvideox_xdit/cli.py`, and under torchrun."""

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

from cogvideox_xdit.config import (
    CONFIGS,
    FRAME_OFFSETS,
    FRAME_STEP,
    CogVideoXRules,
    VAEConfig,
    official_rules,
    read_checkpoint,
)
from cogvideox_xdit.fork import FORK
from common import program
from common.checks import Rules, nearest
from common.options import Option
from common.request import Program, Setup, Source, Video, sampling_options

if TYPE_CHECKING:
    from torch import Tensor

    from cogvideox_xdit.pipeline import CogVideoXPipeline
    from common.estimate import Workload
    from common.parallel import Mesh
    from common.progress import Stages
    from common.quantize import TransformerFiles

TRAINED = "shapes"  # as in cogvideox_xdit.demo, which imports torch
TRAINED_PROMPT = "A big red circle moves slowly to the right on a black background."
DEMO_PROMPT = "A red circle moves slowly to the left on a black background."


def demo_rules(name: str) -> Rules:
    if name == TRAINED:
        return CogVideoXRules(
            heads=6,
            width=64,
            height=64,
            num_frames=17,
            num_steps=25,
            cfg_scale=4.0,
            fps=8,
            default_prompt=TRAINED_PROMPT,
            frame_step=FRAME_STEP,
            frame_offsets=FRAME_OFFSETS,
        )
    return CogVideoXRules(
        heads=4,
        width=96,
        height=64,
        num_frames=17,
        num_steps=10,
        cfg_scale=6.0,
        fps=8,
        dtype="fp32",
        sizes=((96, 64),) if CONFIGS[name].learned else (),
        default_prompt=DEMO_PROMPT,
        frame_step=FRAME_STEP,
        frame_offsets=FRAME_OFFSETS,
    )


def rules(source: Source) -> Rules:
    """The admissible values for a checkpoint; ValueError when the folder is none. Imports no torch."""
    if source.demo is not None:
        return demo_rules(source.demo)
    if source.model_dir is not None:
        return official_rules(read_checkpoint(source.model_dir).transformer)
    return official_rules(FORK.model(source.official).config)


def check(options: Mapping[str, Any], videos: Sequence[Video]) -> list[str]:
    """What is wrong with the image, the video and the strength. They are read as far as they are used."""
    found = []
    image, video, strength = options["image"], options["video"], options["strength"]
    if image is not None and video is not None:
        found.append("--image and --video exclude each other; give one of them")
    if image is not None:
        found += _unreadable_image(image)
    if strength is not None and not 0 < strength <= 1:
        found.append(f"--strength {strength} must be above 0 and at most 1")
    elif video is not None and strength is not None and int(videos[0].num_steps * strength) < 1:
        found.append(f"--strength {strength} of --num-steps {videos[0].num_steps} leaves no step; raise one of them")
    return found + ([] if video is None else _short_video(video, videos[0].num_frames))


def _unreadable_image(path: Path) -> list[str]:
    from common.video import read_image

    try:
        read_image(path)
    except ValueError as error:
        return [f"--image {error}"]
    return []


def _short_video(path: Path, num_frames: int) -> list[str]:
    from common.video import read_frames

    try:
        count = sum(1 for _ in read_frames(path, num_frames))
    except ValueError as error:
        return [f"--video {error}"]
    if count >= num_frames:
        return []
    near = nearest(count, FRAME_STEP, FRAME_OFFSETS).split(" or ")[0]
    return [f"--video {path} has {count} frames, fewer than --num-frames {num_frames}; --num-frames {near} would do"]


def make_demo(name: str) -> Path:
    from cogvideox_xdit.demo import demo_checkpoint

    return demo_checkpoint(name)


def pipeline(setup: Setup, mesh: Mesh, stages: Stages) -> CogVideoXPipeline:
    from cogvideox_xdit.pipeline import CogVideoXPipeline

    assert setup.source.model_dir is not None
    if setup.source.demo not in (None, TRAINED):
        stages.note("this demo checkpoint has random weights: the picture is noise")
    made = CogVideoXPipeline.from_pretrained(
        setup.source.model_dir,
        mesh=mesh,
        stages=stages,
        scheduler=setup.extra["scheduler"],
        **setup.pipeline_options(),
    )
    made.config.check_task(_image(setup, made) is not None, setup.extra["video"] is not None)
    return made


def _image(setup: Setup, pipe: CogVideoXPipeline) -> Path | None:
    """The image to start from; a demo that needs one has one."""
    image = setup.extra["image"]
    if image is None and setup.source.demo is not None and pipe.config.image_channels:
        from cogvideox_xdit.demo import IMAGE

        return pipe.model_dir / IMAGE
    return image


def check_weights(pipe: CogVideoXPipeline, setup: Setup, videos: Sequence[Video]) -> None:
    sample = videos[0].latents is None
    frames = _image(setup, pipe) is not None or setup.extra["video"] is not None
    pipe.check_weights(sample, frames=sample and frames)


def workload(setup: Setup, video: Video, mesh: Mesh) -> Workload:
    from cogvideox_xdit.sampling import workload
    from common.choice import precision

    source = setup.source
    if source.model_dir is None:
        config, vae = FORK.model(source.official).config, VAEConfig()
    else:
        checkpoint = read_checkpoint(source.model_dir)
        config, vae = checkpoint.transformer, checkpoint.vae
    size = (video.height, video.width, video.num_frames)
    guided = setup.rules.guided(video.cfg_scale) or mesh.cfg.size > 1
    made = workload(config, vae, mesh, *size, guided=guided, dtype=precision(setup).dtype)
    return made.with_text(lambda: setup.text_encoder_dir or source.model_dir)


def transformer_files(folder: Path) -> TransformerFiles:
    from cogvideox_xdit.config import read_checkpoint
    from cogvideox_xdit.weights import transformer_files

    return transformer_files(folder, read_checkpoint(folder).transformer)


def generate(pipe: CogVideoXPipeline, video: Video, setup: Setup, stages: Stages) -> Tensor | None:
    assert video.seed is not None
    return pipe(
        video.prompt,
        image=_image(setup, pipe),
        video=setup.extra["video"],
        strength=setup.extra["strength"],
        dynamic_cfg=setup.extra["dynamic_cfg"],
        **sampling_options(video),
        **setup.decode_options(),
    )


def decode(pipe: CogVideoXPipeline, video: Video, setup: Setup, stages: Stages) -> Tensor | None:
    assert video.latents is not None
    latents = program.read_latents(video.latents, pipe.config.out_channels)
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
    demos=(TRAINED, *CONFIGS),
    check=check,
    models=FORK.names,
    workload=workload,
    options=(
        Option(["--image"], type=click.Path(path_type=Path), help="First frame, for image to video checkpoints."),
        Option(["--video"], type=click.Path(path_type=Path), help="Video to start from, for text checkpoints."),
        Option(["--strength"], type=float, default=0.8, help="How much of --video is made anew, of (0, 1]."),
        Option(["--scheduler"], type=click.Choice(["ddim", "dpm"]), help="Default: the checkpoint's own."),
        Option(["--dynamic-cfg"], is_flag=True, help="Let the guidance vary, as the official demo does with dpm."),
    ),
)


def main() -> None:
    sys.exit(program.main(PROGRAM))


if __name__ == "__main__":
    main()
