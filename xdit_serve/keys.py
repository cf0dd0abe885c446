"""Who asks: API keys, compared in constant time, and what the store calls those who hold them."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

from common.system.files import reason, shown

VARIABLE = "XDIT_API_KEY"
EVERYONE = ""
"""The owner of all jobs of a server without keys."""
LEAST, MOST = 8, 512


class Keys:
    """The keys that open a server; none: it is open."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in dict.fromkeys(keys)]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: bytes | None) -> str | None:
        """Whose request it is, by its `Authorization` header; None for nobody's.

        Every key is looked at, and each by its digest, so that the time says nothing of any of them.
        """
        if not self._digests:
            return EVERYONE
        scheme, _, key = (authorization or b"").partition(b" ")
        key_digest, match = _digest(key.strip()[: MOST + 1]), None
        for digest in self._digests:
            if hmac.compare_digest(digest, key_digest):
                match = digest
        return match.hex()[:32] if match is not None and scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(b"xdit-serve " + key).digest()


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Keys of a file, one a line, or those that stand in the environment. ValueError says what is wrong."""
    if file is not None:
        where = f"--api-key-file {shown(file)}"
        try:
            words = [line.strip() for line in file.read_text(encoding="ascii").splitlines()]
        except OSError as error:
            raise ValueError(f"{where}: {reason(error)}; name a file with one key a line") from None
        except ValueError:
            raise ValueError(f"{where} is no ASCII text; name a file with one key a line") from None
        keys = [word for word in words if word and not word.startswith("#")]
        if not keys:
            raise ValueError(f"{where} holds no key; write one a line")
    else:
        where, keys = VARIABLE, environment.get(VARIABLE, "").split()
    for number, key in enumerate(keys, 1):
        if not LEAST <= len(key) <= MOST or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{where}: key {number} is not {LEAST} to {MOST} ASCII letters without spaces")
    return keys


def is_here(host: str | None) -> bool:
    """Whether a name or an address can only be this machine's."""
    try:
        return host == "localhost" or ip_address(host or "").is_loopback
    except ValueError:
        return False
