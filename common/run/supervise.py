"""Starting ranks and watching over them.

Without torchrun a program is its own launcher: `supervise` starts a command once per rank with torchrun's variables
and waits (`common.run.children`). The first failure ends them all.
Under torchrun a rank prints its own failure, and the ranks agree through torchrun's store that only one does.
"""

from __future__ import annotations

import selectors
import signal
import time
from collections.abc import Callable, Sequence

from common.run.children import Child, end_all, explain, pipe, read, scratch, shared_environment, start_rank
from common.system.environment import HANDED, LIFE, open_standard_streams
from common.system.files import say, shown
from common.system.stopping import SIGNALS, Stopped, stoppable

GRACE_SECONDS = 1.5  # after the first failure: time for the rank that caused it to be noticed


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
    status, reason, survivors = 1, "", ""
    children: list[Child] = []
    with scratch() as request_file, pipe() as (life, _), stoppable():
        try:
            request_file.write(request)
            request_file.flush()
            common = shared_environment(ranks, cpu) | {LIFE: str(life), HANDED: str(request_file.fileno())}
            for rank in range(ranks):
                output = None if debug else scratch()
                children.append(start_rank(command, rank, common, output, (life, request_file.fileno(), *inherited)))
            status, reason = _watch(children)
        except Stopped as stopped:
            status = stopped.status
        except OSError as error:
            reason = f"cannot start the ranks: {error}"
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            survivors = end_all(children)
            afterword = leave(status == 0)
    if reason or survivors:
        say(f"error: {shown(reason or 'stopped')}{survivors}{afterword}")
    elif afterword:
        say(f"interrupted{afterword}")
    return status


def _watch(children: list[Child]) -> tuple[int, str]:
    """Until all ranks are done, or one has failed: the exit status and the reason."""
    deadline: float | None = None
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.report, selectors.EVENT_READ, child)
        while True:
            for key, _ in selector.select(timeout=0.1):
                if not read(key.data):
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
        read(child)
    return explain(children)
