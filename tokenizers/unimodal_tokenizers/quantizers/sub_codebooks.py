"""Several codebooks side by side, each for its own slice of the channels (multi-codebook quantization of UniTok).

Letters: P vectors, Q codebooks of K entries, D = Q d channels.
"""

import copy

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unimodal_tokenizers.quantizers.base import Quantized, Quantizer


class SubCodebooks(Quantizer):
    """A position has Q ids: the channels are cut into Q slices, each quantized by itself (UniTok, arXiv 2502.20321).

    Terms of the loss are sums over the slices.
    """

    def __init__(self, quantizer: Quantizer, codebooks: int) -> None:
        """Args:

        quantizer: of one slice, of one codebook; each slice gets a copy.
        codebooks: how many, Q.
        """
        super().__init__()
        if len(quantizer.codebooks) != 1:
            raise ValueError(f"quantizer: expected one with one codebook, got {len(quantizer.codebooks)} codebooks")
        if codebooks < 2:
            raise ValueError(f"codebooks: expected at least 2 (the quantizer alone has one), got {codebooks}")
        self.quantizers = nn.ModuleList(copy.deepcopy(quantizer) for _ in range(codebooks))
        self.dim, self.codebooks = codebooks * quantizer.dim, quantizer.codebooks * codebooks
        self.weights, self.keeps, self.slices = quantizer.weights, quantizer.keeps, codebooks

    def quantize(self, z: Float[Tensor, "P D"]) -> Quantized:
        """Slice by slice."""
        parts = [q.quantize(part) for q, part in zip(self._quantizers, self._slices(z), strict=True)]
        return Quantized(
            quantized=torch.cat([part.quantized for part in parts], dim=-1),  # (P, D)
            ids=torch.stack([part.ids for part in parts], dim=1),  # (P, Q)
            counts=torch.stack([part.counts for part in parts]),  # (Q, K)
            terms={name: torch.stack([part.terms[name] for part in parts]).sum() for name in self.weights},
        )

    def find(self, z: Float[Tensor, "P D"]) -> Int64[Tensor, "P Q"]:
        """The ids of each slice."""
        return torch.stack([q.find(part) for q, part in zip(self._quantizers, self._slices(z), strict=True)], dim=1)

    def say(self, ids: Int64[Tensor, "P Q"]) -> Float[Tensor, "P D"]:
        """What each id says, side by side."""
        return torch.cat([q.say(i) for q, i in zip(self._quantizers, ids.unbind(1), strict=True)], dim=-1)

    def after_step(self) -> None:
        """Those of the slices."""
        for quantizer in self._quantizers:
            quantizer.after_step()

    def _slices(self, z: Float[Tensor, "P D"]) -> tuple[Float[Tensor, "P d"], ...]:
        return z.chunk(len(self.quantizers), dim=-1)

    @property
    def _quantizers(self) -> list[Quantizer]:
        return [q for q in self.quantizers if isinstance(q, Quantizer)]
