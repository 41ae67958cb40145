"""Small streams of packs: documents that say who they are, what a pack holds of them, and ranks that are threads."""

import itertools
import threading
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from PIL import Image

from unimodal.attention import SegmentTable
from unimodal.data.broken import Exchange
from unimodal.data.stream import Mixture, Packing, PackStream, Weighted
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import Lanes, PackedSequence


class Numbered:
    """Documents that say who they are: "kind index"; the picture is drawn from the rng."""

    def __init__(self, kind: str, count: int, longer: int = 0, every: int = 1, image: bool = True) -> None:
        self.kind, self.count, self.longer, self.every, self.image = kind, count, longer, every, image

    def __len__(self) -> int:
        return self.count

    def document(self, index: int, rng: np.random.Generator) -> Document:
        if not 0 <= index < self.count:
            raise IndexError(index)
        text = f"{self.kind} {index}" + " x" * self.longer * (index % self.every == 0)
        if not self.image:
            return Document((Part(text),), self.kind)
        words = Part(text, learn=False)
        image = Image.fromarray(rng.integers(0, 256, (4, 8, 3), dtype=np.uint8))
        return Document((words, Part(image)), self.kind)

    def corpus(self) -> Iterable[str]:
        yield self.kind


def packing(model: UnifiedModel, tokens: int = 120, waiting: int = 5) -> Packing:
    return Packing(model.sequencer, model.backbone.config.experts, model.generator.reads, tokens, waiting)


SEVEN_AND_FIVE = (Weighted(Numbered("a", 7), 7.0), Weighted(Numbered("b", 5), 5.0))


def stream(model: UnifiedModel, *sources: Weighted, tokens: int = 120, position: Lanes = (), seed: int = 3,
           waiting: int = 5, **ranks: int) -> PackStream:  # fmt: skip
    return PackStream(Mixture(sources or SEVEN_AND_FIVE, seed), packing(model, tokens, waiting), position, **ranks)


def order(mixture: Mixture, epoch: int) -> list[tuple[int, int, int]]:
    """(source, index, slot) of every document of an epoch."""
    places = [mixture.place(number) for number in range(epoch * len(mixture), (epoch + 1) * len(mixture))]
    assert {place.epoch for place in places} == {epoch}
    return [(place.source, place.document, place.slot) for place in places]


def take(packs: Iterable[PackedSequence], n: int) -> list[PackedSequence]:
    return list(itertools.islice(packs, n))


class Room:
    """Where ranks meet that are threads of one process."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.given = threading.Barrier(ranks, timeout=60), [None] * ranks


class Thread(Exchange):
    def __init__(self, room: Room, rank: int) -> None:
        super().__init__()
        self.room, self.rank = room, rank

    def gather(self, mine: Any) -> list[Any]:
        self.room.given[self.rank] = mine
        self.room.barrier.wait()
        found = list(self.room.given)
        self.room.barrier.wait()
        return found

    def total(self, counts: dict[str, int]) -> dict[str, int]:
        every = self.gather(counts)
        return {name: sum(one[name] for one in every) for name in counts}


def texts(model: UnifiedModel, p: PackedSequence) -> list[str]:
    """What the documents of a pack say they are (read before expert order mixes kinds: text keeps its order)."""
    out, ids = [], p.text_ids.tolist()
    starts = [i for i, token in enumerate(ids) if token == model.text.special.bos]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        out.append(model.text.decode(ids[start:end]))
    return out


def assert_same(a: PackedSequence, b: PackedSequence, but: tuple[str, ...] = ()) -> None:
    """Bit for bit, but for what was counted since the stream began."""
    for field in fields(PackedSequence):
        if field.name in (*but, "left_out"):
            continue
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "table":
            assert all(np.array_equal(getattr(x, f.name), getattr(y, f.name)) for f in fields(SegmentTable))
        elif field.name == "images":
            assert len(x) == len(y)
            assert all(torch.equal(i, j) for i, j in zip(x, y, strict=True))
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, y), field.name
        else:
            assert x == y, field.name
