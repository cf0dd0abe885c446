"""Values that nobody means, and json documents with a few of them inside."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 16, 17, 64, 1000, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**9, 10**30, -(10**18)),
    *(0.0, -0.0, 0.5, 1e-300, 1e300, -1e300, 3.7, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", " ", "a", "-", "--", "-1", "0x10", "1e5", "²²²", "١٢", "1_000", "NaN", "inf", "null", "None", "True"),
    *(
        "a" * 300,
        "a" * 5000,
        "é龙🎬",
        "\u202e",
        "\ufeff",
        "line\nbreak",
        "tab\t",
        "\x1b[31m",
        "\udce9",
        "\x7f",
        "%s %d",
        "{}",
    ),
    *("../../etc/passwd", "/", "/dev/null", "file:///etc/passwd", "http://127.0.0.1:1/", "$(id)", "`id`", "'", '"'),
)


def odd_number(rng: random.Random) -> Any:
    """A number, small or absurd, whole or not."""
    return (
        rng.choice(NUMBERS)
        if rng.random() < 0.8
        else rng.randint(-(10 ** rng.randint(1, 25)), 10 ** rng.randint(1, 25))
    )


def odd_text(rng: random.Random) -> str:
    """A string, empty, long, of letters from anywhere, or with what a terminal obeys."""
    return rng.choice(TEXTS) if rng.random() < 0.8 else "".join(chr(rng.randrange(1, 0xD7FF)) for _ in range(9))


def odd_value(rng: random.Random) -> Any:
    """Anything that json can say."""
    kind = rng.randrange(6)
    if kind < 3:
        return odd_number(rng)
    if kind == 3:
        return odd_text(rng)
    return rng.choice([None, True, False, [], {}, [[]], [1, 2, 3], ["a"], {"a": 1}, [None] * 5, [2.5, -1]])


def mutate_json(rng: random.Random, document: Any, deep: bool = False) -> str:
    """The document as json text with one to three values replaced, taken away or added, or nested out of reason.

    deep: replace inside lists as well, where tables of tensors have their shapes and offsets.
    """
    if rng.random() < 0.05:
        depth = rng.choice([10, 1000, 100_000])
        return rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth])
    document = json.loads(json.dumps(document))
    for _ in range(rng.randint(1, 3)):
        if not isinstance(document, dict) or not document or rng.random() < 0.05:
            return json.dumps(odd_value(rng))
        _mutate(rng, document, deep)
    return json.dumps(document, ensure_ascii=rng.random() < 0.5)


def _mutate(rng: random.Random, node: Any, deep: bool) -> None:
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    child = node[key]
    inner = isinstance(child, dict) or (isinstance(child, list) and (deep or rng.random() < 0.3))
    if inner and child and rng.random() < 0.8:
        _mutate(rng, child, deep)
    elif isinstance(node, dict) and rng.random() < 0.15:
        del node[key]
    elif isinstance(node, dict) and rng.random() < 0.05:
        node[odd_text(rng)] = odd_value(rng)
    else:
        node[key] = odd_value(rng)
