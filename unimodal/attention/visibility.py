"""Who sees whom, once for every attention back end.

A query sees a key iff they are of the same document AND (the key is not later than the query OR both are in the same
bidirectional block) AND NOT (the key is in a private block other than the query's).

"a seven" drawn and read back, then one word of text (s: seen); N is the noised copy, C the clean one::

             a  boi  N  N  C  C  eoi  word
    a        s
    boi      s   s
    N        s   s   s  s
    N        s   s   s  s
    C        s   s         s  s
    C        s   s         s  s
    eoi      s   s         s  s   s
    word     s   s         s  s   s    s

Letters: S tokens of the packed sequence, n segments of it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class SegmentTable:
    """What visibility needs to know of each segment, in sequence order; on the host, where plans are made of it.

    Every segment is a block; a block's flags say who sees it.
    """

    document: Int[np.ndarray, " n"]  # rising
    length: Int[np.ndarray, " n"]
    bidirectional: Bool[np.ndarray, " n"]
    private: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        """Tokens."""
        return int(self.length.sum())

    @cached_property
    def start(self) -> Int[np.ndarray, " n"]:
        """First token of each segment."""
        return np.cumsum(self.length) - self.length

    @cached_property
    def document_lengths(self) -> Int[np.ndarray, " documents"]:
        """Tokens of each document."""
        return np.bincount(self.document, weights=self.length).astype(np.int64)

    @cached_property
    def pairs(self) -> int:
        """Pairs of query and key that the rule allows, counted by segment and never looked at one by one."""
        length = self.length.astype(np.int64)
        seen = np.where(self.private, 0, length)  # by later segments of the document
        before = np.cumsum(seen) - seen
        _, first, document = np.unique(self.document, return_index=True, return_inverse=True)
        past = before - before[first][document]
        own = np.where(self.bidirectional, length * length, length * (length + 1) // 2)
        return int((length * past + own).sum())

    def tokens(self, device: torch.device) -> "TokenTable":
        """The same, token by token."""

        def per_token(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.repeat(values, self.length)).to(device, non_blocking=True)

        return TokenTable(
            per_token(self.document), per_token(np.arange(len(self.length))),
            per_token(self.bidirectional), per_token(self.private),
        )  # fmt: skip


class TokenTable(NamedTuple):
    """Document, block and flags of each token, in sequence order."""

    document: Int[Tensor, " S"]
    block: Int[Tensor, " S"]
    bidirectional: Bool[Tensor, " S"]
    private: Bool[Tensor, " S"]


def visible(table: TokenTable, q: Int[Tensor, "..."], k: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """The rule, for query and key positions of any shapes that broadcast."""
    same_document = table.document[q] == table.document[k]
    same_block = table.block[q] == table.block[k]
    reachable = (k <= q) | (same_block & table.bidirectional[q])
    hidden = table.private[k] & ~same_block
    return same_document & reachable & ~hidden


def dense_mask(table: TokenTable) -> Bool[Tensor, "S S"]:
    """The rule written out; for tests and for small packs."""
    index = torch.arange(len(table.document), device=table.document.device)
    return visible(table, index[:, None], index[None, :])  # (S, S)
