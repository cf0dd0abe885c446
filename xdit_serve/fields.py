"""A client's fields as words of the command line. Numbers come as numbers or as text; each is refused by its name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from common.run.command_line import MAX_SEED
from common.run.options import MOST
from xdit_serve.errors import ApiError, shortened
from xdit_serve.offers import Offer

MOST_TEXT = 10_000
"""Characters of a prompt."""
WHOLE = re.compile(r"[+-]?[0-9]{1,19}")
NUMBER = re.compile(r"[+-]?([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})(e[+-]?[0-9]{1,3})?", re.IGNORECASE)
SIZE = re.compile(r"([0-9]{1,6})\s*[xX*]\s*([0-9]{1,6})")
OPTION = re.compile(r"--([a-z][a-z0-9-]*)")


@dataclass(frozen=True)
class Asked:
    """The words that a client's fields make up, and the field that each option came from."""

    words: tuple[str, ...]
    sources: Mapping[str, str]

    def field_of(self, problem: str) -> str | None:
        """Which field a line that the command line refused is about."""
        for name in OPTION.findall(problem):
            if (option := name.replace("-", "_")) in self.sources:
                return self.sources[option]
        return None


def read(offer: Offer, fields: Mapping[str, Any]) -> Asked:
    """The words for these fields of one model. ApiError names the field that is wrong.

    `size` stands for width and height, `seconds` for a number of frames that the model admits. None is not said.
    """
    values = {name: value for name, value in fields.items() if value is not None}
    values = _without_size(values)
    values = _without_seconds(offer, values)
    words, sources = [], dict[str, str]()
    for name, value in values.items():
        option = offer.fields.get(name)
        if option is None:
            raise unknown(name, (*offer.fields, *(SPOKEN if offer.kind == "video" else ("model", "size", "n"))))
        assert option.name is not None
        if option.name in sources:
            raise ApiError(400, f"{sources[option.name]} and {name} are the same; give one of them", name)
        sources[option.name] = name
        words += _words(option, name, value)
    sources |= {"width": "size", "height": "size"} if fields.get("size") is not None else {}
    sources |= {"num_frames": "seconds"} if fields.get("seconds") is not None else {}
    return Asked(tuple(words), sources)


SPOKEN = ("model", "size", "seconds", "input_reference", "previews")
"""Fields of a video that are no options."""


def unknown(name: str, names: tuple[str, ...]) -> ApiError:
    near = difflib.get_close_matches(name[:100], names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ApiError(400, f"no such field: {shortened(name, 100)}{hint}", shortened(name, 100), "unknown_field")


def _words(option: click.Option, name: str, value: Any) -> list[str]:
    word = option.opts[0]
    if option.is_flag:
        off = option.secondary_opts[:1]
        return [word] if boolean(name, value) else off
    if isinstance(option.type, click.types.IntParamType):
        return [f"{word}={whole(name, value)}"]
    if isinstance(option.type, click.types.FloatParamType):
        return [f"{word}={number(name, value)!r}"]
    return [f"{word}={text(name, value)}"]


def whole(name: str, value: Any) -> int:
    """A whole number, or its digits. ApiError."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and WHOLE.fullmatch(value.strip()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_SEED:
        raise ApiError(400, f"{name}: {_quoted(value)} is not a whole number of up to 19 digits", name)
    return value


def number(name: str, value: Any) -> float:
    """A finite number, or its digits. ApiError."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    if not fits or not math.isfinite(value):
        raise ApiError(400, f"{name}: {_quoted(value)} is not a number", name)
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """true or false, also as text. ApiError."""
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name}: {_quoted(value)} is neither true nor false", name)
    return value


def text(name: str, value: Any, most: int = MOST_TEXT) -> str:
    """ApiError for what is no text or too long."""
    if not isinstance(value, str):
        raise ApiError(400, f"{name}: {_quoted(value)} is not text", name)
    if len(value) > most:
        raise ApiError(400, f"{name} has {len(value)} characters; at most {most}", name)
    return value


def _quoted(value: Any) -> str:
    # Of an int with a million digits, repr would raise.
    return "such a number" if isinstance(value, int) and abs(value) > 10**20 else repr(shortened(str(value)[:200], 60))


def _without_size(values: Mapping[str, Any]) -> dict[str, Any]:
    size = values.get("size")
    rest = {name: value for name, value in values.items() if name != "size"}
    if size is None:
        return rest
    if twice := [name for name in ("width", "height") if name in rest]:
        raise ApiError(400, f"size and {twice[0]} say the same; give one of them", "size")
    if not isinstance(size, str) or not (sides := SIZE.fullmatch(size.strip())):
        raise ApiError(400, f"size: {_quoted(size)} is not of the form WIDTHxHEIGHT, such as 848x480", "size")
    return {"width": int(sides[1]), "height": int(sides[2]), **rest}


def _without_seconds(offer: Offer, values: Mapping[str, Any]) -> dict[str, Any]:
    """The nearest number of frames that the model admits, in place of a time."""
    rest = {name: value for name, value in values.items() if name != "seconds"}
    if "seconds" not in values or offer.kind == "image":
        return dict(values)
    if "num_frames" in rest:
        raise ApiError(400, "seconds and num_frames say the same; give one of them", "seconds")
    seconds = number("seconds", values["seconds"])
    fps = whole("fps", rest["fps"]) if "fps" in rest else offer.rules.fps
    frames = seconds * min(max(fps, 1), MOST["fps"])
    if not 0 < frames <= MOST["num_frames"]:
        raise ApiError(400, f"seconds: {_quoted(values['seconds'])} is not a length that can be made", "seconds")
    return {"num_frames": nearest_frames(offer, frames), **rest}


def nearest_frames(offer: Offer, frames: float) -> int:
    """The admissible number of frames nearest to one that need not be."""
    rules = offer.rules
    start = max(1, int(frames) - rules.frame_step)
    counts = [
        count
        for count in range(start, int(frames) + 2 * rules.frame_step + 2)
        if any((count - offset) % rules.frame_step == 0 for offset in rules.frame_offsets)
    ]
    return min(counts, key=lambda count: abs(count - frames))
