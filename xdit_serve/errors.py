"""What clients are told when something cannot be done, in the form that OpenAI's client reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common.system.files import shown

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {
    **{400: "invalid_request", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"},
    **{408: "timeout", 409: "conflict", 413: "too_large", 415: "unsupported_media_type", 429: "queue_full"},
    **{500: "server_error", 503: "unavailable"},
}
MOST = 2000
"""Characters of a message: it may quote what a client sent."""


class ApiError(Exception):
    """A request that is refused or could not be served.

    status: of HTTP. message: for people. param: the field that is to blame. retry: seconds after which it may do.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.retry = status, param, retry
        self.message = shortened(message)
        self.code = code or CODES.get(status, "error")

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> bytes:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return as_json({"error": error})


def shortened(text: str, most: int = MOST) -> str:
    """Printable, in one line, and no longer than this."""
    text = shown(" ".join(text[: 4 * most].split()))
    return text if len(text) <= most else text[: most - 3] + "..."


def as_json(value: Mapping[str, Any]) -> bytes:
    """In ASCII, so that no text can fail to be written."""
    return json.dumps(value).encode("ascii")
