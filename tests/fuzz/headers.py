"""Safetensors files with damaged or lying headers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from tests.fuzz.documents import ODD, damaged, mutated

_OFFSETS = ([0, 10**30], [-1, 3], [5, 2], [0], [0, 1, 2], ["0", "4"], [0.0, 4.0], [None, 4], None, "ab", {}, [True, 4])
_SHAPES = ([-1, -4], [2**62, 4], [0, 2**62, 2**62], [1.0], ["4"], [1] * 5000, [[4]], None, 7, "44", {}, [10**30])
_DTYPES = ("I16", "F8_E4M3", "BOOL", "Q4", "", "f32", 3, None, [], {}, "F32\nerror", "\ud800")


def split(content: bytes) -> tuple[dict, bytes]:
    """A file's header and its data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def mutated_file(content: bytes, seed: int) -> Iterator[bytes]:
    """Endless variants of a whole safetensors file."""
    draw = random.Random(seed)
    header, data = split(content)
    documents = mutated(header, seed)
    while True:
        kind = draw.randrange(8)
        if kind == 0:
            yield damaged(content, draw)
        elif kind == 1:
            yield joined(next(documents), data)
        elif kind == 2:
            length = draw.choice([0, 1, 2, 2**20, 2**40, 2**63, 2**64 - 1, draw.randrange(2 * len(content))])
            yield length.to_bytes(8, "little") + content[8:]
        elif kind == 3:
            yield joined(json.dumps(header | {"__metadata__": draw.choice(ODD)}).encode(), data)
        elif kind == 4:
            yield joined(json.dumps(header).encode(), data[: draw.randrange(len(data) + 1)])
        else:
            yield joined(json.dumps(_lying(header, draw)).encode(), data)


def _lying(header: dict, draw: random.Random) -> dict:
    name = draw.choice([key for key in header if key != "__metadata__"])
    field, values = draw.choice([("data_offsets", _OFFSETS), ("shape", _SHAPES), ("dtype", _DTYPES)])
    entry = header[name] | {field: draw.choice(values)}
    if draw.random() < 0.1:
        entry.pop(field)
    if draw.random() < 0.2:
        return {**header, draw.choice(["", "\ud800", "a\nb", "x" * 3000, name + "2"]): entry}
    return {**header, name: entry}
