"""What the page's buttons do: the same doors as the API's, for the owner whose browser asks. No Gradio here."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from xdit_serve.admission import unavailable
from xdit_serve.board import Live
from xdit_serve.errors import ApiError
from xdit_serve.offers import Offer
from xdit_serve.page import looks
from xdit_serve.records import Kind, Record
from xdit_serve.service import Service
from xdit_serve.store import StoreError

KINDS: tuple[Kind, ...] = ("video", "image")
ACTIVE, SHOWN = 4, 12
"""Jobs under way, and ended ones, that the page has room for."""


@dataclass(frozen=True)
class Moment:
    """What one owner sees at one time."""

    active: tuple[tuple[str, str], ...]
    """(job, HTML) of those that wait or run, the oldest first."""
    ended: tuple[tuple[str, str], ...]
    """The same of those that have ended, the newest first."""
    more: int
    """Active ones for which there is no room."""
    signature: str
    """Changes when what has ended does."""


class Actions:
    """All may be called from any thread. ApiError for what cannot be."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def make(self, owner: str, fields: dict[str, Any], picture: bytes | None) -> None:
        """Queue what the form says. fields: as of the API, empty ones left out."""
        self.service.admitting()
        values = {name: value for name, value in fields.items() if value not in (None, "")}
        offer = self.offer(str(values.get("model")))
        if picture is not None:
            values["input_reference"] = "data:;base64," + base64.b64encode(picture).decode()
        admission = self.service.admission
        if offer.kind == "image":
            values.pop("seconds", None)
            admission.pictures(owner, values)
        else:
            admission.video(owner, values)
        self.service.dispatcher.wake()

    def delete(self, owner: str, job: str) -> None:
        """Cancel it, or remove it with what it made; one that is gone is no error."""
        if self.job(owner, job) is not None:
            try:
                self.service.dispatcher.delete(job)
            except StoreError as error:
                raise unavailable(error) from None

    def job(self, owner: str, job: str) -> Record | None:
        """None for one that is gone."""
        try:
            return self.service.store.get(job, owner)
        except StoreError as error:
            raise unavailable(error) from None

    def offer(self, name: str) -> Offer:
        for offer in self.service.settings.offers:
            if offer.name == name:
                return offer
        raise ApiError(400, f"model {name[:80]!r} is not offered", "model")

    def moment(self, owner: str) -> Moment:
        """What there is to see now. StoreError where the store does not answer."""
        store, board = self.service.store, self.service.dispatcher.board
        jobs: list[Record] = []
        for kind in KINDS:
            jobs += store.list(owner, kind, None, ACTIVE + SHOWN + 50, True)
        jobs.sort(key=lambda job: job.number, reverse=True)
        active = [job for job in reversed(jobs) if not job.ended]
        ended = [job for job in jobs if job.ended][:SHOWN]
        entries = []
        for job in active[:ACTIVE]:
            place = store.place(job) if job.status == "queued" else None
            entries.append((job.id, looks.running(job, board.get(job.id) if place is None else Live(), place)))
        return Moment(
            tuple(entries),
            tuple((job.id, looks.ended(job)) for job in ended),
            max(0, len(active) - ACTIVE),
            ",".join(f"{job.id}:{job.status}" for job in ended),
        )
