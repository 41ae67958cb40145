"""The interface every visual tokenizer keeps: pixels in, tokens out, and back.

Letters: B images, H height, W width (pixels); T tokens of all images end to end, D channels of a token,
Q codebooks; h, w the token grid of one image.

Images are RGB float32 in [-1, 1]. Tokens of many images are concatenated, row-major over each image's grid.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn


class Grid(NamedTuple):
    """Rows and columns of one image's tokens."""

    h: int
    w: int

    @property
    def length(self) -> int:
        """Tokens of the image."""
        return self.h * self.w


@dataclass(frozen=True)
class TokenLayout:
    """What a tokenizer's tokens look like: all that generators and packing need to know of it."""

    kind: Literal["continuous", "discrete"]
    dim: int  # channels of one token (continuous), or of its code vector (discrete)
    stride: int  # pixels a token covers along each axis
    codebooks: tuple[int, ...] = ()  # entries of each codebook; empty when continuous

    def grid(self, height: int, width: int) -> Grid:
        """Token grid of an image of `height` x `width` pixels."""
        if height % self.stride or width % self.stride or height < 1 or width < 1:
            raise ValueError(f"image size: expected multiples of the stride {self.stride}, got {height}x{width} pixels")
        return Grid(height // self.stride, width // self.stride)


@dataclass(frozen=True)
class ImageTokens:
    """Tokens of several images end to end.

    `values` is float `(T, D)` for continuous tokenizers and int64 `(T,)` (or `(T, Q)` with Q codebooks) for discrete ones.
    """

    values: Shaped[Tensor, "T *channels"]
    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        expected = sum(grid.length for grid in self.grids)
        if len(self.values) != expected:
            raise ValueError(f"tokens: expected {expected} for grids {self.grids}, got {len(self.values)}")

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each image."""
        return [grid.length for grid in self.grids]

    def split(self) -> list["ImageTokens"]:
        """One record an image."""
        return [ImageTokens(v, (g,)) for v, g in zip(self.values.split(self.lengths), self.grids, strict=True)]

    def select(self, indices: Sequence[int]) -> "ImageTokens":
        """The images at `indices`, in that order (an image may be asked for twice)."""
        if list(indices) == list(range(len(self))):
            return self
        parts = self.values.split(self.lengths)
        values = torch.cat([parts[i] for i in indices]) if len(indices) else self.values[:0]
        return ImageTokens(values, tuple(self.grids[i] for i in indices))

    @staticmethod
    def cat(items: Sequence["ImageTokens"]) -> "ImageTokens":
        """The images of all `items`, in order."""
        return ImageTokens(torch.cat([i.values for i in items]), tuple(g for i in items for g in i.grids))


class ImageTokenizer(nn.Module, ABC):
    """Pixels <-> tokens. Subclasses set `layout` and write `encode_batch`, `decode_batch` and `lookup`."""

    layout: TokenLayout

    @abstractmethod
    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Shaped[Tensor, "B N *channels"]:
        """Images of one size to their tokens; deterministic unless a generator is given."""

    @abstractmethod
    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rng: torch.Generator | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """The inverse of `encode_batch` (up to what the tokenizer loses)."""

    @abstractmethod
    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Code vectors of tokens: ids -> rows of the codebook; continuous tokens are their own vectors."""

    def encode(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None) -> ImageTokens:
        """Tokens of images of one size."""
        grid = self.layout.grid(*images.shape[-2:])
        return ImageTokens(self.encode_batch(images, rng).flatten(0, 1), (grid,) * len(images))  # (B*N, ...)

    def encode_each(self, images: Sequence[Float[Tensor, "3 _ _"]], rng: torch.Generator | None = None) -> ImageTokens:
        """Tokens of images of any sizes, equal sizes encoded together."""
        parts: list[ImageTokens | None] = [None] * len(images)
        for members in _groups([tuple(image.shape) for image in images]):
            tokens = self.encode(torch.stack([images[i] for i in members]), rng)
            for i, one in zip(members, tokens.split(), strict=True):
                parts[i] = one
        return ImageTokens.cat([part for part in parts if part is not None])

    def decode(self, tokens: ImageTokens, rng: torch.Generator | None = None) -> Float[Tensor, "B 3 H W"]:
        """Images of tokens; all grids must be equal (`decode_each` takes any)."""
        if len(set(tokens.grids)) != 1:
            raise ValueError(f"tokens: decode expects images of one grid, got {sorted(set(tokens.grids))}")
        n = tokens.grids[0].length
        return self.decode_batch(tokens.values.unflatten(0, (-1, n)), tokens.grids[0], rng)  # (B, N, ...) -> images

    def decode_each(self, tokens: ImageTokens, rng: torch.Generator | None = None) -> list[Float[Tensor, "3 _ _"]]:
        """Images of tokens of any grids, equal grids decoded together."""
        images: list[Tensor] = [torch.empty(0)] * len(tokens)
        for members in _groups(list(tokens.grids)):
            for i, image in zip(members, self.decode(tokens.select(members), rng), strict=True):
                images[i] = image
        return images


def _groups(keys: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Indices of equal keys, in order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(tuple(key), []).append(i)
    return list(groups.values())


def bits_per_token(layout: TokenLayout) -> float:
    """Information one discrete token carries at most, in bits; infinite for continuous tokens."""
    return sum(math.log2(n) for n in layout.codebooks) if layout.codebooks else math.inf
