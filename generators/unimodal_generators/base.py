"""The interface every image generator keeps: how image tokens are learned, and how they are sampled.

Letters: N images, T tokens of all of them end to end, M of those with a target, D channels of a token, C width of the
backbone, S tokens without prefixes, K channels that skip the backbone, R documents of a session, G guidance branches.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from unimodal_tokenizers.base import Grid, ImageTokenizer, ImageTokens, TokenLayout

if TYPE_CHECKING:
    from unimodal_generators.masked_text import MaskedText


class TokenKind(IntEnum):
    """What a token of the packed sequence is; experts are chosen by it."""

    TEXT = 0
    UNDERSTANDING = 1  # features of an understanding encoder
    CLEAN = 2  # image tokens as context: t = 1, nothing masked
    LEARNED = 3  # image tokens that carry a loss


@dataclass(frozen=True)
class Block:
    """One image (or a part of one) as the packed sequence sees it. Host side: no tensors, no weights.

    `grid` is of its tokens in the sequence, which need not be the image's: queries have one of their own.
    """

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
    targets: Shaped[Tensor, "M *predicted"] | None = None
    where: Int[Tensor, " M"] | None = None  # which tokens the targets are of; None: all, in order


@dataclass(frozen=True)
class Embeddings:
    """What enters the backbone: a vector a token, and a condition an image for backbones with `adaln`.

    `skips` go round the backbone: what a patch coder remembers of each of the images' own tokens.
    """

    values: Float[Tensor, "T C"]
    condition: Float[Tensor, "N C"] | None = None
    skips: Float[Tensor, "S K"] | None = None


@dataclass(frozen=True)
class LossTerm:
    """A sum over tokens and how many there were; means are taken once, over the whole optimizer step."""

    sum: Float[Tensor, ""]
    count: int


LossBreakdown = dict[str, LossTerm]


@dataclass(frozen=True)
class SamplingSettings:
    """What every sampler understands; each generator adds its own.

    Every setting must have its type; lists are taken for tuples and whole numbers for floats, as command lines and YAML give
    them.

    Args:
        guidance: of the text, u + guidance * (c - u): 1 is the conditional model, 0 the one without text.
        image_guidance: of the prompt's images; 1 leaves it out, and a document without any has 1.
        combine: of two conditions, "nested" (BAGEL: text first, from the model that sees images alone; then images, from the
            one that sees text alone) or "additive" (InstructPix2Pix, arXiv 2211.09800: both from the one that sees
            neither, then the one that sees images alone).
        interval: where guidance acts (arXiv 2404.07724): between two times t, where a sampler has them, or shares of its
            steps.
        image_interval: where that of the prompt's images does; None: there, too.
    """

    guidance: float = 1.0
    image_guidance: float = 1.0
    combine: Literal["nested", "additive"] = "nested"
    interval: tuple[float, float] = (0.0, 1.0)
    image_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]  # mypy: a class whose objects compare
            object.__setattr__(self, name, _typed(name, getattr(self, name), hint))
        for name, ends in (("interval", self.interval), ("image_interval", self.image_interval or self.interval)):
            if not 0 <= ends[0] <= ends[1] <= 1:
                raise ValueError(f"{name}: expected two shares, 0 <= low <= high <= 1, got {ends[0]}, {ends[1]}")

    @property
    def branches(self) -> tuple["Branch", ...]:
        """The conditions that are computed, the whole one first."""
        whole, no_text = Branch(), Branch(text=False)
        if self.image_guidance == 1:
            return (whole,) if self.guidance == 1 else (whole, no_text)
        if self.combine == "additive":
            return whole, no_text, Branch(text=False, images=False)
        return (whole, Branch(images=False)) if self.guidance == 1 else (whole, no_text, Branch(images=False))

    def scales(self, progress: float) -> tuple[float, float]:
        """Of the text and of the images at a time or share of the steps: 1 where they do not act."""
        text, images = self.interval, self.image_interval or self.interval
        return (
            self.guidance if text[0] <= progress <= text[1] else 1.0,
            self.image_guidance if images[0] <= progress <= images[1] else 1.0,
        )

    def active(self, progress: float) -> int:
        """How many of the branches, from the first on, are needed there."""
        text, images = self.scales(progress)
        return len(self.branches) if images != 1 else 2 if text != 1 else 1

    def guide(self, outputs: Float[Tensor, "G *rest"], progress: float) -> Float[Tensor, "*rest"]:
        """One output of those of the active branches."""
        (text, images), active = self.scales(progress), self.active(progress)
        if len(outputs) != active:
            raise ValueError(f"guidance: expected outputs of {active} branches, got {len(outputs)}")
        if active == 3 and self.combine == "additive":
            c, image, none = outputs  # e(T, I), e(0, I), e(0, 0)
            return none + images * (image - none) + text * (c - image)
        if active == 2 and images != 1:  # with the branch that lacks them alone
            return guide(outputs, [images])
        return guide(outputs, [text, images][: active - 1])

    def override(self, **settings: Any) -> "SamplingSettings":
        """A copy with those `settings`, each of which must exist here."""
        known = [field.name for field in fields(self)]
        for name in settings:
            if name not in known:
                listed = ", ".join(known)
                raise ValueError(f"{name}: this recipe's generator has no such sampling setting; it has {listed}")
        return replace(self, **settings)


@cache
def _hints(settings: type[SamplingSettings]) -> dict[str, Any]:
    """The type of each setting."""
    known = get_type_hints(settings)
    return {field.name: known[field.name] for field in fields(settings)}


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A setting's value as its type has it; types of others' settings that this does not know hold anything."""
    kinds = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        for kind in kinds:
            with suppress(ValueError):
                return _typed(name, value, kind)
    elif get_origin(hint) is Literal:
        if value in kinds:
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, list | tuple) and kinds[-1] is Ellipsis:
            return tuple(_typed(name, one, kinds[0]) for one in value)
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(_typed(name, one, kind) for one, kind in zip(value, kinds, strict=True))
    elif hint is float:
        with suppress(OverflowError):
            if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
    elif hint is int:
        if isinstance(value, Integral) and not isinstance(value, bool):
            return int(value)
    elif hint is Any or not isinstance(hint, type) or isinstance(value, hint):
        return value
    raise ValueError(f"{name}: expected {_in_words(hint)}, got {value!r}")


