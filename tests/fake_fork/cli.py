"""The fork's command."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.run import launch
from tests.fake_fork.fork import FORK
from tests.fake_fork.generate import generate

if __name__ == "__main__":
    sys.exit(launch.run(FORK, generate))
