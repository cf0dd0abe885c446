"""Files that will be needed soon, read while something else computes: they then come from the page cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.system.files import size_of

PIECE = 16 << 20
"""Bytes that are read at once; the thread ends between two pieces."""


@contextmanager
def read_ahead(files: Sequence[Path], room: int) -> Iterator[None]:
    """Within it a thread reads the files to their ends and drops what it read, which the kernel keeps.

    room: bytes of host memory that may be filled so; files that are larger together are left alone. What cannot be
    read is nothing to speak of here: whoever needs the file will say so. Leaving stops the thread.
    """
    if not files or sum(size_of(file) for file in files) > room:
        yield
        return
    over = threading.Event()
    reader = threading.Thread(target=_read, args=(files, over), name="read ahead", daemon=True)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join()


def _read(files: Sequence[Path], over: threading.Event) -> None:
    piece = memoryview(bytearray(PIECE))
    for file in files:
        try:
            with file.open("rb", buffering=0) as stream:
                while not over.is_set() and stream.readinto(piece):
                    pass
        except OSError:
            continue
