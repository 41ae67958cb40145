"""Attention over a packed sequence: one signature, four back ends, chosen once.

Letters: S tokens, P places of expert order (tokens and padding), H query heads, K key/value heads, E channels of a head.

Queries, keys and values come in *expert order* (see `unimodal.packing`): `inverse[i]` is the place of the token at sequence
position i, and places that no token has are padding, whose outputs are zero and which nobody sees.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unimodal.attention.visibility import SegmentTable, dense_mask

Q = Float[Tensor, "P H E"]
KV = Float[Tensor, "P K E"]


@runtime_checkable
class LayerAttention(Protocol):
    """Attention of one layer."""

    def __call__(self, q: Q, k: KV, v: KV) -> Q:
        """Queries, keys and values in expert order -> outputs in expert order."""


@runtime_checkable
class PackedAttention(Protocol):
    """Attention of one packed sequence (or of new tokens over a cache), for every layer."""

    def layer(self, number: int) -> LayerAttention:
        """What layer `number` calls; the same for every layer of a packed sequence."""


class Backend(NamedTuple):
    """One way to compute it."""

    build: Callable[[SegmentTable, Int[Tensor, " S"], int], PackedAttention]  # table, inverse, P
    missing: Callable[[torch.device], str | None]  # why it cannot run on a device, and what would help
    kernel: Callable[[torch.device], str]  # what will run there, for the log


class ReferenceAttention:
    """The rule as an S x S mask, everything in fp32 or better: slow, and what the others are compared with."""

    def __init__(self, table: SegmentTable, inverse: Int[Tensor, " S"], places: int) -> None:
        self.mask = dense_mask(table.tokens(inverse.device))  # (S, S) in sequence order
        self.inverse = inverse

    def layer(self, number: int) -> "ReferenceAttention":
        """Itself."""
        return self

    def __call__(self, q: Q, k: KV, v: KV) -> Q:
        """Softmax over every visible key."""
        out = torch.zeros_like(q)
        groups = q.shape[1] // k.shape[1]
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, v = (x[self.inverse].to(dtype) for x in (q, k, v))  # (S, H | K | K, E)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (S, H, E)
        scores = torch.einsum("qhe,khe->hqk", q, k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~self.mask, -torch.inf).softmax(-1)  # (H, S, S)
        return out.index_copy(0, self.inverse, torch.einsum("hqk,khe->qhe", weights, v).to(out.dtype))
