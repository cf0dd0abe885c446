"""The first thing a program runs, before anything that takes time to import."""

from __future__ import annotations

import os
import signal
from typing import Any


def begin() -> None:
    """From here on Ctrl-C ends the program at once with status 130, also in the middle of an import.

    An exception would come out as a traceback, or as whatever an extension module that is being imported makes of it.
    What has something to clean up takes the signal over with `launch.stoppable`. A SIGINT that is ignored stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: Any) -> None:
    os._exit(128 + number)
