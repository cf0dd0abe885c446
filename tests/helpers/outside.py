"""The fake fork as a package that somebody else has installed."""

from __future__ import annotations

import shutil
from pathlib import Path

FAKE = Path(__file__).resolve().parents[1] / "fake_fork"


def install(site: Path, entry_points: str = "toy = toy_xdit.fork:FORK") -> None:
    """Put it into a folder of `sys.path` by another name, with the metadata that an installation leaves."""
    shutil.copytree(FAKE, site / "toy_xdit", ignore=shutil.ignore_patterns("__pycache__"))
    about = site / "toy_xdit-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-xdit\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[xdit_zoo.forks]\n{entry_points}\n")
