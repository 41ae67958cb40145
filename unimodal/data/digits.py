"""The handwritten digits that ship with scikit-learn, as documents of four kinds.

1,797 real scans of 8 x 8 pixels with 17 grey levels (Optical Recognition of Handwritten Digits, E. Alpaydin and
C. Kaynak, UCI; scikit-learn installs them with itself, so nothing is downloaded).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from PIL import Image

from unimodal.documents import Document, Part

Kind = Literal["text_to_image", "image_to_text", "sum", "text"]
Split = Literal["train", "test"]

GREY_LEVELS = 16
"""Largest value of a scan as it is stored; the smallest is 0."""
TRAIN_SHARE = 0.8
# Sums are drawn, not listed: these only say how many make an epoch.
_SUMS = {"train": 2000, "test": 200}

NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip
"""Names of 0..18, all that a sum of two digits can be."""


@dataclass(frozen=True, eq=False)
class DigitImages:
    """Scans and what they show.

    Attributes:
        values: (N, 8, 8) uint8, 0 paper .. 16 ink, as stored by scikit-learn.
        labels: (N,) int64, 0..9.
    """

    values: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Number of scans."""
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Scan `index` as an 8 x 8 RGB image, white ink on black."""
        return values_to_image(self.values[index])

    def images(self) -> list[Image.Image]:
        """All scans as images."""
        return [Image.fromarray(pixels) for pixels in _values_to_pixels(self.values)]


def values_to_image(values: np.ndarray) -> Image.Image:
    """Stored values (8, 8) 0..16 as an RGB image 0..255; `image_to_values` is the inverse."""
    return Image.fromarray(_values_to_pixels(values))


def _values_to_pixels(values: np.ndarray) -> np.ndarray:
    """(..., 8, 8) 0..16 as (..., 8, 8, 3) uint8."""
    grey = np.rint(values * (255 / GREY_LEVELS)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def image_to_values(image: Image.Image) -> np.ndarray:
    """Mean of the three colours on the scale 0..16, float64 (H, W): not rounded, so a drawn image keeps its levels."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)  # (H, W, 3)
    return pixels.mean(axis=2) * (GREY_LEVELS / 255)


def in_train_split(values: np.ndarray) -> bool:
    """Which side a scan is on, by a hash of its pixels: equal scans are always on one side, on every machine."""
    digest = hashlib.sha256(np.ascontiguousarray(values, dtype=np.uint8).tobytes()).digest()
    return int.from_bytes(digest[:8], "big") < TRAIN_SHARE * 2**64


@cache
def digit_images(split: Split | None = None) -> DigitImages:
    """The scans of one split, or all of them, in scikit-learn's order.

    Raises:
        ValueError: `split` is not "train", "test" or None.
    """
    if split not in (*get_args(Split), None):
        raise ValueError(f"split: expected train, test or None, got {split!r}")
    from sklearn.datasets import load_digits  # here: the import takes a second, which --help must not

    data = load_digits()
    values, labels = data.images.astype(np.uint8), data.target.astype(np.int64)  # (N, 8, 8), (N,)
    if split is not None:
        chosen = np.array([in_train_split(value) == (split == "train") for value in values])
        values, labels = values[chosen], labels[chosen]
    values.flags.writeable = False  # the cache hands out one array to all
    labels.flags.writeable = False
    return DigitImages(values, labels)


def caption(digit: int) -> str:
    """The one wording for a scan: "a handwritten seven"."""
    return f"a handwritten {NUMBER_WORDS[digit]}"


def caption_digit(text: str) -> int | None:
    """The digit a caption names, or None when the text is not exactly a caption."""
    for digit in range(10):
        if text.strip() == caption(digit):
            return digit
    return None


def sum_answer(text: str) -> int | None:
    """The number that an answer states, in words or digits, or None when it states none or says anything else."""
    word = text.strip().rstrip(".:;,").strip().lower()
    if word in NUMBER_WORDS:
        return NUMBER_WORDS.index(word)
    return int(word) if re.fullmatch(r"[0-9]{1,3}", word) else None


