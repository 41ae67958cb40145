"""Images of prompts that are read when they are looked at: a benchmark of tens of thousands cannot hold them all."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from unimodal.documents import Part
from unimodal.images import load_image, to_rgb


class LazyImage(Part):
    """An image of a prompt that is read whenever it is looked at, and not kept.

    Args:
        read: gives the image.
        digest: stands for the image in fingerprints, so that it need not be read for them.
    """

    def __init__(self, read: Callable[[], Image.Image], digest: str) -> None:
        for name, value in (("read", read), ("digest", digest), ("learn", False), ("role", "")):
            object.__setattr__(self, name, value)  # as the frozen class it is

    read: Callable[[], Image.Image]
    digest: str

    @property
    def content(self) -> Image.Image:
        """The image."""
        return self.read()

    @property
    def is_text(self) -> bool:
        """Never."""
        return False

    @property
    def is_image(self) -> bool:
        """Always, which is known without reading it."""
        return True

    @property
    def image(self) -> Image.Image:
        """The image as RGB."""
        return to_rgb(self.content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LazyImage) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"LazyImage({self.digest!r})"


_load = lru_cache(maxsize=64)(load_image)  # several questions are about one image, and it is looked at more than once


def image_path(folder: Path, name: str, where: str) -> Path:
    """Where an image lies that a benchmark's file names; ValueError, beginning with `where`, for a name that leads out.

    The name alone decides: a folder may hold its user's own links to where the images are, unlike `contained_path`'s.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: expected the name of an image inside {folder}, got {name!r}")
    return folder / name


def image_file(folder: Path, name: str, where: str) -> LazyImage:
    """An image file below a folder, by the name that a benchmark's file has for it; its name and size stand for it.

    Raises:
        ValueError: a name that leads out of the folder, or no such file; `where` says who wants it.
    """
    return image_at(image_path(folder, name, where), where)


def image_at(path: Path, where: str) -> LazyImage:
    """An image file; ValueError, beginning with `where`, when there is none."""
    if not path.is_file():
        raise ValueError(f"{where}: expected the image {path}, got no such file")
    return LazyImage(partial(_load, path), f"{path.name}:{path.stat().st_size}")


def image_base64(data: str, where: str) -> LazyImage:
    """An image within a table."""
    digest = hashlib.sha256(data.encode()).hexdigest()
    return LazyImage(partial(_decode_base64, data, where), digest)


@lru_cache(maxsize=8)
def _decode_base64(data: str, where: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["PNG", "JPEG", "WEBP"]) as image:
            return to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"{where}: image: expected an image in base64, got a file of another kind") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no base64" if isinstance(error, binascii.Error) else " ".join(str(error).split())[:100]
        raise ValueError(f"{where}: image: expected a whole image in base64, got {reason}") from None
