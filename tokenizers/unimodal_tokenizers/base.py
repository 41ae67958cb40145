"""The interface every visual tokenizer keeps: pixels in, tokens out, and back.

Letters: B images, H height, W width (pixels); N tokens of one image, T of all images end to end, D channels of a token,
Q codebooks of K entries; h, w the token grid of one image; S scales of a multi-scale tokenizer.

Images are RGB float32 in [-1, 1]. Tokens of many images are concatenated, row-major over each image's grid; several scales
come coarse to fine, each row-major.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn


class Grid(NamedTuple):
    """Rows and columns of one image's tokens; of several scales, those of the finest and of each."""

    h: int
    w: int
    scales: tuple[tuple[int, int], ...] = ()  # rows and columns of each scale, coarse to fine; empty: one, h x w

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each scale, of the only one too."""
        return self.scales or ((self.h, self.w),)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each scale."""
        return [rows * columns for rows, columns in self.sizes]

    @property
    def length(self) -> int:
        """Tokens of the image."""
        return sum(self.lengths)

    def first(self, scales: int) -> "Grid":
        """The same image, of whose scales only the coarsest so many are held."""
        if not 1 <= scales <= len(self.scales):
            raise ValueError(f"scales: expected between 1 and {len(self.scales)}, got {scales}")
        return Grid(self.h, self.w, self.scales[:scales])


@dataclass(frozen=True)
class TokenLayout:
    """What a tokenizer's tokens look like: all that generators and packing need to know of it."""

    kind: Literal["continuous", "discrete", "multiscale", "sequence"]  # a sequence: ids in one row, of no place
    dim: int  # channels of one token (continuous), or of its code vector (discrete)
    stride: int  # pixels a token covers along each axis; of a sequence, those that its tokenizer takes together
    codebooks: tuple[int, ...] = ()  # entries of each codebook; empty when continuous
    scales: tuple[int, ...] = ()  # rows and columns of each scale of an image whose finest is square; multiscale only
    length: int = 0  # tokens of an image; sequence only
    image: tuple[int, int] = (0, 0)  # (height, width) in pixels of every image; sequence only

    def __post_init__(self) -> None:
        whole, none = self.length >= 1 and min(self.image) >= 1, not self.length and not any(self.image)
        if not (whole if self.kind == "sequence" else none):
            raise ValueError(
                f"layout: expected length and image of a sequence, and of nothing else, got {self.length}, "
                f"{list(self.image)} of {self.kind} tokens"
            )

    def grid(self, height: int, width: int) -> Grid:
        """Token grid of an image of `height` x `width` pixels."""
        if self.kind == "sequence":
            if (height, width) != tuple(self.image):
                h, w = self.image
                raise ValueError(
                    f"image size: expected {h}x{w}, the one this tokenizer has, got {height}x{width} pixels"
                )
            return Grid(1, self.length)
        if height % self.stride or width % self.stride or height < 1 or width < 1:
            raise ValueError(f"image size: expected multiples of the stride {self.stride}, got {height}x{width} pixels")
        h, w = height // self.stride, width // self.stride
        return Grid(h, w, tuple((self._side(h, s), self._side(w, s)) for s in self.scales))

    def size(self, grid: Grid) -> tuple[int, int]:
        """(height, width) in pixels of an image with that grid: the inverse of `grid`."""
        return self.image if self.kind == "sequence" else (grid.h * self.stride, grid.w * self.stride)

    def _side(self, finest: int, scale: int) -> int:
        """Cells of a scale along a side of so many: the share the scale has of the last one, rounded, at least 1."""
        return max(1, (2 * finest * scale + self.scales[-1]) // (2 * self.scales[-1]))


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

    def first(self, scales: int) -> "ImageTokens":
        """The same images, coarser: tokens of the first so many scales, which decode by themselves."""
        grids = tuple(grid.first(scales) for grid in self.grids)
        parts = [v[: grid.length] for v, grid in zip(self.values.split(self.lengths), grids, strict=True)]
        return ImageTokens(torch.cat([self.values[:0], *parts]), grids)

    def prefix(self, count: int) -> "ImageTokens":
        """The same images, of whose sequences only so many first tokens are held; a tokenizer says whether that decodes."""
        if any(grid.h != 1 or grid.scales or not 1 <= count <= grid.w for grid in self.grids):
            raise ValueError(
                f"count: expected from 1 to as many tokens as each sequence has, got {count} of {self.grids}"
            )
        parts = [values[:count] for values in self.values.split(self.lengths)]
        return ImageTokens(torch.cat([self.values[:0], *parts]), (Grid(1, count),) * len(self))

    def until(self, end: int) -> "ImageTokens":
        """The same images, of whose sequences only what stands up to the first `end` is held, which is one of it."""
        parts = []
        for ids in self.values.split(self.lengths):
            ends = (ids == end).nonzero()
            parts.append(ids[: int(ends[0]) + 1] if len(ends) else ids)
        return ImageTokens(torch.cat([self.values[:0], *parts]), tuple(Grid(1, len(ids)) for ids in parts))

    @staticmethod
    def cat(items: Sequence["ImageTokens"]) -> "ImageTokens":
        """The images of all `items`, in order."""
        return ImageTokens(torch.cat([i.values for i in items]), tuple(g for i in items for g in i.grids))


class ImageTokenizer(nn.Module, ABC):
    """Pixels <-> tokens. Subclasses set `layout` and write `encode_batch`, `decode_batch` and `lookup`."""

    layout: TokenLayout
    config: dict[str, Any] | None = None  # class_path and init_args, where something else than its class built it
    end: int | None = None  # the id behind which an image's tokens say nothing, where it may have fewer than it holds

    @abstractmethod
    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Shaped[Tensor, "B N *channels"]:
        """Images of one size to their tokens; deterministic unless a generator is given."""

    @abstractmethod
    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """The inverse of `encode_batch` (up to what the tokenizer loses).

        It draws where the tokenizer does, from a generator for each image; without them it is deterministic.
        """

    @abstractmethod
    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Code vectors of tokens: ids -> rows of the codebook; continuous tokens are their own vectors."""

    def encode(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None) -> ImageTokens:
        """Tokens of images of one size.

        Raises:
            ValueError: images of another shape or type, or of a size that the tokenizer cannot take.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = f"shape {tuple(images.shape)} of {images.dtype}"
            raise ValueError(f"images: expected colours (B, 3, H, W) in [-1, 1], got {got}")
        grid = self.layout.grid(*images.shape[-2:])
        return ImageTokens(self.encode_batch(images, rng).flatten(0, 1), (grid,) * len(images))  # (B*N, ...)

    def check_image(self, image: Float[Tensor, "3 H W"]) -> None:
        """Nothing, if the image has tokens: what encodes very many asks, and leaves out what has none.

        Raises:
            ValueError: an image of a size that the tokenizer cannot take, or one that needs more tokens than it holds.
        """
        self.layout.grid(*image.shape[-2:])

    def encode_each(self, images: Sequence[Float[Tensor, "3 _ _"]], rng: torch.Generator | None = None) -> ImageTokens:
        """Tokens of images of any sizes, equal sizes encoded together."""
        parts: list[ImageTokens | None] = [None] * len(images)
        for members in _groups([tuple(image.shape) for image in images]):
            tokens = self.encode(torch.stack([images[i] for i in members]), rng)
            for i, one in zip(members, tokens.split(), strict=True):
                parts[i] = one
        return ImageTokens.cat([part for part in parts if part is not None])

    def decode(self, tokens: ImageTokens, rngs: Sequence[torch.Generator] | None = None) -> Float[Tensor, "B 3 H W"]:
        """Images of tokens; all grids must be equal (`decode_each` takes any)."""
        if rngs is not None and len(rngs) != len(tokens):
            raise ValueError(f"rngs: expected one for each of {len(tokens)} images, got {len(rngs)}")
        if len(set(tokens.grids)) != 1:
            raise ValueError(f"tokens: decode expects images of one grid, got {sorted(set(tokens.grids))}")
        n = tokens.grids[0].length
        return self.decode_batch(tokens.values.unflatten(0, (-1, n)), tokens.grids[0], rngs)  # (B, N, ...) -> images

    def decode_each(
        self, tokens: ImageTokens, rngs: Sequence[torch.Generator] | None = None
    ) -> list[Float[Tensor, "3 _ _"]]:
        """Images of tokens of any grids, equal grids decoded together."""
        images: list[Tensor] = [torch.empty(0)] * len(tokens)
        for members in _groups(tokens.grids):
            own = None if rngs is None else [rngs[i] for i in members]
            for i, image in zip(members, self.decode(tokens.select(members), own), strict=True):
                images[i] = image
        return images


@dataclass(frozen=True)
class Reconstruction:
    """A training pass of a tokenizer: images through its tokens and back."""

    images: Float[Tensor, "B 3 H W"]
    terms: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)  # of the loss, by name, not weighted
    counts: Int64[Tensor, "*Q K"] | None = None  # tokens of this batch that chose each entry; None: continuous