def digits_of(number: int) -> tuple[int, ...]:
    """Decimal digits from the left: 12 -> (1, 2)."""
    if number < 0:
        raise ValueError(f"number: expected 0 or more, got {number}")
    return tuple(int(character) for character in str(number))


def number_sentences(split: Split | None = None) -> tuple[str, ...]:
    """Every number sentence of one split, or of both; split by a hash of the sentence, as the scans are."""
    words = NUMBER_WORDS
    sentences = []
    for a in range(10):
        for b in range(10):
            sentences.append(f"{words[a]} plus {words[b]} equals {words[a + b]}")
            sentences.append(f"{words[a + b]} minus {words[b]} equals {words[a]}")
            if a != b:
                sentences.append(f"{words[a]} is {'less' if a < b else 'more'} than {words[b]}")
    for a in range(18):
        sentences.append(f"after {words[a]} comes {words[a + 1]}")
        sentences.append(f"before {words[a + 1]} comes {words[a]}")
    if split is None:
        return tuple(sentences)
    return tuple(s for s in sentences if in_train_split(np.frombuffer(s.encode(), np.uint8)) == (split == "train"))


class DigitsSource:
    """Digits as documents of one kind.

    - `text_to_image`: "a handwritten seven", then the scan (learned).
    - `image_to_text`: the scan, then "a handwritten seven" (learned).
    - `sum`: scan, " plus ", scan, " equals ", then learned: the answer as a word and drawn, one scan a digit.
    - `text`: a learned number sentence, "seven plus five equals twelve".

    The first two and the last go through their split by index; a sum is drawn from `rng` alone (operands uniform over
    0..9, then a scan of each digit), so `index` only names it.

    Args:
        kind: one of the four.
        split: "train" or "test"; every scan and sentence comes from that split.

    Raises:
        ValueError: `kind` or `split` is unknown.
    """

    def __init__(self, kind: Kind, split: Split = "train") -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")
        if split not in get_args(Split):
            raise ValueError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")
        self.kind: Kind = kind
        self.split: Split = split
        self._digits = digit_images(split)
        self._of_label = [np.flatnonzero(self._digits.labels == digit) for digit in range(10)]
        self._images = self._digits.images()  # a few hundred kilobytes, made once
        self._sentences = number_sentences(split)

    def __len__(self) -> int:
        """Documents in an epoch."""
        if self.kind == "sum":
            return _SUMS[self.split]
        return len(self._sentences) if self.kind == "text" else len(self._digits)

    def document(self, index: int, rng: np.random.Generator) -> Document:
        """The document at `index`; IndexError outside 0 <= index < len."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        if self.kind == "sum":
            return self._sum(rng)
        if self.kind == "text":
            return Document((Part(self._sentences[index]),), self.kind)
        image, text = self._images[index], caption(int(self._digits.labels[index]))
        first, second = (text, image) if self.kind == "text_to_image" else (image, text)
        return Document((Part(first, learn=False), Part(second)), self.kind)

    def corpus(self) -> Iterable[str]:
        """Every text of this kind, both splits: the tokenizer's vocabulary must not depend on the split."""
        if self.kind == "sum":
            yield from (" plus ", " equals ", *NUMBER_WORDS)
        elif self.kind == "text":
            yield from number_sentences()
        else:
            yield from (caption(digit) for digit in range(10))

    def _sum(self, rng: np.random.Generator) -> Document:
        left, right = (int(digit) for digit in rng.integers(0, 10, size=2))
        total = left + right
        question: tuple[str | Image.Image, ...] = (self._scan(left, rng), " plus ", self._scan(right, rng), " equals ")
        answer: tuple[str | Image.Image, ...] = (
            NUMBER_WORDS[total],
            *(self._scan(digit, rng) for digit in digits_of(total)),
        )
        parts = tuple(Part(content, learn=False) for content in question) + tuple(Part(content) for content in answer)
        return Document(parts, self.kind)

    def _scan(self, digit: int, rng: np.random.Generator) -> Image.Image:
        return self._images[int(rng.choice(self._of_label[digit]))]
