"""Useful FLOPs, counted from shapes and from who sees whom; what a kernel computes in vain does not count."""

from collections.abc import Iterable

from unimodal.attention import SegmentTable
from unimodal.backbone import BackboneConfig
from unimodal.packing import PackedSequence


def weights_per_token(config: BackboneConfig) -> int:
    """Matrix entries of one layer that one token is multiplied with: one expert's, however many there are."""
    d, e = config.width, config.head_size
    attention = d * config.heads * e + 2 * d * config.kv_heads * e + config.heads * e * d
    return attention + 3 * d * config.mlp_width


def train_flops(config: BackboneConfig, packed: PackedSequence, latent: int) -> float:
    """Of a forward and a backward pass: 6 FLOPs a weight and token, 12 a visible pair and channel of a head.

    The head counts for text targets only; recomputation does not count.
    """
    linear = 6 * config.depth * weights_per_token(config) * len(packed)
    attention = 12 * config.depth * config.heads * config.head_size * packed.table.pairs
    head = 6 * config.width * config.rows * packed.counts["text"]
    patches = 6 * config.width * latent * packed.counts["image"]
    modulation = (
        36 * config.depth * config.width**2 * (len(packed.learned_images) + len(packed.context_images))
        if config.adaln
        else 0
    )
    return float(linear + attention + head + patches + modulation)


def attention_flops(table: SegmentTable, heads: int, head_dim: int, backward: bool) -> float:
    """Of one attention: 4 a visible pair and channel of a head, three times as many with backward."""
    return (12.0 if backward else 4.0) * heads * head_dim * table.pairs


def dense_train_flops(config: BackboneConfig, lengths: Iterable[int]) -> float:
    """Of a causal text model on whole sequences, every token a target."""
    lengths = list(lengths)
    linear = 6 * (config.depth * weights_per_token(config) + config.width * config.rows) * sum(lengths)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return float(linear + 12 * config.depth * config.heads * config.head_size * pairs)
