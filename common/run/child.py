"""The script that the launcher starts for each rank: what it is to do is handed down to it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder's modules are not top-level names

from common.system.entry import begin  # noqa: E402


def main() -> int:
    import importlib
    import pickle

    from common.run import rank
    from common.run.channel import handed_down
    from common.system.environment import open_standard_streams, this_process
    from common.system.files import lenient_streams

    open_standard_streams()
    lenient_streams()
    sys.path[1:], package, module, name, request = pickle.loads(handed_down())
    fork = importlib.import_module(f"{package}.fork").FORK
    generate = getattr(importlib.import_module(module), name)
    return rank.run(fork, generate, pickle.loads(request), this_process())


if __name__ == "__main__":
    begin()
    sys.exit(main())