def _in_words(hint: Any) -> str:
    """What a setting of that type may be."""
    kinds = get_args(hint)
    if get_origin(hint) is tuple:
        return f"{len(kinds)} values ({', '.join(map(_in_words, kinds))})"
    if get_origin(hint) is Literal:
        return " or ".join(map(str, kinds))
    if kinds:
        return " or ".join(map(_in_words, kinds))
    words = {float: "a finite number", int: "a whole number", str: "text", NoneType: "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


@dataclass(frozen=True)
class DenoisingSettings(SamplingSettings):
    """Guidance of outputs that have a length, as velocities and noises do and scores of ids do not.

    Args:
        renorm: shrinks what guidance made to the length it had without, never below `renorm_min` of itself: of every token
            ("channel") or of every image ("global"), as BAGEL does. Where an image's tokens are drawn one by one, or a few
            at a time, "global" and `rescale` are of those that are drawn together.
        renorm_min: the least share that is kept.
        rescale: share of the output that is brought to the deviation it had without guidance (2305.08891, section 3.4).
    """

    renorm: Literal["none", "channel", "global"] = "none"
    renorm_min: float = 0.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("renorm_min", "rescale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")

    def guide_images(
        self, outputs: Float[Tensor, "G T D"], lengths: Sequence[int], progress: float
    ) -> Float[Tensor, "T D"]:
        """`guide` for tokens of several images end to end; each is normalised by itself."""
        c, out = outputs[0], self.guide(outputs, progress)
        if len(outputs) == 1 or (self.renorm == "none" and not self.rescale):
            return out
        if self.renorm == "channel":
            shares = c.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            out = out * shares.clamp(self.renorm_min, 1.0)
        pieces = []
        for own, one in zip(c.split(list(lengths)), out.split(list(lengths))):  # (n, D) each
            if self.renorm == "global":
                one = one * (own.norm() / one.norm().clamp_min(1e-12)).clamp(self.renorm_min, 1.0)
            if self.rescale and len(one):
                deviation = one.std(correction=0)  # of one value it is 0, and there is nothing to bring back
                even = one * torch.where(deviation > 0, own.std(correction=0) / deviation, 1.0)
                one = self.rescale * even + (1 - self.rescale) * one
            pieces.append(one)
        return torch.cat(pieces)


@dataclass(frozen=True)
class Branch:
    """One condition of guidance: which parts of a document it keeps. Boundary tokens and drawn images always stay.

    Other words may be read in the place of dropped text (`negative` of `DecodingSettings`).
    """

    text: bool = True
    images: bool = True  # those that are given, not drawn


@dataclass(frozen=True)
class Known:
    """Tokens of the images to be drawn that are given beforehand (inpainting).

    Args:
        tokens: of whole images; what is not known is not read.
        mask: true where a token is given.
    """

    tokens: ImageTokens
    mask: Bool[Tensor, " T"]

    def __post_init__(self) -> None:
        if self.mask.shape != (len(self.tokens.values),):
            raise ValueError(f"known: expected a mask of {len(self.tokens.values)} tokens, got {list(self.mask.shape)}")


class ImageRows(NamedTuple):
    """The model's vocabulary as a generator sees it whose ids are rows of it, behind all others."""

    embedding: Float[Tensor, "V C"]  # of image ids alone
    head: list[Float[Tensor, "_ C"]]  # tables of all ids; the last is that of image ids
    scale: float  # embeddings are multiplied by it


@runtime_checkable
class DecodingSession(Protocol):
    """Documents being decoded, with their key/value cache. Branches are the conditions of guidance.

    Hidden states have C channels of each of the generator's `layers`.
    """

    @property
    def branches(self) -> int:
        """How many conditions are computed side by side; the first sees everything."""

    @property
    def last(self) -> Float[Tensor, "G R C"]:
        """Hidden state of the last layer at the last position of each document."""

    def append(self, embeddings: Embeddings, blocks: Sequence[Block]) -> Float[Tensor, "G T C"]:
        """One block a document; its tokens enter the cache for good."""

    def peek(
        self, embeddings: Embeddings, blocks: Sequence[Block], branches: int | None = None
    ) -> Float[Tensor, "G T C"]:
        """One block a document; sees the cache, leaves no trace. `branches`: of the first so many; None is all."""

    def rows(self, indices: Sequence[int]) -> "DecodingSession":
        """A view of some of the documents."""


class ImageGenerator(nn.Module, ABC):
    """Objective and sampler for image tokens.

    `reads` says whose hidden state predicts a token: its own position's, or the previous one's. Hidden states are gathered
    there before `loss` sees them. A generator whose settings decide of these sets them in its `__init__`.
    """

    accepts: ClassVar[tuple[str, ...]]  # kinds of TokenLayout
    settings: ClassVar[type[SamplingSettings]]  # of its sampler
    reads: Literal["own", "previous"]
    repeats: bool  # a learned image that is followed by something appears again in its context form
    inpaints: bool = False  # whether `sample` can be given some of the tokens
    layers: tuple[int, ...] = (-1,)  # of the backbone, whose hidden states it gets, side by side
    conditions: bool = False  # whether `embed` gives a condition an image, which backbone.adaln reads
    new_weights: ClassVar[tuple[str, ...]] = ()  # of its own, which the weights of a model to start from may lack
    ends: int | None = None  # the id with which an image's places end; None: it has as many as its grid
    image_ids: int = 0  # rows that are added to the model's vocabulary for this generator
    layout: TokenLayout
    sampling: SamplingSettings

    def __init__(self) -> None:
        super().__init__()
        if not hasattr(type(self), "settings"):
            raise ValueError(f"settings: expected {type(self).__name__} to name the class of its sampler's settings")
        self.text: MaskedText | None = None  # how learned text is hidden; without, it is learned token by token

    def bind(self, tokenizer: ImageTokenizer, rows: Callable[[], ImageRows] | None = None) -> None:
        """Called once by the model: its tokenizer, for what tokens say, and the rows of `image_ids`.

        Bound methods alone are kept: the tokenizer is no part of the generator, which would train and export it, and a copy
        of the model is bound to the copies.
        """
        self.lookup, self.rows = tokenizer.lookup, rows

    def check(self, layout: TokenLayout) -> None:
        """Refuse a tokenizer this generator cannot learn."""
        if layout.kind not in self.accepts:
            name = type(self).__name__
            raise ValueError(f"tokenizer: {name} takes {' or '.join(self.accepts)} tokens, got {layout.kind}")

    def check_known(self, known: Known | None) -> None:
        """Refuse given tokens that this sampler could not keep."""
        if known is not None and not self.inpaints:
            raise ValueError(f"known: {type(self).__name__} cannot keep given tokens, expected none")

    def check_sampling(self, settings: SamplingSettings, grids: Sequence[Grid]) -> None:
        """Refuse settings with which `sample` could not draw images of these grids; another sampler's would be ignored."""
        if type(settings) is not self.settings:
            raise ValueError(f"sampling: expected {self.settings.__name__}, got {type(settings).__name__}")

    @abstractmethod
    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """Every random choice of one learned image. Needs no weights: runs in the loader.

        Several blocks are pieces of the image one after the other, the first at offset 0.
        """

    @abstractmethod
    def plan_context(self, grid: Grid) -> list[Block]:
        """The blocks of one image as context."""

    @abstractmethod
    def corrupt(self, tokens: ImageTokens, blocks: Sequence[Block]) -> Corrupted:
        """What is learned, drawn from the blocks' seeds alone; `blocks` are those that `plan` gave, image after image."""

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
        known: Known | None = None,
    ) -> Iterator[ImageTokens]:
        """One image a document of the session. Yields previews, the final tokens last.

        Args:
            session: the documents, read up to where the images begin.
            grids: of the images.
            settings: this generator's; `check_sampling` refuses others.
            rngs: one a document: an image depends on its own alone.
            known: tokens that are given; `check_known` refuses them where `inpaints` is false.
        """


