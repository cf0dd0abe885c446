"""Starting ranks and watching over them.

Without torchrun a program is its own launcher: `supervise` starts a command once per rank with torchrun's variables
and waits. A rank tells its parent over a pipe where it is and why it failed (`common.run.channel`); a second pipe, that
closes when the parent dies, and the kernel's parent-death signal end the ranks with the parent. The first failure ends
them all.
Under torchrun a rank prints its own failure, and the ranks agree through torchrun's store that only one does.
"""

from __future__ import annotations

import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO

from common.system.environment import HANDED, LIFE, PARENT, REPORT, STDERR, cores, open_standard_streams
from common.system.failure import NO_ANSWER, Failure, verdict
from common.system.files import say, shown
from common.system.host import allocator_default
from common.system.stopping import SIGNALS, Stopped, stoppable

KILL_SECONDS = 10.0  # for SIGKILL to end a rank: one that waits inside a driver may outlive it
GRACE_SECONDS = 1.5  # after the first failure: time for the rank that caused it to be noticed


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    report: int
    output: IO[bytes] | None
    stage: str = "starting"
    since: float = field(default_factory=time.monotonic)
    pending: bytes = b""
    failure: Failure | None = None

    def said(self) -> str:
        """The end of what the process wrote on its stderr, where that is kept."""
        if self.output is None:
            return ""
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - 65536))
        return self.output.read().decode(errors="replace")

    def ending(self, code: int) -> Failure:
        """Why the process ended with this status, although it has not said so."""
        text = self.said()
        if "collective operation timeout" in text:  # NCCL's watchdog aborts the process
            return Failure(self.rank, self.stage, NO_ANSWER, secondary=True, late=True)
        killer = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else ""
        message = f"killed by {killer}" if killer else f"ended with status {code}"
        # The last line that is no warning, nor the indented source line that follows one.
        lines = [line for line in text.splitlines() if line.strip() and not line[0].isspace() and "Warning" not in line]
        if code == -signal.SIGKILL:
            message += ", which is also how the system ends a process when memory runs out"
        elif lines:
            message += f"; its last words: {lines[-1][:300]}"
        return Failure(self.rank, self.stage, message, killed=code < 0)


def supervise(
    command: Sequence[str],
    ranks: int,
    cpu: bool,
    request: bytes = b"",
    debug: bool = False,
    leave: Callable[[bool], str] = lambda done: "",
    inherited: Sequence[int] = (),
) -> int:
    """Run `command` once per rank and return the exit status: 0, 1 (one line on stderr says why), 2, or 128 + signal.

    request: what every rank gets from `handed_down`.
    cpu: the ranks compute on the CPU and share its cores.
    debug: the ranks' own stderr goes to the screen; otherwise it is kept for the last words of a rank that crashed.
    leave: called after the last rank is gone, with whether all succeeded; what it returns ends the error line.
    inherited: descriptors that every rank gets too.
    """
    open_standard_streams()
    status, reason, left = 1, "", ""
    children: list[_Child] = []
    with _scratch() as handed, _pipe() as (life, _), stoppable():
        try:
            handed.write(request)
            handed.flush()
            common = _shared_environment(ranks, cpu) | {LIFE: str(life), HANDED: str(handed.fileno())}
            for rank in range(ranks):
                output = None if debug else _scratch()
                children.append(_start(command, rank, common, output, inherited))
            status, reason = _watch(children)
        except Stopped as stopped:
            status = stopped.status
        except OSError as error:
            reason = f"cannot start the ranks: {error}"
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            left = _stop(children)
            afterword = leave(status == 0)
    if reason or left:
        say(f"error: {shown(reason or 'stopped')}{left}{afterword}")
    elif afterword:
        say(f"interrupted{afterword}")
    return status


def _scratch() -> IO[bytes]:
    """A file without a name; in memory where no folder for temporary files can be written."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return os.fdopen(os.memfd_create("xdit"), "w+b")


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def _shared_environment(ranks: int, cpu: bool) -> dict[str, str]:
    """What torchrun would set for all ranks, and defaults that the user's own environment overrides.

    What a torchrun left that we were started under is taken out: it would make every rank wait for its store.
    """
    defaults = {}
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # one machine: independent of what its host name resolves to
    if cpu:
        defaults["OMP_NUM_THREADS"] = str(max(1, cores() // ranks))
    else:
        defaults |= allocator_default(os.environ)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return defaults | environment | {name: str(value) for name, value in world.items()}


def _start(
    command: Sequence[str], rank: int, common: dict[str, str], output: IO[bytes] | None, inherited: Sequence[int]
) -> _Child:
    """output: where the rank's own stderr goes; None: to the screen."""
    read, write = os.pipe()
    stderr = os.dup(2)
    own = {"RANK": rank, "LOCAL_RANK": rank, REPORT: write, STDERR: stderr, PARENT: os.getpid()}
    # A session of its own: the terminal's Ctrl-C reaches the parent alone, and killing the group leaves no grandchild.
    process = subprocess.Popen(
        list(command),
        env=common | {name: str(value) for name, value in own.items()},
        stdin=subprocess.DEVNULL,
        stderr=output,
        pass_fds=(write, stderr, int(common[LIFE]), int(common[HANDED]), *inherited),
        start_new_session=True,
    )
    os.close(write)
    os.close(stderr)
    os.set_blocking(read, False)
    return _Child(rank, process, read, output)


def _watch(children: list[_Child]) -> tuple[int, str]:
    """Until all ranks are done, or one has failed: the exit status and the reason."""
    deadline: float | None = None
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.report, selectors.EVENT_READ, child)
        while True:
            for key, _ in selector.select(timeout=0.1):
                if not _read(key.data):
                    selector.unregister(key.fd)
            codes = [child.process.poll() for child in children]
            if all(code == 0 for code in codes):
                return 0, ""
            broken = any(code for code in codes) or any(child.failure for child in children)
            if broken and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline and (time.monotonic() > deadline or None not in codes):
                break
    for child in children:
        _read(child)
    return _explain(children)


def _read(child: _Child) -> bool:
    """Take in what a rank has sent; False at the end of its pipe."""
    try:
        while chunk := os.read(child.report, 65536):
            child.pending += chunk
            *lines, child.pending = child.pending.split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "failure" in message:
                    child.failure = Failure(**message["failure"])
                elif message["stage"] != child.stage:
                    child.stage, child.since = message["stage"], time.monotonic()
    except BlockingIOError:
        return True
    return False


def _explain(children: list[_Child]) -> tuple[int, str]:
    failures = []
    for child in children:
        code = child.process.poll()
        if child.failure is not None:
            failures.append(child.failure)
        elif code:
            failures.append(child.ending(code))
    silent = [(child.rank, child.stage) for child in children if child.failure is None and child.process.poll() is None]
    return verdict(failures, silent)


def _stop(children: list[_Child]) -> str:
    """SIGKILL: it also ends ranks that are stopped or stuck in a collective. Returns the ranks that outlive it."""
    for child in children:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)
    deadline, left = time.monotonic() + KILL_SECONDS, ""
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            left += f"; rank {child.rank} (process {child.process.pid}) was killed and has not ended"
        os.close(child.report)
        if child.output is not None:
            child.output.close()
    return left and f"{left}: its GPU's driver may hold it, and its memory, until the machine restarts"


def free_port() -> int:
    """A TCP port nobody listens on, below the range from which the kernel takes ports for outgoing connections."""
    for _ in range(100):
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
