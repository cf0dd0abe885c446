"""Starting ranks and watching over them. Importing this costs nothing: no torch, so mistakes are told at once.

Without torchrun the program is its own launcher: `supervise` starts the same command once per rank with torchrun's
variables and waits. A rank tells its parent over a pipe where it is and why it failed; a second pipe, that closes when
the parent dies, and the kernel's parent-death signal end the ranks with the parent. The first failure ends them all.
Under torchrun a rank prints its own failure, and the ranks agree through torchrun's store that only one does.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import IO, Any, NoReturn

from common.failure import NO_ANSWER, Failure, describe, verdict
from common.files import say, shown
from common.host import allocator_default
from common.stopping import SIGNALS, Stopped, is_ignored, stoppable

KILL_SECONDS = 10.0  # for SIGKILL to end a rank: one that waits inside a driver may outlive it
GRACE_SECONDS = 1.5  # after the first failure: time for the rank that caused it to be noticed
_PR_SET_PDEATHSIG = 1
_REPORT, _LIFE, _STDERR, _PARENT = "XDIT_REPORT_FD", "XDIT_LIFE_FD", "XDIT_STDERR_FD", "XDIT_PARENT_PID"
_REQUEST = "XDIT_REQUEST_FD"


@dataclass(frozen=True)
class Place:
    """Where this process stands: one of the ranks of torchrun or of `supervise`, or alone (`launcher` is None)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str | None = None


def place(env: Mapping[str, str] = os.environ) -> Place:
    """The one reading of torchrun's variables. Raises ValueError, with the fix, for values that name no rank.

    Without both RANK and WORLD_SIZE this process is alone. So it is in a world of one that torchrun did not make:
    job schedulers preset such a world in every container, and it is no reason not to start ranks.
    """
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Place()
    world = _number(env, "WORLD_SIZE", 1, None)
    rank = _number(env, "RANK", 0, world - 1)
    if world == 1 and _REPORT not in env and "TORCHELASTIC_RUN_ID" not in env:
        return Place()
    local_world = _number(env, "LOCAL_WORLD_SIZE", 1, world) if "LOCAL_WORLD_SIZE" in env else world
    local_rank = _number(env, "LOCAL_RANK", 0, local_world - 1) if "LOCAL_RANK" in env else 0
    return Place(rank, world, local_rank, local_world, "supervise" if _REPORT in env else "torchrun")


def _number(env: Mapping[str, str], name: str, least: int, most: int | None) -> int:
    text = env[name]
    if (
        text.isascii()
        and text.isdigit()
        and len(text) < 10
        and int(text) >= least
        and (most is None or int(text) <= most)
    ):
        return int(text)
    allowed = f"from {least} to {most}" if most is not None else f"of at least {least}"
    raise ValueError(
        f"the environment has {name}={text[:40]!r}, which is no whole number {allowed}; "
        "unset RANK and WORLD_SIZE to let the program start its ranks, or start it with torchrun"
    )


