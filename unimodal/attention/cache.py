"""Keys and values of documents being decoded: preallocated, written in place, each sequence at its own length.

Letters: N sequences of the cache (branches x documents), R of them in one call, T new tokens a sequence (padded),
M cached positions looked at, H query heads, K key/value heads, G = H / K, E channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class KVCache:
    """Keys and values of every layer, with a length a sequence."""

    def __init__(
        self, layers: int, sequences: int, capacity: int, heads: int, head_dim: int, *,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        shape = (layers, sequences, heads, capacity, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * sequences

    @property
    def capacity(self) -> int:
        """Tokens a sequence can hold."""
        return self.k.shape[3]

    def view(self, sequences: Sequence[int], counts: Sequence[int], bidirectional: bool) -> "CacheView":
        """Attention for `counts[i]` new tokens of `sequences[i]`, which form one block each."""
        return CacheView(self, sequences, counts, bidirectional)

    def advance(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Keep what the last view wrote."""
        for sequence, count in zip(sequences, counts, strict=True):
            self.lengths[sequence] += count


@dataclass(frozen=True)
class _Run:
    """Neighbouring sequences of one call: rows `rows` of the new tokens, sequences `held` of the cache.

    What is common to them is decided once for all layers: sequences of one length are written by one slice and, where each
    new token sees everything, attended without a mask.
    """

    rows: slice
    held: slice
    longest: int  # keys looked at
    at: slice  # where every row is written, when `index` is None
    index: Int[Tensor, "3 m"] | None  # row, token and place of each new token, when lengths differ
    mask: Float[Tensor, "n 1 T M"] | None  # added to scores
    causal: bool  # the same for tokens without a past, which need none written out

    @classmethod
    def make(
        cls, first: int, sequence: int, starts: list[int], counts: list[int], tokens: int, bidirectional: bool,
        device: torch.device, dtype: torch.dtype,
    ) -> "_Run":  # fmt: skip
        """A run that begins with row `first` and `sequence`."""
        n = len(starts)
        ends = [a + b for a, b in zip(starts, counts, strict=True)]
        longest = max(ends)
        even = len(set(starts)) == 1 and min(counts) == tokens
        causal = even and starts[0] == 0 and not bidirectional
        index = mask = None
        if not even:
            real = torch.arange(tokens) < torch.tensor(counts)[:, None]  # (n, T); padding is not written
            row, token = real.nonzero(as_tuple=True)
            index = torch.stack([row, token, token + torch.tensor(starts)[row]]).to(device)
        if not even or (tokens > 1 and not bidirectional and not causal):
            last = torch.tensor(ends)[:, None] - 1  # (n, 1): the last key a row sees
            if not bidirectional:
                # Padded queries see what the last real one sees, so that no row is empty; nobody reads them.
                last = torch.minimum(torch.tensor(starts)[:, None] + torch.arange(tokens), last)
            hidden = torch.arange(longest) > last.expand(n, tokens)[:, :, None]  # (n, T, M)
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None].to(device)
        held = slice(sequence, sequence + n)
        return cls(slice(first, first + n), held, longest, slice(starts[0], starts[0] + tokens), index, mask, causal)

    def past(self, cache: Float[Tensor, "N K capacity E"], x: Float[Tensor, "n T K E"]) -> Float[Tensor, "n K M E"]:
        """Put new rows behind the past; both, where they lie.

        Views are made by `narrow`: at a token a step, indexing by slices would take as long as what it is for.
        """
        held, at = self.held, self.at
        cache = cache.narrow(0, held.start, held.stop - held.start)
        if self.index is None:
            cache.narrow(2, at.start, at.stop - at.start).copy_(x.transpose(1, 2))
        else:
            row, token, place = self.index
            cache[row, :, place] = x[row, token].to(cache.dtype)
        return cache.narrow(2, 0, self.longest)


class CacheView:
    """Attention of new tokens over the cache; the visibility rule of one document whose past is all visible.

    New keys are written behind each sequence's length: until `advance` is called they are scratch, so a view that is not
    advanced leaves no trace. The past is read where it lies, never copied.
    """

    def __init__(self, cache: KVCache, sequences: Sequence[int], counts: Sequence[int], bidirectional: bool) -> None:
        self.k, self.v = cache.k, cache.v
        tokens = max(counts)
        self.shape = (len(counts), tokens)
        longest = max(cache.lengths[s] + n for s, n in zip(sequences, counts, strict=True))
        if longest > cache.capacity:
            raise ValueError(f"context: a document needs {longest} tokens, the session holds {cache.capacity}")
        self.runs: list[_Run] = []
        first = 0
        for i in range(1, len(counts) + 1):
            if i == len(counts) or sequences[i] != sequences[i - 1] + 1:
                starts = [cache.lengths[s] for s in sequences[first:i]]
                run = _Run.make(
                    first, sequences[first], starts, list(counts[first:i]), tokens, bidirectional,
                    self.k.device, self.k.dtype,
                )  # fmt: skip
                self.runs.append(run)
                first = i

    def layer(self, number: int) -> "CacheLayer":
        """Attention of one layer."""
        return CacheLayer(self, number)

    def packed(self) -> "PackedView":
        """The same as tensors alone, which a compiled network can be given."""
        numbers = list(self.shape)
        index: list[Tensor] = []
        masks: list[Tensor] = []
        for run in self.runs:
            written = 0 if run.index is None else run.index.shape[1]
            flags = [written, int(run.mask is not None), int(run.causal)]
            numbers += [run.rows.start, run.rows.stop, run.held.start, run.held.stop, run.longest, run.at.start, *flags]
            index += [] if run.index is None else [run.index.flatten()]
            masks += [] if run.mask is None else [run.mask.flatten()]
        none = torch.zeros(2, dtype=torch.long, device=self.k.device)  # of a length that no compiler takes for special
        flat = torch.cat([*index, none])
        return PackedView(self.k, self.v, torch.tensor(numbers), flat, torch.cat([*masks, none.to(self.k.dtype)]))


