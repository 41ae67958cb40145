"""An endless stream of packed sequences, whose position is a few integers a lane.

Documents are counted through all epochs: *number* n is document n % len(mixture) of epoch n // len(mixture). A *lane* is
what one micro-batch of every optimizer step is cut from; of L lanes, lane l reads the numbers l, L + l, 2 L + l ... So what
a step holds depends on L = ranks x accumulation alone, and a rank reads its own documents only.
"""

import logging
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from math import inf
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from unimodal.backbone import Experts
from unimodal.data.broken import BrokenItems, Exchange
from unimodal.data.order import mixed_order
from unimodal.data.source import BrokenDocument, Source, identity
from unimodal.packing import LOSSES, Lanes, PackedSequence, SequencedDocument, Sequencer, pack

_log = logging.getLogger(__name__)

CHUNK = 8  # documents that a worker is asked for at a time


@dataclass(frozen=True)
class Weighted:
    """A source and its share of the documents of an epoch; None: each of its documents once. 0 leaves it out."""

    source: Source
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 <= self.weight < inf:
            raise ValueError(f"data: expected a weight of at least 0 for {self.source.kind}, got {self.weight}")

    @property
    def used(self) -> bool:
        """Whether it is read at all."""
        return self.weight != 0


@dataclass(frozen=True)
class Packing:
    """What packs are made with."""

    sequencer: Sequencer
    experts: Experts
    reads: str
    tokens: int  # most tokens of a pack
    waiting: int = 32  # documents of a lane among which the best fit is chosen

    def __post_init__(self) -> None:
        if self.tokens < self.sequencer.rules.context_length:
            raise ValueError(
                f"data.batch_tokens: expected at least sequence.context_length {self.sequencer.rules.context_length}, "
                f"got {self.tokens}"
            )


class Place(NamedTuple):
    """Which document has a number. A slot is never used twice in an epoch; every draw is a function of (epoch, slot)."""

    number: int
    epoch: int
    source: int
    document: int
    slot: int


class Mixture:
    """Documents of several sources, in an order that is a function of (seed, epoch).

    Without weights an epoch is every document of every source, once. With weights it has as many documents, of each source
    its share, rounded and at least one; a source goes on in the next epoch where it stopped, so that after any number of
    epochs each of its documents was given equally often, or once more than another.

    Raises:
        ValueError: no source with a weight above 0, one without documents, or weights of some sources only.
    """

    def __init__(self, sources: Sequence[Weighted], seed: int) -> None:
        self.sources = [s for s in sources if s.used]
        for weighted in self.sources:
            if not len(weighted.source):
                raise ValueError(f"data: expected documents of source {weighted.source.kind}, got none")
        if not self.sources:
            raise ValueError("data: expected at least one source with a weight above 0, got none")
        self.seed = seed
        self.counts = _counts(self.sources)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def lengths(self) -> dict[str, int]:
        """Documents that there are, by kind."""
        found: Counter[str] = Counter()
        for weighted in self.sources:
            found[weighted.source.kind] += len(weighted.source)
        return found

    @property
    def identities(self) -> dict[str, str]:
        """What the sources are, by kind."""
        return {weighted.source.kind: identity(weighted.source) for weighted in self.sources}

    def place(self, number: int) -> Place:
        """Which document has a number."""
        epoch, at = divmod(number, len(self))
        if epoch not in self._orders:
            while len(self._orders) > 1:  # lanes stand in one epoch or the next
                del self._orders[min(self._orders)]
            self._orders[epoch] = mixed_order([s.source for s in self.sources], self.counts, self.seed, epoch)
        sources, indices = self._orders[epoch]
        return Place(number, epoch, int(sources[at]), int(indices[at]), at)


def _counts(sources: Sequence[Weighted]) -> list[int]:
    """Documents of each source in an epoch."""
    lengths, weights = [len(s.source) for s in sources], [s.weight for s in sources if s.weight is not None]
    if not weights:
        return lengths
    if len(weights) < len(sources):
        bare, given = (next(s.source.kind for s in sources if (s.weight is None) == none) for none in (True, False))
        raise ValueError(
            f"data: expected a weight for every source or for none, got one for {given} and none for {bare}"
        )
    return [max(1, round(sum(lengths) * weight / sum(weights))) for weight in weights]


def deal(lanes: Lanes, count: int) -> Lanes:
    """The same unread documents for `count` lanes; no lanes are a stream that begins."""
    if len(lanes) == count:
        return lanes
    first = max((lane[0] for lane in lanes), default=0)
    unread = sorted(n for lane in lanes for n in (*lane[1:], *range(lane[0], first, len(lanes))))
    # The smallest number from `first` on that is l modulo `count`, behind this lane's part of what was left before it.
    return tuple((first + (lane - first) % count, *unread[lane::count]) for lane in range(count))


