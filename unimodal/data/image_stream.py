"""Plain images: all those of documents, with their texts or without, in batches whose position is a few integers a lane.

Documents are numbered and dealt out to lanes as in `unimodal.data.stream`; a lane gives the images of its documents one
after another, so that a batch may end within a document.

Letters: B images of a batch, H, W their pixels.
"""

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from unimodal.data.broken import BrokenItems, Exchange, Mark
from unimodal.data.source import BrokenDocument, Source
from unimodal.data.stream import Mixture, Place, Reader, deal
from unimodal.images import fit_image
from unimodal.packing import Lanes, Pixels, to_tensor

_log = logging.getLogger(__name__)

BEHIND = 64
"""Steps that a stream can be ahead of training, which says where it stands by counting steps."""


class ImagePosition(NamedTuple):
    """Where lanes stand: of each its next number and those that have images left, and how many the latter gave already."""

    lanes: Lanes = ()
    given: Lanes = ()


class CaptionedImages(NamedTuple):
    """A batch of images, each with all that its document says."""

    images: Float[Tensor, "B 3 H W"]
    texts: tuple[str, ...]


ImageBatch = Float[Tensor, "B 3 H W"] | CaptionedImages


def taken_apart(batch: ImageBatch) -> tuple[Float[Tensor, "B 3 H W"], tuple[str, ...] | None]:
    """Images of a batch, and what is said of them, if that came along."""
    return (batch.images, batch.texts) if isinstance(batch, CaptionedImages) else (batch, None)


Item = tuple[Pixels, str]  # an image and what its document says


class ImageStream:
    """Batches for one rank, from a position on, for ever.

    Batch a of rank r in an optimizer step is of lane a * ranks + r, as in `PackStream`, and as there ranks talk once a step,
    when its batches are made and before any of them is given: all know then what each has met, and stop together.

    Args:
        mixture: of the documents.
        image_size: (height, width) that images are scaled and cropped to.
        batch: images of a batch.
        position: of all lanes; any number of them, from batches of any size.
        rank: whose batches these are.
        ranks: how many there are.
        accumulate: batches of a rank in a step.
        captions: whether batches are `CaptionedImages`; a document without text is then a broken one.
        workers: processes that read documents; the batches are the same for any number.
        broken_share: of a source's documents, how many may be broken before reading stops.
        left_out: `BrokenItems.state` of the run that is continued.
        exchange: between the ranks, once a step. What stops one of them there stops all, with its message.
    """

    def __init__(
        self, mixture: Mixture, image_size: tuple[int, int], batch: int, position: ImagePosition,
        *, rank: int = 0, ranks: int = 1, accumulate: int = 1, captions: bool = False, workers: int = 0,
        broken_share: float = 0.0, left_out: Mapping[str, Any] | None = None, exchange: Exchange | None = None,
    ) -> None:  # fmt: skip
        self.mixture, self.image_size, self.batch, self.workers = mixture, image_size, batch, workers
        self.captions = captions
        self.exchange = Exchange() if exchange is None else exchange
        self.broken = BrokenItems(broken_share, mixture.lengths, left_out)
        pairs = zip(position.lanes, position.given, strict=True)
        self._given = {n: i for lane, given in pairs for n, i in zip(lane[1:], given, strict=True)}
        lanes = deal(position.lanes, ranks * accumulate)[rank::ranks]
        begin = ImagePosition(lanes, tuple(tuple(self._given.get(n, 0) for n in lane[1:]) for lane in lanes))
        self._behind: deque[tuple[ImagePosition, Mark]] = deque([(begin, self.broken.mark())], maxlen=BEHIND)
        self._cut = 0  # steps whose batches were made
        self._step = ranks * accumulate  # from one number of a lane to the next

    def __iter__(self) -> Iterator[ImageBatch]:
        positions = self._behind[-1][0].lanes
        images = _Images(self.mixture, self.image_size, self.captions)
        reader = Reader(self.mixture, images, positions, self._step, self.workers)
        lanes = [
            _Lane(reader, self.broken, i, position, self._given, self._step) for i, position in enumerate(positions)
        ]
        while True:
            batches: list[ImageBatch] = []
            failed: ValueError | None = None
            try:
                batches = [batch_of(lane.cut(self.batch), self.captions) for lane in lanes]
            except ValueError as error:
                failed = error  # the others would wait for this rank
            self.broken.settle(self.exchange, {}, failed)
            position = ImagePosition(tuple(lane.position for lane in lanes), tuple(lane.given for lane in lanes))
            self._behind.append((position, self.broken.mark()))
            self._cut += 1
            yield from batches

    def behind(self, steps: int) -> ImagePosition:
        """Where this rank's lanes stand behind so many steps of this stream: what is held ahead of them does not count."""
        return self._behind[steps - self._cut - 1][0]

    def left_out(self, steps: int) -> dict[str, Any]:
        """`BrokenItems.state` there, alike on every rank."""
        return self.broken.state(self._behind[steps - self._cut - 1][1])