def per_token(values: Shaped[Tensor, "N *rest"], grids: Sequence[Grid]) -> Shaped[Tensor, "T *rest"]:
    """What each image has, for each of its tokens."""
    lengths = torch.tensor([g.length for g in grids], device=values.device, dtype=torch.long)
    return values.repeat_interleave(lengths, 0, output_size=sum(g.length for g in grids))  # no waiting for a GPU


def in_rows(values: Shaped[Tensor, "R m *c"], grid: Grid, known: Known | None) -> ImageTokens:
    """Images of one grid of which so many first tokens are drawn, a whole number of rows: a preview.

    What is given stands in its place already, and everywhere else below the last row is repeated.
    """
    r, m, n = *values.shape[:2], grid.length
    rows = values.unflatten(1, (-1, grid.w))  # (R, m / w, w, *c)
    whole = torch.cat([rows, *[rows[:, -1:]] * ((n - m) // grid.w)], dim=1).flatten(0, 2)  # (T, *c)
    if known is not None:  # those above are given already
        mask = known.mask.to(whole.device).view(-1, *[1] * (whole.ndim - 1))
        whole = torch.where(mask, known.tokens.values.to(whole), whole)
    return ImageTokens(whole, (grid,) * r)


def guide(outputs: Float[Tensor, "G *rest"], scales: Sequence[float]) -> Float[Tensor, "*rest"]:
    """Classifier-free guidance (arXiv 2207.12598), nested over any number of conditions as BAGEL does for two.

    `outputs[0]` sees every condition and `outputs[i]` lacks those of branch i: out = u_i + s_i (out - u_i), i = 1, 2, ...
    """
    out = outputs[0]
    for u, scale in zip(outputs[1:], scales, strict=True):
        out = u + scale * (out - u)
    return out


__all__ = [
    "Block", "Branch", "Corrupted", "DecodingSession", "DenoisingSettings", "Embeddings", "Grid", "ImageGenerator",
    "ImageRows", "ImageTokens", "Known", "LossBreakdown", "LossTerm", "SamplingSettings", "TokenKind", "TokenLayout",
    "guide", "in_rows", "per_token",
]  # fmt: skip
