"""The order of the documents of an epoch: a function of (seed, epoch), so that a position in it is one integer."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from unimodal.data.source import Source, epoch_order


def round_order(source: Source, first: int, count: int, seed: Sequence[int]) -> Int[np.ndarray, " count"]:
    """Documents `first` to `first + count` of the endless row of a source's rounds, each of all its documents once.

    With any weight, a source gives each of its documents once before any comes again, across epochs of a mixture too.
    """
    n = len(source)
    rounds = range(first // n, -(-(first + count) // n))
    orders = [epoch_order(source, r, np.random.default_rng((*seed, r))) for r in rounds]
    begin = first - (first // n) * n
    return np.concatenate([*orders, np.zeros(0, np.int64)])[begin : begin + count]


def mixed_order(
    sources: Sequence[Source], counts: Sequence[int], seed: int, epoch: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Source and index of every document of an epoch.

    Sources take turns at random; each gives its documents in its own order, so that shards are read one after another.

    Args:
        sources: of the mixture.
        counts: documents of each in an epoch.
        seed: of the run.
        epoch: from 0.
    """
    turns = np.random.default_rng((seed, epoch)).permutation(np.repeat(np.arange(len(sources)), counts))
    index = np.zeros(len(turns), np.int64)
    for s, (source, count) in enumerate(zip(sources, counts, strict=True)):
        index[turns == s] = round_order(source, epoch * count, count, (seed, s, 1))
    return turns, index
