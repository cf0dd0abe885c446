"""What is let in: fields become a checked request and a stored job, or a refusal in the command line's words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.registry.request import Request, WrongUse, draw_seeds
from xdit_serve import fields as reading
from xdit_serve import uploads
from xdit_serve.building import INPUT, build
from xdit_serve.errors import ApiError
from xdit_serve.fields import Asked
from xdit_serve.offers import Offer, find
from xdit_serve.records import JobSpec, Kind, Record
from xdit_serve.store import QueueFull, Store, StoreError, new_id

MOST_PICTURES = 10
OUTPUTS: Mapping[Kind, str] = {"video": "video.mp4", "image": "image.png"}


@dataclass(frozen=True)
class Admission:
    """Takes a client's fields and queues jobs."""

    store: Store
    offers: Sequence[Offer]
    own: tuple[str, ...]
    """Words of the command line that all jobs get."""
    most: int
    """Jobs that may wait."""
    memory: Callable[[str, Request], str]
    """(model, request) -> why memory does not suffice, or empty."""
    job_seconds: Callable[[], float]
    """Seconds that a job takes, by what was seen."""

    def video(self, owner: str, fields: Mapping[str, Any]) -> Record:
        """Queue a video. ApiError where that cannot be."""
        rest = dict(fields)
        offer = self._offer(rest, "video")
        content = rest.pop(uploads.FIELD, None)
        return self._admit(offer, owner, rest, None if content is None else uploads.content_of(content), 1)[0]

    def pictures(self, owner: str, fields: Mapping[str, Any]) -> list[Record]:
        """Queue one or several pictures, each with the next seed. ApiError where that cannot be."""
        rest = dict(fields)
        offer = self._offer(rest, "image")
        count = rest.pop("n", None)
        count = 1 if count is None else reading.whole("n", count)
        if not 1 <= count <= MOST_PICTURES:
            raise ApiError(400, f"n: {count} is not a number from 1 to {MOST_PICTURES}", "n")
        return self._admit(offer, owner, rest, None, count)

    def _offer(self, rest: dict[str, Any], kind: Kind) -> Offer:
        name, user = rest.pop("model", None), rest.pop("user", None)
        if user is not None:
            reading.text("user", user, 512)
        return find(self.offers, None if name is None else reading.text("model", name, 512), kind)

    def _admit(self, offer: Offer, owner: str, rest: dict[str, Any], content: bytes | None, count: int) -> list[Record]:
        previews = rest.pop("previews", None)
        extras = {"previews": True if previews is None else reading.boolean("previews", previews)}
        if rest.get("prompt") is None:
            raise ApiError(400, f"--prompt is missing; say what the {offer.kind} shows", "prompt")
        arguments = reading.read(offer, rest)
        first = new_id(offer.kind)
        ids = [first]
        try:
            if content is not None:
                self._keep(offer, first, content)
            request = self._request(offer, first, arguments)
            if problem := self.memory(offer.name, request):
                raise ApiError(400, problem, None, "not_enough_memory")
            seed = draw_seeds(request.videos)[0].seed
            assert seed is not None
            extras |= {"input_reference": content is not None}
            jobs = []
            for place in range(count):
                ids += [new_id(offer.kind)] if place else []
                description = describe(offer, request, seed + place) | extras
                words = (*arguments.words, f"--seed={seed + place}")
                jobs.append(JobSpec(ids[-1], owner, offer.kind, offer.name, words, description, OUTPUTS[offer.kind]))
                self.store.make_folder(ids[-1])
            self.store.flush(first)
            return self.store.admit(jobs, self.most)
        except BaseException as error:
            for job in ids:
                self.store.drop_folder(job)
            if isinstance(error, QueueFull):
                wait = min(3600, max(1, math.ceil(self.job_seconds())))
                raise ApiError(429, str(error), retry=wait) from None
            if isinstance(error, StoreError):
                raise unavailable(error) from None
            raise

    def _keep(self, offer: Offer, job: str, content: bytes) -> None:
        """A client's file into its job's folder, under a name of ours."""
        option, kind = uploads.option_for(offer, content)
        data = uploads.checked(content, kind)
        folder = self.store.make_folder(job)
        try:
            (folder / f"{INPUT}{option}").write_bytes(data)
        except OSError as error:
            raise StoreError(f"the data folder cannot be used: {error.strerror}") from None

    def _request(self, offer: Offer, job: str, arguments: Asked) -> Request:
        folder = self.store.make_folder(job)
        try:
            return build(offer, self.own, arguments.words, folder, OUTPUTS[offer.kind])
        except WrongUse as wrong:
            problems = [problem.replace(f"{folder}/", "") for problem in wrong.problems]
            if ours := [problem for problem in problems if problem.startswith(("--output", "--model-dir"))]:
                raise StoreError(ours[0]) from None
            param = next((field for problem in problems if (field := arguments.field_of(problem))), None)
            raise ApiError(400, "; ".join(problems), param) from None


def unavailable(error: StoreError) -> ApiError:
    return ApiError(503, str(error), retry=5)


def describe(offer: Offer, request: Request, seed: int) -> dict[str, Any]:
    """What clients are told of a job, by the names that they may send it with again."""
    video = request.videos[0]
    sampling = video.sampling
    fields: dict[str, Any] = {"prompt": video.prompt, "negative_prompt": video.negative_prompt}
    fields |= {"size": f"{sampling.width}x{sampling.height}", "seed": seed}
    fields |= {"num_inference_steps": sampling.num_steps, "guidance_scale": sampling.cfg_scale}
    if offer.kind == "video":
        fields |= {
            "seconds": f"{sampling.num_frames / video.fps:.6g}",
            "num_frames": sampling.num_frames,
            "fps": video.fps,
        }
    own = [option.name for option in offer.fork.options.command_line if option.name in offer.fields]
    values = {name: getattr(request.options, name) for name in own if name is not None}
    return fields | {name: value for name, value in values.items() if value is not None}
