"""Fewer positions than tokens: s x s neighbours are merged along channels and come apart again behind the backbone.

Token-Shuffle (arXiv 2504.17789). Letters: T tokens in the order of windows, S positions, s the side of a window,
n = s * s its tokens, C width.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unimodal_tokenizers.base import Grid

BLOCKS = 2
"""Residual MLPs on each side."""


class TokenShuffle(nn.Module):
    """Merging and its inverse: each token has C / n channels of its position."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.tokens = side * side
        if width % self.tokens:
            raise ValueError(
                f"generator.shuffle: {side} needs a backbone.width that {self.tokens} divides, got {width}"
            )
        self.compress = nn.Linear(width, width // self.tokens)
        self.before = nn.Sequential(*(_Residual(width) for _ in range(BLOCKS)))
        self.after = nn.Sequential(*(_Residual(width) for _ in range(BLOCKS)))
        self.expand = nn.Linear(width // self.tokens, width)

    def merge(self, x: Float[Tensor, "T C"]) -> Float[Tensor, "S C"]:
        """One vector a window."""
        return self.before(self.compress(x).reshape(-1, x.shape[1]))  # (T, C/n) -> (S, C)

    def part(self, hidden: Float[Tensor, "*rest C"]) -> Float[Tensor, "*rest n C"]:
        """One vector a token of a window."""
        return self.expand(self.after(hidden).unflatten(-1, (self.tokens, -1)))  # (*rest, n, C/n) -> (*rest, n, C)


class _Residual(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.RMSNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Float[Tensor, "*rest C"]) -> Float[Tensor, "*rest C"]:
        return x + super().forward(x)


@lru_cache(maxsize=256)
def windows(grid: Grid, side: int) -> Int[Tensor, " T"]:
    """Numbers of an image's tokens, window by window; windows and the tokens of each are row-major."""
    h, w = grid.h, grid.w
    numbers = torch.arange(grid.length).view(h // side, side, w // side, side)
    return numbers.transpose(1, 2).flatten()  # (rows, columns, s, s) -> (T,)
