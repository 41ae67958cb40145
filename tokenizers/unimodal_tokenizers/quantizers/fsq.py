"""Finite scalar quantization: every channel rounded to one of a few levels (FSQ, arXiv 2309.15505).

Letters: P vectors, D channels, K = L_1 ... L_D entries. z a vector, z_hat its rounded form.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unimodal_tokenizers.quantizers.base import Quantized, Quantizer, straight_through
from unimodal_tokenizers.quantizers.search import SEARCH_BYTES

MARGIN = 1e-3  # the outermost levels are reached before tanh is flat


class FSQ(Quantizer):
    """A grid of L_1 x ... x L_D codes in [-1, 1]^D: nothing to learn, nothing to search, no term of the loss."""

    keeps = "levels"
    levels: Int64[Tensor, " D"]  # a cast of the weights to bf16, which has 256 whole numbers, leaves it alone

    def __init__(self, levels: Sequence[int]) -> None:
        """Args:

        levels: of each channel, at least 3; as many as there are channels. The paper's table 1 has none below 5: 8 6 5
            are 240 entries, 8 5 5 5 are 1000, 8 8 8 6 5 are 15360.
        """
        super().__init__()
        most = SEARCH_BYTES // torch.float32.itemsize
        if not levels or min(levels) < 3 or math.prod(levels) > most:
            raise ValueError(
                f"levels: expected at least 3 of each channel (LFQ has 2) and at most {most} entries, got {list(levels)}"
            )
        self.dim, self.codebooks, self.weights = len(levels), (math.prod(levels),), {}
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.places = list(itertools.accumulate([1, *levels[:-1]], lambda a, b: a * b))  # of the levels in an id

    def extra_repr(self) -> str:
        """The order of the levels, which no weight shows."""
        return f"levels={self.levels.tolist()}"

    def quantize(self, z: Float[Tensor, "P D"]) -> Quantized:
        """round(f(z)), with the gradient of f(z)."""
        bounded = self.bound(z)
        z_hat = bounded.detach().round()
        ids = self._ids(z_hat)
        half = self._half(z)
        counts = torch.bincount(ids, minlength=self.codebooks[0])
        return Quantized(straight_through(bounded / half, z_hat / half), ids, counts)

    def find(self, z: Float[Tensor, "P D"]) -> Int64[Tensor, " P"]:
        """The levels of all channels as one number, the first channel's the fastest."""
        return self._ids(self.bound(z).round())

    def say(self, ids: Int64[Tensor, " P"]) -> Float[Tensor, "P D"]:
        """The levels, evenly spaced from -1 to 1 (an even number of them ends one step before 1)."""
        index = torch.stack([ids // place for place in self.places], dim=-1) % self.levels  # (P, D)
        half = (self.levels // 2).float()
        return (index - half) / half

    def bound(self, z: Float[Tensor, "P D"]) -> Float[Tensor, "P D"]:
        """f: z -> tanh(z + shift) (L - 1) / 2 - offset, which rounds to L numbers (FSQ, appendix A.1); f(0) = 0."""
        levels = self.levels.to(z.dtype)
        width = (levels - 1) * (1 + MARGIN) / 2
        offset = 0.5 * (1 - levels % 2)  # an even number of levels has no middle one
        shift = torch.atanh(offset / width)
        return torch.tanh(z + shift) * width - offset

    def _half(self, like: Float[Tensor, "*shape"]) -> Float[Tensor, " D"]:
        return (self.levels // 2).to(like.dtype)

    def _ids(self, z_hat: Float[Tensor, "P D"]) -> Int64[Tensor, " P"]:
        places = torch.tensor(self.places, device=z_hat.device)
        return ((z_hat + self._half(z_hat)).long() * places).sum(-1)
