"""The script that `common.workers.local` starts for each rank."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder's modules are not top-level names

from common.system.entry import begin  # noqa: E402


def main() -> int:
    from common.run.channel import Channel
    from common.system.environment import open_standard_streams, this_process
    from common.system.files import discard_stdout, lenient_streams
    from common.workers.orders import messages
    from common.workers.resident import Resident

    open_standard_streams()
    lenient_streams()
    discard_stdout()  # whoever made the group hears of outputs by its events
    orders = messages(int(sys.argv[1]))
    hello = next(orders)
    sys.path[1:] = hello.path
    channel = Channel(this_process(), debug="--debug" in sys.argv)
    status = Resident(this_process(), hello, channel.tell).serve(orders)
    channel.leave(status)


if __name__ == "__main__":
    begin()
    sys.exit(main())
