"""wan-xdit: a prompt, with an image or without, becomes an mp4. Also `python -m wan_xdit`, `python wan_xdit/cli.py`,
and under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder's modules are not top-level names
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.system.entry import begin

    begin()

from common.run import launch
from wan_xdit.fork import FORK
from wan_xdit.generate import generate


def main() -> None:
    sys.exit(launch.run(FORK, generate))


if __name__ == "__main__":
    main()
