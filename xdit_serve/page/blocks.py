"""The page itself: a form, what is under way, what has been made. Gradio draws it; `Actions` does the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from xdit_serve.errors import ApiError
from xdit_serve.offers import Offer
from xdit_serve.page import looks
from xdit_serve.page.actions import ACTIVE, SHOWN, Actions
from xdit_serve.sessions import Sessions
from xdit_serve.store import StoreError

EVERY_SECONDS = 1.0
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of events: other programs have the API for this."""
FORM = ("prompt", "model", "size", "seconds", "negative_prompt", "num_inference_steps", "guidance_scale", "seed")
"""The form's fields, by the names that the API has for them."""
BY_MODEL = ("prompt", "size", "seconds", "num_inference_steps", "guidance_scale")
"""Those whose defaults are the model's."""


@dataclass(frozen=True)
class Slot:
    """A place for one job: hidden while there is none."""

    box: gr.Column
    job: gr.State
    shown: gr.HTML
    buttons: tuple[gr.Button, ...]

    @property
    def parts(self) -> list[Any]:
        return [self.box, self.job, self.shown]


def theme() -> gr.themes.Base:
    """With fonts of the reader's own system: nothing is loaded from elsewhere."""
    return gr.themes.Soft(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))


class Page:
    """One server's page. Its methods are what Gradio calls, each with the request of the browser that asks."""

    def __init__(self, actions: Actions, sessions: Sessions) -> None:
        self.actions, self.sessions = actions, sessions

    def draw(self) -> gr.Blocks:
        with gr.Blocks(title="xdit-serve", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._draw_form()
                with gr.Column(scale=3, min_width=320):
                    gr.Markdown("## Under way")
                    self.note = gr.Markdown("Nothing is being made.")
                    self.active = [_slot(["Cancel"], 320) for _ in range(ACTIVE)]
            gr.Markdown("## Made")
            with gr.Row(elem_classes="made"):
                self.ended = [_slot(["Again with these", "Delete"], 260) for _ in range(SHOWN)]
            self.seen = gr.State("")
            self._wire(blocks)
        return blocks

    def _draw_form(self) -> None:
        offers = self.actions.service.settings.offers
        rules = offers[0].rules
        gr.Markdown("## Make a video")
        prompt = gr.Textbox(label="Prompt", lines=3, value=rules.default_prompt or "", autofocus=True)
        model = gr.Dropdown([offer.name for offer in offers], value=offers[0].name, label="Model")
        self.about = gr.Markdown()
        self.picture = gr.File(
            label="Picture to begin with", type="binary", file_types=["image", "video"], height=120, visible=False
        )
        with gr.Row():
            size = gr.Dropdown(label="Size", allow_custom_value=True, min_width=120)
            seconds = gr.Number(label="Seconds", minimum=0, min_width=80)
        with gr.Accordion("Advanced settings", open=False):
            negative = gr.Textbox(label="Negative prompt", placeholder="the model's own")
            with gr.Row():
                steps = gr.Number(label="Steps", precision=0, min_width=80)
                scale = gr.Number(label="Guidance", min_width=80)
                seed = gr.Textbox(label="Seed", placeholder="drawn", min_width=80)
        self.button = gr.Button("Make", variant="primary")
        self.problem = gr.HTML()
        self.form: dict[str, Any] = dict(zip(FORM, (prompt, model, size, seconds, negative, steps, scale, seed)))

    def _wire(self, blocks: gr.Blocks) -> None:
        form, model = self.form, self.form["model"]
        jobs = [self.note, self.seen, *(part for slot in (*self.active, *self.ended) for part in slot.parts)]
        for event in (self.button.click, form["prompt"].submit):
            event(self.make, [self.picture, *form.values()], [self.problem, *jobs], **PRIVATE)
        outputs = [self.about, self.picture, *(form[name] for name in BY_MODEL)]
        for event in (model.input, blocks.load):
            event(self.choose, [model, form["prompt"]], outputs, **PRIVATE)
        for slot in (*self.active, *self.ended):
            slot.buttons[-1].click(self.delete, [slot.job], jobs, **PRIVATE)
        for slot in self.ended:
            slot.buttons[0].click(self.again, [slot.job], [self.about, self.picture, *form.values()], **PRIVATE)
        gr.Timer(EVERY_SECONDS).tick(self.look, [self.seen], jobs, **PRIVATE)
        blocks.load(self.refresh, None, jobs, **PRIVATE)

    def owner(self, request: gr.Request) -> str:
        owner = self.sessions.owner({b"cookie": request.headers.get("cookie", "").encode("latin-1")})
        if owner is None:
            raise gr.Error("open the page again: this server wants one of its keys")
        return owner

    def make(
        self,
        picture: bytes | None,
        prompt: str,
        model: str,
        size: str,
        seconds: float | None,
        negative: str,
        steps: int | None,
        scale: float | None,
        seed: str,
        request: gr.Request,
    ) -> list[Any]:
        """Queue a video, or say in the form why not."""
        fields = dict(zip(FORM, (prompt, model, size, seconds, negative, steps, scale, seed)))
        try:
            self.actions.make(self.owner(request), fields, picture)
        except (ApiError, StoreError) as error:
            return [looks.problem(str(error)), *self.refresh(request)]
        return ["", *self.refresh(request)]

    def refresh(self, request: gr.Request) -> list[Any]:
        return self.look(None, request)

    def look(self, signature: str | None, request: gr.Request) -> list[Any]:
        """What has changed. signature: of what the browser shows of the ended ones, which may be playing."""
        try:
            now = self.actions.moment(self.owner(request))
        except StoreError as error:
            return [f"The server cannot look: {error}", *[gr.skip()] * (1 + 3 * (ACTIVE + SHOWN))]
        note = "" if now.active else "Nothing is being made."
        note = f"{now.more} more wait behind these." if now.more else note
        updates = [note, now.signature, *_filled(now.active, ACTIVE)]
        if signature == now.signature:
            return updates + [gr.skip()] * (3 * SHOWN)
        return updates + _filled(now.ended, SHOWN)

    def delete(self, job: str, request: gr.Request) -> list[Any]:
        """Cancel a job, or remove what it made."""
        try:
            self.actions.delete(self.owner(request), job)
        except ApiError as error:
            raise gr.Error(str(error)) from None
        return self.refresh(request)

    def again(self, job: str, request: gr.Request) -> list[Any]:
        """The form as it was for a job."""
        try:
            record = self.actions.job(self.owner(request), job)
            if record is None:
                raise gr.Error("that video is gone")
            offer = self.actions.offer(record.model)
        except ApiError as error:  # the model of an earlier start may not be offered any more
            raise gr.Error(str(error)) from None
        values = {name: record.shown.get(name) for name in FORM} | {"model": record.model}
        values["seed"] = str(record.shown.get("seed", ""))
        updates = {name: gr.update(value=value) for name, value in values.items()}
        seconds = float(record.shown.get("seconds", 0))
        updates["seconds"] = gr.update(value=seconds, visible=offer.kind == "video")
        return [*_about(offer), *(updates[name] for name in FORM)]

    def choose(self, model: str, prompt: str) -> list[Any]:
        """A model's own defaults. A prompt that somebody wrote stays."""
        offer = self.actions.offer(model)
        rules = offer.rules
        own = {one.rules.default_prompt for one in self.actions.service.settings.offers}
        values: dict[str, Any] = {"prompt": rules.default_prompt or "" if prompt in own | {"", None} else prompt}
        size = f"{rules.width}x{rules.height}"
        sizes = [f"{width}x{height}" for width, height in rules.sizes] or [size]
        values["size"] = gr.update(choices=sizes, value=size)
        values["seconds"] = gr.update(value=round(rules.num_frames / rules.fps, 2), visible=offer.kind == "video")
        values |= {"num_inference_steps": rules.num_steps, "guidance_scale": rules.cfg_scale}
        return [*_about(offer), *(values[name] for name in BY_MODEL)]


def _about(offer: Offer) -> list[Any]:
    """What is said of a model, and the place for a file where it starts from one."""
    kinds = list(offer.inputs.values())
    label = f"{' or '.join(kinds).capitalize()} to begin with"
    file = gr.update(visible=bool(kinds), label=label, value=None)
    return [gr.update(value=looks.about(offer), visible=bool(looks.about(offer))), file]


def _slot(words: Sequence[str], width: int) -> Slot:
    with gr.Column(visible=False, min_width=width) as box:
        job, html = gr.State(""), gr.HTML()
        with gr.Row():
            buttons = tuple(gr.Button(word, size="sm", min_width=80) for word in words)
    return Slot(box, job, html, buttons)


def _filled(jobs: Sequence[tuple[str, str]], places: int) -> list[Any]:
    updates: list[Any] = []
    for i in range(places):
        job, html = jobs[i] if i < len(jobs) else ("", "")
        updates += [gr.update(visible=bool(job)), job, html]
    return updates
