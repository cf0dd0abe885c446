"""What a run leaves: each video with its json, complete before the next begins; after a failure nothing by halves."""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any

from common.registry.forks import version
from common.registry.request import Request, Video, WrongUse, settings
from common.run.kept import check_decoder, command_that_decodes, numbers_of
from common.system.files import identity, remove_partial, shown, tell
from common.system.progress import Report, StageRecord
from common.system.stopping import stoppable

if TYPE_CHECKING:
    from torch import Tensor

    from common.parallel.mesh import Mesh
    from common.video.files import Audio
    from common.video.previews import Lesson
    from common.video.states import StateKeeper
    from common.video.writers import FrameWriter


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
        self._latents: Tensor | None = None
        self._first, self._start = len(report.records), time.perf_counter()
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
            entries = {"program": self.request.program, "decoder": numbers_of(decoder), "settings": text}
            save_latents(self.video.latents_file, latents, entries, self.report.warn)
            self._latents = latents

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
        """Write a whole video at once, as `opened` does.

        frames: uint8 (T, H, W, 3) on rank 0, None elsewhere. audio: the sound beside them, on rank 0. Collective.
        """
        with self.opened(audio) as file:
            if frames is not None:
                count, height, width, _ = frames.shape
                file.begin(count, height, width)
                file.add(frames)

    @contextmanager
    def opened(self, audio: Audio | None = None) -> Iterator[GrowingVideo]:
        """Takes the frames of the video on rank 0, as they come.

        Left without an error, it gives the video its name, with its settings inside and the json beside it, and removes
        the latents unless they are to be kept; otherwise nothing of it stays. audio: as of `write`. Collective.
        """
        from common.video.previews import learn

        latents = self._latents if self.request.colours is not None else None
        with GrowingVideo(self.video, self.request, audio, self.mesh.world.size == 1, latents) as file:
            yield file
            of_peers = _gather(self.mesh, self.report.records[self._first :])[1:]
            if not self.mesh.is_main:
                return
            self._complete(file, of_peers)
        if self.request.colours is not None and file.lesson is not None:
            with suppress(OSError):  # of a full disk: there are no previews then
                learn(self.request.colours, file.lesson.sums())
        for path, earlier in zip(self.video.latents_files, self._before):
            if identity(path) == earlier:  # what an earlier run has kept is not ours
                continue
            if self.video.save_latents:
                self.report.note(f"latents: {shown(path)}")
            else:
                with suppress(OSError):
                    path.unlink()
        tell(shown(self.video.output))

    def _complete(self, file: GrowingVideo, of_peers: list[list[StageRecord]]) -> None:
        with stoppable():
            with self.report.stage("writing"):
                writer = file.closed()
            seconds = time.perf_counter() - self._start
            cost = {"seconds": seconds, "stages": _costs(self.report.records[self._first :], of_peers)}
            sidecar = {"program": self.request.program, "settings": file.settings} | cost | _surroundings(self.mesh)
            writer.finish(self.video.sidecar, sidecar)


class GrowingVideo:
    """A video's output while its frames come, see `common.video.decode_video.FrameSink`.

    alone: whether no other rank waits for this one. If others do, a full disk is told in the end (`closed`): who left
    in the middle of a decode would leave them in it. latents: those of which colours are to be learned, in `lesson`.
    Left as a context, it removes what has not got its name.
    """

    def __init__(
        self, video: Video, request: Request, audio: Audio | None, alone: bool, latents: Tensor | None = None
    ) -> None:
        self.video, self.request, self.audio, self.alone = video, request, audio, alone
        self._latents = latents
        self.lesson: Lesson | None = None
        self.settings: dict[str, Any] = {}
        self._writer: FrameWriter | None = None
        self._failed: OSError | None = None

    def __enter__(self) -> GrowingVideo:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(*exc)

    def begin(self, count: int, height: int, width: int) -> None:
        """Open the output; of an earlier beginning nothing stays."""
        from common.video.formats import open_writer
        from common.video.previews import Lesson

        self.__exit__()
        self.lesson = None if self._latents is None else Lesson(self._latents, count, height, width)
        self._writer = self._failed = None
        # Decoded from a file, they need not be what the options say.
        self.settings = settings(self.request, self.video) | {"width": width, "height": height, "num_frames": count}
        video = self.video
        details = (video.prompt, json.dumps(self.settings), self.audio, video.crf)
        with self._in_step():
            self._writer = open_writer(video.target, video.fps, *details)

    def add(self, frames: Tensor) -> None:
        if self._failed is None:
            assert self._writer is not None
            with self._in_step():
                self._writer.add(frames)
        if self.lesson is not None:
            self.lesson.add(frames)

    def closed(self) -> FrameWriter:
        """The writer, all frames in it. Raises OSError where one could not be written, then or now."""
        if self._failed is not None:
            raise self._failed
        assert self._writer is not None
        self._writer.close()
        return self._writer

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.alone:
                raise
            self._failed = error


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
