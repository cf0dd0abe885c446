"""Pictures and videos that clients send: bounded, and decoded in a process that can do little harm."""

from __future__ import annotations

import base64
import binascii
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.system.files import shown
from xdit_serve.errors import ApiError, shortened
from xdit_serve.offers import Offer

FIELD = "input_reference"
MOST_BYTES = 32 << 20
MOST_PIXELS = 24_000_000
SECONDS = 30.0
AT_ONCE = 2
"""Files that are decoded at once: each may take gigabytes."""
DECODER = Path(__file__).with_name("decode.py")
DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+)?(;[a-z0-9=-]+)*;base64,", re.IGNORECASE)
_room = threading.BoundedSemaphore(AT_ONCE)


def content_of(value: Any) -> bytes:
    """The file of a field that is a `data:` URL, alone or as `image_url` of an object. ApiError for anything else."""
    if isinstance(value, bytes):
        return _bounded(value)
    if isinstance(value, Mapping):
        if others := [name for name in value if name != "image_url"]:
            reason = "files are not kept here" if "file_id" in others else "it has only image_url"
            raise ApiError(400, f"{FIELD}.{shortened(str(others[0]), 60)}: {reason}; send the file itself", FIELD)
        value = value.get("image_url")
    head = DATA_URL.match(value) if isinstance(value, str) else None
    if head is None:
        raise ApiError(
            400, f"{FIELD} is neither a file nor a data:...;base64, URL; nothing is fetched for clients", FIELD
        )
    try:
        return _bounded(base64.b64decode(value[head.end() :], validate=True))
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{FIELD}: what follows base64, is not base64", FIELD) from None


def _bounded(content: bytes) -> bytes:
    if len(content) > MOST_BYTES:
        raise ApiError(413, f"{FIELD} is larger than {MOST_BYTES >> 20} MiB", FIELD)
    if not content:
        raise ApiError(400, f"{FIELD} is empty", FIELD)
    return content


def option_for(offer: Offer, content: bytes) -> tuple[str, str]:
    """Which of a model's options takes this file, and what the file has to be: picture or video. ApiError: none."""
    kind = "video" if is_video(content) else "picture"
    for option, option_kind in offer.inputs.items():
        if option_kind == kind:
            return option, kind
    if not offer.inputs:
        raise ApiError(400, f"model {offer.name} takes no {FIELD}", FIELD)
    raise ApiError(
        400, f"{FIELD} is a {kind}; model {offer.name} takes a {' or a '.join(offer.inputs.values())}", FIELD
    )


def is_video(content: bytes) -> bool:
    """By its first bytes: mp4 and its kind, Matroska and WebM, AVI."""
    if content[4:8] == b"ftyp":
        return content[8:12] not in (b"avif", b"avis", b"heic", b"mif1")
    return content[:4] == b"\x1a\x45\xdf\xa3" or (content[:4] == b"RIFF" and content[8:12] == b"AVI ")


def checked(content: bytes, kind: str) -> bytes:
    """What is kept of a file: a PNG of its pixels, or the video as it is. ApiError says why it cannot be read."""
    command = [sys.executable, str(DECODER), kind, str(MOST_PIXELS)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with _room:
        # A session of its own: what it starts ends with it.
        child = subprocess.Popen(
            command, env=environment, start_new_session=True, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
        try:
            output, _ = child.communicate(content, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise ApiError(400, f"{FIELD}: reading it takes longer than {SECONDS:g} s", FIELD) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode == 3:
        raise ApiError(400, f"{FIELD}: {shown(output.decode(errors='replace'))}", FIELD)
    if child.returncode:
        raise ApiError(400, f"{FIELD} cannot be read with the memory and time that a file may take", FIELD)
    return output if kind == "picture" else content
