"""The data module for any sources: what a recipe names under `data.init_args.sources`, each with its weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from unimodal.data.module import DocumentData
from unimodal.data.source import Source, digest, epoch_order, identity
from unimodal.data.stream import Weighted
from unimodal.documents import Document


@dataclass(frozen=True)
class Entry:
    """A source of a mixture.

    Args:
        source: of documents.
        weight: its share of the documents of an epoch, beside the other weights; 0 leaves it out. None, for all sources of
            a mixture: each document of every source once an epoch.
    """

    source: Source
    weight: float | None = None


class MixtureData(DocumentData):
    """Documents of any sources, mixed by weight. Losses and scores are reported by the sources' names.

    Without weights every document of every source comes once an epoch. With weights an epoch has as many documents as the
    sources together, of each its share; a source gives all of its documents before any comes again, from epoch to epoch too.

    Args:
        batch_tokens: most tokens of one packed sequence, which is one micro-batch on one device.
        sources: by name.
        validation: held-out sources by name; none: a share of each training source is held out.
        validation_share: that share; which documents these are depends on their numbers alone.
        validation_documents: most documents of each source in validation.
        prompts: documents of each source that are continued in validation, always the same.
        seed: of every draw; linked to `seed_everything`.
        workers: processes that read documents beside the training process; packs are the same for any number.
        broken_share: of a source's documents, how many may be broken; those are skipped and named, more stop the run.
    """

    def __init__(
        self,
        batch_tokens: int,
        sources: dict[str, Entry],
        validation: dict[str, Entry] | None = None,
        validation_share: float = 0.05,
        validation_documents: int = 200,
        prompts: int = 20,
        seed: int = 0,
        workers: int = 0,
        broken_share: float = 0.01,
    ) -> None:
        super().__init__(batch_tokens, validation_documents, prompts, seed, workers, broken_share)
        if not sources:
            raise ValueError("data.sources: expected at least one source, got none")
        if not 0 < validation_share < 1:
            raise ValueError(f"data.validation_share: expected a number above 0 and below 1, got {validation_share}")
        for key, entries in (("sources", sources), ("validation", validation or {})):
            for name, entry in entries.items():
                if entry.weight is not None and not 0 <= entry.weight < inf:
                    raise ValueError(f"data.{key}.{name}.weight: expected a number of 0 or more, got {entry.weight}")
        self._training, self._held_out = [], []
        for name, entry in sources.items():
            if validation or entry.weight == 0:
                self._training.append(Weighted(Slice(name, entry.source), entry.weight))
                continue
            held = held_out(name, entry, validation_share)
            self._training.append(Weighted(Slice(name, entry.source, ~held), entry.weight))
            self._held_out.append(Slice(name, entry.source, held))
        for name, entry in (validation or {}).items():
            self._held_out.append(Slice(name, entry.source))

    def training_sources(self) -> list[Weighted]:
        """What is not held out."""
        return self._training

    def validation_sources(self) -> list[Source]:
        """What is."""
        return list(self._held_out)


class Slice:
    """Some documents of a source, under the name a recipe gives it.

    Args:
        name: kind of its documents.
        source: whole.
        chosen: which documents are in; None: all.
    """

    def __init__(self, name: str, source: Source, chosen: Bool[np.ndarray, " n"] | None = None) -> None:
        self.name, self.source = name, source
        self._whole = chosen is None  # a whole stream has indices beyond its length
        if chosen is not None:
            self._indices = np.flatnonzero(chosen)
            self._number = np.cumsum(chosen) - 1  # of a chosen document, counted among those

    @property
    def kind(self) -> str:
        """The name."""
        return self.name

    def __len__(self) -> int:
        """Documents that are in."""
        return len(self.source) if self._whole else len(self._indices)

    def identity(self) -> str:
        """The whole source's, and which of its documents are in."""
        whole = identity(self.source)
        return whole if self._whole else f"{whole}, {len(self)} of them ({digest([self._indices.tobytes()])})"

    def document(self, index: int, rng: np.random.Generator) -> Document:
        """The document, of the kind that the recipe's name for the source is."""
        if not self._whole and not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        document = self.source.document(index if self._whole else int(self._indices[index]), rng)
        return Document(document.parts, self.name)

    def order(self, epoch: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """The source's, without what is left out."""
        order = epoch_order(self.source, epoch, rng)
        if self._whole:
            return order
        chosen = np.zeros(len(self._number), dtype=bool)
        chosen[self._indices] = True
        return self._number[order[chosen[order]]]

    def corpus(self) -> Iterable[str]:
        """The whole source's: the text tokenizer must not depend on what is held out."""
        return self.source.corpus()


def held_out(name: str, entry: Entry, share: float) -> Bool[np.ndarray, " n"]:
    """Which documents of a source are for validation: a hash of the number, so that more data moves none of them."""
    n = len(entry.source)
    if n < 2:
        raise ValueError(f"data.sources.{name}: expected at least two documents, one to hold out, got {n}")
    if getattr(entry.source, "endless", False):
        raise ValueError(
            f"data.validation: expected sources: of the stream data.sources.{name} nothing can be held out"
        )
    places = _hash(np.arange(n, dtype=np.uint64))
    chosen = places < share
    chosen[places.argmin()] = True
    chosen[places.argmax()] = False
    return chosen


def _hash(x: UInt64[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Numbers in [0, 1) (the finalizer of splitmix64, G. Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x / 2.0**64
