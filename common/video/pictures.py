"""Pictures: read from files, brought to a size, written with the settings inside. All are (H, W, 3) uint8."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.registry.checks import FITS
from common.system.files import shown, write_file
from common.video.metadata import exif, png_text

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
MAX_PIXELS = 1 << 27
"""Of a picture: more than the largest camera's, 400 MB as RGB."""
QUALITY = 95
"""Of JPEG and lossy WebP, of 100; JPEG's colours are kept in full resolution."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_image(path: str | Path) -> np.ndarray:
    """A picture file as (H, W, 3) uint8, upright as its EXIF data say, on white where it is transparent.

    Raises ValueError when it cannot be read, is not of IMAGE_FORMATS, is too large, or holds floating point numbers.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of a size that is bounded here
            with Image.open(path, formats=_image_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS // 10**6} million pixels")
                return as_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image file") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not a readable image (none of {', '.join(IMAGE_FORMATS)})") from None
    except Exception as error:  # decoders raise whatever comes to them
        raise ValueError(f"{path} is not a readable image ({one_line(error)})") from None


def _image_formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def as_rgb(image: Image.Image) -> np.ndarray:
    """A PIL image as (H, W, 3) uint8, upright, on white where it is transparent; ValueError for one in floats."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise ValueError("floating point numbers have no agreed white; save it in 8 or 16 bits")
    if upright.mode.startswith("I"):  # 16 bits of grey, which PIL would clip instead of scale
        deep = np.asarray(upright).astype(np.int64)
        if deep.min() < 0 or deep.max() > 0xFFFF:
            raise ValueError("more than 16 bits of grey; save it in 8 or 16 bits")
        return np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if upright.has_transparency_data:
        colours = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return np.asarray(upright.convert("RGB"))


def one_line(error: BaseException) -> str:
    """What an error says, printable and without line breaks."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(line.split()) or type(error).__name__


def fit_picture(picture: np.ndarray, height: int, width: int, fit: str = "crop") -> tuple[np.ndarray, str]:
    """A picture (H, W, 3) uint8 brought to (height, width, 3), and `fit_remark`'s words on it.

    fit: `crop` cuts what is too wide or too high off both sides alike; `pad` keeps all of it between black bars;
    `stretch` gives up its shape. One that has the shape already is resized whole, alike in all three. The filter is
    Lanczos, the reference pipelines'.
    """
    from PIL import Image

    remark = fit_remark(picture.shape[:2], height, width, fit)
    source = Image.fromarray(np.ascontiguousarray(picture))
    if fit == "pad" and remark:
        inner = _inside(picture.shape[:2], height, width)
        canvas = Image.new("RGB", (width, height))
        resized = source.resize(inner[::-1], Image.Resampling.LANCZOS)
        canvas.paste(resized, ((width - inner[1]) // 2, (height - inner[0]) // 2))
        return np.asarray(canvas), remark
    box = _kept(picture.shape[:2], height, width) if fit == "crop" and remark else None
    return np.asarray(source.resize((width, height), Image.Resampling.LANCZOS, box=box)), remark


def fit_remark(size: tuple[int, ...], height: int, width: int, fit: str = "crop") -> str:
    """What `fit_picture` cuts off or adds to a picture of `size` (H, W), for people; empty where it does neither.

    Raises ValueError for a fit that is none of FITS.
    """
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; choose one of {', '.join(FITS)}")
    rows, columns = size
    if rows * width == columns * height or fit == "stretch":
        return ""
    wide, excess = columns * height > rows * width, misfit(size, height, width)
    shape = f"{columns}x{rows} to {width}x{height}"
    if fit == "crop":
        return f"cropped from {shape}: {excess:.1%} of its {'width' if wide else 'height'} is cut off"
    return f"padded from {shape}: {excess:.1%} of the {'height' if wide else 'width'} is black"


def misfit(size: tuple[int, ...], height: int, width: int) -> float:
    """The part of a picture (H, W) that is over in the shape of (height, width), on the side that is too long."""
    rows, columns = size
    return 1 - min(rows * width, columns * height) / max(rows * width, columns * height)


def seen_part(picture: np.ndarray, height: int, width: int, fit: str = "crop") -> np.ndarray:
    """What `fit_picture` shows of a picture (H, W, 3), in the picture's own pixels, at least one."""
    if fit != "crop":
        return picture
    left, top, right, bottom = _kept(picture.shape[:2], height, width)
    return picture[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)]


def _kept(size: tuple[int, ...], height: int, width: int) -> tuple[float, float, float, float]:
    """The middle of a picture (H, W) in the shape of (height, width): left, top, right, bottom, in parts of pixels."""
    rows, columns = size
    kept_columns = min(columns, rows * width / height)
    kept_rows = min(rows, columns * height / width)
    left, top = (columns - kept_columns) / 2, (rows - kept_rows) / 2
    return left, top, left + kept_columns, top + kept_rows


def _inside(size: tuple[int, ...], height: int, width: int) -> tuple[int, int]:
    """The largest (height, width) in the shape of `size` (H, W), in whole pixels and at least one."""
    rows, columns = size
    scale = min(height / rows, width / columns)
    return max(1, min(height, round(rows * scale))), max(1, min(width, round(columns * scale)))


def write_picture(
    path: str | Path, picture: np.ndarray | Tensor, title: str = "", comment: str = "", lossless: bool = False
) -> None:
    """A picture (H, W, 3) uint8 to a file of the format that its suffix names, whole or not at all.

    Title and comment go inside: PNG has them as text, JPEG and WebP as EXIF. lossless: of WebP alone; PNG always is.
    Raises ValueError for another suffix or what is no picture, WriteError when the file cannot be written.
    """
    path, pixels = Path(path), np.asarray(picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"the picture is {pixels.dtype} {pixels.shape}; needed is uint8 (H, W, 3)")
    write_file(path, encode_picture(pixels, path.suffix.lower(), title, comment, lossless))


def encode_picture(
    picture: np.ndarray, suffix: str, title: str = "", comment: str = "", lossless: bool = False
) -> bytes:
    """The content of a picture file; see `write_picture`. In memory, since PIL hides why a disk takes no more."""
    from PIL import Image

    kinds: dict[str, dict[str, Any]] = {
        ".png": {"format": "PNG", "pnginfo": png_text(title, comment)},
        ".jpg": {"format": "JPEG", "quality": QUALITY, "subsampling": 0, "exif": _jpeg_exif(title, comment)},
        ".webp": {"format": "WEBP", "quality": QUALITY, "lossless": lossless, "exif": exif(title, comment)},
    }
    kinds[".jpeg"] = kinds[".jpg"]
    if suffix not in kinds:
        raise ValueError(
            f"a picture cannot be written as {shown(suffix) or 'a name without a suffix'}; choose one of "
            f"{', '.join(PICTURE_SUFFIXES)}"
        )
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(content, **kinds[suffix])
    return content.getvalue()


def _jpeg_exif(title: str, comment: str) -> bytes:
    data = exif(title, comment)
    return b"Exif\0\0" + data if data else b""
