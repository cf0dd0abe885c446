"""The videos of one request, start to end: one person, read once, in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.registry.request import Request, as_wrong_use
from common.run.outputs import outputs
from common.system.progress import Report
from consisid_xdit.options import missing_packages

if TYPE_CHECKING:
    from common.parallel.mesh import Mesh
    from consisid_xdit.face import IdentityFeatures
    from consisid_xdit.pipeline import ConsisIDPipeline


def generate(request: Request, mesh: Mesh, report: Report) -> None:
    """Make every video of a request. Runs in every rank."""
    from consisid_xdit.demo import is_random
    from consisid_xdit.pipeline import ConsisIDPipeline

    options = request.options
    identity: IdentityFeatures | None = None
    with as_wrong_use(), report.stage("opening the checkpoint", quiet=True):
        pipe = ConsisIDPipeline.from_pretrained(
            request.folder, mesh, request.runtime, report, scheduler=options.scheduler
        )
        pipe.check_weights(request.sampled, frames=request.sampled)
        person = _person(request, pipe.model_dir, report) if request.sampled else (None, None)
        if pipe.mesh.is_main:
            _check_person(*person, pipe)
    if request.source.demo is not None and is_random(pipe.model_dir):
        report.note("this demo checkpoint has random weights: the picture is noise, and its face models know one face")
    for output in outputs(request, mesh, report):
        video = output.video
        latents = output.kept(pipe.config.out_channels, pipe.vae_config)
        if latents is None:
            identity = identity or _identify(pipe, request, person, report)
            latents = pipe(
                video.prompt,
                video.negative_prompt,
                seed=output.seed,
                identity=identity,
                dynamic_cfg=options.dynamic_cfg,
                output="latent",
                keeper=output.keeper,
                **vars(video.sampling),
            )
            output.keep(latents, pipe.vae_config)
        assert latents is not None
        with output.opened() as frames:
            pipe.decode(latents, request.decode, frames)


def _check_person(image: Path | None, file: Path | None, pipe: ConsisIDPipeline) -> None:
    """CheckpointError for identity features, or face models, that will not do; nothing is loaded yet."""
    from consisid_xdit.face import load_identity
    from consisid_xdit.face_files import check_face_files

    if file is not None:
        load_identity(file, pipe.config)
    elif image is not None:
        check_face_files(pipe.model_dir, pipe.config)


def _identify(
    pipe: ConsisIDPipeline, request: Request, person: tuple[Path | None, Path | None], report: Report
) -> IdentityFeatures:
    """Identity features of the person of a request, kept in a file where that was asked for. Collective."""
    from consisid_xdit.face import save_identity

    identity = pipe.identify(*person)
    save = request.options.save_id_embeddings
    if save is not None and pipe.mesh.is_main:
        save_identity(save, identity)
        report.note(f"identity features: {save}")
    return identity


def _person(request: Request, folder: Path, report: Report) -> tuple[Path | None, Path | None]:
    """The photograph, or the file of identity features; a demo has one of its own."""
    from consisid_xdit.demo import IDENTITY, PORTRAIT, SHOWN, is_random

    image, file = request.options.image, request.options.id_embeddings
    if image is not None or file is not None:
        return image, file
    if not is_random(folder):
        return None, folder / next(iter(SHOWN))
    if missing := missing_packages():
        report.note(f"no {' and no '.join(missing)}: the demo takes made-up identity features, not its portrait's")
        return None, folder / IDENTITY
    return folder / PORTRAIT, None
