"""What a source of documents is; mixtures and loaders know nothing else about data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from unimodal.documents import Document
from unimodal.sequence_rules import SequenceRules


class BrokenDocument(ValueError):  # noqa: N818  # it is what a run skips, no failure of its own
    """A document that cannot be read: it is skipped, counted and named (`unimodal.data.broken`), and the run goes on.

    Args:
        name: of what is broken, a file or an item of one. What breaks many documents, a vanished shard, has one name.
        reason: what was expected and what came.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both: exceptions travel between processes by their arguments
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@runtime_checkable
class Source(Protocol):
    """A finite set of documents of one kind.

    `document(index, rng)` is a pure function of its arguments: the caller derives `rng` from run seed, epoch and
    document, so that nothing depends on the order in which documents are read or on the worker that reads them.
    """

    @property
    def kind(self) -> str:
        """Name that losses and scores are reported under."""
        ...

    def __len__(self) -> int:
        """How many documents make one epoch."""
        ...

    def document(self, index: int, rng: np.random.Generator) -> Document:
        """The document at `index`, 0 <= index < len; every random choice in it is drawn from `rng`.

        Raises:
            IndexError: `index` is outside.
            BrokenDocument: the document cannot be read.
        """
        ...

    def corpus(self) -> Iterable[str]:
        """Texts that hold everything this source may say; the text tokenizer is trained on them."""
        ...


@runtime_checkable
class Ordered(Source, Protocol):
    """A source that says in which order it is best read: shards on disk, streams."""

    def order(self, epoch: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Indices of all documents of the source's round `epoch`, those that lie together near each other.

        It is a function of `epoch` and `rng` alone, so that what a shuffle buffer would hold need not be saved: a
        position in the order says it all. A stream goes on where its last round ended, with indices from
        `epoch * len` on.
        """
        ...


@runtime_checkable
class Identified(Source, Protocol):
    """A source that can be told from others with as many documents."""

    def identity(self) -> str:
        """Words and a hash: the class, how many documents, names and sizes of files; not their folder, which may move."""
        ...


def identity(source: Source) -> str:
    """The source's own, or its class and how many documents it has."""
    return source.identity() if isinstance(source, Identified) else described(source)


def described(source: Source, *more: str) -> str:
    """The words of an identity."""
    return ", ".join([type(source).__name__, f"{len(source)} documents", *filter(None, more)])


def names_and_sizes(paths: Sequence[Path]) -> str:
    """Of files, by their names without folders, which may move: how many, how large, and a hash. Nothing is read."""
    if not paths:
        return ""
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    named = (
        f"{path.name}:{size}\0".encode("utf-8", "surrogateescape") for path, size in zip(paths, sizes, strict=True)
    )
    return f"{len(paths)} files of {sum(sizes)} bytes ({digest(named)})"


def digest(parts: Iterable[bytes]) -> str:
    """Eight hexadecimal digits of a hash."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:8]


@runtime_checkable
class Stored(Source, Protocol):
    """A source whose images are tokens already, made by the image tokenizer of one model for one set of rules."""

    def check(self, fingerprint: str, rules: SequenceRules) -> None:
        """ValueError, naming the setting, where a model's tokenizer (`tokenizer_fingerprint`) or its rules are others."""
        ...

    def prompts(self) -> list[Document]:
        """Held-out documents with pixels, cut before their first target."""
        ...


@runtime_checkable
class Partial(Source, Protocol):
    """Some documents of another source."""

    @property
    def source(self) -> Source:
        """The other."""
        ...


def whole(source: Source) -> Source:
    """What a source is a part of, or itself."""
    return whole(source.source) if isinstance(source, Partial) else source


def epoch_order(source: Source, epoch: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """The source's own order of a round, or any order where it has none."""
    return source.order(epoch, rng) if isinstance(source, Ordered) else rng.permutation(len(source))
