"""consisid-xdit: a photograph of a person and a prompt become an mp4. Also `python -m consisid_xdit`,
`python consisid_xdit/cli.py`, and under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder's modules are not top-level names
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.system.entry import begin

    begin()

from common.run import launch
from consisid_xdit.fork import FORK
from consisid_xdit.generate import generate


def main() -> None:
    sys.exit(launch.run(FORK, generate))


if __name__ == "__main__":
    main()
