"""What decoding is asked for, and what it says while it goes on.

Letters: n tokens of one image, H, W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from unimodal.images import to_rgb
from unimodal_generators.base import Grid, SamplingSettings
from unimodal_generators.choice import check_choice


@dataclass(frozen=True)
class DecodingSettings:
    """How documents go on.

    Args:
        start: whether the first thing to come is text (which may begin an image) or an image.
        max_tokens: most text tokens a document, over all its texts.
        max_images: most images a document.
        temperature: of the text; 0 takes the likeliest token.
        top_k: of the text; 0 is all.
        top_p: of the text; 1 is all.
        image: of the images; None takes the recipe's.
        size: (height, width) of drawn images; None takes the recipe's first, or what the model writes where
            sequence.write_size lets it.
        stop: a document ends before any of these, where a text of it would hold one.
        negative: words to be led away from: where guidance drops the prompt's text, they are read in its place.
    """

    start: Literal["text", "image"] = "text"
    max_tokens: int = 64
    max_images: int = 4
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    image: SamplingSettings | None = None
    size: tuple[int, int] | None = None
    stop: tuple[str, ...] = ()
    negative: str = ""

    def __post_init__(self) -> None:
        if self.start not in ("text", "image"):
            raise ValueError(f"start: expected text or image, got {self.start!r}")
        if "" in self.stop:  # as it is in every text that is given for a tuple
            raise ValueError(f"stop: expected a tuple of texts that are not empty, got {self.stop!r}")
        if self.max_tokens < 0 or self.max_images < 0:
            raise ValueError(
                f"max_tokens and max_images: expected 0 or more, got {self.max_tokens} and {self.max_images}"
            )
        if self.start == "image" and self.max_images == 0:
            raise ValueError("max_images: expected at least 1 to start with an image, got 0")
        if self.negative and self.max_images == 0:
            raise ValueError(f"negative: expected none where no image is drawn (max_images 0), got {self.negative!r}")
        check_choice(self.temperature, self.top_k, self.top_p)


def checked_seeds(seeds: Sequence[int]) -> list[int]:
    """Seeds that every random generator takes."""
    for seed in seeds:
        if not isinstance(seed, Integral) or not 0 <= seed < 2**64:
            raise ValueError(f"seeds: expected whole numbers from 0 to 2**64 - 1, got {seed!r}")
    return [int(seed) for seed in seeds]


@dataclass(frozen=True)
class Piece:
    """What came next of one of the documents being decoded.

    Args:
        document: which of them.
        text: further text, or
        image: an image, whole; or
        preview: an image as it looks while it is drawn.
    """

    document: int
    text: str = ""
    image: Image.Image | None = None
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Inpaint:
    """Part of the first image that a document draws, given beforehand.

    Tokens are kept whole: one counts as given where all of its pixels are. A tokenizer that loses something loses it of the
    given pixels as well.

    Args:
        image: of the size that is drawn; what is to be drawn is not looked at.
        redraw: of the same size, black where the image is given and anything else where it is to be drawn. Both are read as
            images of documents are: turned as their files say, on white where they let something through.
    """

    image: Image.Image
    redraw: Image.Image

    def __post_init__(self) -> None:
        for name in ("image", "redraw"):
            object.__setattr__(self, name, to_rgb(getattr(self, name)))
        if self.image.size != self.redraw.size:
            (w, h), (mw, mh) = self.image.size, self.redraw.size
            raise ValueError(f"redraw: expected a mask of {w}x{h} pixels, as the image has, got {mw}x{mh}")

    def shown(self) -> UInt8[np.ndarray, "H W 3"]:
        """The image without what is to be drawn: a tokenizer that looks around a token must not see it."""
        return np.where(self._free()[..., None], np.uint8(128), np.asarray(self.image))

    def _free(self) -> Bool[np.ndarray, "H W"]:
        return np.asarray(np.asarray(self.redraw).any(-1))

    def given(self, grid: Grid) -> Bool[Tensor, " n"]:
        """Which tokens of the image are given, row by row."""
        free = self._free()
        h, w = free.shape
        cells = free.reshape(grid.h, h // grid.h, grid.w, w // grid.w)
        return torch.from_numpy(~cells.any(axis=(1, 3)).flatten())


def check_one_each(documents: int, seeds: Sequence[int], inpaint: Sequence[Inpaint | None] | None) -> None:
    """ValueError, naming it, for what is not one a document."""
    for name, values in (("seeds", seeds), ("inpaint", inpaint)):
        if values is not None and len(values) != documents:
            raise ValueError(f"{name}: expected one a document ({documents}), got {len(values)}")
