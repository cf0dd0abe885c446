"""The routes of /v1/images: pictures, from models that make them."""

from __future__ import annotations

import base64
import time
from typing import Any

import anyio
from fastapi import APIRouter, Request, Response

from xdit_serve import answers
from xdit_serve.errors import ApiError
from xdit_serve.records import Record
from xdit_serve.service import Service
from xdit_serve.videos import failure, file_answer

FORMATS = ("b64_json", "url")


def image_routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/images/generations")
    async def generate(request: Request) -> Response:
        owner = service.owner(request)
        service.admitting()
        fields = await service.bodies.fields(request)
        form = fields.pop("response_format", None) or FORMATS[0]
        if form not in FORMATS:
            raise ApiError(400, f"response_format is neither {' nor '.join(FORMATS)}", "response_format")
        jobs: list[Record] = await service.ask(service.admission.pictures, owner, fields)
        service.dispatcher.wake()
        return answers.json_answer({"created": int(time.time()), "data": await _made(service, jobs, request, form)})

    @routes.get("/v1/images/{name}/content")
    async def picture(request: Request, name: str) -> Response:
        return await file_answer(service, await service.job(name, service.viewer(request), "image"))

    return routes


async def _made(service: Service, jobs: list[Record], request: Request, form: str) -> list[dict[str, Any]]:
    """The pictures when all are there; when one fails or the client leaves, the rest is not made."""
    pictures = []
    try:
        for job in jobs:
            record = await service.ended(job, request)
            if record.status == "failed":
                raise failure(record)
            if form == "url":
                pictures.append({"url": str(request.url_for("picture", name=record.id))})
            else:
                content = await anyio.to_thread.run_sync(service.store.output_of(record).read_bytes)
                pictures.append({"b64_json": base64.b64encode(content).decode()})
    except ApiError as error:
        if error.code != "leaving":
            for job in jobs[len(pictures) :]:
                await service.ask(service.dispatcher.delete, job.id)
        raise
    return pictures
