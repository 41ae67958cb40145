"""CIDEr, BLEU and ROUGE-L of captions, by the pure Python scorers of pycocoevalcap.

The official COCO evaluation first cuts captions with Stanford's PTBTokenizer, a Java program. Here nltk's
TreebankWordTokenizer does it, on lowercase text whose sentences are parted first, and the same punctuation is left out
afterwards. Both follow the Penn Treebank; they differ on rare strings (abbreviations, clock times, unusual quotes), so
scores may differ somewhat from those of the official program. METEOR and SPICE are Java programs too, and not offered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nltk.tokenize import TreebankWordTokenizer
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test
from pycocoevalcap.rouge.rouge import Rouge

TOKENIZER = "nltk TreebankWordTokenizer, lowercase, COCO punctuation (the official one is Stanford's Java PTBTokenizer)"
_PUNCTUATION = frozenset(("''", "'", "``", "`", "(", ")", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_JAVA = {
    "meteor": "METEOR's scorer is a Java program (meteor-1.5.jar)",
    "spice": "SPICE's scorer is a Java program (Stanford CoreNLP and spice-1.0.jar)",
}
METRICS = ("cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l")


def check_metric(name: str) -> None:
    """Refuse what is not computed here, with the reason.

    Raises:
        ValueError: a metric that needs Java, or none at all.
    """
    if name.lower() in _JAVA:
        raise ValueError(f"metric: {_JAVA[name.lower()]}, which nothing here runs; expected {', '.join(METRICS)}")
    if name not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {name!r}")


def tokenise(caption: str) -> str:
    """Lowercase words of a caption with a space between them, punctuation left out."""
    text = " ".join(caption.lower().split())
    text = re.sub(r"(?<=\w\w)\.(?= )", " .", text)  # nltk cuts off the very last period alone
    words = TreebankWordTokenizer().tokenize(text)
    return " ".join(word for word in words if word not in _PUNCTUATION)


@dataclass(frozen=True)
class CaptionScore:
    """One caption.

    Attributes:
        cider: 0..10; words count by how rare they are among the images of the whole set.
        rouge_l: 0..1.
        words: length of the caption.
        reference_words: length of the nearest reference.
        guessed: n-grams of the caption, n = 1..4.
        matched: those of them that a reference has; BLEU is a ratio of sums of these.
    """

    cider: float
    rouge_l: float
    words: int
    reference_words: int
    guessed: tuple[int, ...]
    matched: tuple[int, ...]


class CaptionScorer:
    """Scores captions against the references of a set of images.

    CIDEr weighs words by the references of the whole set, so these are given first; captions may then come in any
    order and any portions, and the set's CIDEr is the mean of theirs.

    Args:
        references: image -> its reference captions, at least one.

    Raises:
        ValueError: no image, or an image without a reference.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        if not references or not all(references.values()):
            raise ValueError("references: expected at least one image and one caption each, got none")
        self._references = {image: [tokenise(text) for text in texts] for image, texts in references.items()}
        self._cooked = {image: cook_refs(texts) for image, texts in self._references.items()}
        self._cider = CiderScorer()
        self._all_cooked = list(self._cooked.values())
        self._cider.crefs = self._all_cooked
        self._cider.compute_doc_freq()

    def score(self, image: str, caption: str) -> CaptionScore:
        """One caption of an image; ValueError when the image has no references."""
        if image not in self._references:
            raise ValueError(f"image: expected one of the {len(self._references)} with references, got {image!r}")
        words, references = tokenise(caption), self._references[image]
        bleu = BleuScorer(words, references)
        (found,) = bleu.ctest
        return CaptionScore(
            cider=self._cider_of(image, words),
            rouge_l=float(Rouge().calc_score([words], references)),
            words=found["testlen"],
            reference_words=min((abs(n - found["testlen"]), n) for n in found["reflen"])[1],  # as option "closest"
            guessed=tuple(found["guess"]),
            matched=tuple(found["correct"]),
        )

    def _cider_of(self, image: str, words: str) -> float:
        # Captions and references are paired from the front; the number of references is that of the set's images.
        self._cider.crefs = [self._cooked[image], *self._all_cooked[1:]]
        self._cider.ctest = [cook_test(words)]
        (score,) = self._cider.compute_cider()
        return float(score)


def caption_scores(scores: Iterable[CaptionScore]) -> dict[str, float]:
    """CIDEr (0..10), BLEU-1 to -4 (corpus, 0..1) and ROUGE-L (0..1) of many captions.

    Raises:
        ValueError: no caption.
    """
    listed = list(scores)
    if not listed:
        raise ValueError("scores: expected at least one caption, got none")
    columns = zip(*((s.words, s.reference_words, *s.guessed, *s.matched) for s in listed), strict=True)
    words, references, *rest = [sum(column) for column in columns]
    corpus = BleuScorer()
    corpus.ctest = [{"testlen": words, "reflen": [references], "guess": rest[:4], "correct": rest[4:]}]
    corpus.crefs = [None]
    bleu, _ = corpus.compute_score("closest")
    return {
        "cider": sum(s.cider for s in listed) / len(listed),
        **{f"bleu{n}": float(value) for n, value in enumerate(bleu, start=1)},
        "rouge_l": sum(s.rouge_l for s in listed) / len(listed),
    }


def to_fields(score: CaptionScore) -> dict[str, Any]:
    """A score as JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(score).items()}


def from_fields(fields: Mapping[str, Any]) -> CaptionScore:
    """The inverse of `to_fields`; other keys are left alone."""
    made: dict[str, Any] = {name: fields[name] for name in CaptionScore.__dataclass_fields__}
    made |= {name: tuple(made[name]) for name in ("guessed", "matched")}
    return CaptionScore(**made)