class TrainableTokenizer(ImageTokenizer):
    """A tokenizer with weights to learn: what `TokenizerTraining` takes.

    Its loss is the error of the reconstruction, which the training step measures, and terms of its own, which have names.
    """

    weights: Mapping[str, float]  # the names of its terms, each with the weight it has unless a recipe says another
    needs_error: ClassVar[bool] = True  # whether nothing but the error of pixels makes it reconstruct

    @abstractmethod
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        """Images `(B, 3, H, W)` in [-1, 1] through tokens and back, with every term that `weights` names."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight: an adversarial term is weighed by the gradients that arrive there."""

    def after_step(self) -> None:
        """Called after every optimizer step: what learns without gradients moves here. Most have nothing to do."""


class MultiscaleTokenizer(ImageTokenizer):
    """A tokenizer whose scales add up: each says what the coarser ones left out. Its layout is "multiscale"."""

    @abstractmethod
    def accumulate(self, tokens: Shaped[Tensor, "B N"], grid: Grid) -> list[Float[Tensor, "B D {grid.h} {grid.w}"]]:
        """What the first 1, 2, ... scales of `grid` say together, on its finest grid. Fewer scales are `grid.first`."""


def precise(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In single precision at least: bf16 has eight bits, confuses neighbouring codes and knows a few hundred times."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def bits_per_token(layout: TokenLayout) -> float:
    """Information one discrete token carries at most, in bits; infinite for continuous tokens."""
    return sum(math.log2(n) for n in layout.codebooks) if layout.codebooks else math.inf
