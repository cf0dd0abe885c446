"""What stands before the page: the key is asked for, bodies have an end, and nothing is loaded from elsewhere."""

from __future__ import annotations

from html import escape
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xdit_serve.errors import ApiError
from xdit_serve.keys import Keys
from xdit_serve.sessions import Sessions, cookie
from xdit_serve.uploads import MOST_BYTES

MOST_WORDS = 1 << 20
"""Bytes of what the page sends but files."""
MOST_LOGIN = 4096
ASK, UPLOAD = "/login", "/gradio_api/upload"
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'"
)
"""Of contents: the framework of the page would otherwise load fonts and scripts from other hosts."""
FORM = """<!doctype html><html lang="en"><meta charset="utf-8"><title>xdit-serve</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font:16px system-ui,sans-serif;max-width:24em;margin:15vh auto;padding:0 1em;color-scheme:light dark}}
input,button{{font:inherit;width:100%;box-sizing:border-box;padding:.6em;margin:.4em 0}}</style>
<h1>xdit-serve</h1><form method="post" action="/login"><label for="key">This server asks for a key.</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<p role="alert">{problem}</p><button>Open</button></form></html>"""


class PageDoor:
    """Around the page's application."""

    def __init__(self, app: ASGIApp, keys: Keys, sessions: Sessions) -> None:
        self.app, self.keys, self.sessions = app, keys, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        guarded_send = _with_policy(send)
        # A mounted application sees the whole path, with what it is mounted under in front.
        if scope["path"] == ASK and self.keys:
            await (await self._asked(scope, receive))(scope, receive, guarded_send)
        elif self.sessions.owner(headers) is None:
            await self._stranger(scope)(scope, receive, guarded_send)
        else:
            most = MOST_BYTES + MOST_WORDS if scope["path"] == UPLOAD else MOST_WORDS
            await self.app(scope, _bounded(receive, most), guarded_send)

    def _stranger(self, scope: Scope) -> Response:
        if scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):
            return RedirectResponse(ASK, 303)
        error = ApiError(401, "open the page and give it one of this server's keys")
        return Response(error.body, error.status, media_type="application/json")

    async def _asked(self, scope: Scope, receive: Receive) -> Response:
        if scope["method"] != "POST":
            return HTMLResponse(FORM.format(problem=""))
        words, take = b"", _bounded(receive, MOST_LOGIN)
        while True:
            message = await take()
            words += message.get("body", b"")
            if not message.get("more_body"):
                break
        key = parse_qs(words.decode("latin-1")).get("key", [""])[0]
        token = self.sessions.begin(key)
        if token is None:
            return HTMLResponse(FORM.format(problem=escape("That is none of this server's keys.")), 401)
        return RedirectResponse("/", 303, {"Set-Cookie": cookie(token, scope.get("scheme") == "https")})


def _bounded(receive: Receive, most: int) -> Receive:
    """What comes in, up to so many bytes; a longer body ends as if its sender had left."""
    remaining = most

    async def take() -> Message:
        nonlocal remaining
        message = await receive()
        remaining -= len(message.get("body", b""))
        return message if remaining >= 0 else {"type": "http.disconnect"}

    return take


def _with_policy(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = POLICY
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "same-origin"
        await send(message)

    return sent
