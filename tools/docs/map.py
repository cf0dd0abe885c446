"""`python -m tools.docs.map`: docs/map.md, the rooms of `common/` and what is in them, from the code itself."""

from __future__ import annotations

import ast
from pathlib import Path

from common.registry.forks import forks

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "docs" / "map.md"
ROOMS = ("system", "registry", "parallel", "weights", "video", "text", "model", "memory", "run", "workers")
"""Of `common/`, each of which may import those before it."""
DOOR = "run/launch.py"
"""What every program calls first: it may import all rooms."""
HEAD = """# Map

Made by `python -m tools.docs.map` from the code.

A fork is a folder of its own (`{forks}`).
It calls the rooms of `common/`, which know no fork; the planner knows the registry alone; `xdit_doctor`,
`xdit_download` and `xdit_serve` are programs above both. A room imports those before it and none after
(but for `{door}`, where every program begins):

```
{chain}
```

How a command goes through them: [parallel.md](parallel.md). A new model: [adding-a-fork.md](adding-a-fork.md).
"""


def said(path: Path) -> str:
    """The first paragraph of a file's docstring, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def page() -> str:
    """The whole page."""
    packages = "/`, `".join(fork.package for fork in forks())
    lines = [HEAD.format(forks=f"{packages}/", chain=" <- ".join(ROOMS), door=DOOR)]
    for room in ROOMS:
        folder = ROOT / "common" / room
        lines += [f"## common/{room}", "", said(folder / "__init__.py"), "", "| file | what |", "|---|---|"]
        files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        lines += [f"| `{path.name}` | {said(path).replace('|', ' or ')} |" for path in files]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
