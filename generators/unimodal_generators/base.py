"""The interface every image generator keeps: how image tokens are learned, and how they are sampled.

Letters: N images, T tokens of all of them end to end, D channels of a token, C width of the backbone,
R documents of a session, G guidance branches.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout


class TokenKind(IntEnum):
    """What a token of the packed sequence is; experts are chosen by it."""

    TEXT = 0
    UNDERSTANDING = 1  # features of an understanding encoder
    CLEAN = 2  # image tokens as context: t = 1, nothing masked
    LEARNED = 3  # image tokens that carry a loss


@dataclass(frozen=True)
class Block:
    """One image (or a part of one) as the packed sequence sees it. Host side: no tensors, no weights."""

    grid: Grid
    kind: TokenKind
    bidirectional: bool
    private: bool  # seen by its own tokens only
    time: float = 1.0  # 0 noise, 1 data
    seed: int = 0  # of every other draw of this block (its noise)
    n_targets: int = 0
    offset: int = 0  # first token of the image held here, when it is appended in pieces
    count: int | None = None  # tokens held here; None: all
    prefix: int = 0  # tokens before the image's own, which nobody reads: a time token

    @property
    def length(self) -> int:
        """Tokens of the block."""
        return self.prefix + (self.grid.length if self.count is None else self.count)

    @property
    def complete(self) -> bool:
        """Whether the image ends with this block."""
        return self.offset + self.length - self.prefix == self.grid.length

    def piece(self, offset: int, count: int) -> "Block":
        """Tokens `offset` to `offset + count` of the image."""
        return replace(self, offset=offset, count=count)


@dataclass(frozen=True)
class Corrupted:
    """Image tokens as the backbone reads them, and what is to be predicted (None: context only)."""

    inputs: Shaped[Tensor, "T *channels"]
    time: Float[Tensor, " N"]
    grids: tuple[Grid, ...]
    targets: Shaped[Tensor, "T *channels"] | None = None


@dataclass(frozen=True)
class Embeddings:
    """What enters the backbone: a vector a token, and a condition an image for backbones with `adaln`."""

    values: Float[Tensor, "T C"]
    condition: Float[Tensor, "N C"] | None = None


@dataclass(frozen=True)
class LossTerm:
    """A sum over tokens and how many there were; means are taken once, over the whole optimizer step."""

    sum: Float[Tensor, ""]
    count: int


LossBreakdown = dict[str, LossTerm]


@dataclass(frozen=True)
class SamplingSettings:
    """What every sampler understands; each generator adds its own."""

    guidance: float = 1.0  # out = u + guidance * (c - u): 1 is the conditional model, 0 the unconditional

    def override(self, **settings: Any) -> "SamplingSettings":
        """A copy with those `settings` that are not None, each of which must exist here."""
        asked = {name: value for name, value in settings.items() if value is not None}
        known = list(self.__dataclass_fields__)
        for name in asked:
            if name not in known:
                raise ValueError(
                    f"{name}: this recipe's generator has no such sampling setting; it has {', '.join(known)}"
                )
        return replace(self, **asked)


@runtime_checkable
class DecodingSession(Protocol):
    """Documents being decoded, with their key/value cache. Branches are the conditions of guidance."""

    @property
    def branches(self) -> int:
        """How many conditions are computed side by side; the first sees everything."""

    @property
    def last(self) -> Float[Tensor, "G R C"]:
        """Hidden state at the last position of each document."""

    def append(self, embeddings: Embeddings, blocks: Sequence[Block]) -> Float[Tensor, "G T C"]:
        """One block a document; its tokens enter the cache for good."""

    def peek(self, embeddings: Embeddings, blocks: Sequence[Block]) -> Float[Tensor, "G T C"]:
        """One block a document; sees the cache, leaves no trace."""

    def rows(self, indices: Sequence[int]) -> "DecodingSession":
        """A view of some of the documents."""


class ImageGenerator(nn.Module, ABC):
    """Objective and sampler for image tokens.

    `reads` says whose hidden state predicts a token: its own position's, or the previous one's. Hidden states are gathered
    there before `loss` sees them.
    """

    reads: ClassVar[Literal["own", "previous"]]
    accepts: ClassVar[tuple[str, ...]]  # kinds of TokenLayout
    repeats: ClassVar[bool]  # a learned image that is followed by something appears again in its context form
    conditions: bool = False  # whether `embed` gives a condition an image, which backbone.adaln reads
    layout: TokenLayout
    sampling: SamplingSettings

    def bind(self, lookup: Callable[[Tensor], Tensor]) -> None:
        """Called once by the model with its tokenizer's `lookup`, for generators that read code vectors."""
        self.lookup = lookup

    def check(self, layout: TokenLayout) -> None:
        """Refuse a tokenizer this generator cannot learn."""
        if layout.kind not in self.accepts:
            name = type(self).__name__
            raise ValueError(f"tokenizer: {name} takes {' or '.join(self.accepts)} tokens, got {layout.kind}")

    @abstractmethod
    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """Every random choice of one learned image. Needs no weights: runs in the loader."""

    @abstractmethod
    def plan_context(self, grid: Grid) -> list[Block]:
        """The blocks of one image as context."""

    @abstractmethod
    def corrupt(self, tokens: ImageTokens, blocks: Sequence[Block]) -> Corrupted:
        """What is learned, drawn from the blocks' seeds alone."""

    @abstractmethod
    def context(self, tokens: ImageTokens) -> Corrupted:
        """The clean form: t = 1, nothing masked."""

    @abstractmethod
    def embed(self, corrupted: Corrupted) -> Embeddings:
        """Vectors for the backbone."""

    @abstractmethod
    def loss(self, hidden: Float[Tensor, "T C"], embeddings: Embeddings, corrupted: Corrupted) -> LossBreakdown:
        """Sums and counts, never means; draws nothing."""

    @abstractmethod
    def sample(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
    ) -> Iterator[ImageTokens]:
        """One image a document of the session. Yields previews, the final tokens last."""


def guide(outputs: Float[Tensor, "G *rest"], scales: Sequence[float]) -> Float[Tensor, "*rest"]:
    """Classifier-free guidance (arXiv 2207.12598), nested over any number of conditions as BAGEL does for two.

    `outputs[0]` sees every condition and `outputs[i]` lacks those of branch i: out = u_i + s_i (out - u_i), i = 1, 2, ...
    """
    out = outputs[0]
    for u, scale in zip(outputs[1:], scales, strict=True):
        out = u + scale * (out - u)
    return out


__all__ = [
    "Block", "Corrupted", "DecodingSession", "Embeddings", "Grid", "ImageGenerator", "ImageTokens", "LossBreakdown",
    "LossTerm", "SamplingSettings", "TokenKind", "TokenLayout", "guide",
]  # fmt: skip
