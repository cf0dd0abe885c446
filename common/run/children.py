"""Processes of ranks on this machine: starting them, hearing from them, ending them.

A rank tells its parent over a pipe where it is and why it failed (`common.run.channel`); a second pipe, that closes
when the parent dies, and the kernel's parent-death signal end the ranks with the parent. That signal is sent when the
thread ends that has started a rank, so the thread must live as long as the rank may.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

from common.system.environment import PARENT, REPORT, STDERR, cores
from common.system.failure import NO_ANSWER, Failure, verdict
from common.system.host import allocator_default

KILL_SECONDS = 10.0  # for SIGKILL to end a rank: one that waits inside a driver may outlive it


@dataclass
class Child:
    """One rank's process as its parent sees it."""

    rank: int
    process: subprocess.Popen[bytes]
    report: int
    output: IO[bytes] | None
    """Where its stderr goes, None for the screen."""
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


def scratch() -> IO[bytes]:
    """A file without a name; in memory where no folder for temporary files can be written."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return os.fdopen(os.memfd_create("xdit"), "w+b")


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe, to read and to write; closed afterwards."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def shared_environment(ranks: int, cpu: bool, share: int = 1) -> dict[str, str]:
    """What torchrun would set for all ranks, and defaults that the user's own environment overrides.

    share: such groups of ranks that compute on the same cores.
    What a torchrun left that we were started under is taken out: it would make every rank wait for its store.
    """
    defaults = {}
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # one machine: independent of what its host name resolves to
    if cpu:
        defaults["OMP_NUM_THREADS"] = str(max(1, cores() // (ranks * share)))
    else:
        defaults |= allocator_default(os.environ)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return defaults | environment | {name: str(value) for name, value in world.items()}


def start_rank(
    command: Sequence[str], rank: int, common: dict[str, str], output: IO[bytes] | None, inherited: Sequence[int]
) -> Child:
    """output: where the rank's own stderr goes; None: to the screen. inherited: descriptors that it gets."""
    read_fd, write_fd = os.pipe()
    stderr = os.dup(2)
    own = {"RANK": rank, "LOCAL_RANK": rank, REPORT: write_fd, STDERR: stderr, PARENT: os.getpid()}
    # A session of its own: the terminal's Ctrl-C reaches the parent alone, and killing the group leaves no grandchild.
    process = subprocess.Popen(
        list(command),
        env=common | {name: str(value) for name, value in own.items()},
        stdin=subprocess.DEVNULL,
        stderr=output,
        pass_fds=(write_fd, stderr, *inherited),
        start_new_session=True,
    )
    os.close(write_fd)
    os.close(stderr)
    os.set_blocking(read_fd, False)
    return Child(rank, process, read_fd, output)


def read(child: Child, take: Callable[[dict[str, Any]], None] | None = None) -> bool:
    """Take in what a rank has sent; False at the end of its pipe. take: gets every message, too."""
    try:
        while chunk := os.read(child.report, 65536):
            child.pending += chunk
            *lines, child.pending = child.pending.split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "failure" in message:
                    child.failure = Failure(**message["failure"])
                elif "stage" in message and message["stage"] != child.stage:
                    child.stage, child.since = message["stage"], time.monotonic()
                if take is not None:
                    take(message)
    except BlockingIOError:
        return True
    return False


def end_all(children: list[Child]) -> str:
    """SIGKILL: it also ends ranks that are stopped or stuck in a collective. Returns the ranks that outlive it."""
    for child in children:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)
    deadline, survivors = time.monotonic() + KILL_SECONDS, ""
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            survivors += f"; rank {child.rank} (process {child.process.pid}) was killed and has not ended"
        os.close(child.report)
        if child.output is not None:
            child.output.close()
    return survivors and f"{survivors}: its GPU's driver may hold it, and its memory, until the machine restarts"


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


def explain(children: Sequence[Child]) -> tuple[int, str]:
    """Exit status and the one line for the user, of ranks of which one has failed or ended."""
    return verdict(failures_of(children), silent_of(children))


def failures_of(children: Sequence[Child]) -> list[Failure]:
    """What the ranks have told, and what is known of those that have ended without a word."""
    failures = []
    for child in children:
        code = child.process.poll()
        if child.failure is not None:
            failures.append(child.failure)
        elif code:
            failures.append(child.ending(code))
    return failures


def silent_of(children: Sequence[Child]) -> list[tuple[int, str]]:
    """(rank, stage) of the ranks that live and have told of no failure."""
    return [(child.rank, child.stage) for child in children if child.failure is None and child.process.poll() is None]
