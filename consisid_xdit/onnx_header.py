"""What an ONNX file says of itself, read without a runtime: the fields of its messages, over whose contents is leapt.

The format is protobuf's (protobuf.dev/programming-guides/encoding), the numbers of the fields are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.weights.schema import CheckpointError, plain_file

_IR_VERSION, _GRAPH = 1, 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12
_NUMBER, _RUN = 0, 2
_FIXED = {1: 8, 5: 4}
"""Kinds of fields: a number, a run of bytes after its length, and those of so many bytes."""
_MOST_BITS = 64


class _DamagedError(Exception):
    pass


@dataclass(frozen=True)
class Outline:
    """How many of each a network has. Inputs: with its weights, where the file lists these as such."""

    nodes: int
    weights: int
    inputs: int
    outputs: int


def read_outline(path: Path) -> Outline:
    """The outline of an ONNX file. CheckpointError, with its name, for a file that is none, or ends too early."""
    with plain_file(path) as file:
        end = file.seek(0, 2)
        try:
            model = dict(_fields(file, 0, end))
            if _GRAPH not in model or _IR_VERSION not in model:
                raise _DamagedError
            counts = dict.fromkeys((_NODE, _INITIALIZER, _INPUT, _OUTPUT), 0)
            for number, _ in _fields(file, *model[_GRAPH]):
                if number in counts:
                    counts[number] += 1
        except _DamagedError:
            raise CheckpointError(f"{path} is no ONNX file, or is damaged or truncated ({end} bytes)") from None
    return Outline(*counts.values())


def _fields(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """The fields of a message that lies from `begin` to `end`: their numbers, and where the contents lie."""
    at = begin
    while at < end:
        file.seek(at)
        key = _number(file)
        number, kind = key >> 3, key & 7
        if not number or kind not in (_NUMBER, _RUN, *_FIXED):
            raise _DamagedError
        value = _number(file) if kind in (_NUMBER, _RUN) else 0
        length = value if kind == _RUN else _FIXED.get(kind, 0)
        start = file.tell()
        at = start + length
        if at > end:
            raise _DamagedError
        yield number, (start, at)


def _number(file: BinaryIO) -> int:
    """Seven bits a byte, the lowest first; the eighth says that another follows."""
    value = 0
    for shift in range(0, _MOST_BITS + 6, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise _DamagedError
