"""Images as Pillow reads them from files and writes them: always RGB, and one line where a file is not one.

And in one of the sizes that a model reads.
"""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from unimodal.files import one_line, printable

# Raster formats only: Pillow would hand PostScript to an outside interpreter.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF")
# What Pillow's decoders raise on a damaged file (the list is theirs, not documented in one place).
_DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError,
    AttributeError, struct.error, zlib.error,
)  # fmt: skip
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB, turned the way its EXIF orientation says; an RGB image comes back as it is.

    Transparent pixels are laid on white. 16-bit grey 0..65535 becomes 0..255 (Pillow's own conversion clips at 255).

    Raises:
        ValueError: a mode without a defined scale (float, integers outside 16 bits), or no pixels.
    """
    if 0 in image.size:
        raise ValueError(f"image: expected pixels, got size {image.size}")
    # A subclass is a file still: its exact class, EXIF and transparent colour would travel along.
    if type(image) is Image.Image and image.mode == "RGB" and not image.info and not image.getexif():
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT:
        rgb = _sixteen_bit_to_rgb(image)
    elif image.mode == "F":
        raise ValueError("image: expected 8-bit or 16-bit pixels, got mode F (float), which has no fixed white")
    elif image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    else:
        rgb = image.convert("RGB")
    # A fresh image drops palette, EXIF and file handle, so that equal pixels compare equal.
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"image: expected 16-bit grey 0..65535, got {values.min()}..{values.max()}")
    grey = np.rint(values / 257).astype(np.uint8)  # 65535 / 257 = 255 exactly
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def fit_image(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> UInt8[np.ndarray, "_ _ 3"]:
    """RGB pixels of an image, scaled and centre-cropped to the (height, width) of `sizes` nearest to its shape."""
    image = to_rgb(image)
    ratio = image.height / image.width
    height, width = min(sizes, key=lambda s: (abs(np.log(s[0] / s[1] / ratio)), -s[0] * s[1]))
    if image.size != (width, height):
        # Cropped first: a spacer of 2000 x 2 pixels must not be scaled up whole.
        scale = max(height / image.height, width / image.width)
        w, h = min(width / scale, image.width), min(height / scale, image.height)
        left, top = (image.width - w) / 2, (image.height - h) / 2
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + w, top + h))
    return np.asarray(image)


def load_image(path: str | Path) -> Image.Image:
    """The first frame of an image file as RGB, decoded completely.

    Raises:
        ValueError: the file is missing, empty, no image, truncated, or holds more pixels than `Image.MAX_IMAGE_PIXELS`.
    """
    path = Path(path)
    try:
        present, size = path.is_file(), path.stat().st_size if path.is_file() else 0
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(path)}: expected an image file, got {error}") from None
    if not present:
        found = "a folder" if path.is_dir() else "no such file"
        raise ValueError(f"{printable(path)}: expected an image file, got {found}")
    if size == 0:
        raise ValueError(f"{printable(path)}: expected an image, got an empty file")
    try:
        return decode_image(path)
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {error}") from None


def decode_image(file: Path | io.BytesIO) -> Image.Image:
    """The first frame of an image file as RGB, decoded completely.

    Raises:
        ValueError: no image, damaged, or more pixels than `Image.MAX_IMAGE_PIXELS`.
    """
    Image.init()
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its limit; a warning would pass unseen in a loader.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
                image.load()
                return to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"expected at most {Image.MAX_IMAGE_PIXELS} pixels, got a larger image") from None
    except Image.UnidentifiedImageError:
        raise ValueError("expected an image, got a file of another kind") from None
    except _DAMAGE as error:
        raise ValueError(f"expected a whole image, got {one_line(error)}") from None


def image_data_uri(image: Image.Image) -> str:
    """The image as `data:image/png;base64,...`."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")


def png_bytes(image: Image.Image) -> bytes:
    """The image as the bytes of an RGB PNG file."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, format="PNG")
    return buffer.getvalue()
