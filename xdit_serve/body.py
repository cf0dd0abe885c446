"""What a client sends, read within bounds of size and time, as plain fields."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from xdit_serve.errors import ApiError
from xdit_serve.uploads import FIELD, MOST_BYTES

MOST_BODY = MOST_BYTES * 4 // 3 + (1 << 20)
"""A file as base64, and the rest."""
MOST_FIELDS = 100


@dataclass(frozen=True)
class Bodies:
    """Reads bodies."""

    seconds: float
    """How long a whole body may take."""
    room: anyio.Semaphore
    """How many bodies are read at once, each in memory."""

    async def fields(self, request: Request) -> dict[str, Any]:
        """The fields of a JSON object or of a form; a file is bytes. ApiError."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            with anyio.fail_after(self.seconds):
                async with self.room:
                    if kind == "application/json":
                        return await asyncio.to_thread(_object, b"".join([part async for part in _bounded(request)]))
                    if kind == "multipart/form-data":
                        return await _form(request)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.seconds:g} s") from None
        except ClientDisconnect:
            raise ApiError(400, "the client left before its body had come") from None
        raise ApiError(415, "the body has to be application/json or multipart/form-data; say so in Content-Type")


async def _bounded(request: Request) -> AsyncGenerator[bytes, None]:
    length, size = request.headers.get("content-length", ""), 0
    if length.isdigit() and int(length[:20]) > MOST_BODY:
        raise ApiError(413, f"the body is larger than {MOST_BODY >> 20} MiB")
    async for part in request.stream():
        size += len(part)
        if size > MOST_BODY:
            raise ApiError(413, f"the body is larger than {MOST_BODY >> 20} MiB")
        yield part


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is no JSON object of fields")
    if len(fields) > MOST_FIELDS:
        raise ApiError(400, f"the body has more than {MOST_FIELDS} fields")
    return fields


class _Parser(MultiPartParser):
    spool_max_size = MOST_BODY
    """Files stay in memory: none that a stranger sends is written before it was decoded."""


async def _form(request: Request) -> dict[str, Any]:
    parser = _Parser(request.headers, _bounded(request), max_files=1, max_fields=MOST_FIELDS, max_part_size=MOST_BODY)
    try:
        form = await parser.parse()
    except ApiError:
        raise
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}") from None
    except (ValueError, LookupError, KeyError, AssertionError) as error:
        raise ApiError(400, f"the form cannot be read: {error}") from None
    fields: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            _put(fields, name, await value.read() if isinstance(value, UploadFile) else value)
    finally:
        await form.close()
    return fields


def _put(fields: dict[str, Any], name: str, value: bytes | str) -> None:
    """`name[key]` is the key of an object, as the client writes one; a field that comes twice is refused."""
    outer, bracket, key = name.partition("[")
    if bracket and key.endswith("]"):
        inside = fields.setdefault(outer, {})
        if isinstance(inside, dict) and key[:-1] not in inside:
            inside[key[:-1]] = value
            return
    if name in fields:
        raise ApiError(400, f"field {name} comes twice", name)
    if isinstance(value, bytes) and name != FIELD:
        raise ApiError(400, f"field {name} is a file; only {FIELD} may be one", name)
    fields[name] = value
