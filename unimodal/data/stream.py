"""An endless stream of packed sequences whose position is three integers."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from unimodal.backbone import Experts
from unimodal.data.broken import BrokenItems
from unimodal.data.order import mixed_order
from unimodal.data.source import BrokenDocument, Source
from unimodal.packing import PackedSequence, SequencedDocument, Sequencer, pack


@dataclass(frozen=True)
class Weighted:
    """A source and its share of the documents of an epoch."""

    source: Source
    weight: float

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"data: expected a weight of at least 0 for {self.source.kind}, got {self.weight}")


@dataclass(frozen=True)
class Packing:
    """What packs are made with."""

    sequencer: Sequencer
    experts: Experts
    reads: str
    tokens: int  # most tokens of a pack

    def __post_init__(self) -> None:
        if self.tokens < self.sequencer.rules.context_length:
            raise ValueError(
                f"data.batch_tokens: expected at least sequence.context_length {self.sequencer.rules.context_length}, "
                f"got {self.tokens}"
            )


class Mixture:
    """Documents of several sources, in an order that is a function of (seed, epoch).

    Every source gives its share of `len(self)` documents, all of its own before any comes twice, also from epoch to epoch.
    """

    def __init__(self, sources: Sequence[Weighted], seed: int) -> None:
        self.sources = [s for s in sources if s.weight > 0]
        for weighted in self.sources:
            if not len(weighted.source):
                raise ValueError(f"data: source {weighted.source.kind} has weight {weighted.weight} and no document")
        if not self.sources:
            raise ValueError("data: expected at least one source with a weight above 0, got none")
        self.seed = seed
        # One epoch has as many documents as the sources together; with weights in proportion to lengths, each comes once.
        total = sum(s.weight for s in self.sources)
        size = sum(len(s.source) for s in self.sources)
        self.counts = [max(1, round(size * s.weight / total)) for s in self.sources]

    def __len__(self) -> int:
        return sum(self.counts)

    def order(self, epoch: int) -> list[tuple[int, int, int]]:
        """(source, index, slot) of every document of an epoch; a slot is never used twice in it."""
        turns, index = mixed_order([s.source for s in self.sources], self.counts, self.seed, epoch)
        return [(int(s), int(i), slot) for slot, (s, i) in enumerate(zip(turns, index, strict=True))]


class PackStream:
    """Packs for one rank, from a position on, for ever.

    A *step* is what one optimizer step sees: `accumulate` packs on each of `ranks`. Its packs are cut from the stream in
    order and dealt round the ranks, so two ranks see what one rank sees in twice the accumulation; every pack announces the
    target counts of its whole step. `position` is (epoch, document): where the step after this one begins.
    """

    def __init__(
        self, mixture: Mixture, packing: Packing, position: tuple[int, int] = (0, 0),
        *, rank: int = 0, ranks: int = 1, accumulate: int = 1, broken_share: float = 0.0,
    ) -> None:  # fmt: skip
        self.mixture, self.packing, self.position, self.broken = mixture, packing, position, BrokenItems(broken_share)
        self.rank, self.ranks, self.accumulate = rank, ranks, accumulate

    def __iter__(self) -> Iterator[PackedSequence]:
        packs = self._packs()
        while True:
            step = [next(packs) for _ in range(self.ranks * self.accumulate)]
            counts: dict[str, int] = {}
            for one in step:
                for name, count in one.counts.items():
                    counts[name] = counts.get(name, 0) + count
            for one in step[self.rank :: self.ranks]:
                yield one.announce(counts, step[-1].position)

    def _packs(self) -> Iterator[PackedSequence]:
        held: list[SequencedDocument] = []
        tokens = 0
        for position, document in self._documents():
            if tokens + document.length > self.packing.tokens:
                yield pack(held, self.packing.experts, self.packing.reads, position)
                held, tokens = [], 0
            held.append(document)
            tokens += document.length

    def _documents(self) -> Iterator[tuple[tuple[int, int], SequencedDocument]]:
        """Documents with their own position."""
        epoch, first = self.position
        while True:
            order = self.mixture.order(epoch)
            found = 0
            for number in range(first, len(order)):
                document = self._document(epoch, *order[number])
                if document is not None:
                    found += 1
                    yield (epoch, number), document
            if not found and first == 0:
                limit = self.packing.sequencer.rules.context_length
                raise ValueError(f"data: no document fits sequence.context_length {limit}")
            epoch, first = epoch + 1, 0

    def _document(self, epoch: int, source: int, index: int, slot: int) -> SequencedDocument | None:
        """The document in a slot; every draw in it is a function of (seed, epoch, slot). None: broken, or too long."""
        key = (self.mixture.seed, epoch, slot)
        one = self.mixture.sources[source].source
        try:
            read = one.document(index, np.random.default_rng(key))
        except BrokenDocument as error:
            self.broken.add(one.kind, one, index, error)
            return None
        self.broken.read(one.kind)
        document = self.packing.sequencer.document(read, key)
        limit = self.packing.sequencer.rules.context_length
        if document.length > limit:
            warnings.warn(
                f"document {index} of {one.kind} skipped: {document.length} tokens, sequence.context_length is {limit}",
                stacklevel=2,
            )
            return None
        return document


def validation_packs(sources: Sequence[Source], packing: Packing, seed: int, limit: int) -> list[PackedSequence]:
    """The first `limit` documents of every source, packed kind by kind, with the same draws each time."""
    packs = []
    for s, source in enumerate(sources):
        held: list[SequencedDocument] = []
        for index in range(min(limit, len(source))):
            key = (seed, s, index)
            try:
                read = source.document(index, np.random.default_rng(key))
            except BrokenDocument:
                continue
            document = packing.sequencer.document(read, key, train=False)
            if document.length > packing.sequencer.rules.context_length:
                continue
            if held and sum(d.length for d in held) + document.length > packing.tokens:
                packs.append(pack(held, packing.experts, packing.reads))
                held = []
            held.append(document)
        if held:
            packs.append(pack(held, packing.experts, packing.reads))
    return packs
