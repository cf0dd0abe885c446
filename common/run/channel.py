"""What a rank says to whoever tells the user: the parent that watches over it, or its own stderr."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from typing import IO, Any, NoReturn

from common.system.environment import HANDED, LIFE, PARENT, REPORT, STDERR, Process
from common.system.failure import describe
from common.system.files import say, shown
from common.system.stopping import is_ignored

_PR_SET_PDEATHSIG = 1


def handed_down() -> bytes:
    """What the parent passed to `supervise` as `request`."""
    request = int(os.environ[HANDED])
    return os.pread(request, os.fstat(request).st_size, 0)


class Channel:
    """What a rank says to whoever tells the user: its parent under `supervise`, else its own stderr."""

    def __init__(self, at: Process, debug: bool = False) -> None:
        self.process, self.debug = at, debug
        self.stderr: IO[str] = sys.stderr
        self._pipe: int | None = None
        self._one_at_a_time = threading.Lock()
        if at.launcher == "supervise":
            self._attach()
        elif at.launcher == "torchrun":
            _die_with_parent()
            # At once, even while a collective waits: torchrun would kill us only 30 seconds later. Rank 0 has more to
            # do, see `common.run.rank`.
            if not is_ignored(signal.SIGINT):
                signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _attach(self) -> None:
        _die_with_parent()
        life = int(os.environ[LIFE])
        self._pipe = int(os.environ[REPORT])
        os.set_blocking(self._pipe, False)
        self.stderr = os.fdopen(int(os.environ[STDERR]), "w", buffering=1, errors="backslashreplace")
        threading.Thread(target=_outlive_nothing, args=(life,), daemon=True).start()
        if os.getppid() != int(os.environ[PARENT]):
            os._exit(1)
        # The parent answers for Ctrl-C and removes what a rank leaves behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def at_stage(self, where: str) -> None:
        """Tell the parent where this rank is; lost when the parent does not keep up."""
        self.tell({"stage": where})

    def failed(self, stage: str, error: BaseException, status: int = 1, afterword: str = "") -> None:
        """Tell the user, once for all ranks, why this rank failed. afterword: follows the message on the same line."""
        failure = describe(error, self.process.rank, stage, status)
        if self.debug:
            say(failure.trace, self.stderr)
        if self._pipe is not None:
            self.tell({"failure": failure.as_dict()}, surely=True)
        elif self.process.world_size == 1:
            say(f"error: {shown(failure.text(with_rank=False))}{afterword}", self.stderr)
        elif _first_to_fail():
            say(f"error: {shown(failure.text())}{afterword}", self.stderr)
        elif afterword:
            say(afterword.removeprefix("; "), self.stderr)

    def interrupted(self, afterword: str) -> None:
        """Tell the user who interrupted the run what is kept; nothing where nothing is, but under torchrun.

        There a signal may be torchrun's answer to a rank that failed: that one has said so, and what is kept remains.
        """
        if self.process.world_size == 1:
            if afterword:
                say(f"interrupted{afterword}", self.stderr)
        elif _first_to_fail():
            say(f"interrupted{afterword}", self.stderr)
        elif afterword:
            say(afterword.removeprefix("; "), self.stderr)

    def leave(self, status: int) -> NoReturn:
        """End this process without tearing down process groups: their threads may wait for a peer, or abort at exit."""
        for stream in (sys.stdout, self.stderr):
            with suppress(OSError, ValueError):  # a full disk behind one has no say in how the run ended
                stream.flush()
        os._exit(status)

    def tell(self, message: dict[str, Any], surely: bool = False) -> None:
        """Send the parent a message of plain values, unless there is no parent.

        surely: waits where the parent does not keep up; otherwise the message is lost then.
        """
        if self._pipe is None:
            return
        line = json.dumps(message).encode() + b"\n"
        surely = surely or len(line) > select.PIPE_BUF  # such a line could be torn
        with self._one_at_a_time, suppress(BrokenPipeError):
            while line:
                try:
                    line = line[os.write(self._pipe, line) :]
                except BlockingIOError:
                    if not surely:
                        return
                    select.select([], [self._pipe], [])


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _outlive_nothing(life: int) -> None:
    """Wait for the pipe to close, which only the parent's death does, then end this rank and what it started."""
    os.read(life, 1)
    os.killpg(0, signal.SIGKILL)


def _first_to_fail() -> bool:
    """Under torchrun: whether no other rank has told of a failure; the cause comes before its echoes."""
    import torch.distributed as dist

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"xdit/failed/{attempt}", 1) == 1
    except (RuntimeError, KeyError, ValueError):
        return True
