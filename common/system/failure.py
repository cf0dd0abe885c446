"""Why a run failed, in one line: what each rank reports, and which of several reports is the cause."""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from common.system.files import WriteError

# What PyTorch's collectives say when a peer is gone, and when it does not answer. They raise RuntimeError for both.
_PEER_GONE = ("connection closed", "connection reset", "broken pipe", "connection refused", "remote process exited")
_NO_ANSWER = ("timed out", "timeout")
_COLLECTIVE = ("gloo", "nccl", "c10d", "tcpstore", "process group", "collective", "socket", "store")
# Running out of memory, as libraries put it into a plain RuntimeError: CUDA and NCCL; cuDNN, where no convolution
# algorithm got its workspace; handles of cuDNN and cuBLAS; PyTorch's allocator on the CPU.
_NO_ENGINE = "unable to find an engine"
_NO_MEMORY = (
    "out of memory",
    _NO_ENGINE,
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
    "can't allocate memory",
    "cannot allocate memory",
)

_PLAIN = (ValueError, ImportError, ArithmeticError, TimeoutError, WriteError)  # their messages need no name in front
NO_SPACE = "no space is left on the disk"
NO_ANSWER = "another rank did not answer within --timeout"


@dataclass(frozen=True)
class Failure:
    """One rank's failure."""

    rank: int
    stage: str
    message: str
    when: float = field(default_factory=time.time)
    secondary: bool = False
    """Only an echo of another rank's."""
    late: bool = False
    """A peer did not answer in time."""
    killed: bool = False
    status: int = 1
    trace: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Without the trace, which stays in the rank: the rest fits a pipe."""
        return asdict(self) | {"trace": ""}

    def text(self, with_rank: bool = True) -> str:
        return f"rank {self.rank}, {self.stage}: {self.message}" if with_rank else f"{self.stage}: {self.message}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the device's or the machine's, whichever library noticed it.

    PyTorch's allocator raises OutOfMemoryError and Python MemoryError; cuDNN, cuBLAS and NCCL, which allocate for
    themselves, end in a RuntimeError that only its words tell apart.
    """
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def describe(error: BaseException, rank: int, stage: str, status: int = 1) -> Failure:
    """One line for an exception, and whether it is the cause or only an echo of another rank's end."""
    text = " ".join(str(error).split())
    trace = "".join(traceback.format_exception(error))
    kind = type(error).__name__
    short_of_memory = is_out_of_memory(error)
    if _is_collective(error, f"{kind} {text}") and not short_of_memory:
        if any(word in text.lower() for word in _PEER_GONE):
            return Failure(rank, stage, "lost the connection to another rank", secondary=True, trace=trace)
        if any(word in text.lower() for word in _NO_ANSWER):
            return Failure(rank, stage, NO_ANSWER, secondary=True, late=True, trace=trace)
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "no space left" in text.lower():
        message = f"{NO_SPACE}: {text}"
    elif isinstance(error, OSError) and error.errno and error.filename:
        message = f"{error.filename}: {(error.strerror or kind).lower()}"
    elif short_of_memory:
        message = f"out of memory: {_first_sentence(text) or 'the machine has no more'}"
        if _NO_ENGINE in text.lower():
            message += " (cuDNN's convolutions found no room for their workspace)"
    elif text and (isinstance(error, _PLAIN) or kind == "RuntimeError"):
        message = text
    else:
        message = f"{kind}: {text}" if text else kind
    return Failure(rank, stage, message[:2000], status=status, trace=trace)


def _is_collective(error: BaseException, words: str) -> bool:
    return isinstance(error, RuntimeError) and any(word in words.lower() for word in _COLLECTIVE)


def _first_sentence(text: str) -> str:
    return text.split(". ")[0]


def verdict(failures: Sequence[Failure], silent: Sequence[tuple[int, str]]) -> tuple[int, str]:
    """Exit status and the one line for the user. silent: (rank, stage) of ranks that live and have said nothing."""
    killed = [f for f in failures if f.killed]
    causes = sorted((f for f in failures if not f.secondary and not f.killed), key=lambda f: f.when)
    echoes = sorted((f for f in failures if f.secondary), key=lambda f: (not f.late, f.when))
    # A killed rank is noticed after it died, so an exception told before that is the earlier event.
    if causes and all(causes[0].when < k.when for k in killed):
        return causes[0].status, causes[0].text()
    if killed:
        return 1, "; ".join(f.text() for f in sorted(killed, key=lambda f: f.rank))
    if echoes[0].late and silent:
        waiting = ", ".join(f"rank {rank} ({stage})" for rank, stage in silent)
        return 1, f"{echoes[0].text()}; still silent: {waiting}"
    return 1, echoes[0].text()
