"""Index back-propagation: gradients reach every code through the choice itself (IBQ, arXiv 2412.02692; Emu3.5).

Letters: P vectors, K entries, D channels. z a vector, E the codebook, e its chosen row; sg[.] stops the gradient.
"""

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unimodal_tokenizers.quantizers.base import (
    Quantized,
    Quantizer,
    check_codebook,
    entropy,
    mean_over_processes,
    precise,
)
from unimodal_tokenizers.quantizers.search import nearest_code, rows_at_once


class IBQ(Quantizer):
    """Each vector to the code of the largest inner product; every code of the codebook learns at every step.

    The one-hot choice has the gradient of a softmax over all codes, and the entropy term is LFQ's: each vector decides, all
    together use every code. Both are computed for a part of the vectors at a time, again in the backward pass, so that no
    matrix of vectors x codes exceeds `SEARCH_BYTES`. Over several processes the entropy is that of all their vectors.
    """

    keeps = "levels"  # only what lies around zero on all sides finds every code

    def __init__(
        self, entries: int, dim: int, temperature: float = 0.01, diversity: float = 1.0, seed: int = 0
    ) -> None:
        """Args:

        entries: size K of the codebook.
        dim: channels D of a code.
        temperature: of the entropy's softmax.
        diversity: weight of the entropy of all vectors' codes within the entropy term.
        seed: of the first codes.
        """
        super().__init__()
        check_codebook(entries, dim)
        if temperature <= 0:
            raise ValueError(f"temperature: expected above 0, got {temperature}")
        self.dim, self.codebooks = dim, (entries,)
        self.weights = {"double": 1.0, "commitment": 1.0, "codebook": 0.25, "entropy": 0.05}
        self.temperature, self.diversity = temperature, diversity
        start = torch.randn(entries, dim, generator=torch.Generator().manual_seed(seed), device="cpu")
        # Of one length: the longest would be chosen by all, and no other learns then.
        start = F.normalize(start, dim=-1)
        self.codebook = nn.Embedding.from_pretrained(start, freeze=False)  # an embedding: weight decay leaves it alone

    def quantize(self, z: Float[Tensor, "P D"]) -> Quantized:
        """z_q = (onehot + p - sg[p]) E with p = softmax(z E^T), and twice the quantization loss (IBQ).

        `double` is |z_q - z|^2, whose gradient goes through the choice; the other two are those of VQ-VAE. All three are
        means over channels, as published: of sums, vectors and codes shrink to nothing, which costs less than to differ.
        """
        codes = precise(self.codebook.weight).to(z.dtype)
        ids = self.find(z.detach())
        e = F.embedding(ids, codes)  # onehot E
        again = partial(checkpoint, self._softly, use_reentrant=False, preserve_rng_state=False)
        parts = [again(part, codes) for part in z.split(rows_at_once(len(codes), z))]
        soft = torch.cat([part[0] for part in parts])  # p E, of which only the gradient with respect to p is wanted
        z_q = e + (soft - soft.detach())
        p = torch.stack([part[2] for part in parts]).sum(0) / len(z)
        together = entropy(mean_over_processes(p) if self.training else p)
        terms = {
            "double": F.mse_loss(z_q, z),
            "commitment": F.mse_loss(z, e.detach()),
            "codebook": F.mse_loss(z.detach(), e),
            "entropy": torch.stack([part[1] for part in parts]).sum() / len(z) - self.diversity * together,
        }
        return Quantized(z_q, ids, torch.bincount(ids, minlength=len(codes)), terms)

    def _softly(
        self, z: Float[Tensor, "P D"], codes: Float[Tensor, "K D"]
    ) -> tuple[Float[Tensor, "P D"], Float[Tensor, ""], Float[Tensor, " K"]]:
        """p E; with p at the entropy's temperature, the sum over vectors of H(p), and of p."""
        logits = z @ codes.T  # (P, K)
        soft = logits.softmax(-1) @ codes.detach()
        sharp = logits / self.temperature
        p = sharp.softmax(-1)  # not the exponential of the logarithm: most of it is so small that processors crawl
        return soft, -(p * sharp.log_softmax(-1)).sum(), p.sum(0)

    def find(self, z: Float[Tensor, "P D"]) -> Int64[Tensor, " P"]:
        """argmax_k <z, e_k>."""
        return nearest_code(z, precise(self.codebook.weight).detach().to(z.dtype))

    def say(self, ids: Int64[Tensor, " P"]) -> Float[Tensor, "P D"]:
        """Rows of the codebook."""
        return F.embedding(ids, precise(self.codebook.weight))
