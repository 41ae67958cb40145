"""What a run does about documents that cannot be read: skip them, name each once, stop when they are too many."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch

from unimodal.data.source import BrokenDocument

ENOUGH = 1000
"""Documents read before it is judged whether half of them are broken: of fewer, chance decides."""
ALLOWED = 20
"""Documents that the share must allow to be broken before it is judged by what was read so far: likewise."""
NAMED = 1000
"""Of one source, most that are logged as broken, and as too long: a log is for reading."""
_TALLIES = ("packed", "broken", "long")

_log = logging.getLogger(__name__)

Mark = tuple[tuple[int, ...], ...]
"""How much of what `BrokenItems` knows it knew behind a step; of each source in turn."""


class Exchange:
    """What ranks tell each other about a step: between hosts, so that no device waits for it. One rank talks to nobody.

    Args:
        group: of `torch.distributed`; None: this rank is alone.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    @classmethod
    def over_ranks(cls) -> Exchange:
        """Of all ranks there are."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        return cls(torch.distributed.new_group(backend="gloo"))

    def total(self, counts: dict[str, int]) -> dict[str, int]:
        """Sums over the ranks; each gives the same names."""
        if self.group is None:
            return dict(counts)
        summed = torch.tensor([counts[name] for name in sorted(counts)])
        torch.distributed.all_reduce(summed, group=self.group)
        return dict(zip(sorted(counts), summed.tolist(), strict=True))

    def gather(self, mine: Any) -> list[Any]:
        """What every rank gives, by rank."""
        if self.group is None:
            return [mine]
        found: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(found, mine, group=self.group)
        return found


class _News(NamedTuple):
    """A broken document that a rank met first."""

    source: str
    item: int
    name: int
    said: str


@dataclass
class _Count:
    """Of one source. Items and names are in the order in which this rank learned of them, so that an earlier state is two
    lengths.
    """

    length: int
    packed: int = 0
    broken: int = 0
    long: int = 0
    items: dict[int, None] = field(default_factory=dict)  # that are broken, each once however often it came
    names: dict[int, None] = field(default_factory=dict)  # hashes of what they are called
    last: str = ""  # of what this run met

    @property
    def read(self) -> int:
        return self.packed + self.broken + self.long


class BrokenItems:
    """Counts what became of the documents that were read, by source, over all ranks and through all resumes.

    A run stops when more than `share` of a source's documents are broken, or of those it has read so far (at least so many
    that `ALLOWED` may be broken; it notices a stream or a disk that fails altogether before it has been read to the end). Of
    the latter, what has one name counts once, unless it is half of all (of at least `ENOUGH`): a shard that is gone is met
    within one window. Ranks tell each other what they met where they sum the counts of a step (`news`, `agree`), so that all
    of them stop at the same one.

    Args:
        share: largest share of a source's documents that may be broken, 0 to 1.
        sources: how many documents each has, by name.
        state: of a run that goes on.

    Raises:
        ValueError: `share` is outside.
    """

    def __init__(
        self, share: float, sources: Mapping[str, int] | None = None, state: Mapping[str, Any] | None = None
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"data.broken_share: expected a share from 0 to 1, got {share}")
        self.share = share
        self._counts = {name: _Count(length) for name, length in (sources or {}).items()}
        for name, kept in (state or {}).items():
            if name in self._counts:
                items, names = (dict.fromkeys(kept[key]) for key in ("items", "names"))
                tallies = {key: kept[key] for key in _TALLIES}
                self._counts[name] = _Count(self._counts[name].length, **tallies, items=items, names=names)
        self._own: Counter[str] = Counter()  # of this rank, since ranks agreed
        self._new: list[_News] = []

    @property
    def total(self) -> int:
        """Broken documents met so far."""
        return sum(count.broken for count in self._counts.values())

    @property
    def skipped(self) -> dict[str, int]:
        """Documents left out so far, by source: those that are broken, and those that are too long."""
        return {name: count.broken + count.long for name, count in self._counts.items()}

    def leave_out(self, name: str, said: str) -> None:
        """A document of source `name` is too long for a sequence. This is warned of as often as a log is read."""
        if self._counts[name].long < NAMED:
            warnings.warn(said, stacklevel=2)
        self._tally(name, "long")
        if self._counts[name].long == NAMED:
            warnings.warn(f"data: {name}: {NAMED} documents were too long; more are counted, not named", stacklevel=2)

    def pack(self, name: str) -> None:
        """A document of source `name` is in a pack."""
        self._tally(name, "packed")

    def add(self, name: str, index: int, error: BrokenDocument) -> None:
        """Document `index` of source `name` cannot be read. What is broken is logged the first time it comes.

        Raises:
            ValueError: these are too many.
        """
        self._tally(name, "broken")
        count = self._counts[name]
        item, called = index % count.length, _hash(error.name)  # a stream's indices go on and on
        if called not in count.names and len(count.names) < NAMED:
            _log.warning("data: %s: skipped %s", name, error)
            if len(count.names) + 1 == NAMED:
                _log.warning("data: %s: more are counted, not named", name)
        if item not in count.items or called not in count.names:
            self._new.append(_News(name, item, called, str(error)))
            self._learn(self._new[-1])
        self._judge(name, str(error))

    def settle(self, exchange: Exchange, counts: Mapping[str, int], failed: ValueError | None) -> dict[str, int]:
        """What ranks do behind the reading of each step, all of them: what stops one of them stops all.

        Args:
            exchange: between them.
            counts: of this rank in the step, the same names on all; they are summed on the way.
            failed: what stopped this rank.

        Returns:
            `counts`, of all ranks.

        Raises:
            ValueError: a rank was stopped, or these are too many; in the same words on every rank.
        """
        told = exchange.total({**counts, **self.news(), "failed": int(failed is not None)})
        if told["failed"]:
            said = exchange.gather("" if failed is None else str(failed))
            raise ValueError(next(filter(None, said))) from failed
        self.agree(told, exchange.gather)
        return {name: told[name] for name in counts}

    def news(self) -> dict[str, int]:
        """Numbers for the ranks to sum: of what this one met since they last agreed."""
        tallies = {f"{what} {name}": self._own[f"{what} {name}"] for name in self._counts for what in _TALLIES}
        return {**tallies, "news": len(self._new)}

    def agree(self, totals: Mapping[str, int], gather: Callable[[Any], list[Any]]) -> None:
        """Take in what all ranks met. They talk again only where one of them met something new.

        Args:
            totals: the sums over ranks of their `news()`; other names may be among them.
            gather: of every rank what it gives.

        Raises:
            ValueError: these are too many, in the same words on every rank.
        """
        for name, count in self._counts.items():
            for what in _TALLIES:
                key = f"{what} {name}"
                setattr(count, what, getattr(count, what) + totals[key] - self._own[key])
        new: Sequence[_News] = [one for rank in gather(self._new) for one in rank] if totals["news"] else ()
        for one in new:
            self._learn(one)
        self._own, self._new = Counter(), []
        for name in self._counts:
            self._judge(name, self._counts[name].last)

    def mark(self) -> Mark:
        """What is known now, to be asked for later."""
        return tuple(
            (count.packed, count.broken, count.long, len(count.items), len(count.names))
            for count in self._counts.values()
        )

    def state(self, mark: Mark) -> dict[str, Any]:
        """What was known there, alike on every rank: plain lists, so that checkpoints load without code."""
        found = {}
        for (name, count), (packed, broken, long, items, names) in zip(self._counts.items(), mark, strict=True):
            kept = {"items": sorted(islice(count.items, items)), "names": sorted(islice(count.names, names))}
            found[name] = {"packed": packed, "broken": broken, "long": long, **kept}
        return found

    def _tally(self, name: str, what: str) -> None:
        count = self._counts[name]
        setattr(count, what, getattr(count, what) + 1)
        self._own[f"{what} {name}"] += 1

    def _learn(self, one: _News) -> None:
        count = self._counts[one.source]
        count.items.setdefault(one.item)
        count.names.setdefault(one.name)
        count.last = one.said

    def _judge(self, name: str, last: str) -> None:
        count = self._counts[name]
        if len(count.items) > self.share * count.length:
            raise ValueError(self._message(name, f"{len(count.items)} of {count.length} documents", last))
        many = len(count.names) > max(ALLOWED if self.share else 0, self.share * count.read)
        half = 2 * count.broken > max(count.read, ENOUGH) and count.broken > self.share * count.read
        if many or half:
            raise ValueError(self._message(name, f"{count.broken} of {count.read} documents read", last))

    def _message(self, name: str, what: str, last: str) -> str:
        return (
            f"data: {name}: {what} cannot be read, more than data.broken_share {self.share:g}"
            f"{'; the last: ' + last if last else ''} (all of them: unimodal data check)"
        )


def _hash(name: str) -> int:
    """63 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()) >> 1