class PackedView(NamedTuple):
    """A view as tensors."""

    k: Float[Tensor, "layers N K capacity E"]
    v: Float[Tensor, "layers N K capacity E"]
    runs: Int[Tensor, " numbers"]
    places: Int[Tensor, " _"]  # row, token and place of what is written one by one, run by run
    masks: Float[Tensor, " _"]

    def layer(self, number: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention of one layer, through the operator."""
        return lambda q, k, v: torch.ops.unimodal.cached_attention(q, k, v, *self[:2], number, *self[2:])


# Defined without `custom_op`, whose wrapper for gradients would take longer than one step's attention.
torch.library.define(
    "unimodal::cached_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, int layer, Tensor runs, Tensor index, "
    "Tensor masks) -> Tensor",
)


@torch.library.impl("unimodal::cached_attention", "CompositeExplicitAutograd")
def _cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, layer: int,
    runs: Tensor, index: Tensor, masks: Tensor,
) -> Tensor:  # fmt: skip
    """`CacheLayer` as one operator, which a compiler does not look into."""
    rows, tokens, *numbers = runs.tolist()
    made = []
    at = mask_at = 0
    for i in range(0, len(numbers), 9):
        first, stop, held, until, longest, start, written, masked, causal = numbers[i : i + 9]
        where = index[at : at + 3 * written].view(3, written) if written else None
        size = (stop - first) * tokens * longest * masked
        mask = masks[mask_at : mask_at + size].view(stop - first, 1, tokens, longest) if masked else None
        at, mask_at = at + 3 * written, mask_at + size
        made.append(
            _Run(slice(first, stop), slice(held, until), longest, slice(start, start + tokens), where, mask, bool(causal))
        )  # fmt: skip
    return _attend_runs(q, k, v, cache_k[layer], cache_v[layer], (rows, tokens), made).contiguous()


@torch.library.register_fake("unimodal::cached_attention")
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


class CacheLayer(NamedTuple):
    """One layer's call."""

    view: CacheView
    number: int

    def __call__(
        self, q: Float[Tensor, "RT H E"], k: Float[Tensor, "RT K E"], v: Float[Tensor, "RT K E"]
    ) -> Float[Tensor, "RT H E"]:
        """Write k and v behind the past, attend over both."""
        view = self.view
        return _attend_runs(q, k, v, view.k[self.number], view.v[self.number], view.shape, view.runs)


def _attend_runs(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, shape: tuple[int, int], runs: Sequence[_Run]
) -> Tensor:
    dtype = q.dtype
    q, k, v = (
        q.view(*shape, *q.shape[1:]),
        k.view(*shape, *k.shape[1:]),
        v.view(*shape, *v.shape[1:]),
    )  # (R, T, heads, E)
    outputs = []
    for run in runs:
        first, n = run.rows.start, run.rows.stop - run.rows.start
        one = (q, k, v) if n == len(q) else (q.narrow(0, first, n), k.narrow(0, first, n), v.narrow(0, first, n))
        past_k, past_v = run.past(cache_k, one[1]), run.past(cache_v, one[2])  # (n, K, M, E)
        outputs.append(attend(one[0].to(past_k.dtype), past_k, past_v, run.mask, run.causal))
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # (R, T, H, E)
    return o.to(dtype).flatten(0, 1)


def attend(
    q: Float[Tensor, "n T H E"], k: Float[Tensor, "n K M E"], v: Float[Tensor, "n K M E"], mask: Tensor | None,
    causal: bool = False,
) -> Float[Tensor, "n T H E"]:  # fmt: skip
    """Attention of a few queries over many keys; `mask` (n, 1, T, M) is added to scores, `causal` needs T = M.

    Queries that share a key head become rows of one matrix: the past is read once a key head and never repeated.
    """
    _, tokens, heads, _ = q.shape
    groups = heads // k.shape[1]
    if groups == 1 or causal:  # without a past, repeated keys are new ones
        q = q.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=groups > 1).transpose(1, 2)
    q = q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (n, K, G*T, E)
    if mask is not None:
        mask = mask.repeat(1, 1, groups, 1)  # (n, 1, G*T, M)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return o.unflatten(2, (groups, tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (n, T, H, E)
