"""Images of documents of which only the tokens are at hand, and who made them.

Letters: N tokens of the image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimodal.documents import Part
from unimodal.sequence_rules import SequenceRules
from unimodal_tokenizers.base import Grid, ImageTokenizer, ImageTokens


class StoredImage(Part):
    """An image part as the tokens that a tokenizer made of it.

    Args:
        tokens: of this image alone, on the host.
        size: (height, width) of the pixels that they were made of.
        learn: whether the image is to be drawn.
        role: as of any part.
    """

    tokens: ImageTokens
    size: tuple[int, int]

    def __init__(self, tokens: ImageTokens, size: tuple[int, int], learn: bool = True, role: str = "") -> None:
        if len(tokens) != 1:
            raise ValueError(f"tokens: expected those of one image, got {len(tokens)}")
        for name, value in (("tokens", tokens), ("size", size), ("learn", learn), ("role", role)):
            object.__setattr__(self, name, value)  # as the frozen class it is

    @property
    def content(self) -> str | Image.Image:
        """None: ValueError."""
        raise ValueError("image: expected pixels, got an image that is stored as tokens")

    @property
    def is_text(self) -> bool:
        """Never."""
        return False

    @property
    def is_image(self) -> bool:
        """Always."""
        return True

    @property
    def image(self) -> Image.Image:
        """None: ValueError."""
        raise ValueError("image: expected pixels, got an image that is stored as tokens")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredImage) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"StoredImage({self.size[1]}x{self.size[0]}, {self.tokens.grids[0].length} tokens)"

    def __reduce__(self) -> tuple[object, ...]:
        # A tensor would travel between processes as an open file, one for each image that waits.
        return _restored, (self.tokens.values.numpy(), self.tokens.grids, self.size, self.learn, self.role)

    def _key(self) -> tuple[object, ...]:
        return self.tokens.grids, tuple(self.tokens.values.flatten().tolist()), self.size, self.learn, self.role


def _restored(
    values: np.ndarray, grids: tuple[Grid, ...], size: tuple[int, int], learn: bool, role: str
) -> StoredImage:
    return StoredImage(ImageTokens(torch.from_numpy(values), grids), size, learn, role)


def check_stored(sizes: Iterable[Sequence[int]], rules: SequenceRules) -> None:
    """ValueError where a recipe has no use for tokens without pixels, or for images of one of these (height, width)."""
    if rules.context != "clean":
        raise ValueError(f"sequence.context: expected clean with images stored as tokens, got {rules.context}")
    if rules.native is not None:
        raise ValueError("sequence.native: expected none with images stored as tokens, which have their sizes")
    for size in sizes:
        if tuple(size) not in {tuple(one) for one in rules.image_sizes}:
            raise ValueError(f"sequence.image_sizes: expected {list(size)}, which images are stored of, among them")


def tokenizer_fingerprint(tokenizer: ImageTokenizer) -> str:
    """SHA-256 of a tokenizer's class, layout, weights, and what its own parts say of settings that no weight shows.

    Two that share it make the same tokens, unless their configs were edited to have other activations.
    """
    digest = hashlib.sha256(f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__} {tokenizer.layout}".encode())
    for name, part in tokenizer.named_modules():
        # Of other libraries' parts words may change, and most settings follow from weights and layout.
        if type(part).__module__.startswith("unimodal_tokenizers"):
            digest.update(f"\n{name} {type(part).__qualname__} {part.extra_repr()}".encode())
        for key in ("num_groups", "num_heads", "heads"):
            if isinstance(value := getattr(part, key, None), int):
                digest.update(f"\n{name} {key} {value}".encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
