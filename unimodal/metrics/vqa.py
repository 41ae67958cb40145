"""Scores of short answers about images: VQA accuracy, yes and no, letters of multiple choice.

Rules are those of the official programs, in their own order, with their own oddities, because numbers are compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

# ---- VQA accuracy

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIODS = 32  # at most so many are removed: the official program passes a flag where the count stands
_CONTRACTIONS_WRITTEN = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've "
    "he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've "
    "o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's "
    "someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've "
    "wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
# An answer that lacks one apostrophe gets it back; one that lacks two does not.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTIONS_WRITTEN.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one the other way round


def _without_punctuation(text: str) -> str:
    """Punctuation that touches a space, or any in a text with a number like 1,000, is deleted; other becomes a space."""
    digits = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if touches or digits else " ")
    return re.sub(r"\.(?!\d)", "", out, count=_PERIODS)


def _without_articles(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes put back."""
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_answer(text: str) -> str:
    """An answer as the VQA evaluation compares it (vqaEval.py of GT-Vision-Lab/VQA)."""
    return _without_articles(_without_punctuation(_one_line(text)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Share of agreement with ten annotators, 0..1 (Antol et al., VQA, 2015; averaged as on the evaluation server).

    Each annotator is left out in turn: of the others, three that agree make the answer right. The mean over the ten is
    not min(n / 3, 1) for n of ten in agreement: n = 3 gives 0.9. Where all annotators wrote the very same thing, the
    official program compares without normalising, and so does this.

    Raises:
        ValueError: no annotator.
    """
    if not humans:
        raise ValueError("humans: expected at least one annotator's answer, got none")
    answer, others = _one_line(answer), [_one_line(human) for human in humans]
    if len(set(others)) > 1:
        answer = _without_articles(_without_punctuation(answer))
        others = [_without_articles(_without_punctuation(human)) for human in others]
    agree = [human == answer for human in others]
    n = sum(agree)
    return sum(min((n - left_out) / 3, 1.0) for left_out in agree) / len(agree)


class VQAAccuracy(Metric):
    """Mean VQA accuracy, 0..1, over all ranks."""

    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, answers: Sequence[str], humans: Sequence[Sequence[str]]) -> None:
        """Add answers, each with what the annotators said."""
        for answer, others in zip(answers, humans, strict=True):
            self.total += vqa_accuracy(answer, others)
            self.count += 1

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.count


def gqa_correct(answer: str, truth: str) -> bool:
    """Whether an answer is the true one: the official program compares strings.

    Answers written by a model are lowercased and lose a final period first, as is done before submitting (LLaVA).
    """
    return answer.strip().rstrip(".").lower() == truth


# ---- yes and no

YesNo = Literal["yes", "no"]


def pope_answer(text: str) -> YesNo:
    """How POPE's evaluate.py reads an answer: its first sentence says no if it has the word No, no or not, else yes."""
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def states_yes_or_no(text: str) -> bool:
    """Whether an answer has the word yes, no or not at all: what has none, POPE takes for a yes."""
    return re.search(r"\b(yes|no|not)\b", text, re.IGNORECASE) is not None


def mme_answer(text: str) -> Literal["yes", "no", "other"]:
    """How MME's calculation.py reads an answer: yes or no within its first four letters, else something wrong."""
    start = text.strip().lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


@dataclass(frozen=True)
class YesNoScores:
    """Yes is the positive class. A ratio without a denominator is 0."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def yes_no_scores(said: Sequence[str], truth: Sequence[str]) -> YesNoScores:
    """POPE's five numbers.

    Args:
        said: "yes" or "no" for each question.
        truth: what is right.

    Raises:
        ValueError: no question, another word, or lists of two lengths.
    """
    if not said or len(said) != len(truth):
        raise ValueError(f"said: expected one answer to each of {len(truth)} (at least 1) questions, got {len(said)}")
    for word in (*said, *truth):
        if word not in ("yes", "no"):
            raise ValueError(f"said and truth: expected yes or no, got {word!r}")
    pairs = list(zip(said, truth, strict=True))
    hits, false_alarms = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    misses, rejections = pairs.count(("no", "yes")), pairs.count(("no", "no"))
    precision = hits / (hits + false_alarms) if hits + false_alarms else 0.0
    recall = hits / (hits + misses) if hits + misses else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return YesNoScores((hits + rejections) / len(pairs), precision, recall, f1, (hits + false_alarms) / len(pairs))


class YesNoMetric(Metric):
    """POPE's five numbers over all ranks; answers are read as `pope_answer` does."""

    full_state_update = False
    counts: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("counts", torch.zeros(2, 2, dtype=torch.int64), dist_reduce_fx="sum")  # said, truth; 1 is yes

    def update(self, answers: Sequence[str], truth: Sequence[str]) -> None:
        """Add answers as they were written, and what is right, "yes" or "no"."""
        for answer, right in zip(answers, truth, strict=True):
            self.counts[int(pope_answer(answer) == "yes"), int(right == "yes")] += 1

    def compute(self) -> dict[str, Tensor]:
        """Accuracy, precision, recall, f1 and yes_ratio."""
        words = ("no", "yes")
        counts = self.counts.tolist()
        pairs = [(words[s], words[t]) for s in (0, 1) for t in (0, 1) for _ in range(counts[s][t])]
        scores = yes_no_scores([s for s, _ in pairs], [t for _, t in pairs])
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in vars(scores).items()}


# ---- MME

MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


@dataclass(frozen=True)
class MMEScores:
    """One subtask, or a sum over subtasks.

    Attributes:
        accuracy: 0..1, over questions.
        accuracy_plus: 0..1, share of the images both of whose questions were answered right.
    """

    accuracy: float
    accuracy_plus: float

    @property
    def score(self) -> float:
        """0..200."""
        return 100 * (self.accuracy + self.accuracy_plus)


def mme_scores(right: Sequence[tuple[bool, bool]]) -> MMEScores:
    """A subtask's scores from whether the two answers about each image are right.

    Raises:
        ValueError: no image.
    """
    if not right:
        raise ValueError("right: expected at least one image, got none")
    return MMEScores(sum(a + b for a, b in right) / (2 * len(right)), sum(a and b for a, b in right) / len(right))


def mme_totals(subtasks: Mapping[str, MMEScores]) -> dict[str, float]:
    """`perception`, 0..2000, and `cognition`, 0..800: sums over subtasks; a total that lacks a subtask is left out."""
    totals = {}
    for name, members in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        if all(member in subtasks for member in members):
            totals[name] = sum(subtasks[member].score for member in members)
    return totals


# ---- multiple choice

_LETTER_ALONE = re.compile(r"\(?([A-Z])\)?[.:,]?")
_LETTER_FIRST = re.compile(r"(?<!\w)(?:\(([A-Z])\)|([A-Z])[.:)])\s")
_LETTER_NAMED = re.compile(r"\b[Aa]nswer(?: is|:)\s*\(?([A-Z])\)?(?=[.,:]|$)")  # not "the answer is A dog"


def choice_letter(text: str, options: int) -> str | None:
    """The letter that an answer to a multiple choice question states, or None where that is not plain.

    Read are "B", "(B)", "B.", "B. a dog", "(B) a dog" and "The answer is B": a capital letter of an option, and no
    letter of another option in any of these forms. Nothing is guessed from the wording of the options.

    Args:
        text: the answer.
        options: how many options there are; the first is A.
    """
    text = text.strip()
    alone = _LETTER_ALONE.fullmatch(text)
    if alone is not None:
        named = {alone[1]}
    else:
        # A list of the options, as a model may repeat it, states more than one letter.
        named = {a or b for a, b in _LETTER_FIRST.findall(text)} if _LETTER_FIRST.match(text) else set()
        named |= set(_LETTER_NAMED.findall(text))
    (letter,) = named if len(named) == 1 else ("",)
    return letter if letter and ord(letter) - ord("A") < options else None


def rotations(options: Sequence[str]) -> list[tuple[str, ...]]:
    """Every circular shift of the options, the given order first (CircularEval of MMBench, Liu et al. 2023)."""
    return [tuple(options[i:]) + tuple(options[:i]) for i in range(len(options))]
