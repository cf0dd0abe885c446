"""Pictures and videos that are damaged, and files that only look like them."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence

from PIL import Image

from tests.fuzz.documents import damaged

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
REFUSED = ("EPS", "DDS", "ICNS", "SGI", "TGA", "PCX", "SPIDER", "JPEG2000")


def picture(kind: str, size: tuple[int, int] = (24, 16), mode: str = "RGB") -> bytes:
    """A small picture in a format of PIL."""
    image = Image.radial_gradient("L").resize(size).convert("F" if kind == "SPIDER" else mode)
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def mutated_files(contents: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """Endless variants of some files, damaged in one to four places."""
    draw = random.Random(seed)
    while True:
        content = draw.choice(contents)
        for _ in range(draw.randint(1, 4)):
            content = damaged(content, draw) or b"\0"
        yield content
