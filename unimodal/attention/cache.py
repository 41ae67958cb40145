"""Keys and values of documents being decoded: preallocated, written in place, each sequence at its own length.

Letters: N sequences of the cache (branches x documents), R of them in one call, T new tokens a sequence (padded),
M cached positions looked at, H query heads, K key/value heads, E channels of a head.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unimodal.attention.packed import attend


class KVCache:
    """Keys and values of every layer, with a length a sequence."""

    def __init__(
        self, layers: int, sequences: int, capacity: int, heads: int, head_dim: int, *,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        shape = (layers, sequences, capacity, heads, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * sequences

    @property
    def capacity(self) -> int:
        """Tokens a sequence can hold."""
        return self.k.shape[2]

    def view(self, sequences: Sequence[int], counts: Sequence[int], bidirectional: bool) -> "CacheView":
        """Attention for `counts[i]` new tokens of `sequences[i]`, which form one block each."""
        return CacheView(self, sequences, counts, bidirectional)

    def advance(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Keep what the last view wrote."""
        for sequence, count in zip(sequences, counts, strict=True):
            self.lengths[sequence] += count


class CacheView:
    """Attention of new tokens over the cache; the visibility rule of one document whose past is all visible.

    New keys are written behind each sequence's length: until `advance` is called they are scratch, so a view that is not
    advanced leaves no trace.
    """

    def __init__(self, cache: KVCache, sequences: Sequence[int], counts: Sequence[int], bidirectional: bool) -> None:
        self.cache = cache
        device = cache.k.device
        tokens = max(counts)
        starts = torch.tensor([cache.lengths[s] for s in sequences], device=device)  # (R,)
        ends = starts + torch.tensor(counts, device=device)
        longest = max(cache.lengths[s] for s in sequences) + tokens
        if longest > cache.capacity:
            raise ValueError(f"context: a document needs {longest} tokens, the session holds {cache.capacity}")
        # All sequences in order are read as a view of the cache; a choice of them is copied.
        everything = list(sequences) == list(range(len(cache.lengths)))
        self.rows: slice | Tensor = slice(None) if everything else torch.tensor(sequences, device=device)
        self.where = torch.tensor(sequences, device=device)[:, None]  # (R, 1)
        self.positions = starts[:, None] + torch.arange(tokens, device=device)  # (R, T)
        self.longest = longest
        self.mask = self._mask(starts, ends, bidirectional)  # (R, 1, T, M)

    def _mask(self, starts: Tensor, ends: Tensor, bidirectional: bool) -> Bool[Tensor, "R 1 T M"]:
        keys = torch.arange(self.longest, device=starts.device)
        last = ends[:, None].expand_as(self.positions) - 1 if bidirectional else self.positions  # last key seen (R, T)
        # Padded queries see what their block sees, so that no row is empty; nobody reads them.
        return (keys <= torch.maximum(last, starts[:, None])[:, :, None])[:, None]

    def __call__(
        self, layer: int, q: Float[Tensor, "RT H E"], k: Float[Tensor, "RT K E"], v: Float[Tensor, "RT K E"]
    ) -> Float[Tensor, "RT H E"]:
        """Write k and v behind the past, attend over both."""
        r, t = self.positions.shape
        cache_k, cache_v = self.cache.k[layer], self.cache.v[layer]  # (N, capacity, K, E)
        cache_k[self.where, self.positions] = k.unflatten(0, (r, t)).to(cache_k.dtype)
        cache_v[self.where, self.positions] = v.unflatten(0, (r, t)).to(cache_v.dtype)
        past_k = cache_k[self.rows, : self.longest].transpose(1, 2)  # (R, K, M, E)
        past_v = cache_v[self.rows, : self.longest].transpose(1, 2)
        o = attend(q.unflatten(0, (r, t)).transpose(1, 2), past_k.to(q.dtype), past_v.to(q.dtype), self.mask)
        return o.transpose(1, 2).flatten(0, 1)  # (R*T, H, E)
