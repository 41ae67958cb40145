"""Position schemes: which rotary ids text and image tokens get, and what is added to image embeddings.

Letters: n tokens, A axes of position ids (1 here; more for schemes that turn each axis by itself), C width.
"""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unimodal_tokenizers.base import Grid


class Placed(NamedTuple):
    """Ids of a run of tokens, and the id that follows it."""

    ids: Int[np.ndarray, "n A"]  # host side: thousands of short runs a pack
    following: int


@runtime_checkable
class PositionScheme(Protocol):
    """How a run of tokens that begins at id `start` is numbered."""

    axes: int

    def text(self, start: int, count: int) -> Placed:
        """Ids of `count` text tokens."""

    def image(self, start: int, grid: Grid) -> Placed:
        """Ids of one image; its learned and its clean copy share them."""

    def additive(self, grid: Grid, width: int) -> Float[Tensor, "n C"] | None:
        """What is added to an image's embeddings, if anything."""


class Sequential:
    """One id a token, images included (Chameleon, Janus, Show-o2)."""

    axes = 1

    def text(self, start: int, count: int) -> Placed:
        """start, start + 1, ..."""
        return Placed(np.arange(start, start + count)[:, None], start + count)

    def image(self, start: int, grid: Grid) -> Placed:
        """As text."""
        return self.text(start, grid.length)

    def additive(self, grid: Grid, width: int) -> None:
        """Nothing: the ids tell the tokens apart."""
        return


class BlockPositions:
    """One id an image, whose tokens are told apart by an added 2-D sine-cosine (BAGEL, arXiv 2505.14683)."""

    axes = 1

    def text(self, start: int, count: int) -> Placed:
        """start, start + 1, ..."""
        return Placed(np.arange(start, start + count)[:, None], start + count)

    def image(self, start: int, grid: Grid) -> Placed:
        """start, for every token."""
        return Placed(np.full((grid.length, 1), start), start + 1)

    def additive(self, grid: Grid, width: int) -> Float[Tensor, "n C"]:
        """Half of the channels for the row, half for the column."""
        return sincos_2d(grid, width)


def sincos_2d(grid: Grid, width: int) -> Float[Tensor, "n C"]:
    """Fixed 2-D sine-cosine embedding, row-major (MAE, arXiv 2111.06377)."""
    if width % 4:
        raise ValueError(f"width: a 2-D sine-cosine embedding needs a multiple of 4, got {width}")
    rows, columns = torch.meshgrid(torch.arange(grid.h), torch.arange(grid.w), indexing="ij")  # (h, w)
    halves = [sincos(axis.flatten().float(), width // 2) for axis in (rows, columns)]
    return torch.cat(halves, dim=1)  # (n, C)


def sincos(values: Float[Tensor, " n"], width: int, period: float = 10_000.0) -> Float[Tensor, "n C"]:
    """Sines, then cosines, of `values` at geometrically falling frequencies (Transformer, section 3.5)."""
    half = width // 2
    frequency = torch.exp(-math.log(period) * torch.arange(half, device=values.device) / half)
    angle = values[:, None] * frequency  # (n, C/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


SCHEMES: dict[str, PositionScheme] = {"sequential": Sequential(), "block": BlockPositions()}


class Rotary:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), the two halves of a head turned against each other."""

    def __init__(self, positions: Int[Tensor, "n A"], head_dim: int, theta: float) -> None:
        half = head_dim // 2
        frequency = theta ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
        angle = positions[:, 0, None].double() * frequency  # (n, E/2)
        self.cos, self.sin = angle.cos().float()[:, None], angle.sin().float()[:, None]  # (n, 1, E/2)

    def __call__(self, x: Float[Tensor, "n H E"]) -> Float[Tensor, "n H E"]:
        """Turn every head of every token by its position."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.cos.to(dtype), self.sin.to(dtype)
        a, b = x.to(dtype).chunk(2, dim=-1)  # (n, H, E/2) each
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
