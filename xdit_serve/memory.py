"""Whether a request fits into memory, asked of a process that has torch; see `xdit_serve.estimating`."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.registry.request import Request
from xdit_serve.estimating import receive, send

SECONDS = 120.0
"""For an answer; later ones are let in unasked."""
IDLE_SECONDS = 300.0
MOST_KEPT = 1000


class Memory:
    """Asks, and remembers what was answered for a size. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._free: Any = None
        self._answers: dict[Any, str] = {}
        self._rest: threading.Timer | None = None

    def problem(self, model: str, request: Request) -> str:
        """Why memory does not suffice, in the command line's words; empty where it does, or where nobody knows."""
        video = request.videos[0]
        sampling = video.sampling
        key = (model, sampling.width, sampling.height, sampling.num_frames, request.guided(video), request.layout)
        with self._lock:
            if key not in self._answers:
                if len(self._answers) >= MOST_KEPT:
                    self._answers.clear()
                message = self._ask(request)
                if message is None:
                    return ""
                self._answers[key] = message
            return self._answers[key]

    def _ask(self, request: Request) -> str | None:
        if self._rest is not None:
            self._rest.cancel()
        child = self._child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None
        try:
            send(child.stdin, (request, self._free))
            with selectors.DefaultSelector() as selector:
                selector.register(child.stdout, selectors.EVENT_READ)
                if not selector.select(SECONDS):
                    raise TimeoutError
            message, self._free = receive(child.stdout)
        except (OSError, EOFError):
            self._stop()
            return None
        self._rest = threading.Timer(IDLE_SECONDS, self.close)
        self._rest.daemon = True
        self._rest.start()
        return message

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(__file__).with_name("estimating.py"))]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
        # It ends when its stdin does, which is when this process ends in whatever way.
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for stream in (self._child.stdin, self._child.stdout):
                with suppress(OSError):
                    if stream is not None:
                        stream.close()
            self._child = None

    def close(self) -> None:
        """End the process; the next question starts another."""
        with self._lock:
            self._stop()