class PackStream:
    """Packs for one rank, from a position on, for ever.

    A *step* is what one optimizer step sees: `accumulate` packs on each of `ranks`, one of every lane. Pack a of rank r is
    of lane a * ranks + r, so two ranks see what one rank sees in twice the accumulation. Every pack announces the target
    counts of its whole step, and where this rank's lanes stand behind it.

    Args:
        mixture: of the documents.
        packing: what packs are made with.
        position: of all lanes; any number of them, see `deal`.
        rank: whose packs these are.
        ranks: how many there are.
        accumulate: packs of a rank in a step.
        workers: processes that read documents; the packs are the same for any number.
        broken_share: of a source's documents, how many may be broken before reading stops.
        left_out: `BrokenItems.state` of the run that is continued.
        exchange: between the ranks, once a step. What stops one of them there stops all, with its message.
    """

    def __init__(
        self, mixture: Mixture, packing: Packing, position: Lanes = (),
        *, rank: int = 0, ranks: int = 1, accumulate: int = 1, workers: int = 0, broken_share: float = 0.0,
        left_out: Mapping[str, Any] | None = None, exchange: Exchange | None = None,
    ) -> None:  # fmt: skip
        self.mixture, self.packing, self.workers = mixture, packing, workers
        self.exchange = Exchange() if exchange is None else exchange
        self.broken = BrokenItems(broken_share, mixture.lengths, left_out)
        self.position = deal(position, ranks * accumulate)[rank::ranks]
        self._step = ranks * accumulate  # from one number of a lane to the next

    def __iter__(self) -> Iterator[PackedSequence]:
        documents = _Documents(self.mixture, self.packing)
        reader: Reader[SequencedDocument | str] = Reader(
            self.mixture, documents, self.position, self._step, self.workers
        )
        lanes = [
            _Lane(reader, self.packing, self.broken, i, position, self._step)
            for i, position in enumerate(self.position)
        ]
        while True:
            packs: list[PackedSequence] = []
            failed: ValueError | None = None
            try:
                packs = [pack(lane.cut(), self.packing.experts, self.packing.reads) for lane in lanes]
            except ValueError as error:
                failed = error  # the others would wait for this rank
            own = {name: sum(one.counts[name] for one in packs) for name in LOSSES}
            counts = self.broken.settle(self.exchange, own, failed)
            position, left_out = tuple(lane.position for lane in lanes), self.broken.mark()
            for one in packs:
                yield one.announce(counts, position, left_out)


class _Lane:
    """Documents that wait, and the packs that are cut from them."""

    def __init__(
        self, reader: "Reader[SequencedDocument | str]", packing: Packing, broken: BrokenItems, lane: int,
        position: tuple[int, ...], step: int,
    ) -> None:  # fmt: skip
        self.reader, self.packing, self.broken, self.lane, self.step = reader, packing, broken, lane, step
        self.next, self.unread = position[0], deque(position[1:])
        self.waiting: list[SequencedDocument] = []

    @property
    def position(self) -> tuple[int, ...]:
        """The next number, and the earlier ones that are in no pack yet, in the order of reading."""
        return self.next, *(document.number for document in self.waiting), *self.unread

    def cut(self) -> list[SequencedDocument]:
        """The documents of the next pack: the oldest, so that none waits for ever, then the best fit of those that wait."""
        held, room = [], self.packing.tokens
        chosen: int | None = 0
        while chosen is not None:
            self._fill()
            held.append(self.waiting.pop(chosen))
            self.broken.pack(self._kind(self.reader.mixture.place(held[-1].number)))
            room -= held[-1].length
            self._fill()
            chosen = best_fit(self.waiting, room, len(self.reader.mixture))
        return held

    def _fill(self) -> None:
        left_out = 0
        while len(self.waiting) < self.packing.waiting:
            place, document = self.reader.take(self.lane)
            if self.unread:
                self.unread.popleft()
            else:
                self.next = place.number + self.step
            if isinstance(document, BrokenDocument):
                self.broken.add(self._kind(place), place.document, document)
            if isinstance(document, SequencedDocument):
                left_out = 0
                self.waiting.append(document)
                continue
            if isinstance(document, str):
                self.broken.leave_out(self._kind(place), document)
            left_out += 1
            if left_out >= len(self.reader.mixture) and not self.waiting:
                limit = self.packing.sequencer.rules.context_length
                raise ValueError(f"data: no document fits sequence.context_length {limit}")

    def _kind(self, place: Place) -> str:
        return self.reader.mixture.sources[place.source].source.kind


