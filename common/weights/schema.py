"""JSON files that others wrote: read in bounded memory, every value checked for kind and size, once for all models.

A model's numbers are a frozen dataclass, and its fields say what a file may give them: the annotation is the kind,
`bounded` and `one_of` set limits where a kind's own are not meant. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

C = TypeVar("C")

MAX_JSON_BYTES = 16 << 20  # the largest index of a published checkpoint takes less than one
MAX_SIZE = 1 << 16
"""The largest width, count or side that a file may ask for where its field sets no other limit."""
MAX_LAYERS = 512
MAX_NUMBER = 1e6
MAX_ITEMS = 64

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxdict, _repr.maxstring, _repr.maxother = 2, 4, 4, 60, 60


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line, names the file and, where there is one, the tensor."""


def shown(value: Any) -> str:
    """A value of a file as a message quotes it: on one line, shortened, however deep or long it is."""
    return _repr.repr(value)


def quoted(name: str) -> str:
    """A name of a file as a message quotes it: as it is where it is short and can be printed."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)


def bounded(default: Any, most: float, least: float = 1) -> Any:
    """A dataclass field whose number (each number of its tuple) lies between `least` and `most`."""
    return field(default=default, metadata={"least": least, "most": most})


def one_of(default: str, *others: str) -> Any:
    """A dataclass field for one of some words."""
    return field(default=default, metadata={"words": (default, *others)})


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object with finite numbers. ValueError says what else the bytes are, without a file's name."""
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


@contextmanager
def plain_file(path: Path) -> Iterator[BinaryIO]:
    """A file to read. CheckpointError with its name where it is missing, cannot be read, or is no plain file."""
    try:
        with open(path, "rb", opener=_open_plain) as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: a directory, not a file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _open_plain(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would wait for one
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    raise IsADirectoryError if stat.S_ISDIR(mode) else OSError(errno.EINVAL, "not a plain file")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. CheckpointError names the file when it is missing, too large, or holds none."""
    with plain_file(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, too large for a file of settings")
    try:
        return parse_object(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from None


def check_keys(raw: Mapping[str, Any], keys: Collection[str], fixed: Mapping[str, Any], where: str) -> None:
    """CheckpointError naming key and value of what the code behind `keys` and `fixed` would get wrong.

    fixed: the only value that a key may have; a tuple lists several. Keys beginning with `_` are notes of the library
    that wrote the file; an unknown key that is off (null, false) asks for nothing.
    """
    for key, value in raw.items():
        if key in fixed:
            choices = fixed[key] if isinstance(fixed[key], tuple) else (fixed[key],)
            if value not in choices:
                text = " or ".join(repr(one) for one in choices)
                raise CheckpointError(f"{where} says {key}={shown(value)}; supported is {text}")
        elif key not in keys and not key.startswith("_") and value is not None and value is not False:
            raise CheckpointError(
                f"{where} says {quoted(key)}={shown(value)}, which is unknown here; this checkpoint needs newer code"
            )


def numbers(cls: type, keys: Mapping[str, str], raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of `raw` for the fields of the dataclass `cls`; keys: field name -> key in the file.

    A key that is absent or null leaves its field out. CheckpointError names file, key and value of what is of another
    kind than its field, or beyond its limits.
    """
    values = {}
    for one in fields(cls):
        key = keys.get(one.name)
        if key is None or raw.get(key) is None:
            continue
        kind = _KINDS[str(one.type).partition(" | ")[0]]
        try:
            values[one.name] = kind.read(raw[key], one)
        except (TypeError, ValueError):
            raise CheckpointError(f"{where} says {key}={shown(raw[key])}; it must be {kind.requirement(one)}") from None
    return values


def build(cls: type[C], keys: Mapping[str, str], raw: Mapping[str, Any], where: str, **others: Any) -> C:
    """`cls` with the `numbers` of a file, and others; what its own checks raise gets the file's name."""
    values = numbers(cls, keys, raw, where)
    try:
        return cls(**values, **others)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


@dataclass(frozen=True)
class _Kind:
    """How values of a type are read."""

    read: Callable[[Any, Field], Any]
    """From a JSON value to the field's; TypeError or ValueError when it will not do."""
    requirement: Callable[[Field], str]
    """What will do, in words."""


def _limits(one: Field, whole: bool) -> tuple[float, float]:
    least, most = (1, MAX_SIZE) if whole else (0, MAX_NUMBER)
    return one.metadata.get("least", least), one.metadata.get("most", most)


def _truth(value: Any, one: Field) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _whole(value: Any, one: Field) -> int:
    least, most = _limits(one, whole=True)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise TypeError
    return value


def _number(value: Any, one: Field) -> float:
    least, most = _limits(one, whole=False)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise TypeError
    if value == 0 == least:
        raise ValueError
    return float(value)


def _word(value: Any, one: Field) -> str:
    if not isinstance(value, str) or value not in one.metadata["words"]:
        raise TypeError
    return value


def _several(single: Callable[[Any, Field], Any]) -> Callable[[Any, Field], tuple]:
    def read(value: Any, one: Field) -> tuple:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_ITEMS:
            raise TypeError
        return tuple(single(item, one) for item in value)

    return read


def _meant_whole(one: Field) -> str:
    least, most = _limits(one, whole=True)
    return f"whole number of at least {least:.0f} and at most {most:.0f}"


def _meant_number(one: Field) -> str:
    least, most = _limits(one, whole=False)
    return f"number above 0 and at most {most:g}" if least == 0 else f"number from {least:g} to {most:g}"


_KINDS: Mapping[str, _Kind] = {
    "bool": _Kind(_truth, lambda one: "true or false"),
    "int": _Kind(_whole, lambda one: f"a {_meant_whole(one)}"),
    "float": _Kind(_number, lambda one: f"a {_meant_number(one)}"),
    "str": _Kind(_word, lambda one: " or ".join(one.metadata["words"])),
    "tuple[bool, ...]": _Kind(_several(_truth), lambda one: "a list of true and false"),
    "tuple[int, ...]": _Kind(_several(_whole), lambda one: f"a list, each a {_meant_whole(one)}"),
    "tuple[float, ...]": _Kind(_several(_number), lambda one: f"a list, each a {_meant_number(one)}"),
}
