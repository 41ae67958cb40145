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
        starts = torch.tensor([cache.lengths[s] for s in sequences])  # (R,), on the host as all that follows
        ends = starts + torch.tensor(counts)
        longest = int(ends.max())
        if longest > cache.capacity:
            raise ValueError(f"context: a document needs {longest} tokens, the session holds {cache.capacity}")
        # All sequences in order are read as a view of the cache; a choice of them is copied.
        everything = list(sequences) == list(range(len(cache.lengths)))
        self.rows: slice | Tensor = slice(None) if everything else torch.tensor(sequences, device=device)
        positions = starts[:, None] + torch.arange(tokens)  # (R, T)
        real = positions < ends[:, None]  # padding is not written: a row may end where the cache does
        self.real: slice | Tensor = (
            slice(None) if min(counts) == tokens else real.flatten().nonzero().squeeze(1).to(device)
        )
        self.where = torch.tensor(sequences).repeat_interleave(ends - starts).to(device)  # (n,) new tokens, end to end
        self.at = positions[real].to(device)  # (n,)
        self.longest, self.shape = longest, tuple(positions.shape)
        self.mask = self._mask(positions, ends, bidirectional).to(device)  # (R, 1, T, M)

    def _mask(self, positions: Tensor, ends: Tensor, bidirectional: bool) -> Bool[Tensor, "R 1 T M"]:
        keys = torch.arange(self.longest)
        last = ends[:, None].expand_as(positions) - 1 if bidirectional else positions  # last key seen (R, T)
        # Padded queries see what their block sees, so that no row is empty; nobody reads them.
        return (keys <= last[:, :, None])[:, None]

    def __call__(
        self, layer: int, q: Float[Tensor, "RT H E"], k: Float[Tensor, "RT K E"], v: Float[Tensor, "RT K E"]
    ) -> Float[Tensor, "RT H E"]:
        """Write k and v behind the past, attend over both."""
        cache_k, cache_v = self.cache.k[layer], self.cache.v[layer]  # (N, capacity, K, E)
        cache_k[self.where, self.at] = k[self.real].to(cache_k.dtype)
        cache_v[self.where, self.at] = v[self.real].to(cache_v.dtype)
        past_k = cache_k[self.rows, : self.longest].transpose(1, 2)  # (R, K, M, E)
        past_v = cache_v[self.rows, : self.longest].transpose(1, 2)
        o = attend(q.unflatten(0, self.shape).transpose(1, 2), past_k.to(q.dtype), past_v.to(q.dtype), self.mask)
        return o.transpose(1, 2).flatten(0, 1)  # (R*T, H, E)
