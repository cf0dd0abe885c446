"""What jobs look like on the page: HTML of values, everything that a user has said escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

from xdit_serve.board import Live
from xdit_serve.offers import Offer
from xdit_serve.records import Record

CSS = """
.gradio-container { max-width: 78rem !important; margin: 0 auto; }
footer { display: none !important; }
.job { display: grid; gap: .5rem; }
.job video, .job img { width: 100%; border-radius: .4rem; background: #111; image-rendering: auto; }
.job img.preview { height: 16rem; object-fit: contain; }
.job p { margin: 0; overflow-wrap: anywhere; }
.job .settings { font-size: .8rem; opacity: .75; }
.job [role=progressbar] { height: .6rem; border-radius: .3rem; background: rgba(128,128,128,.3); overflow: hidden; }
.job [role=progressbar] > div { height: 100%; background: var(--color-accent, #4a6cf7); transition: width .5s; }
.made { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.made > :has(.job:empty) { display: none; }
.problem { color: var(--error-text-color, #b00020); }
"""
NAMES: Mapping[str, str] = {
    "size": "",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "seed": "seed",
}
"""Settings that are shown under a video, with the word behind or before the value."""


def problem(text: str) -> str:
    return f'<p class="problem" role="alert">{escape(text)}</p>' if text else ""


def about(offer: Offer) -> str:
    """What one may expect of a model, in a line or two."""
    if not offer.demo:
        return ""
    if not offer.name.endswith("-demo"):
        return "A demo with random weights: what it draws is noise. It shows that everything runs."
    text = "A small demo. It draws one big or small shape (circle, square, ...) in a colour, moving in a direction"
    return f"{text} on a black background, and nothing else."


def running(job: Record, live: Live, place: int | None) -> str:
    """A job that waits or runs: where it is, and a picture where there is one."""
    if place is not None:
        text = "Next in the queue." if place == 0 else f"{place} {'video' if place == 1 else 'videos'} before this one."
    else:
        text = _moment(live)
    percent = live.percent if place is None else 0
    picture = ""
    if live.preview:
        data = base64.b64encode(live.preview).decode()
        picture = (
            f'<img class="preview" alt="Preview after step {live.preview_step}" src="data:image/png;base64,{data}">'
        )
    return (
        f'<div class="job"><p>{escape(_shortened(job))}</p>{picture}'
        f'<div role="progressbar" aria-label="Progress" aria-valuenow="{percent}" aria-valuemin="0" '
        f'aria-valuemax="100"><div style="width:{percent}%"></div></div><p class="settings">{escape(text)}</p></div>'
    )


def ended(job: Record) -> str:
    """A job that has ended: what it made, to play, with its settings; or why it made nothing."""
    if job.status == "failed":
        reason = problem(f"Failed: {job.message or 'no reason is known'}")
        return f'<div class="job"><p>{escape(_shortened(job))}</p>{reason}</div>'
    kind = "images" if job.kind == "image" else "videos"
    source = f"/v1/{kind}/{escape(job.id)}/content"
    media = (
        f'<img alt="{escape(_shortened(job))}" src="{source}">'
        if job.kind == "image"
        else f'<video controls loop muted playsinline preload="metadata" src="{source}"></video>'
    )
    return (
        f'<div class="job">{media}<p>{escape(_shortened(job))}</p>'
        f'<p class="settings">{escape(settings(job))} <a href="{source}" download>Download</a></p></div>'
    )


def settings(job: Record) -> str:
    """Model, size, frames, steps, guidance and seed in a line; and how long it took."""
    parts = [job.model]
    for name, word in NAMES.items():
        value: Any = job.shown.get(name)
        if value is not None:
            parts.append(f"{word} {value}" if word in ("seed", "guidance") else f"{value} {word}".strip())
    took = sum(job.seconds.values())
    return " · ".join(parts) + (f" · made in {duration(took)}." if took else ".")


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _moment(live: Live) -> str:
    progress = f": {live.unit} {live.step} of {live.steps}" if live.steps and live.unit in ("step", "chunk") else ""
    remaining = "" if live.seconds_left is None else f", about {duration(max(1.0, live.seconds_left))} left"
    return f"{live.stage.capitalize()}{progress}{remaining}."


def _shortened(job: Record) -> str:
    text = str(job.shown.get("prompt") or "")
    return text if len(text) <= 300 else text[:299] + "…"
