"""consisid-xdit: a photograph of a person and a prompt become an mp4. Also `python -m consisid_xdit`,
`python consisid_xdit/cli.py`, and under torchrun."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: this folder's modules are not top-level names
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.entry import begin

    begin()

import click

from cogvideox_xdit import cli as cogvideox
from cogvideox_xdit.config import official_rules
from common import program
from common.checks import Rules
from common.extras import install
from common.files import absence, writing_problem
from common.options import Option
from common.request import Program, Setup, Source, Video, sampling_options
from consisid_xdit.config import PREVIEW, read_consisid
from consisid_xdit.fork import FORK

if TYPE_CHECKING:
    from torch import Tensor

    from common.estimate import Workload
    from common.parallel import Mesh
    from common.progress import Stages
    from common.quantize import TransformerFiles
    from consisid_xdit.face import IdentityFeatures
    from consisid_xdit.pipeline import ConsisIDPipeline

TRAINED = "shapes"  # as in consisid_xdit.demo, which imports torch
TRAINED_PROMPT = "A big shape moves slowly to the right on a black background."
EXTRA = {"cv2": "opencv-python-headless", "onnxruntime": "onnxruntime"}


@dataclass
class Session:
    """The pipeline, and the person of all videos of one command once they are known."""

    pipe: ConsisIDPipeline
    identity: IdentityFeatures | None = None


def rules(source: Source) -> Rules:
    """The admissible values for a checkpoint; ValueError when the folder is none. Imports no torch."""
    if source.demo == TRAINED:
        trained = cogvideox.demo_rules(cogvideox.TRAINED)
        # The guidance that the model card's figures were measured with.
        sizes = ((trained.width, trained.height),)
        return replace(trained, heads=5, cfg_scale=1.5, sizes=sizes, default_prompt=TRAINED_PROMPT)
    if source.demo is not None:
        return cogvideox.demo_rules("5b-i2v")
    return official_rules(PREVIEW if source.model_dir is None else read_consisid(source.model_dir).transformer)


def missing_packages() -> list[str]:
    """Packages of the extra `face` that are not installed."""
    return [package for module, package in EXTRA.items() if importlib.util.find_spec(module) is None]


def check(options: Mapping[str, Any], videos: Sequence[Video]) -> list[str]:
    """What is wrong with the photograph and the files of identity features."""
    image, file, save = (options[name] for name in ("image", "id_embeddings", "save_id_embeddings"))
    found = cogvideox.check({"image": image, "video": None, "strength": None}, videos)
    if image is not None and file is not None:
        found.append("--image and --id-embeddings exclude each other; give one of them")
    if image is not None and (missing := missing_packages()):
        found.append(
            f"--image needs {' and '.join(missing)}: {install('face')}; or make the features elsewhere "
            "with --save-id-embeddings and pass them with --id-embeddings"
        )
    if file is not None and (problem := absence(file, "file")):
        found.append(f"--id-embeddings {problem}")
    if save is not None and (problem := writing_problem(save)):
        found.append(f"--save-id-embeddings: {problem}")
    return found


def require_person(context: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    """There has to be a person, but in the demo, which has one, and where nothing is generated."""
    others = ("id_embeddings", "demo", "from_latents", "dry_run")
    if value is None and all(context.params.get(name) is None for name in others):
        raise click.UsageError("--image is missing; name a photograph of the person, or use --id-embeddings")
    return value


def make_demo(name: str) -> Path:
    from consisid_xdit.demo import demo_checkpoint

    return demo_checkpoint(name)


def pipeline(setup: Setup, mesh: Mesh, stages: Stages) -> Session:
    from consisid_xdit.pipeline import ConsisIDPipeline

    assert setup.source.model_dir is not None
    if setup.source.demo == TRAINED and setup.extra["image"] is not None:
        raise ValueError(
            "--demo shapes has no face models; name a file with --id-embeddings, or use --demo face for a photograph"
        )
    if setup.source.demo not in (None, TRAINED):
        stages.note("this demo checkpoint has random weights: the picture is noise, and its face models know one face")
    options = setup.pipeline_options() | {"scheduler": setup.extra["scheduler"]}
    return Session(ConsisIDPipeline(setup.source.model_dir, mesh, stages=stages, **options))


def person(session: Session, setup: Setup, stages: Stages) -> IdentityFeatures:
    """The person of this command: read once, for all its videos, and kept in a file where that was asked for."""
    if session.identity is not None:
        return session.identity
    from consisid_xdit.demo import IDENTITY, PORTRAIT, SHOWN
    from consisid_xdit.face import save_identity

    pipe, image, file = session.pipe, setup.extra["image"], setup.extra["id_embeddings"]
    if image is None and file is None and setup.source.demo == TRAINED:
        file = pipe.model_dir / next(iter(SHOWN))
    elif image is None and file is None:
        if missing := missing_packages():
            stages.note(f"no {' and no '.join(missing)}: the demo takes made-up identity features, not its portrait's")
            file = pipe.model_dir / IDENTITY
        else:
            image = pipe.model_dir / PORTRAIT
    session.identity = pipe.identify(image, file)
    if (save := setup.extra["save_id_embeddings"]) is not None and pipe.mesh.is_main:
        save_identity(save, session.identity)
        stages.note(f"identity features: {save}")
    return session.identity


def check_weights(session: Session, setup: Setup, videos: Sequence[Video]) -> None:
    session.pipe.check_weights(sample=videos[0].latents is None, frames=videos[0].latents is None)


def workload(setup: Setup, video: Video, mesh: Mesh) -> Workload:
    from cogvideox_xdit.config import VAEConfig
    from common.choice import precision
    from consisid_xdit.config import ConsisIDConfig
    from consisid_xdit.sampling import workload

    config, vae, folder = PREVIEW, VAEConfig(), setup.source.model_dir
    if folder is not None:
        checkpoint = read_consisid(folder)
        assert isinstance(checkpoint.transformer, ConsisIDConfig)
        config, vae = checkpoint.transformer, checkpoint.vae
    size = (video.height, video.width, video.num_frames)
    guided = setup.rules.guided(video.cfg_scale) or mesh.cfg.size > 1
    made = workload(config, vae, mesh, *size, guided=guided, dtype=precision(setup).dtype)
    return made.with_text(lambda: setup.text_encoder_dir or folder)


def transformer_files(folder: Path) -> TransformerFiles:
    from consisid_xdit.config import ConsisIDConfig, read_consisid
    from consisid_xdit.weights import transformer_files

    config = read_consisid(folder).transformer
    assert isinstance(config, ConsisIDConfig)
    return transformer_files(folder, config)


def generate(session: Session, video: Video, setup: Setup, stages: Stages) -> Tensor | None:
    assert video.seed is not None
    return session.pipe(
        video.prompt,
        identity=person(session, setup, stages),
        dynamic_cfg=setup.extra["dynamic_cfg"],
        **sampling_options(video),
        **setup.decode_options(),
    )


def decode(session: Session, video: Video, setup: Setup, stages: Stages) -> Tensor | None:
    return cogvideox.decode(session.pipe, video, setup, stages)


_FILE = click.Path(path_type=Path)
PROGRAM = Program(
    name=FORK.program,
    script=str(Path(__file__).resolve()),
    rules=rules,
    make_demo=make_demo,
    demos=(TRAINED, "face"),
    pipeline=pipeline,
    check_weights=check_weights,
    transformer=transformer_files,
    generate=generate,
    decode=decode,
    check=check,
    models=FORK.names,
    workload=workload,
    options=(
        Option(["--id-embeddings"], type=_FILE, help="Identity features in place of --image; needs no face models."),
        Option(["--image"], type=_FILE, callback=require_person, help="Photograph; its largest face is taken."),
        Option(["--save-id-embeddings"], type=_FILE, help="Write the photograph's identity features (safetensors)."),
        Option(["--scheduler"], type=click.Choice(["ddim", "dpm"]), help="Default: the checkpoint's own."),
        Option(["--dynamic-cfg"], is_flag=True, help="Let the guidance vary, as CogVideoX's demo does with dpm."),
    ),
)


def main() -> None:
    sys.exit(program.main(PROGRAM))


if __name__ == "__main__":
    main()
