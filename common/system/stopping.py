"""How a run is ended from outside: as an exception that lets what is half written be removed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

GRACE_SECONDS = 2.0
"""For the main thread to end by itself after a signal, before another ends the process."""
AGAIN_SECONDS = 0.05
"""After which a signal whose exception nobody got, or that came in an import, is sent again."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the run to end; `status` is the exit status, 128 + signal."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.status = 128 + number


class Abandoned(BaseException):
    """All ranks have agreed to leave what they do, at the same place; they go on with something else.

    unread: whether messages between neighbours may be on their way that nobody will take (`Mesh.world.edges`).
    """

    unread = False


@dataclass
class Asked:
    """Which signal has asked the run to end, None as long as none has."""

    number: int | None = None


@contextmanager
def stoppable(once: bool = False) -> Iterator[Asked]:
    """SIGINT, SIGTERM and SIGHUP raise `Stopped` inside, so that what is half written is removed on the way out.

    The value tells afterwards that it was so, whatever error a library has made of the exception.

    A signal that was ignored when the program began stays ignored: that is how `nohup`, and a shell's `&` in a script,
    ask for a run that outlives its terminal. One that comes in an import waits for its end: torch's C++ part ends the
    process when what it imports raises. once: what comes after the first signal changes nothing.
    """
    signals = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if once and signals.number is not None:
            return
        if _in_import(frame):
            return again(number)
        signals.number = number
        raise Stopped(number)

    with _sent_again(signals) as again:
        before = {number: signal.signal(number, stop) for number in SIGNALS if not is_ignored(number)}
        try:
            yield signals
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _in_import(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def _sent_again(signals: Asked) -> Iterator[Callable[[int], None]]:
    """The value sends a signal once more, soon; when the block is left before, to whom it then reaches.

    One that came in a finalizer or in a weak reference's callback is not lost either: Python prints an exception that
    is raised there and goes on.
    """
    exit_event = threading.Event()
    previous_hook = sys.unraisablehook

    def send(number: int) -> None:
        exit_event.wait(AGAIN_SECONDS)
        if signals.number is None:  # none has raised meanwhile: what follows a first one may not cut its tidying short
            os.kill(os.getpid(), number)

    def again(number: int) -> None:
        threading.Thread(target=send, args=(number,), daemon=True).start()

    def hear(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, Stopped):
            return previous_hook(unraisable)
        signals.number = None
        again(unraisable.exc_value.number)

    sys.unraisablehook = hear
    try:
        yield again
    finally:
        exit_event.set()
        sys.unraisablehook = previous_hook


@contextmanager
def heard(end: Callable[[int], None]) -> Iterator[None]:
    """Inside `stoppable`: if the main thread does not leave soon after a signal, another calls `end` with its number.

    A thread that waits for another rank inside a library runs no Python, so it never sees the exception; the system
    tells of the signal all the same, through a descriptor. Main thread only.
    """
    exit_event = threading.Event()
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)

    def listen() -> None:
        while data := os.read(read_fd, 1):
            if data[0] in SIGNALS:
                if not exit_event.wait(GRACE_SECONDS):
                    end(data[0])
                return

    before = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        exit_event.set()
        signal.set_wakeup_fd(before)
        os.close(write_fd)
        listener.join()
        os.close(read_fd)


def is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN
