"""A codebook that learns without gradients: each code the moving average of the vectors that chose it.

Letters: P vectors, K entries, D channels. z a vector, e_k a code, n_k the vectors that chose it in a step, N_k the moving
average of n_k; sg[.] stops the gradient.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from unimodal_tokenizers.quantizers.base import (
    Quantized,
    Quantizer,
    check_codebook,
    drawn,
    precise,
    processes,
    squared_distance,
    straight_through,
)
from unimodal_tokenizers.quantizers.search import nearest_code_of_any_length


class MovingAverageQuantizer(Quantizer):
    """The codebook of VQ-VAE-2 (arXiv 1906.00446; VQ-VAE, arXiv 1711.00937, appendix A.1).

    It moves in `after_step`, once an optimizer step, by all vectors that the training passes since the last one have seen on
    all processes: batches that are accumulated or shared out give what one large batch gives. An entry that no vector chose
    for `revive_after` steps becomes one of these vectors; all entries start so, and the first step fills the codebook.
    """

    codes: Float[Tensor, "K D"]
    mass: Float[Tensor, " K"]
    idle: Int64[Tensor, " K"]
    steps: Int64[Tensor, ""]

    def __init__(self, entries: int, dim: int, decay: float = 0.99, revive_after: int = 50, seed: int = 0) -> None:
        """Args:

        entries: size K of the codebook.
        dim: channels D of a code.
        decay: gamma, the share of the past in the moving averages.
        revive_after: optimizer steps without a vector after which an entry is replaced.
        seed: of the first codes and of the choice of vectors that replace dead ones.
        """
        super().__init__()
        check_codebook(entries, dim)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected at least 0 and below 1, got {decay}")
        if revive_after < 1:
            raise ValueError(f"revive_after: expected at least 1 step, got {revive_after}")
        self.dim, self.codebooks, self.weights = dim, (entries,), {"commitment": 0.25}
        self.decay, self.revive_after, self.seed = decay, revive_after, seed
        start = torch.randn(entries, dim, generator=torch.Generator().manual_seed(seed), device="cpu")
        self.register_buffer("codes", start)
        self.register_buffer("mass", torch.zeros(entries))  # N_k
        self.register_buffer("idle", torch.full((entries,), revive_after))  # steps since last chosen
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._seen: list[tuple[Tensor, Tensor]] = []  # vectors and their ids since the last step

    def quantize(self, z: Float[Tensor, "P D"]) -> Quantized:
        """The loss of VQ-VAE without the codebook's term: beta |z - sg[e]|^2 (VQ-VAE-2)."""
        ids = self.find(z.detach())
        e = self.say(ids).to(z.dtype)
        if self.training:
            self._seen.append((z.detach(), ids))
        counts = torch.bincount(ids, minlength=len(self.codes))
        return Quantized(straight_through(z, e), ids, counts, {"commitment": squared_distance(z, e)})

    def find(self, z: Float[Tensor, "P D"]) -> Int64[Tensor, " P"]:
        """Each vector's nearest code."""
        return nearest_code_of_any_length(z, precise(self.codes).to(z.dtype))

    def say(self, ids: Int64[Tensor, " P"]) -> Float[Tensor, "P D"]:
        """Rows of the codebook."""
        return F.embedding(ids, precise(self.codes))

    @torch.no_grad()
    def after_step(self) -> None:
        """N' = gamma N + (1 - gamma) n and N' e' = gamma N e + (1 - gamma) sum z (VQ-VAE); dead entries revive."""
        if not self._seen:
            return
        z = torch.cat([vectors for vectors, _ in self._seen]).to(self.codes.dtype)
        ids = torch.cat([chosen for _, chosen in self._seen])
        self._seen.clear()
        finite = z.isfinite().all(dim=1, keepdim=True)  # (P, 1): a batch that overflowed must not stay in the codebook
        z, n = (
            torch.where(finite, z, 0),
            torch.zeros_like(self.mass).index_add_(0, ids, finite[:, 0].to(self.mass.dtype)),
        )
        total = torch.zeros_like(self.codes).index_add_(0, ids, z)  # sum z
        if processes() > 1:
            torch.distributed.all_reduce(n)
            torch.distributed.all_reduce(total)
        self.mass.mul_(self.decay).add_((1 - self.decay) * n)
        step = (1 - self.decay) * (total - n[:, None] * self.codes) / self.mass.clamp(min=1e-30)[:, None]
        self.codes.add_(step)  # 0 where no vector came
        self.idle.copy_(torch.where(n > 0, 0, self.idle + 1))
        self._revive(z)
        self.steps.add_(1)

    def _revive(self, z: Float[Tensor, "P D"]) -> None:
        """Dead entries begin anew, without a past, as vectors of this step: each vector once."""
        dead = (self.idle >= self.revive_after).nonzero().squeeze(-1)  # (K_dead,)
        if not len(dead):
            return
        fresh = drawn(z, len(dead), torch.Generator().manual_seed(1_000_003 * self.seed + int(self.steps)))
        dead = dead[: len(fresh)]
        self.codes[dead], self.mass[dead], self.idle[dead] = fresh, 0.0, 0
