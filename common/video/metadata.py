"""Settings inside the files that hold pictures: PNG text, EXIF of JPEG and WebP, comments of GIF.

A file has a title (the prompt) and a comment (the settings as json). Both are text; what a format cannot hold is cut
off at the end.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

MAX_TITLE_BYTES, MAX_COMMENT_BYTES = 4_000, 56_000
"""Of EXIF, which JPEG keeps in one segment of 64 KiB."""
IMAGE_DESCRIPTION, EXIF_IFD, USER_COMMENT = 0x010E, 0x8769, 0x9286  # EXIF 2.3, tables 3 to 7
VP8X_EXIF, VP8X_ALPHA = 0x08, 0x10  # WebP container specification, extended file format


def truncated(text: str, max_bytes: int) -> str:
    """The text without zero bytes, its UTF-8 no longer than `max_bytes`; what UTF-8 cannot say is escaped."""
    clean = text.replace("\0", "").encode("utf-8", "backslashreplace")
    return clean[:max_bytes].decode("utf-8", "ignore")


def png_text(title: str, comment: str) -> PngInfo:
    """Title and comment under PNG's own keywords, in UTF-8 (iTXt)."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in {"Title": title, "Comment": comment}.items():
        if text:
            info.add_itxt(key, truncated(text, 1 << 20))
    return info


def exif(title: str, comment: str) -> bytes:
    """EXIF data with the title as ImageDescription and the comment as UserComment; empty for neither.

    Without the prefix that JPEG puts before them.
    """
    from PIL import Image

    exif = Image.Exif()
    if title:
        exif[IMAGE_DESCRIPTION] = truncated(title, MAX_TITLE_BYTES).encode()
    if comment:
        plain = comment.isascii()
        text = truncated(comment, MAX_COMMENT_BYTES if plain else MAX_COMMENT_BYTES // 2)
        # UserComment names its encoding in 8 bytes; UTF-16 is in the byte order of the whole, here little endian.
        data = b"ASCII\0\0\0" + text.encode() if plain else b"UNICODE\0" + text.encode("utf-16-le")
        exif[EXIF_IFD] = {USER_COMMENT: data}
    return exif.tobytes().removeprefix(b"Exif\0\0") if title or comment else b""


def with_gif_comment(gif: bytes, text: str) -> bytes:
    """A GIF with a comment extension before its first picture, where readers look for it."""
    flags = gif[10]
    head = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)  # up to the end of the global palette
    data = truncated(text, MAX_COMMENT_BYTES).encode()
    blocks = b"".join(bytes([len(part)]) + part for part in (data[i : i + 255] for i in range(0, len(data), 255)))
    return gif[:head] + b"\x21\xfe" + blocks + b"\0" + gif[head:]


def with_webp_exif(webp: bytes, data: bytes) -> bytes:
    """A WebP, still or animated, with EXIF data at its end. One in the simple layout becomes one in the extended."""
    chunks = webp[12:]
    if chunks[:4] != b"VP8X":
        chunks = _vp8x(chunks) + chunks
    chunks = chunks[:8] + bytes([chunks[8] | VP8X_EXIF]) + chunks[9:] + _chunk(b"EXIF", data)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _vp8x(chunks: bytes) -> bytes:
    """The header of the extended layout for a simple WebP's only chunk."""
    if chunks[:4] == b"VP8L":
        bits = struct.unpack("<I", chunks[9:13])[0]
        width, height, flags = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, VP8X_ALPHA * (bits >> 28 & 1)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", chunks[14:18]))
        flags = 0
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return _chunk(b"VP8X", bytes([flags, 0, 0, 0]) + canvas)


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
