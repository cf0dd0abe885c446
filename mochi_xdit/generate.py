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
    from mochi_xdit.demo import is_random
    from mochi_xdit.pipeline import MochiPipeline

    with as_wrong_use(), report.stage("opening the checkpoint", quiet=True):
        pipe = MochiPipeline.from_pretrained(request.folder, mesh, request.runtime, report)
        has_text = any(v.prompt or (v.negative_prompt and request.guided(v)) for v in request.videos)
        pipe.check_weights(sample=request.sampled, text=has_text)
    if request.source.demo is not None and is_random(pipe.model_dir):
        report.note("the demo checkpoint has random weights: the picture is noise")
    for output in outputs(request, mesh, report):
        video = output.video
        latents = output.kept(pipe.config.channels, pipe.vae_config)
        if latents is None:
            latents = pipe(
                video.prompt,
                video.negative_prompt,
                seed=output.seed,
                output="latent",
                keeper=output.keeper,
                **vars(video.sampling),
                **vars(request.options),
            )
            output.keep(latents, pipe.vae_config)
        assert latents is not None
        with output.opened() as frames:
            pipe.decode(latents, request.decode, frames)
