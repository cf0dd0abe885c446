"""Who looks at the page: a key is given once, and the browser gets a cookie for it that no script can read."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping

from starlette.requests import cookie_parser

from xdit_serve.keys import EVERYONE, Keys

NAME = "xdit_session"
MOST = 10_000
"""Sessions that are known at a time; the oldest is forgotten, and its browser asks for the key again."""


class Sessions:
    """In memory alone: after the server's next start the key is asked for again. May be called from any thread."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._owners: dict[str, str] = {}
        self._lock = threading.Lock()

    def begin(self, key: str) -> str | None:
        """A new session's token for one of the server's keys; None for anything else."""
        owner = self._keys.owner(b"Bearer " + key.strip().encode(errors="replace"))
        if owner is None:
            return None
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._owners[token] = owner
            if len(self._owners) > MOST:
                self._owners.pop(next(iter(self._owners)))
        return token

    def owner(self, headers: Mapping[bytes, bytes]) -> str | None:
        """Whose browser sends these headers; None for nobody's. A server without keys knows one owner, everyone."""
        if not self._keys:
            return EVERYONE
        with self._lock:
            return self._owners.get(_token(headers))


def cookie(token: str, secure: bool) -> str:
    """The value of Set-Cookie. Sent with requests of this page alone, so that no other page can act for its user."""
    return f"{NAME}={token}; Path=/; HttpOnly; SameSite=Strict" + ("; Secure" if secure else "")


def _token(headers: Mapping[bytes, bytes]) -> str:
    # http.cookies drops all of them for the sake of one that it does not like, such as another program's on this host.
    return cookie_parser(headers.get(b"cookie", b"").decode("latin-1")).get(NAME, "")