class _Lane:
    """The document whose images are being given."""

    def __init__(
        self, reader: Reader[list[Item]], broken: BrokenItems, lane: int, position: tuple[int, ...],
        given: dict[int, int], step: int,
    ) -> None:  # fmt: skip
        self.reader, self.broken, self.lane, self.step = reader, broken, lane, step
        self.next, self.unread = position[0], deque(position[1:])
        self._given = {number: given.get(number, 0) for number in self.unread}
        self._number, self._used = -1, 0
        self._images: deque[Item] = deque()

    @property
    def position(self) -> tuple[int, ...]:
        """The next number, and the earlier ones that have images to give, in the order of reading."""
        return self.next, *([self._number] if self._images else []), *self.unread

    @property
    def given(self) -> tuple[int, ...]:
        """Of each of the latter, images that it gave."""
        return *([self._used] if self._images else []), *(self._given[number] for number in self.unread)

    def cut(self, count: int) -> list[Item]:
        """The next images."""
        held: list[Item] = []
        while len(held) < count:
            self._fill()
            held.append(self._images.popleft())
            self._used += 1
        return held

    def _fill(self) -> None:
        without: set[tuple[int, int]] = set()
        while not self._images:
            place, found = self.reader.take(self.lane)
            if self.unread:
                self.unread.popleft()
            else:
                self.next = place.number + self.step
            source = self.reader.mixture.sources[place.source].source
            self._number, self._used = place.number, self._given.pop(place.number, 0)
            if isinstance(found, BrokenDocument):
                self.broken.add(source.kind, place.document, found)
                found = []
            elif not self._used:  # of another, some images were given before the run was stopped: it is counted
                self.broken.pack(source.kind)
            self._images = deque(found[self._used :])
            without.add((place.source, place.document % len(source)))  # a stream's indices go on and on
            if len(without) >= sum(len(one.source) for one in self.reader.mixture.sources) and not self._images:
                raise ValueError("data: expected documents with images, got none")


class _Images(Dataset[tuple[Place, list[Item] | BrokenDocument]]):
    """The images of documents by their place; runs in the workers."""

    def __init__(self, mixture: Mixture, size: tuple[int, int], captions: bool) -> None:
        self.sources, self.seed = [s.source for s in mixture.sources], mixture.seed
        self.size, self.captions = size, captions

    def __getitem__(self, place: Place) -> tuple[Place, list[Item] | BrokenDocument]:
        key = (self.seed, place.epoch, place.slot)
        try:
            return place, images_of(self.sources[place.source], place.document, key, self.size, self.captions)
        except BrokenDocument as error:
            return place, error


def images_of(source: Source, index: int, key: Sequence[int], size: tuple[int, int], captions: bool) -> list[Item]:
    """All images of a document, scaled and cropped; BrokenDocument where one cannot be read or lacks an asked text."""
    document = source.document(index, np.random.default_rng(key))
    text = document.text if captions else ""
    if captions and document.images and not text.strip():
        raise BrokenDocument(f"{source.kind} {index}", "data.captions: expected text with the images, got none")
    return [(fit_image(image, [size]), text) for image in document.images]


def batch_of(items: Sequence[Item], captions: bool) -> ImageBatch:
    """What a tokenizer is trained on."""
    images = to_tensor([image for image, _ in items]).contiguous()
    return CaptionedImages(images, tuple(text for _, text in items)) if captions else images


class HeldOutImages:
    """Every image of some sources once, in their order, the last batch as large as it comes.

    Args:
        sources: of held-out documents; what is broken in them is left out, counted and named.
        image_size: (height, width) that images are scaled and cropped to.
        batch: images of a batch.
        seed: of the documents' draws.
        captions: whether batches are `CaptionedImages`.
    """

    def __init__(
        self, sources: Sequence[Source], image_size: tuple[int, int], batch: int, seed: int, captions: bool = False
    ) -> None:
        self.sources, self.image_size, self.batch, self.seed = sources, image_size, batch, seed
        self.captions = captions
        self._named = False

    def __iter__(self) -> Iterator[ImageBatch]:
        held: list[Item] = []
        none = True
        for s, source in enumerate(self.sources):
            broken: list[str] = []
            for index in range(len(source)):
                try:
                    held += images_of(source, index, (self.seed, s, index), self.image_size, self.captions)
                except BrokenDocument as error:
                    broken.append(str(error))
                while len(held) >= self.batch:
                    yield batch_of(held[: self.batch], self.captions)
                    held, none = held[self.batch :], False
            if broken and not self._named:
                _log.warning(
                    "data: %s: %d held-out documents left out, such as %s", source.kind, len(broken), broken[0]
                )
        if held:
            yield batch_of(held, self.captions)
        elif none:
            raise ValueError("data: expected held-out documents with images, got none")
        self._named = True
