"""The visibility rule, the back ends that keep it, and the key/value cache."""

from unimodal.attention.backends import BACKENDS, choose_backend, describe, packed_attention
from unimodal.attention.cache import CacheView, KVCache
from unimodal.attention.packed import LayerAttention, PackedAttention
from unimodal.attention.visibility import SegmentTable, TokenTable, dense_mask, visible

__all__ = [
    "BACKENDS",
    "CacheView",
    "KVCache",
    "LayerAttention",
    "PackedAttention",
    "SegmentTable",
    "TokenTable",
    "choose_backend",
    "dense_mask",
    "describe",
    "packed_attention",
    "visible",
]
