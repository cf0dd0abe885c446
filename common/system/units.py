"""Numbers to be read. Bytes: memory in powers of two, files, disks and traffic in powers of ten."""

from __future__ import annotations

GIB = 2**30


def gib(size: float, digits: int = 1) -> str:
    """Memory: `21.6 GiB`."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size >= unit / 10:
            return f"{size / unit:.{digits}f} {name}"
    return f"{size / 1024:.{digits}f} KiB"


def gibs(*sizes: float) -> tuple[str, ...]:
    """Amounts of memory that are compared: with as many digits as tell apart those that differ."""
    for digits in range(1, 7):
        texts = tuple(gib(size, digits) for size in sizes)
        if len(set(texts)) == len(set(sizes)):
            break
    return texts


def gb(size: float) -> str:
    """What lies on disks or goes through links: `12.3 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} bytes"


def figure(value: float, digits: int = 3) -> str:
    """A number with so many digits that count, and all of those before its point: `0.125`, `16.4`, `3904`."""
    return f"{value:.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g}"
