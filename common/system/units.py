"""Bytes to be read: memory in powers of two, files, disks and traffic in powers of ten."""

from __future__ import annotations

GIB = 2**30


def gib(size: float) -> str:
    """Memory: `21.6 GiB`."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size >= unit / 10:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1024:.1f} KiB"


def gb(size: float) -> str:
    """What lies on disks or goes through links: `12.3 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} bytes"
