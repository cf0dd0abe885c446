"""JSON objects with one or a few values replaced: wrong kinds, absurd numbers, odd text, nesting."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 64, 2.5, -0.5, 0.0, 1e-300, 1e300),
    *(10**9, 10**11, 10**18, 10**30, -(10**30), 2**31, 2**63),
    *("", "7", "abc", "\x00", "\ud800", "a\nb", "x" * 5000, "../../etc/passwd", "/dev/zero"),
    *([], [0], [1, 2, 3], [None], ["a"], [[1]], [10**30] * 4, [1] * 5000, {}, {"a": 1}, {"a": {"a": {}}}),
)
_RAW = ("Infinity", "-Infinity", "NaN", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000)


def absurd(raw: Mapping[str, Any], key: str) -> Iterator[bytes]:
    """The object with each odd value in turn under `key`."""
    for value in ODD:
        yield json.dumps({**raw, key: value}).encode()
    for text in _RAW:
        yield json.dumps({**raw, key: "@@"}).replace('"@@"', text).encode()


def mutated(raw: Mapping[str, Any], seed: int) -> Iterator[bytes]:
    """Endless variants: values replaced at random, keys lost and added, and now and then the text itself damaged."""
    draw = random.Random(seed)
    while True:
        made = dict(raw)
        for _ in range(draw.randint(1, 3)):
            key = draw.choice([*made, "unknown"]) if made else "unknown"
            if draw.random() < 0.1:
                made.pop(key, None)
                continue
            made[key] = "@@" if draw.random() < 0.15 else _changed(made.get(key), draw)
        text = json.dumps(made).replace('"@@"', draw.choice(_RAW)).encode()
        yield damaged(text, draw) if draw.random() < 0.1 else text


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, list) and value and draw.random() < 0.5:
        at = draw.randrange(len(value))
        return draw.choice([[*value[:at], draw.choice(ODD), *value[at + 1 :]], value[:at], value + value])
    if isinstance(value, (int, float)) and draw.random() < 0.3:
        return draw.choice([value + 1, -value, value * 1000, float(value), str(value), [value]])
    return draw.choice(ODD)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes cut short, with some of them replaced, or with some put in."""
    at = draw.randrange(len(content) + 1)
    kind = draw.randrange(3)
    if kind == 0:
        return content[:at]
    noise = draw.randbytes(draw.randint(1, 8))
    return content[:at] + noise + content[at + (len(noise) if kind == 1 else 0) :]
