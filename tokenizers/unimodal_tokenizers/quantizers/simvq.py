"""A frozen codebook seen through one learned linear map (SimVQ, arXiv 2411.02038).

Letters: P vectors of D channels, K entries of E (here E = D). z a vector, e = W q_k its code, q_k the frozen entry; sg[.]
stops the gradient.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal_tokenizers.quantizers.base import (
    Quantized,
    Quantizer,
    check_codebook,
    precise,
    squared_distance,
    straight_through,
)
from unimodal_tokenizers.quantizers.search import nearest_code_of_any_length


class SimVQ(Quantizer):
    """Each vector to the nearest of the codes W q_k: every one that is chosen moves all, so that none dies."""

    entries: Float[Tensor, "K E"]

    def __init__(self, entries: int, dim: int, seed: int = 0) -> None:
        """Args:

        entries: size K of the codebook.
        dim: channels D of a code.
        seed: of the frozen entries.
        """
        super().__init__()
        check_codebook(entries, dim)
        self.dim, self.codebooks, self.weights = dim, (entries,), {"codebook": 1.0, "commitment": 0.25}
        frozen = torch.randn(entries, dim, generator=torch.Generator().manual_seed(seed), device="cpu") * dim**-0.5
        self.register_buffer("entries", frozen)
        self.map = nn.Linear(dim, dim, bias=False)  # W

    def quantize(self, z: Float[Tensor, "P D"]) -> Quantized:
        """|sg[z] - W q|^2 + beta |z - sg[W q]|^2 (the loss of VQ-VAE, of codes W q: SimVQ)."""
        ids = self.find(z.detach())
        e = self.say(ids).to(z.dtype)
        terms = {"codebook": squared_distance(z.detach(), e), "commitment": squared_distance(z, e.detach())}
        return Quantized(straight_through(z, e), ids, torch.bincount(ids, minlength=len(self.entries)), terms)

    def find(self, z: Float[Tensor, "P D"]) -> Int64[Tensor, " P"]:
        """Each vector's nearest code."""
        with torch.no_grad():
            return nearest_code_of_any_length(z, self._map(self.entries).to(z.dtype))

    def say(self, ids: Int64[Tensor, " P"]) -> Float[Tensor, "P D"]:
        """W q of the entries."""
        return self._map(F.embedding(ids, self.entries))

    def _map(self, q: Float[Tensor, "P E"]) -> Float[Tensor, "P D"]:
        return F.linear(precise(q), precise(self.map.weight))