def best_fit(waiting: Sequence[SequencedDocument], room: int, epoch: int) -> int | None:
    """Which document goes into `room` tokens: of the earliest epoch the longest that fits, of equals the oldest.

    An epoch, of `epoch` documents, thus ends before the next begins, but for what fills the last packs.
    """
    fitting = [i for i, document in enumerate(waiting) if document.length <= room]
    return min(fitting, key=lambda i: (waiting[i].number // epoch, -waiting[i].length, i), default=None)


Found = TypeVar("Found")


class Reader(Generic[Found]):
    """Reads the documents of a rank's lanes, ahead of time where there are workers.

    Which lane is read for next depends on what they have; what a lane gets, and in which order, does not.

    Args:
        mixture: of the documents.
        documents: what is to be had of the document at a place, or why there is none; runs in the workers.
        lanes: of this rank.
        step: from one number of a lane to the next.
        workers: processes; 0 reads in this one.
    """

    def __init__(
        self, mixture: Mixture, documents: "Dataset[tuple[Place, Found | BrokenDocument]]", lanes: Lanes, step: int,
        workers: int,
    ) -> None:  # fmt: skip
        self.mixture = mixture
        self._numbers = [chain(lane[1:], count(lane[0], step)) for lane in lanes]
        self._arrived: list[deque[tuple[Place, Found | BrokenDocument]]] = [deque() for _ in lanes]
        self._ahead = [0] * len(lanes)  # documents that were asked for and not taken
        self._asked: deque[int] = deque()  # lanes of the requests that are under way
        self._chunk = CHUNK if workers else 1
        # A generator of its own: the loader's draw must not move the random state of the run.
        loader = DataLoader(
            documents, batch_sampler=self._requests(), collate_fn=list, num_workers=workers,
            prefetch_factor=4 if workers else None, generator=torch.Generator(), worker_init_fn=_obey_parent,
        )  # fmt: skip
        self._documents: Iterator[list[tuple[Place, Found | BrokenDocument]]] = iter(loader)

    def take(self, lane: int) -> tuple[Place, Found | BrokenDocument]:
        """The next document of a lane."""
        while not self._arrived[lane]:
            found = next(self._documents)
            self._arrived[self._asked.popleft()] += found
        self._ahead[lane] -= 1
        return self._arrived[lane].popleft()

    def _requests(self) -> Iterator[list[Place]]:
        while True:
            lane = min(range(len(self._ahead)), key=self._ahead.__getitem__)
            self._asked.append(lane)
            self._ahead[lane] += self._chunk
            yield [self.mixture.place(number) for number in islice(self._numbers[lane], self._chunk)]


def _obey_parent(worker: int) -> None:
    """A worker ends when its training process says so or is gone, and for no signal that the whole group of them gets.

    The training goes on to the end of its step then, and reads. Its SIGTERM is how torch ends a worker that hangs.
    """
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Held back, it can be asked who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while os.getppid() == parent:
            got = signal.sigtimedwait({signal.SIGTERM}, 0.5)
            if got is not None and got.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class _Documents(Dataset[tuple[Place, SequencedDocument | str | BrokenDocument]]):
    """Documents by their place; runs in the workers."""

    def __init__(self, mixture: Mixture, packing: Packing) -> None:
        self.sources, self.seed, self.sequencer = [s.source for s in mixture.sources], mixture.seed, packing.sequencer

    def __getitem__(self, place: Place) -> tuple[Place, SequencedDocument | str | BrokenDocument]:
        key, source = (self.seed, place.epoch, place.slot), self.sources[place.source]
        try:
            read = source.document(place.document, np.random.default_rng(key))
        except BrokenDocument as error:
            return place, error
        document = self.sequencer.document(read, key)
        limit = self.sequencer.rules.context_length
        if document.length > limit:
            named = f"document {place.document} of {source.kind}"
            return place, f"{named} skipped: {document.length} tokens, sequence.context_length is {limit}"
        return place, replace(document, number=place.number)


def validation_packs(sources: Sequence[Source], packing: Packing, seed: int, limit: int) -> list[PackedSequence]:
    """The first `limit` documents of every source, packed kind by kind, with the same draws each time.

    Losses are reported by kind, so that none may depend on how documents fall into packs.
    """
    packs = []
    for s, source in enumerate(sources):
        held: dict[str, list[SequencedDocument]] = {}  # of each kind
        left_out: list[str] = []
        broken = 0
        for index in range(min(limit, len(source))):
            key = (seed, s, index)
            try:
                read = source.document(index, np.random.default_rng(key))
            except BrokenDocument as error:
                left_out.append(str(error))
                broken += 1
                continue
            document = packing.sequencer.document(read, key, train=False)
            if document.length > packing.sequencer.rules.context_length:
                left_out.append(f"document {index}: {document.length} tokens")
                continue
            own = held.setdefault(document.kind, [])
            if own and sum(d.length for d in own) + document.length > packing.tokens:
                packs.append(pack(own, packing.experts, packing.reads))
                own.clear()
            own.append(document)
        packs += [pack(own, packing.experts, packing.reads) for own in held.values()]
        if left_out:
            _log.warning(
                "data: %s: %d held-out documents left out, such as %s", source.kind, len(left_out), left_out[0]
            )
        if broken and broken == min(limit, len(source)):
            raise ValueError(
                f"data: {source.kind}: expected held-out documents that can be read, got none: {left_out[0]}"
            )
    return packs
