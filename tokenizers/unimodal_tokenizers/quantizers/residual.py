"""Quantizing what is left over, codebook by codebook (RQ-VAE, arXiv 2203.01941; VILA-U).

Letters: P vectors, Q codebooks of K entries, D channels. f a vector, e_q its code of codebook q, r_q what is left after it;
sg[.] stops the gradient.
"""

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from unimodal_tokenizers.quantizers.base import Quantized, Quantizer, straight_through
from unimodal_tokenizers.quantizers.vector import EuclideanQuantizer


class ResidualQuantizer(Quantizer):
    """A position has Q ids, one of every codebook: each quantizes what those before it left, and their codes add up."""

    def __init__(self, entries: int, codebooks: int, dim: int, revive_after: int = 50) -> None:
        """Args:

        entries: size K of each codebook.
        codebooks: how many, Q.
        dim: channels D of a code.
        revive_after: training batches without a token after which an entry of a codebook is replaced.
        """
        super().__init__()
        if codebooks < 2:
            raise ValueError(f"codebooks: expected at least 2 (EuclideanQuantizer has one), got {codebooks}")
        # Each draws its entries from other tokens: nothing is left of those that the codebook before has as entries.
        self.quantizers = nn.ModuleList(EuclideanQuantizer(entries, dim, revive_after, q) for q in range(codebooks))
        self.dim, self.codebooks = dim, (entries,) * codebooks
        self.weights = self._quantizers[0].weights

    def quantize(self, z: Float[Tensor, "P D"]) -> Quantized:
        """r_q = r_(q-1) - e_q; commitment: sum over q of |f - sg[e_1 + ... + e_q]|^2 (RQ-VAE, eq. 7)."""
        f = r = z
        steps = []
        for quantizer in self._quantizers:
            steps.append(quantizer.quantize(r))
            r = r - quantizer.say(steps[-1].ids).detach()  # the gradient of f stays in r
        return Quantized(
            quantized=straight_through(f, f - r),
            ids=torch.stack([step.ids for step in steps], dim=1),  # (P, Q)
            counts=torch.stack([step.counts for step in steps]),  # (Q, K)
            terms={name: torch.stack([step.terms[name] for step in steps]).sum() for name in self.weights},
        )

    def find(self, z: Float[Tensor, "P D"]) -> Int64[Tensor, "P Q"]:
        """Of every vector, the id of each codebook."""
        ids, r = [], z
        for quantizer in self._quantizers:
            ids.append(quantizer.find(r))
            r = r - quantizer.say(ids[-1])
        return torch.stack(ids, dim=1)  # (P, Q)

    def say(self, ids: Int64[Tensor, "P q"]) -> Float[Tensor, "P D"]:
        """The sum of the codes; the first q codebooks alone say `(P, q)`."""
        return torch.stack([q.say(i) for q, i in zip(self._quantizers, ids.unbind(1), strict=False)]).sum(0)

    def check_shape(self, ids: Shaped[Tensor, "*shape"]) -> None:
        """One id of each codebook, or of the first few."""
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= len(self.quantizers):
            raise ValueError(f"tokens: expected ids (T, {len(self.quantizers)}), got shape {tuple(ids.shape)}")

    @property
    def _quantizers(self) -> list[EuclideanQuantizer]:
        return [q for q in self.quantizers if isinstance(q, EuclideanQuantizer)]
