"""What a source of documents is; mixtures and loaders know nothing else about data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np

from unimodal.documents import Document


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
            ValueError: the document's files cannot be read (named).
        """
        ...

    def corpus(self) -> Iterable[str]:
        """Texts that hold everything this source may say; the text tokenizer is trained on them."""
        ...
