"""Codes that are the signs of the channels: nothing to search (LFQ of MAGVIT-v2, arXiv 2310.05737; BSQ, arXiv 2406.07548).

Letters: P vectors, Q codebooks of b bits, D = Q b channels, K = 2^b entries. z a vector, c a code; p(c | z) how likely z
would choose c if it chose softly; H entropy in nats.
"""

from abc import abstractmethod
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unimodal_tokenizers.quantizers.base import (
    Quantized,
    Quantizer,
    entropy,
    mean_over_processes,
    straight_through,
)
from unimodal_tokenizers.quantizers.search import SEARCH_BYTES, rows_at_once


class BinaryQuantizer(Quantizer):
    """One bit a channel, the first of a codebook's the most significant. Subclasses say where vectors lie and what they pay.

    The entropy term is E[H(p(c | z))] - diversity H(E[p(c | z)]): each vector decides, all together use every code
    (MAGVIT-v2). p(c | z) is the softmax of -|z - c|^2 / temperature over all codes, which is a product over bits:
    the bit of channel i is 1 with probability sigmoid(4 s z_i / temperature), where codes are -s and s.
    """

    keeps = "levels"

    def __init__(self, bits: int, codebooks: int = 1, temperature: float = 0.01, diversity: float = 1.0) -> None:
        """Args:

        bits: channels D, one bit each.
        codebooks: ids a position, Q, which share the bits equally.
        temperature: of the entropy's soft choice.
        diversity: weight of the entropy of all vectors' codes within the entropy term.
        """
        super().__init__()
        most = (SEARCH_BYTES // torch.float32.itemsize).bit_length() - 1
        if codebooks < 1 or bits < 1 or bits % codebooks or bits // codebooks > most:
            raise ValueError(
                f"bits: expected a multiple of codebooks, of at most {most} bits each, got {bits} bits for {codebooks}"
            )
        if temperature <= 0:
            raise ValueError(f"temperature: expected above 0, got {temperature}")
        self.dim, self.bits, self.codebooks = bits, bits // codebooks, (2 ** (bits // codebooks),) * codebooks
        self.temperature, self.diversity, self.scale = temperature, diversity, 1.0
        self.register_buffer("one", torch.ones(()), persistent=False)  # whose precision is that of the codes

    one: Float[Tensor, ""]

    @abstractmethod
    def project(self, z: Float[Tensor, "P D"]) -> Float[Tensor, "P D"]:
        """Vectors to where they are compared with codes of -scale and scale."""

    @abstractmethod
    def terms(self, z: Float[Tensor, "P D"], c: Float[Tensor, "P D"]) -> dict[str, Float[Tensor, ""]]:
        """Of the loss: z as projected, c its code."""

    def quantize(self, z: Float[Tensor, "P D"]) -> Quantized:
        """c = scale sign(z) (MAGVIT-v2; BSQ); a channel of 0 says -scale."""
        z = self.project(z)
        c = torch.where(z.detach() > 0, self.scale, -self.scale)
        ids = self.find(z.detach())
        counts = torch.stack([torch.bincount(i, minlength=self.codebooks[0]) for i in ids.view(len(z), -1).unbind(1)])
        return Quantized(
            straight_through(z, c), ids, counts if len(self.codebooks) > 1 else counts[0], self.terms(z, c)
        )

    def find(self, z: Float[Tensor, "P D"]) -> Int64[Tensor, "P *Q"]:
        """The signs of each codebook's channels as one number."""
        ids = ((z > 0).unflatten(-1, (-1, self.bits)) * self._places(z)).sum(-1)  # (P, Q)
        return ids if len(self.codebooks) > 1 else ids[:, 0]

    def say(self, ids: Int64[Tensor, "P *Q"]) -> Float[Tensor, "P D"]:
        """-scale and scale, by the bits."""
        bits = (ids.view(len(ids), -1, 1) & self._places(ids)) > 0  # (P, Q, b)
        scale = self.scale * self.one
        return torch.where(bits.flatten(1), scale, -scale)

    def logits(self, z: Float[Tensor, "P D"]) -> Float[Tensor, "P D"]:
        """log p(bit = 1 | z) - log p(bit = 0 | z) = (|z_i + s|^2 - |z_i - s|^2) / temperature."""
        return 4 * self.scale * z / self.temperature

    def _places(self, like: Tensor) -> Int64[Tensor, " b"]:
        return 2 ** torch.arange(self.bits - 1, -1, -1, device=like.device)


class LFQ(BinaryQuantizer):
    """Lookup-free quantization: codes are the corners of [-1, 1]^D (MAGVIT-v2; Show-o).

    The entropy of all vectors' codes is exact. Over several processes it is that of all their vectors.
    """

    def __init__(self, bits: int, codebooks: int = 1, temperature: float = 0.01, diversity: float = 1.0) -> None:
        """Args:

        bits: channels D, one bit each.
        codebooks: ids a position, Q, which share the bits equally (as ELM's, arXiv 2410.16257).
        temperature: of the entropy's soft choice.
        diversity: weight of the entropy of all vectors' codes within the entropy term.
        """
        super().__init__(bits, codebooks, temperature, diversity)
        self.weights = {"entropy": 0.1, "commitment": 0.25}

    def project(self, z: Float[Tensor, "P D"]) -> Float[Tensor, "P D"]:
        """Anywhere."""
        return z

    def terms(self, z: Float[Tensor, "P D"], c: Float[Tensor, "P D"]) -> dict[str, Float[Tensor, ""]]:
        """Entropy, a mean over codebooks, and |z - c|^2 (MAGVIT-v2), a mean over channels: a sum holds each at its sign."""
        logits = self.logits(z).unflatten(-1, (-1, self.bits))  # (P, Q, b)
        each = bit_entropy(logits).sum(-1).mean()
        together = []
        for book in logits.unbind(1):
            p = mean_code_probability(book)
            together.append(entropy(mean_over_processes(p) if self.training else p))
        return {"entropy": each - self.diversity * torch.stack(together).mean(), "commitment": F.mse_loss(z, c)}


class BSQ(BinaryQuantizer):
    """Binary spherical quantization: vectors of length 1, codes the corners of a cube in the unit sphere.

    The distance to a code is bounded, so nothing is paid for it. The entropy of all vectors' codes is taken bit by bit
    (as the paper does), an upper bound of the exact one that knows no codebooks: any number of bits costs the same a bit.
    """

    def __init__(self, bits: int, codebooks: int = 1, temperature: float = 1.0, diversity: float = 1.0) -> None:
        """Args:

        bits: channels D, one bit each; at least 2.
        codebooks: ids a position, Q, which share the bits equally.
        temperature: of the entropy's soft choice; 1 is the authors' own, and that of LFQ would leave bits without gradients.
        diversity: weight of the entropy of all vectors' codes within the entropy term (gamma of the paper).
        """
        if bits < 2:
            raise ValueError(f"bits: expected at least 2 (the unit sphere of one channel is two points), got {bits}")
        super().__init__(bits, codebooks, temperature, diversity)
        self.weights, self.scale = {"entropy": 0.1}, bits**-0.5

    def project(self, z: Float[Tensor, "P D"]) -> Float[Tensor, "P D"]:
        """z / |z|."""
        return F.normalize(z, dim=-1)

    def terms(self, z: Float[Tensor, "P D"], c: Float[Tensor, "P D"]) -> dict[str, Float[Tensor, ""]]:
        """Entropy, summed over bits."""
        logits = self.logits(z)
        p = logits.sigmoid().mean(0)  # (D,)
        p = mean_over_processes(p) if self.training else p
        together = entropy(p) + entropy(1 - p)
        return {"entropy": bit_entropy(logits).sum(-1).mean() - self.diversity * together}


def bit_entropy(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """H of a bit that is 1 with probability sigmoid(a): log(1 + e^a) - a sigmoid(a)."""
    return F.softplus(logits) - logits * logits.sigmoid()


def mean_code_probability(logits: Float[Tensor, "P b"]) -> Float[Tensor, " K"]:
    """E[p(c | z)] of all 2^b codes without a matrix of vectors x codes.

    A code is a first half of bits and a second one, and p(c | z) the product of theirs: so the mean is one matrix product of
    (P x 2^(b/2))^T and (P x 2^(b/2)), done for a part of the vectors at a time, and again in the backward pass.
    """
    rows = rows_at_once(2 ** ((logits.shape[-1] + 1) // 2), logits)
    again = partial(checkpoint, _code_probability, use_reentrant=False, preserve_rng_state=False)
    return sum(again(part) for part in logits.split(rows)) / len(logits)


def _code_probability(logits: Float[Tensor, "P b"]) -> Float[Tensor, " K"]:
    """sum over vectors of p(c | z)."""
    first, second = (_table(half) for half in logits.tensor_split([logits.shape[-1] // 2], dim=-1))
    return (first.T @ second).flatten()  # the first bits are the most significant


def _table(logits: Float[Tensor, "P b"]) -> Float[Tensor, "P K"]:
    """p of all settings of a few bits."""
    table = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(-1):
        table = (table[..., None] * torch.stack([-bit, bit], dim=-1).sigmoid()[:, None]).flatten(1)  # twice as many
    return table
