"""toy-xdit, as `python -m toy_xdit`."""

import sys

from common.system.entry import begin

begin()

from common.run import launch  # noqa: E402
from toy_xdit.fork import FORK  # noqa: E402
from toy_xdit.generate import generate  # noqa: E402

if __name__ == "__main__":
    sys.exit(launch.run(FORK, generate))
