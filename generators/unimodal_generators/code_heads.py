"""From a hidden state to the codes of one image token: several codebooks, and where their heads lie.

Letters: T tokens, Q codebooks, q of them that are drawn already, V entries of one, C width.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unimodal_generators.base import ImageRows
from unimodal_generators.cross_entropy import linear_cross_entropy
from unimodal_tokenizers.base import precise


class CodeHeads(Protocol):
    """What turns a token's hidden state into its Q codes."""

    def logits(self, hidden: Float[Tensor, "*rest C"], codes: Int[Tensor, "*rest q"]) -> Float[Tensor, "*rest V"]:
        """Scores of the next codebook, given the codes of those before it; in fp32 or better."""

    def loss(self, hidden: Float[Tensor, "T C"], ids: Int[Tensor, "T Q"]) -> Float[Tensor, ""]:
        """Cross-entropy, a mean over a token's codebooks and a sum over tokens."""


class ParallelHeads(nn.Sequential):
    """All codes of a token at once: one hidden layer, and behind it a linear head a codebook."""

    def __init__(self, width: int, codebooks: Sequence[int]) -> None:
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.Linear(width, sum(codebooks)))
        self.codebooks = list(codebooks)

    def logits(self, hidden: Float[Tensor, "*rest C"], codes: Int[Tensor, "*rest q"]) -> Float[Tensor, "*rest V"]:
        """Scores of the next codebook, whatever the codes of the others are."""
        return precise(self(hidden).split(self.codebooks, dim=-1)[codes.shape[-1]])

    def loss(self, hidden: Float[Tensor, "T C"], ids: Int[Tensor, "T Q"]) -> Float[Tensor, ""]:
        """Cross-entropy, a mean over a token's codebooks and a sum over tokens."""
        *inner, last = self
        for module in inner:
            hidden = module(hidden)
        assert isinstance(last, nn.Linear)
        rows, biases = last.weight.split(self.codebooks), last.bias.split(self.codebooks)
        terms = [linear_cross_entropy(hidden, [rows[q]], i, biases[q]) for q, i in enumerate(ids.unbind(1))]
        return torch.stack(terms).mean()


class SharedHeads:
    """Image ids as rows of the model's vocabulary (Chameleon, arXiv 2405.09818; Liquid, arXiv 2412.04332).

    Learned by one softmax over words and image ids alike; what an image may hold is settled where it is drawn.
    """

    def __init__(self, rows: Callable[[], ImageRows], codebooks: Sequence[int]) -> None:
        self.rows, self.codebooks = rows, list(codebooks)

    def logits(self, hidden: Float[Tensor, "*rest C"], codes: Int[Tensor, "*rest q"]) -> Float[Tensor, "*rest V"]:
        """Scores of the next codebook's rows, and of no others."""
        own = self.rows().head[-1].split(self.codebooks)[codes.shape[-1]]
        return precise(F.linear(hidden, own))

    def loss(self, hidden: Float[Tensor, "T C"], ids: Int[Tensor, "T Q"]) -> Float[Tensor, ""]:
        """Cross-entropy over the whole vocabulary, a mean over a token's codebooks and a sum over tokens."""
        tables = self.rows().head
        first = sum(len(table) for table in tables[:-1])
        terms = []
        for entries, i in zip(self.codebooks, ids.unbind(1), strict=True):
            terms.append(linear_cross_entropy(hidden, tables, i + first))
            first += entries
        return torch.stack(terms).mean()
