"""The code in docs/adding-a-fork.md: `python -m tools.docs.outside_fork` puts the toy fork's files into it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs" / "adding-a-fork.md"
FOLDER = ROOT / "tests" / "outside_fork" / "toy_xdit"
SHOWN = re.compile(r"(^## `toy_xdit/(\w+\.py)`\n.*?^```python\n).*?^```$", re.MULTILINE | re.DOTALL)


def shown(text: str) -> str:
    """The page with the code under each heading as it stands in the file."""
    return SHOWN.sub(lambda found: f"{found[1]}{(FOLDER / found[2]).read_text(encoding='utf-8')}```", text)


def names(text: str) -> set[str]:
    """The files that the page shows."""
    return {found[2] for found in SHOWN.finditer(text)}


if __name__ == "__main__":
    TARGET.write_text(shown(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
