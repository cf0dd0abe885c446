"""The videos of one request, start to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.registry.request import Request, as_wrong_use
from common.run.outputs import outputs
from common.system.progress import Report

if TYPE_CHECKING:
    from common.parallel.mesh import Mesh


def generate(request: Request, mesh: Mesh, report: Report) -> None:
    """Make every video of a request. Runs in every rank."""
    from cogvideox_xdit.demo import IMAGE, is_random
    from cogvideox_xdit.pipeline import CogVideoXPipeline

    options = request.options
    with as_wrong_use(), report.stage("opening the checkpoint", quiet=True):
        pipe = CogVideoXPipeline.from_pretrained(
            request.folder, mesh, request.runtime, report, scheduler=options.scheduler
        )
        image = options.image
        if image is None and request.source.demo is not None and pipe.config.image_channels:
            image = pipe.model_dir / IMAGE
        pipe.config.check_task(image is not None, options.video is not None)
        starts_from_frames = image is not None or options.video is not None
        pipe.check_weights(request.sampled, frames=request.sampled and starts_from_frames)
    if request.source.demo is not None and is_random(pipe.model_dir):
        report.note("this demo checkpoint has random weights: the picture is noise")
    for output in outputs(request, mesh, report):
        video = output.video
        latents = output.kept(pipe.config.out_channels, pipe.vae_config)
        if latents is None:
            latents = pipe(
                video.prompt,
                video.negative_prompt,
                seed=output.seed,
                image=image,
                video=options.video,
                fit=options.fit,
                strength=options.strength,
                dynamic_cfg=options.dynamic_cfg,
                output="latent",
                keeper=output.keeper,
                **vars(video.sampling),
            )
            output.keep(latents, pipe.vae_config)
        assert latents is not None
        with output.opened() as frames:
            pipe.decode(latents, request.decode, frames)
