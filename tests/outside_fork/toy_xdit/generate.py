"""The videos of one request, start to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.registry.request import Request, as_wrong_use
from common.run.outputs import outputs
from common.system.progress import Report
from toy_xdit.config import RATE

if TYPE_CHECKING:
    from common.parallel.mesh import Mesh


def generate(request: Request, mesh: Mesh, report: Report) -> None:
    """Make every picture or video of a request. Runs in every rank."""
    from common.video.files import Audio
    from toy_xdit.pipeline import ToyPipeline

    with as_wrong_use(), report.stage("opening the checkpoint", quiet=True):
        pipe = ToyPipeline.from_pretrained(request.folder, mesh, request.runtime, report)
        pipe.check_weights()
    for output in outputs(request, mesh, report):
        video, made = output.video, vars(output.video.sampling).copy()
        del made["cfg_scale"]
        frames, samples = pipe(video.prompt, seed=output.seed, decode=request.decode, **made)
        output.write(frames, None if samples is None else Audio(samples, RATE))
