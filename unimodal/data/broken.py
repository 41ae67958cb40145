"""What a run does about documents that cannot be read: skip them, name each once, stop when they are too many."""

from __future__ import annotations

import logging
from collections.abc import Sized
from dataclasses import dataclass, field

from unimodal.data.source import BrokenDocument

ENOUGH = 1000
"""Documents read before their broken share is judged by itself: of fewer, chance decides."""
_NAMED = 1000  # of one source, most that are logged: a log is for reading

_log = logging.getLogger(__name__)


@dataclass
class _Count:
    read: int = 0
    broken: int = 0
    long: int = 0
    items: set[int] = field(default_factory=set)  # that are broken, each once however often it came
    named: set[str] = field(default_factory=set)


class BrokenItems:
    """Counts what was read and what was broken, by source.

    A run stops when more than `share` of a source's documents are broken, or of those it has read so far (at least
    `ENOUGH`, which notices a stream or a disk that fails altogether before it has been read to the end). Of the latter, what
    has one name counts once, unless it is half of all: a shard that is gone is met within one window. Each rank counts
    its own.

    Args:
        share: largest share of a source's documents that may be broken, 0 to 1.

    Raises:
        ValueError: `share` is outside.
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"data.broken_share: expected a share from 0 to 1, got {share}")
        self.share = share
        self._counts: dict[str, _Count] = {}

    @property
    def total(self) -> int:
        """Broken documents met so far."""
        return sum(count.broken for count in self._counts.values())

    @property
    def skipped(self) -> dict[str, int]:
        """Documents left out so far, by source: those that are broken, and those that are too long."""
        return {name: count.broken + count.long for name, count in self._counts.items()}

    def leave_out(self, name: str) -> None:
        """A document of source `name` is too long for a sequence."""
        self._counts.setdefault(name, _Count()).long += 1

    def read(self, name: str) -> None:
        """A document of source `name` was read."""
        self._counts.setdefault(name, _Count()).read += 1

    def add(self, name: str, source: Sized, index: int, error: BrokenDocument) -> None:
        """Document `index` of source `name` was not. What is broken is logged the first time it comes.

        Raises:
            ValueError: these are too many.
        """
        count = self._counts.setdefault(name, _Count())
        count.read += 1
        count.broken += 1
        count.items.add(index % len(source))  # a stream's indices go on and on
        if error.name not in count.named:
            count.named.add(error.name)
            if len(count.named) <= _NAMED:
                _log.warning("data: %s: skipped %s", name, error)
        if len(count.items) > self.share * len(source):
            raise ValueError(self._message(name, f"{len(count.items)} of {len(source)} documents", error))
        seen = max(count.read, ENOUGH)
        if len(count.named) > self.share * seen or 2 * count.broken > seen:
            raise ValueError(self._message(name, f"{count.broken} of {count.read} documents read", error))

    def _message(self, name: str, what: str, error: BrokenDocument) -> str:
        return (
            f"data: {name}: {what} cannot be read, more than data.broken_share {self.share:g}; the last: {error} "
            "(all of them: unimodal data check)"
        )
