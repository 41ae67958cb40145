"""What can be built on decoding: the best of several tries, and a model that looks at what it drew and draws again."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings, Inpaint, check_one_each
from unimodal.documents import GENERATED, Document, Part
from unimodal.evaluation.likelihood import log_likelihoods
from unimodal.model import UnifiedModel

Scorer = Callable[[Sequence[Document]], Sequence[float]]
"""A number a document, higher is better."""


@dataclass(frozen=True)
class Look:
    """One try.

    Args:
        document: the prompt and what was made of it.
        read: what the model says of the last image that it drew; empty where it drew none.
        agrees: whether that was found to fit.
        drawn: whether it drew one.
    """

    document: Document
    read: str
    agrees: bool
    drawn: bool


def best_of(
    model: UnifiedModel,
    documents: Sequence[Document],
    settings: DecodingSettings,
    seeds: Sequence[int],
    n: int,
    scorer: Scorer,
    inpaint: Sequence[Inpaint | None] | None = None,
) -> list[Document]:
    """Continue each document `n` times and keep what the scorer likes most; the first of equals.

    Args:
        model: it decodes.
        documents: what is there.
        settings: how they go on.
        seeds: one a document; the first try is what `decode` makes of it.
        n: tries.
        scorer: sees all tries of all documents at once.
        inpaint: as of `decode`.

    Raises:
        ValueError: less than one try, or another number of scores than of tries.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    best: list[tuple[float, Document]] = []
    tries = [
        decode(model, documents, settings, [_try_seed(seed, number) for seed in seeds], inpaint) for number in range(n)
    ]  # try by try
    scores = list(scorer([document for row in tries for document in row]))
    if len(scores) != n * len(documents):
        raise ValueError(f"scorer: expected {n * len(documents)} scores, got {len(scores)}")
    for i in range(len(documents)):
        own = [(scores[number * len(documents) + i], tries[number][i]) for number in range(n)]
        best.append(max(own, key=lambda pair: pair[0]))
    return [document for _, document in best]


def reads_back(model: UnifiedModel) -> Scorer:
    """A scorer: how likely the model finds the text before the last image when it sees that image alone, a token.

    It needs a model that was trained to describe images in the words that ask for them. Minus infinity where nothing was
    drawn.
    """

    def score(documents: Sequence[Document]) -> list[float]:
        drawn = [i for i, document in enumerate(documents) if _drawn(document.parts)]
        looks, asked = [_look(documents[i]) for i in drawn], [[_asked(documents[i])] for i in drawn]
        scores = [-math.inf] * len(documents)
        for i, (one,) in zip(drawn, log_likelihoods(model, looks, asked), strict=True):
            scores[i] = one.mean
        return scores

    return score


def look_again(
    model: UnifiedModel,
    documents: Sequence[Document],
    settings: DecodingSettings,
    seeds: Sequence[int],
    rounds: int,
    agrees: Callable[[Document, str], bool],
    max_tokens: int = 64,
    again: Callable[[Document, Look], Document] | None = None,
    inpaint: Sequence[Inpaint | None] | None = None,
) -> list[list[Look]]:
    """Draw (think first, where `settings.start` is "text"), describe the last image, and draw anew what does not fit.

    A try in which nothing was drawn reads as nothing and does not fit.

    Args:
        model: it draws and reads.
        documents: what is there.
        settings: how they go on.
        seeds: one a document; the first try is what `decode` makes of it.
        rounds: most tries.
        agrees: whether a document and what the model reads from its last image fit.
        max_tokens: of a description.
        again: what is continued next, given what is there and the try that does not fit, for instance with that image and
            what it was read as, for a model that was taught to correct itself. None, and behind a try in which nothing was
            drawn: what is there, with other draws.
        inpaint: as of `decode`, of every try.

    Returns:
        The tries of each document in order; the last one is the result.

    Raises:
        ValueError: less than one round, settings that never draw, or not one seed (and `inpaint`, if any) a document.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if settings.max_images < 1:
        raise ValueError(f"settings: max_images: expected at least 1 to look at, got {settings.max_images}")
    check_one_each(len(documents), seeds, inpaint)
    looks: list[list[Look]] = [[] for _ in documents]
    left = list(range(len(documents)))
    reading = DecodingSettings(max_tokens=max_tokens, max_images=0)
    for number in range(rounds):
        given = [documents[i] for i in left]
        if again is not None and number > 0:
            last = [looks[i][-1] for i in left]
            given = [again(d, look) if look.drawn else d for d, look in zip(given, last, strict=True)]
        known = None if inpaint is None else [inpaint[i] for i in left]
        tries = decode(model, given, settings, [_try_seed(seeds[i], number) for i in left], known)
        seen = [bool(_drawn(t.parts[len(g.parts) :])) for g, t in zip(given, tries, strict=True)]
        looked = [_look(document) for document, drew in zip(tries, seen, strict=True) if drew]
        read = iter(decode(model, looked, reading, [0] * len(looked)))
        for i, document, drew in zip(left, tries, seen, strict=True):
            text = "".join(part.text for part in next(read).parts[1:]) if drew else ""
            looks[i].append(Look(document, text, drew and agrees(document, text), drew))
        left = [i for i in left if not looks[i][-1].agrees]
    return looks


def _try_seed(seed: int, number: int) -> int:
    """The seed itself first, then others that follow from it."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _drawn(parts: Sequence[Part]) -> list[int]:
    """Which parts are images that were drawn: one that was given says nothing of the model."""
    return [i for i, part in enumerate(parts) if part.is_image and part.role == GENERATED]


def _last_image(document: Document) -> int:
    return _drawn(document.parts)[-1]


def _look(document: Document) -> Document:
    """The last image alone."""
    return Document((Part(document.parts[_last_image(document)].image, learn=False),), "image_to_text")


def _asked(document: Document) -> str:
    texts = [part.text for part in document.parts[: _last_image(document)] if part.is_text and part.text.strip()]
    if not texts:
        raise ValueError("documents: expected a text and an image behind it, got no text before the last image")
    return texts[-1]
