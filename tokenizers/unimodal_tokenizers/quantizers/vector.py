"""A codebook that learns by gradient: each vector to its nearest code.

Letters: P vectors, K entries, D channels. z a vector and e its code; sg[.] stops the gradient.

`VectorQuantizer` has z and e on the unit sphere of R^D: its codebook is the one of ViT-VQGAN (arXiv 2110.04627)
and LlamaGen (arXiv 2406.06525): few channels, everything l2-normalised. `EuclideanQuantizer` has them anywhere.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
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
from unimodal_tokenizers.quantizers.search import nearest_code, nearest_code_of_any_length
from unimodal_tokenizers.squares import Keeps


class VectorQuantizer(Quantizer):
    """Encoder outputs to the nearest of K codes on the unit sphere of R^D.

    An entry that no token chose for `revive_after` training batches is dead and is replaced by an encoder output of the
    next batch; all entries start dead, so the first batch initialises the codebook. The choice of outputs depends on a
    counter among the buffers only: training that was stopped and resumed makes the same choices. Over several processes
    entries are dead when no process chose them, and replacements are drawn from the outputs of all.
    """

    keeps: Keeps = "directions"
    steps: Int64[Tensor, ""]
    idle: Int64[Tensor, " K"]

    def __init__(self, entries: int, dim: int, revive_after: int = 50, seed: int = 0) -> None:
        """Args:

        entries: size K of the codebook.
        dim: channels D of a code; few (4 to 16) keep the whole codebook in use.
        revive_after: training batches without a token after which an entry is replaced.
        seed: of the choice of outputs; quantizers of the same tokens need different ones.
        """
        super().__init__()
        check_codebook(entries, dim)
        if dim < 2:
            raise ValueError(
                f"dim: expected at least 2 channels (the unit sphere of one channel is two points), got {dim}"
            )
        if revive_after < 1:
            raise ValueError(f"revive_after: expected at least 1 batch, got {revive_after}")
        self.entries, self.dim, self.revive_after, self.seed = entries, dim, revive_after, seed
        self.codebooks, self.weights = (entries,), {"codebook": 1.0, "commitment": 0.25}
        start = torch.randn(entries, dim, generator=torch.Generator().manual_seed(seed), device="cpu")
        self.codebook = nn.Embedding.from_pretrained(start, freeze=False)  # an embedding: weight decay leaves it alone
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # training batches seen
        self.register_buffer("idle", torch.full((entries,), revive_after))  # training batches since last chosen

    @property
    def codes(self) -> Float[Tensor, "K D"]:
        """The codebook where encoder outputs are compared with it, in single precision at least."""
        return self.project(self.codebook.weight)

    def project(self, x: Float[Tensor, "P D"]) -> Float[Tensor, "P D"]:
        """x / |x|, in single precision at least: half precision confuses neighbouring codes."""
        return F.normalize(precise(x), dim=-1)

    def nearest(self, z: Float[Tensor, "P D"], codes: Float[Tensor, "K D"]) -> Int64[Tensor, " P"]:
        """The search."""
        return nearest_code(z, codes)

    def quantize(self, z: Float[Tensor, "P D"]) -> Quantized:
        """The loss of VQ-VAE (arXiv 1711.00937): reconstruction + |sg[z] - e|^2 + beta |z - sg[e]|^2."""
        z = self.project(z)
        ids, counts = self.assign(z.detach())
        e = F.embedding(ids, self.codes.to(z.dtype))  # (P, D)
        terms = {"codebook": squared_distance(z.detach(), e), "commitment": squared_distance(z, e.detach())}
        return Quantized(straight_through(z, e), ids, counts, terms)

    def find(self, z: Float[Tensor, "P D"]) -> Int64[Tensor, " P"]:
        """Each vector's nearest code."""
        z = self.project(z)
        return self.nearest(z, self.codes.to(z.dtype))

    def say(self, ids: Int64[Tensor, " P"]) -> Float[Tensor, "P D"]:
        """Rows of the codebook."""
        return F.embedding(ids, self.codes)  # (P, D)

    @torch.no_grad()
    def assign(self, z: Float[Tensor, "P D"]) -> tuple[Int64[Tensor, " P"], Int64[Tensor, " K"]]:
        """Ids of projected outputs and how many chose each entry; in training mode this counts as a batch."""
        if self.training:
            self._revive(z)
        ids = self.nearest(z, self.codes.to(z.dtype))
        counts = torch.bincount(ids, minlength=self.entries)
        if self.training:
            self._count(counts)
        return ids, counts

    @torch.no_grad()
    def _revive(self, z: Float[Tensor, "P D"]) -> None:
        """Put encoder outputs in the place of dead entries: each output once, so as many as there are at the most."""
        dead = (self.idle >= self.revive_after).nonzero().squeeze(-1)  # (K_dead,)
        if not len(dead):
            return
        rng = torch.Generator().manual_seed(1_000_003 * self.seed + int(self.steps))
        fresh = drawn(z, len(dead), rng)
        # Before the codebook enters this step's graph, so that an output that was drawn chooses its own copy at once.
        self.codebook.weight[dead[: len(fresh)]] = fresh.to(self.codebook.weight.dtype)

    @torch.no_grad()
    def _count(self, counts: Int64[Tensor, " K"]) -> None:
        """One more training batch for every entry that no token of any process chose."""
        counts = counts.clone()
        if processes() > 1:
            torch.distributed.all_reduce(counts)
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
        self.steps.add_(1)


class EuclideanQuantizer(VectorQuantizer):
    """Codes of any length: residuals shrink from one to the next, and their length says something."""

    keeps = "vectors"

    def project(self, x: Float[Tensor, "P D"]) -> Float[Tensor, "P D"]:
        """x itself, in single precision at least."""
        return precise(x)

    def nearest(self, z: Float[Tensor, "P D"], codes: Float[Tensor, "K D"]) -> Int64[Tensor, " P"]:
        """The search."""
        return nearest_code_of_any_length(z, codes)
