"""How this project's optional packages are installed: by what command, true wherever it runs. No torch."""

from __future__ import annotations

import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def install(extra: str, root: Path = ROOT) -> str:
    """The command that brings the packages of an extra (`face`) to the Python that runs this.

    The project is on no package index, so that its name installs nothing. In a checkout pip takes the extra from
    there; where there is none, as in a container image, the extra's packages are named.
    """
    if (root / "pyproject.toml").is_file():
        where = "" if Path.cwd() == root else f" in {root}"
        return f'{pip()} install -e ".[{extra}]"{where}'
    return f"{pip()} install {' '.join(packages(extra))}"


def pip() -> str:
    """`pip` where that is the running Python's, else `/path/to/python -m pip`."""
    command = shutil.which("pip")
    same = command is not None and Path(command).parent == Path(sys.executable).parent
    return "pip" if same else f"{sys.executable} -m pip"


def packages(extra: str) -> list[str]:
    """What the installed project's metadata says that an extra brings, each quoted for a shell where that is needed."""
    requirements = [re.split(r"\s*;\s*", line) for line in metadata.requires("xdit-zoo") or []]
    mine = [line[0] for line in requirements if re.fullmatch(rf"extra == ['\"]{extra}['\"]", line[-1])]
    return [f'"{name}"' if re.search(r"[<>]", name) else name for name in mine]
