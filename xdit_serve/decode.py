"""`python decode.py KIND PIXELS`: read a stranger's picture or video from stdin, in a process that can do little harm.

A picture goes to stdout as a PNG of this program's own making, whatever the file was; of a video it is said only
whether it can be read. What is wrong goes to stdout too, as one line after status 3.
"""

from __future__ import annotations

import os
import resource
import sys
from itertools import islice
from pathlib import Path

MEMORY = 3 << 30
SECONDS = 20
FRAMES = 1000
REFUSED = 3


def bound() -> None:
    """From here on: so much address space and time of a core, and no file can be written."""
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def main() -> int:
    kind, most = sys.argv[1], int(sys.argv[2])
    descriptor = os.memfd_create("upload")
    while chunk := os.read(0, 1 << 20):
        view = memoryview(chunk)
        while view:
            view = view[os.write(descriptor, view) :]
    bound()
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    try:
        answer = picture(path, most) if kind == "picture" else video(path, most)
    except (ValueError, OSError, MemoryError) as error:
        answer = (str(error) or type(error).__name__).replace(f"{path} ", "it ").replace(path, "it").encode()
        sys.stdout.buffer.write(answer[:500])
        return REFUSED
    sys.stdout.buffer.write(answer)
    return 0


def picture(path: str, most: int) -> bytes:
    from PIL import Image

    from common.video.pictures import encode_picture, read_image

    Image.MAX_IMAGE_PIXELS = None  # the bound is `most`, and told in our words
    check_size(path, most)
    pixels = read_image(path)
    return encode_picture(pixels, ".png")


def check_size(path: str, most: int) -> None:
    """By the header, before anything is decoded. Other files are told of by whoever reads them."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception:  # decoders raise whatever comes to them
        return
    if width * height > most:
        raise ValueError(f"{width}x{height} is more than {most / 1e6:g} million pixels; send a smaller picture")


def video(path: str, most: int) -> bytes:
    from common.video.files import read_frames

    count = 0
    for frame in islice(read_frames(path), FRAMES):
        if frame.shape[0] * frame.shape[1] > most:
            raise ValueError(f"{frame.shape[1]}x{frame.shape[0]} is more than {most / 1e6:g} million pixels a frame")
        count += 1
    return str(count).encode()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's modules are not top-level names
    sys.exit(main())
