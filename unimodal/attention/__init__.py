"""The visibility rule, the back ends that keep it, and the key/value cache."""

from unimodal.attention.cache import KVCache
from unimodal.attention.packed import BACKENDS, PackedAttention, describe, packed_attention
from unimodal.attention.visibility import TokenTable, dense_mask, visible

__all__ = [
    "BACKENDS",
    "KVCache",
    "PackedAttention",
    "TokenTable",
    "dense_mask",
    "describe",
    "packed_attention",
    "visible",
]
