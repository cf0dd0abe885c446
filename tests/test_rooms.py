"""The rooms of `common/`: imports go one way, and the map shows what is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tools.docs import map as rooms

ROOT = Path(__file__).resolve().parents[1]


def imported(path: Path) -> set[str]:
    """Rooms of `common/` that a file imports from, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "common":
            names = [node.module] if "." in node.module else [f"common.{alias.name}" for alias in node.names]
            found |= {name.split(".")[1] for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("common.")}
    return found


@pytest.mark.parametrize("room", rooms.ROOMS)
def test_a_room_imports_those_before_it(room: str) -> None:
    allowed = set(rooms.ROOMS[: rooms.ROOMS.index(room) + 1])
    for path in (ROOT / "common" / room).glob("*.py"):
        assert imported(path) <= allowed or f"{room}/{path.name}" == rooms.DOOR, path


def test_every_module_is_in_a_room() -> None:
    assert [path.name for path in (ROOT / "common").glob("*.py")] == ["__init__.py"]
    assert {path.parent.name for path in (ROOT / "common").glob("*/*.py")} == set(rooms.ROOMS)


def test_the_map_is_what_the_code_draws() -> None:
    assert rooms.TARGET.read_text(encoding="utf-8") == rooms.page(), "run python -m tools.docs.map"
