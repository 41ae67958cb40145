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

Letters: S tokens of the packed sequence.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenTable:
    """What visibility needs to know of each token, in sequence order.

    `block` numbers every block of the pack (text runs included); the two flags are those of the token's block.
    """

    document: Int[Tensor, " S"]
    block: Int[Tensor, " S"]
    bidirectional: Bool[Tensor, " S"]
    private: Bool[Tensor, " S"]
    document_lengths: tuple[int, ...]  # host side: tokens of each document, in order

    def __len__(self) -> int:
        return len(self.document)

    def to(self, device: torch.device | str) -> "TokenTable":
        """The same table on another device."""
        names = ("document", "block", "bidirectional", "private")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def visible(table: TokenTable, q: Int[Tensor, "..."], k: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """The rule, for query and key positions of any shapes that broadcast."""
    same_document = table.document[q] == table.document[k]
    same_block = table.block[q] == table.block[k]
    reachable = (k <= q) | (same_block & table.bidirectional[q])
    hidden = table.private[k] & ~same_block
    return same_document & reachable & ~hidden


def dense_mask(table: TokenTable) -> Bool[Tensor, "S S"]:
    """The rule written out; for tests and for small packs."""
    index = torch.arange(len(table), device=table.document.device)
    return visible(table, index[:, None], index[None, :])  # (S, S)
