"""Jobs and models as clients are told of them: the objects of OpenAI's API, and a few fields beside."""

from __future__ import annotations

from typing import Any

from fastapi import Response

from xdit_serve.board import Live
from xdit_serve.errors import as_json
from xdit_serve.offers import Offer
from xdit_serve.records import Record

POLL_MS = 1000
TOLD = ("previews", "input_reference")
"""Of what is stored, what is no field of the object itself."""


def json_answer(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(value), status, headers, media_type="application/json")


def video(job: Record, live: Live, keep_seconds: float, place: int | None = None) -> dict[str, Any]:
    """A job as a video object. place: how many wait before it."""
    running, done = job.status == "in_progress", job.status == "completed"
    answer = {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": 100 if done else live.percent if running else 0,
        "created_at": int(job.created),
        "completed_at": int(job.completed) if done and job.completed else None,
        "expires_at": int(job.completed + keep_seconds) if job.completed and keep_seconds < 1e12 else None,
        "error": {"code": job.code, "message": job.message} if job.status == "failed" else None,
        "remixed_from_video_id": None,
    }
    answer |= {name: value for name, value in job.shown.items() if name not in TOLD}
    if running:
        answer |= moment(live)
    if place is not None:
        answer["queue_position"] = place
    return answer


def moment(live: Live) -> dict[str, Any]:
    """Where a running job is: `step` of `steps` are done; seconds_left of the whole job, where that is known."""
    seconds = None if live.seconds_left is None else round(live.seconds_left, 1)
    return {"stage": live.stage, "step": live.step, "steps": live.steps, "unit": live.unit, "seconds_left": seconds}


def model(offer: Offer, since: float) -> dict[str, Any]:
    """A model object. The rest: its own defaults, and which fields it takes."""
    rules = offer.rules
    answer: dict[str, Any] = {"id": offer.name, "object": "model", "created": int(since), "owned_by": "xdit-serve"}
    answer |= {"kind": offer.kind, "program": offer.fork.program, "demo": offer.demo}
    answer |= {"size": f"{rules.width}x{rules.height}", "num_inference_steps": rules.num_steps}
    answer |= {"guidance_scale": rules.cfg_scale, "input_reference": list(offer.inputs.values())}
    if offer.kind == "video":
        answer |= {"num_frames": rules.num_frames, "fps": rules.fps}
    return answer | {"fields": sorted(offer.fields)}