def driver_present() -> bool:
    """Whether the system has a GPU driver, whatever this PyTorch can do with it."""
    return any(os.path.exists(node) for node in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def visible_gpus() -> int:
    """GPUs this process may use. torch is asked only where a driver is present."""
    if not driver_present():
        return 0
    import torch

    with warnings.catch_warnings():
        # A driver that is too old is told by the caller, in one line.
        warnings.simplefilter("ignore")
        usable = torch.cuda.is_available()
    # The count alone comes from the driver's own library, which has one for GPUs that CUDA cannot use.
    return torch.cuda.device_count() if usable else 0


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_cores(at: Place) -> None:
    """Give every CPU rank its share of the cores; torchrun's blanket single thread is not a choice of the user's."""
    if at.launcher == "torchrun" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        import torch

        torch.set_num_threads(max(1, cores() // at.local_world_size))


def open_standard_streams() -> None:
    """Open descriptors 0 to 2 where whoever started us closed them, as daemons and cron wrappers do.

    Otherwise the next pipe or file would get such a number, and would be replaced by a child's own stdin or stderr.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one
            os.set_inheritable(opened, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", closefd=False))  # noqa: SIM115


# ---- in a rank


def handed_down() -> bytes:
    """What the parent passed to `supervise` as `request`."""
    request = int(os.environ[_REQUEST])
    return os.pread(request, os.fstat(request).st_size, 0)


class Link:
    """A rank's line to whoever tells the user: its parent under `supervise`, else its own stderr."""

    def __init__(self, at: Place, debug: bool = False) -> None:
        self.place, self.debug = at, debug
        self.stderr: IO[str] = sys.stderr
        self._pipe: int | None = None
        if at.launcher == "supervise":
            self._attach()
        elif at.launcher == "torchrun":
            _die_with_parent()
            # At once, even while a collective waits: torchrun would kill us only 30 seconds later.
            if not is_ignored(signal.SIGINT):
                signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _attach(self) -> None:
        _die_with_parent()
        life = int(os.environ[_LIFE])
        self._pipe = int(os.environ[_REPORT])
        os.set_blocking(self._pipe, False)
        self.stderr = os.fdopen(int(os.environ[_STDERR]), "w", buffering=1, errors="backslashreplace")
        threading.Thread(target=_outlive_nothing, args=(life,), daemon=True).start()
        if os.getppid() != int(os.environ[_PARENT]):
            os._exit(1)
        # The parent answers for Ctrl-C and removes what a rank leaves behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def at_stage(self, where: str) -> None:
        """Tell the parent where this rank is; lost when the parent does not keep up."""
        self._send({"stage": where})

    def failed(self, stage: str, error: BaseException, status: int = 1, afterword: str = "") -> None:
        """Tell the user, once for all ranks, why this rank failed. afterword: follows the message on the same line."""
        failure = describe(error, self.place.rank, stage, status)
        if self.debug:
            say(failure.trace, self.stderr)
        if self._pipe is not None:
            os.set_blocking(self._pipe, True)
            self._send({"failure": failure.as_dict()})
        elif self.place.world_size == 1:
            say(f"error: {shown(failure.text(with_rank=False))}{afterword}", self.stderr)
        elif _first_to_fail():
            say(f"error: {shown(failure.text())}{afterword}", self.stderr)

    def leave(self, status: int) -> NoReturn:
        """End this process without tearing down process groups: their threads may wait for a peer, or abort at exit."""
        for stream in (sys.stdout, self.stderr):
            with suppress(OSError, ValueError):  # a full disk behind one has no say in how the run ended
                stream.flush()
        os._exit(status)

    def _send(self, message: dict[str, Any]) -> None:
        if self._pipe is not None:
            with suppress(BlockingIOError, BrokenPipeError):
                os.write(self._pipe, json.dumps(message).encode() + b"\n")


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


# ---- in the parent


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
        said = self.said()
        if "collective operation timeout" in said:  # NCCL's watchdog aborts the process
            return Failure(self.rank, self.stage, NO_ANSWER, secondary=True, late=True)
        killer = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else ""
        message = f"killed by {killer}" if killer else f"ended with status {code}"
        # The last line that is no warning, nor the indented source line that follows one.
        lines = [line for line in said.splitlines() if line.strip() and not line[0].isspace() and "Warning" not in line]
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
    clean_up: Callable[[], str] = lambda: "",
) -> int:
    """Run `command` once per rank and return the exit status: 0, 1 (one line on stderr says why), 2, or 128 + signal.

    request: what every rank gets from `handed_down`.
    cpu: the ranks compute on the CPU and share its cores.
    debug: the ranks' own stderr goes to the screen; otherwise it is kept for the last words of a rank that crashed.
    clean_up: called when the run did not succeed, after the last rank is gone; what it returns ends the error line.
    """
    open_standard_streams()
    status, reason, left = 1, "", ""
    children: list[_Child] = []
    with _scratch() as handed, _pipe() as (life, _), stoppable():
        try:
            handed.write(request)
            handed.flush()
            common = _shared_environment(ranks, cpu) | {_LIFE: str(life), _REQUEST: str(handed.fileno())}
            for rank in range(ranks):
                output = None if debug else _scratch()
                children.append(_start(command, rank, common, output))
            status, reason = _watch(children)
        except Stopped as stopped:
            status = stopped.status
        except OSError as error:
            reason = f"cannot start the ranks: {error}"
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            left = _stop(children)
            afterword = clean_up() if status else ""
    if reason or left:
        say(f"error: {shown(reason or 'stopped')}{left}{afterword}")
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
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return defaults | kept | {name: str(value) for name, value in world.items()}


def _start(command: Sequence[str], rank: int, common: dict[str, str], output: IO[bytes] | None) -> _Child:
    """output: where the rank's own stderr goes; None: to the screen."""
    read, write = os.pipe()
    stderr = os.dup(2)
    own = {"RANK": rank, "LOCAL_RANK": rank, _REPORT: write, _STDERR: stderr, _PARENT: os.getpid()}
    # A session of its own: the terminal's Ctrl-C reaches the parent alone, and killing the group leaves no grandchild.
    process = subprocess.Popen(
        list(command),
        env=common | {name: str(value) for name, value in own.items()},
        stdin=subprocess.DEVNULL,
        stderr=output,
        pass_fds=(write, stderr, int(common[_LIFE]), int(common[_REQUEST])),
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
