"""The interface every quantizer keeps: vectors of an encoder to ids and back.

Letters: P vectors (of all positions of all images), D channels of one; Q codebooks of K entries each, where Q is left out
if there is one. z a vector and e what its codes say of it; sg[.] stops the gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from unimodal_tokenizers.base import precise
from unimodal_tokenizers.quantizers.search import SEARCH_BYTES
from unimodal_tokenizers.squares import Keeps


@dataclass(frozen=True)
class Quantized:
    """What a quantizer says of P vectors, in training."""

    quantized: Float[Tensor, "P D"]  # what the chosen codes say; gradients pass through to the vectors
    ids: Int64[Tensor, "N *Q"]  # N = P, or more of several scales
    counts: Int64[Tensor, "*Q K"]  # vectors of this batch that chose each entry
    terms: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)  # of the loss, by name, not weighted


class Quantizer(nn.Module, ABC):
    """Vectors <-> ids. Subclasses set the three attributes and write `quantize`, `find` and `say`.

    These compute in single precision at least, whatever autocast says: half precision confuses neighbouring codes.
    """

    dim: int  # channels D it reads and says
    codebooks: tuple[int, ...]  # entries K of each codebook
    weights: Mapping[str, float]  # the names of the terms of its loss, each with the weight it has by default
    keeps: Keeps = "vectors"  # what of a vector its ids can say; where an encoder beside a linear map begins
    slices: int = 1  # of the channels, each quantized by itself

    @abstractmethod
    def quantize(self, z: Float[Tensor, "P D"]) -> Quantized:
        """What `forward` returns. In training mode a codebook may count, revive and collect; otherwise nothing changes."""

    @abstractmethod
    def find(self, z: Float[Tensor, "P D"]) -> Int64[Tensor, "P *Q"]:
        """The ids of vectors; changes nothing, needs no gradient."""

    @abstractmethod
    def say(self, ids: Int64[Tensor, "P *Q"]) -> Float[Tensor, "P D"]:
        """What ids say that are known to be within the codebooks."""

    def after_step(self) -> None:
        """Called after every optimizer step: a codebook that learns without gradients moves here."""

    def forward(self, vectors: Float[Tensor, "P D"]) -> Quantized:
        """Vectors through the codebooks, with every term that `weights` names."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self.quantize(precise(vectors))

    def vectors_to_ids(self, vectors: Float[Tensor, "P D"]) -> Int64[Tensor, "P *Q"]:
        """Vectors to their ids `(P,)`, or `(P, Q)` of several codebooks; changes nothing."""
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            return self.find(precise(vectors))

    def ids_to_vectors(self, ids: Shaped[Tensor, "P *Q"]) -> Float[Tensor, "P D"]:
        """Ids to what they say, which is what the decoder reads.

        `vectors_to_ids` gives the ids back where a code is its own nearest: not where vectors are bent before they are
        rounded (FSQ), are compared by inner product (IBQ), or leave something to a next codebook (residual).

        Raises:
            ValueError: ids that are no integers, lie outside the codebook, or are not one of each codebook.
        """
        self.check_shape(ids)
        check_ids(ids, self.codebooks[0])
        with torch.autocast(ids.device.type, enabled=False):
            return self.say(ids.long())

    def check_shape(self, ids: Shaped[Tensor, "*shape"]) -> None:
        """Refuse ids that are not one of each codebook a row."""
        books = self.codebooks[1:] and (len(self.codebooks),)
        if tuple(ids.shape[1:]) != books or not ids.dim():
            expected = f"(T, {books[0]})" if books else "(T,)"
            raise ValueError(f"tokens: expected ids {expected}, got shape {tuple(ids.shape)}")


def check_codebook(entries: int, dim: int) -> None:
    """Refuse sizes of a codebook that cannot be searched."""
    most = SEARCH_BYTES // torch.float32.itemsize  # else the similarities of one vector are too many
    if not 2 <= entries <= most:
        raise ValueError(f"entries: expected between 2 and {most}, got {entries}")
    if dim < 1:
        raise ValueError(f"dim: expected at least 1 channel, got {dim}")


def check_ids(ids: Shaped[Tensor, "*shape"], entries: int) -> None:
    """Refuse what is no id of a codebook of so many entries."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"tokens: expected integer ids of a codebook of {entries}, got {ids.dtype}")
    if ids.device.type == "cuda":  # looking would wait for the device at every token; it ends the process by itself
        torch._assert_async(((ids >= 0) & (ids < entries)).all(), f"tokens: expected ids from 0 to {entries - 1}")
    elif ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= entries):
        raise ValueError(f"tokens: expected ids from 0 to {entries - 1}, got {int(ids.min())} to {int(ids.max())}")


def processes() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def step_generator(seed: int, step: int) -> torch.Generator:
    """Of one training batch of one process: training that was stopped and resumed draws the same."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return torch.Generator().manual_seed(1_000_003 * (1_000_003 * seed + rank) + step)


def squared_distance(a: Float[Tensor, "P D"], b: Float[Tensor, "P D"]) -> Float[Tensor, ""]:
    """|a - b|^2, summed over channels and averaged over the rest; on the unit sphere it is 2 - 2 cos, from 0 to 4."""
    return (a - b).square().sum(-1).mean()


@torch.no_grad()
def drawn(z: Float[Tensor, "P D"], count: int, rng: torch.Generator) -> Float[Tensor, "n D"]:
    """So many vectors (or all, if there are fewer) drawn from those of all processes, the same on every one."""
    sizes, rank = torch.tensor([len(z)], device=z.device), 0
    if processes() > 1:
        rank, parts = torch.distributed.get_rank(), [torch.zeros_like(sizes) for _ in range(processes())]
        torch.distributed.all_gather(parts, sizes)
        sizes = torch.cat(parts)
    chosen = torch.randperm(int(sizes.sum()), generator=rng)[:count].to(z.device) - sizes[:rank].sum()
    own = (chosen >= 0) & (chosen < len(z))
    vectors = torch.where(own[:, None], z[torch.where(own, chosen, 0)], 0).nan_to_num(0, 0, 0)  # (n, D)
    if processes() > 1:
        torch.distributed.all_reduce(vectors)
    return vectors


def mean_over_processes(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The mean, with the gradient that makes it a mean over one large batch where processes average gradients."""
    if processes() == 1:
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x) / processes()


def entropy(p: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """-sum p log p in nats, whose gradient is finite at 0."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum()


def straight_through(z: Float[Tensor, "P D"], e: Float[Tensor, "P D"]) -> Float[Tensor, "P D"]:
    """z + sg[e - z]: the value of e, the gradient of z (the straight-through estimator of VQ-VAE, 1711.00937)."""
    return z + (e - z).detach()


def codebook_usage(counts: Int64[Tensor, "*Q K"]) -> Float[Tensor, ""]:
    """Share of the entries that at least one token chose, from 0 to 1."""
    return (counts > 0).float().mean()


def codebook_perplexity(counts: Int64[Tensor, "*Q K"]) -> Float[Tensor, ""]:
    """exp(-sum_k p_k log p_k): entries that carry as much when used equally often: 1 to K, 0 without tokens.

    The mean over several codebooks.
    """
    total = counts.sum(-1, keepdim=True)
    p = counts.float() / total.clamp(min=1)
    return torch.where(total[..., 0] > 0, torch.exp(-torch.xlogy(p, p).sum(-1)), 0.0).mean()
