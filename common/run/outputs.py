"""What a run leaves: each video with its json, complete before the next begins; after a failure nothing by halves."""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any

from common.registry.request import Request, Video, WrongUse, settings
from common.run.kept import check_decoder, command_that_decodes, numbers_of
from common.run.options import version
from common.system.files import identity, remove_partial, shown, tell
from common.system.progress import Report, StageRecord
from common.system.stopping import stoppable

if TYPE_CHECKING:
    from torch import Tensor

    from common.parallel.mesh import Mesh
    from common.video.files import Audio
    from common.video.states import StateKeeper


def clean_up(request: Request, since: float) -> str:
    """After a failure: remove what is half written; name the latents this run has finished, for `--from-latents`."""
    files = []
    for video in request.videos:
        for path in (video.output, *video.beside, *video.latents_files):
            remove_partial(path)
        for path in video.latents_files if video.latents is None else (video.latents,):
            with suppress(OSError):
                if path.stat().st_mtime >= since or path == video.latents:
                    files.append(command_that_decodes(request, video, path))
    return f"; finished latents are kept, go on with: {shown(shlex.join(files[-1]))}" if files else ""


class Output:
    """One video to make, and where it goes. Made when the work on it begins, since it measures that.

    keeper: for the pipeline, of the state after each step.
    """

    def __init__(
        self, video: Video, request: Request, mesh: Mesh, report: Report, keeper: StateKeeper | None = None
    ) -> None:
        self.keeper = keeper
        self.video, self.request, self.mesh, self.report = video, request, mesh, report
        self._first, self._began = len(report.records), time.perf_counter()
        self._before = [identity(path) for path in video.latents_files]

    @property
    def seed(self) -> int:
        """The one that was given, or that rank 0 drew."""
        assert self.video.seed is not None
        return self.video.seed

    def keep(self, latents: Tensor | None, decoder: object) -> None:
        """Put final latents (1, C, T, h, w), with every setting they come from, where a decode that fails leaves them.

        decoder: the numbers of the one that they are for, a dataclass.
        """
        from common.video.latents import save_latents

        if self.mesh.is_main:
            assert latents is not None
            text = json.dumps(settings(self.request, self.video))
            told = {"program": self.request.program, "decoder": numbers_of(decoder), "settings": text}
            save_latents(self.video.latents_file, latents, told, self.report.warn)

    def kept(self, channels: int, decoder: object) -> Tensor | None:
        """The latents (1, C, T, h, w) of --from-latents, None without it; WrongUse says what is wrong with them.

        decoder: the numbers of the one that is to decode them.
        """
        from common.video.latents import load_latents

        path = self.video.latents
        if path is None:
            return None
        try:
            latents = load_latents(path, channels)
            check_decoder(path, numbers_of(decoder), self.video.made or {})
            return latents
        except ValueError as error:
            raise WrongUse([f"--from-latents {error}"]) from None

    def write(self, frames: Tensor | None, audio: Audio | None = None) -> None:
        """Write the video with its settings, the json, and remove the latents unless they are to be kept.

        frames: uint8 (T, H, W, 3) on rank 0, None elsewhere. audio: the sound beside them, on rank 0. Collective.
        """
        records = self.report.records[self._first :]
        of_peers = _gather(self.mesh, records)[1:]
        if not self.mesh.is_main:
            return
        assert frames is not None
        self._write(frames, audio, of_peers)
        for path, earlier in zip(self.video.latents_files, self._before):
            if identity(path) == earlier:  # what an earlier run has kept is not ours
                continue
            if self.video.save_latents:
                self.report.note(f"latents: {shown(path)}")
            else:
                with suppress(OSError):
                    path.unlink()
        tell(shown(self.video.output))

    def _write(self, frames: Tensor, audio: Audio | None, of_peers: list[list[StageRecord]]) -> None:
        from common.video.formats import open_writer

        video = self.video
        count, height, width, _ = frames.shape  # decoded from a file, they need not be what the options say
        sidecar = settings(self.request, video) | {"width": width, "height": height, "num_frames": count}
        comment = json.dumps(sidecar)
        with stoppable(), open_writer(video.target, video.fps, video.prompt, comment, audio, video.crf) as file:
            with self.report.stage("writing"):
                file.add(frames)
                file.close()
            seconds = time.perf_counter() - self._began
            cost = {"seconds": seconds, "stages": _costs(self.report.records[self._first :], of_peers)}
            told = {"program": self.request.program, "settings": sidecar} | cost | _surroundings(self.mesh)
            file.finish(video.sidecar, told)


def outputs(request: Request, mesh: Mesh, report: Report) -> Iterator[Output]:
    """An `Output` for each video of a request that is not made yet; their seeds are drawn."""
    from common.run.resume import keeper_of

    videos = request.videos
    for number, video in ((index + 1, videos[index]) for index in request.left):
        if len(videos) > 1:
            report.about = f"video {number} of {len(videos)}"
            report.note(f"{report.about}: {video.prompt}")
        if video.latents is None:
            report.note(f"seed {video.seed}")
        keeper = keeper_of(request, mesh, number - 1)
        try:
            yield Output(video, request, mesh, report, keeper)
        finally:
            with suppress(OSError):  # of a full disk or memory: the sampling did not need it
                keeper.wait()  # whatever ended the video, nothing of it is written later


def _gather(mesh: Mesh, records: list[StageRecord]) -> list[list[StageRecord]]:
    if mesh.world.group is None:
        return [records]
    import torch.distributed as dist

    gathered: list[Any] = [None] * mesh.world.size
    dist.all_gather_object(gathered, records, group=mesh.world.group)
    return gathered


def _costs(mine: list[StageRecord], of_peers: list[list[StageRecord]]) -> list[dict[str, Any]]:
    """Seconds and peak memory by stage: rank 0's seconds, the bytes of every rank that ran the stage."""
    costs = []
    for record in mine:
        peaks = [
            r.peak_bytes for r in (record, *(other for peer in of_peers for other in peer)) if r.name == record.name
        ]
        costs.append(record.as_dict() | {"peak_bytes": max(peaks), "peak_bytes_by_rank": peaks})
    return costs


def _surroundings(mesh: Mesh) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
    versions: dict[str, str | None] = {"xdit-zoo": version(), "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["cuda"] = torch.version.cuda
    return {"device": device, "versions": versions, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
