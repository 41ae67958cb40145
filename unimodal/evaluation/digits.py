"""Scores of a model trained on the handwritten digits: does it draw, read and add, and is what it draws its own?

Letters: N scans or images, M others, D features (64 pixels).

Distances between sets of images (frechet, precision, recall, copies) are taken in the space `pixels64`, the 64 pixel
values 0..16. None of them is FID or its relatives: those use another network's features and compare with nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch import nn
from tqdm import tqdm

from unimodal import processes
from unimodal.data.digits import (
    DigitImages,
    DigitsSource,
    caption,
    caption_digit,
    digit_images,
    digits_of,
    image_to_values,
    sum_answer,
)
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import GENERATED, Document, Part
from unimodal.evaluation.page import RunDescription, print_scores, write_page
from unimodal.files import write_atomically
from unimodal.images import png_bytes
from unimodal.metrics.distances import frechet_distance
from unimodal.metrics.manifolds import copy_share, copy_threshold, pairwise, precision_recall_of_distances
from unimodal.metrics.moments import Moments
from unimodal.metrics.shares import wilson_interval
from unimodal_generators.base import SamplingSettings

VERSION = 1
"""Raised whenever scores of the same answers would change."""
FEATURE = "pixels64"
Scores = dict[str, Any]
"""Names to numbers, `[low, high]` intervals, and a few words; what `scores.json` holds."""

_SHOWN_SUMS = 5
_GRID_COLUMNS = 10
_SUBSETS = 20  # draws of equal-sized subsets that frechet, precision and recall are averaged over


@runtime_checkable
class DecodeFunction(Protocol):
    """`unimodal.decoding.decode`, or what a test puts in its place."""

    def __call__(
        self, model: Any, documents: Sequence[Document], settings: Any, seeds: Sequence[int]
    ) -> list[Document]:
        """Each document followed by what the model wrote and drew, those parts with role "generated"."""
        ...


# ---- the judge


class Judge:
    """Reads digits: a support vector machine (radial kernel) on the 64 pixels, fitted on the train split.

    Attributes:
        accuracy: share of the test split it reads right.
        correct: the same as a count.
    """

    def __init__(self) -> None:
        from sklearn.svm import SVC

        train, test = digit_images("train"), digit_images("test")
        # scikit-learn's own digits example uses this gamma; chosen there, not tuned on our test split.
        self._svm = SVC(kernel="rbf", gamma=0.001).fit(scan_features(train), train.labels)
        self.correct = int((self._svm.predict(scan_features(test)) == test.labels).sum())
        self.accuracy = self.correct / len(test)

    def read(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Labels (N,) int64 of N images of 8 x 8 pixels; ValueError on another size."""
        return self.read_features(image_features(images))

    def read_features(self, features: np.ndarray) -> np.ndarray:
        """Labels (N,) int64 of pixels (N, 64)."""
        return np.zeros(0, np.int64) if not len(features) else np.asarray(self._svm.predict(features), np.int64)


def scan_features(scans: DigitImages) -> np.ndarray:
    """Pixels (N, 64) float64, 0..16, of scans."""
    return scans.values.reshape(len(scans), -1).astype(np.float64)


def image_features(images: Sequence[Image.Image]) -> np.ndarray:
    """Pixels (N, 64) float64, 0..16, of 8 x 8 images; ValueError on another size."""
    for image in images:
        if image.size != (8, 8):
            raise ValueError(f"images: expected 8x8 pixels, as the digits are, got {image.width}x{image.height}")
    return np.array([image_to_values(image).ravel() for image in images]).reshape(len(images), 64)


# ---- the protocol


@dataclass(frozen=True)
class _Sums:
    """Sums of unseen scans, continued."""

    documents: list[Document]
    in_text: int
    drawn: int


def evaluate_digits(
    model: nn.Module,
    out: str | Path,
    *,
    seed: int = 0,
    asked: int = 500,
    sums: int = 200,
    train_seconds: float | None = None,
    sampling: SamplingSettings | None = None,
    batch: int = 100,
    weights: str = "ema",
    description: RunDescription | None = None,
    metrics: str | Path | None = None,
    decode_fn: DecodeFunction | None = None,
) -> Scores:
    """Ask a model for digits, show it digits, let it add them; write and return the scores.

    Writes `scores.json`, `samples.png` (a row a digit) and `index.html` into `out` and prints the table; where several
    processes share the asking, the main one does, and the others return nothing. Every image score comes from the same
    `asked` images at one guidance scale. Intervals are Wilson's at 95 %, for shares of independent trials; frechet and
    recall have none.

    Args:
        model: what `decode_fn` takes; its parameters are counted.
        out: folder for the results.
        seed: of every draw, the model's and ours.
        asked: digits asked for, equally many of each: a multiple of 10, at least 40.
        sums: interleaved sums asked for.
        train_seconds: how long training took, if known.
        sampling: image sampler's settings; None: the model's own.
        batch: documents decoded at once.
        weights: which weights `model` holds, recorded as given.
        description: what the page says about the run, and the aims.
        metrics: the run's metrics.csv for the loss curves.
        decode_fn: what decodes; None: `unimodal.decoding.decode`.

    Raises:
        ValueError: an argument out of range, `out` is a file, or images of another size than the digits'.
    """
    # Here, because scores of images alone need no model.
    from unimodal.decoding import decode
    from unimodal.model import UnifiedModel

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {out}")
    if asked % 10 or asked < 40:
        raise ValueError(f"asked: expected a multiple of 10, at least 40, got {asked}")
    if sums < 1 or batch < 1:
        raise ValueError(f"sums and batch: expected 1 or more, got {sums} and {batch}")
    if sampling is None and isinstance(model, UnifiedModel):
        sampling = model.generator.sampling  # so that the scores say which guidance made them
    test, whole, digits = digit_images("test"), _sums(sums, seed), np.repeat(np.arange(10), asked // 10)
    drawing = DecodingSettings(start="image", max_images=1, max_tokens=0, image=sampling)
    # A caption needs at most one token a byte; room for more shows a model that does not stop.
    reading = DecodingSettings(start="text", max_images=0, max_tokens=32)
    # One image more than any answer has, so that drawing too many is seen.
    adding = DecodingSettings(start="text", max_images=3, max_tokens=32, image=sampling)
    to_draw = [Document((Part(caption(int(digit)), learn=False),), "text_to_image") for digit in digits]
    to_read = [Document((Part(image, learn=False),), "image_to_text") for image in test.images()]
    to_add = [Document(tuple(part for part in document.parts if not part.learn), "sum") for document in whole]
    tasks = [(drawing, to_draw), (reading, to_read), (adding, to_add)]
    answers = _ask(model, decode if decode_fn is None else decode_fn, tasks, seed, batch)
    if not processes.current().alone():
        return {}
    judge, drawn = Judge(), _one_image_each(answers[0])
    added = _add(whole, to_add, answers[2], judge)
    scores = _shares(judge, drawn, digits, answers[1], test, added)
    scores |= image_set_scores(image_features(drawn), seed)
    scores |= {
        "train_seconds": train_seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": weights,
        "guidance": None if sampling is None else sampling.guidance,
        "seed": seed,
        "feature": FEATURE,
        "samples": asked,
    }
    grid = sample_grid(drawn, digits)
    write_atomically(out / "samples.png", png_bytes(grid))
    write_atomically(out / "scores.json", (json.dumps(scores, indent=2) + "\n").encode())
    description = description or RunDescription()
    write_page(out, scores, metrics, grid, added.documents[:_SHOWN_SUMS], description)
    print_scores(scores, description)
    return scores


def _ask(
    model: nn.Module,
    decode_fn: DecodeFunction,
    tasks: Sequence[tuple[DecodingSettings, Sequence[Document]]],
    seed: int,
    batch: int,
) -> list[list[tuple[Part, ...]]]:
    """Of each task what was generated behind each of its documents, in the main process."""
    here = processes.current()
    total, hidden = sum(len(documents) for _, documents in tasks), None if here.main else True
    found: list[list[tuple[Part, ...]]] = []
    with tqdm(total=total, desc="scoring", unit="document", disable=hidden) as bar:
        for task, (settings, documents) in enumerate(tasks):

            def answer(
                chunk: Sequence[tuple[int, Document]], task: int = task, settings: DecodingSettings = settings
            ) -> list[tuple[Part, ...]]:
                seeds = [_seed(seed, task, number) for number, _ in chunk]
                done = decode_fn(model, [document for _, document in chunk], settings, seeds)
                return [after.parts[len(before.parts) :] for (_, before), after in zip(chunk, done, strict=True)]

            found.append([])
            for _, parts in here.in_order(list(enumerate(documents)), batch, answer):
                found[-1].append(parts)
                bar.update()
    return found


def _shares(
    judge: Judge,
    drawn: Sequence[Image.Image],
    digits: np.ndarray,
    said: Sequence[Sequence[Part]],
    test: DigitImages,
    added: _Sums,
) -> Scores:
    """How many of what was asked came out right, of each task."""
    named = [caption_digit(_text(parts)) for parts in said]
    scores: Scores = {}
    _put_share(scores, "judge_accuracy", judge.correct, len(test))
    _put_share(scores, "asked_digit", int((judge.read(drawn) == digits).sum()), len(drawn))
    right = sum(digit == label for digit, label in zip(named, test.labels.tolist(), strict=True))
    _put_share(scores, "image_to_text", right, len(test))
    _put_share(scores, "sums_text", added.in_text, len(added.documents))
    _put_share(scores, "sums_drawn", added.drawn, len(added.documents))
    return scores


def _one_image_each(answers: Sequence[Sequence[Part]]) -> list[Image.Image]:
    images = [part.image for parts in answers for part in parts if part.is_image]
    if len(images) != len(answers) or any(len(parts) != 1 for parts in answers):
        raise ValueError(f"decode_fn: expected one image for each of {len(answers)} captions, got {len(images)} images")
    return images


def _sums(sums: int, seed: int) -> list[Document]:
    """Interleaved sums with their answers."""
    source = DigitsSource("sum", "test")
    return [source.document(i % len(source), np.random.default_rng([seed, 2, i])) for i in range(sums)]


def _add(
    whole: Sequence[Document], prompts: Sequence[Document], answers: Sequence[Sequence[Part]], judge: Judge
) -> _Sums:
    in_text = drawn = 0
    shown = []
    for document, prompt, answer in zip(whole, prompts, answers, strict=True):
        truth = sum_answer("".join(part.text for part in document.parts if part.learn and part.is_text))
        assert truth is not None  # the source wrote it
        in_text += sum_answer(_text(answer)) == truth
        # Against the true answer, not against what the model wrote: a wrong sum drawn well is wrong.
        read = judge.read([part.image for part in answer if part.is_image])
        drawn += tuple(read.tolist()) == digits_of(truth)
        shown.append(prompt.extended(Part(part.content, part.learn, GENERATED) for part in answer))
    return _Sums(shown, in_text, drawn)


def _text(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if part.is_text)


def _seed(seed: int, task: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, task, index]).generate_state(1)[0])


def image_set_scores(fake: np.ndarray, seed: int) -> Scores:
    """Frechet distance, precision, recall and copies of drawn images (N, 64), beside the same of unseen real images.

    Everything is compared with one reference, the whole train split. These numbers depend on how many images are
    compared, and there are fewer test images than drawn ones: so `compared` = min(N, size of the test split) images of
    each side are compared at a time, and the numbers averaged over 20 draws of such subsets (all of a side that has no
    more).
    The noise is as many images of independent uniform pixels.
    """
    reference, unseen = scan_features(digit_images("train")), scan_features(digit_images("test"))
    compared = min(len(fake), len(unseen))
    rng = np.random.default_rng([seed, 3])
    noise = rng.uniform(0, 16, size=(compared, 64))
    within = _train_distances()
    model = _compare(reference, within, fake, compared, rng)
    real = _compare(reference, within, unseen, compared, rng)
    chaos = _compare(reference, within, noise, compared, rng)
    scores: Scores = {
        "frechet": model.frechet,
        "frechet_real": real.frechet,
        "frechet_noise": chaos.frechet,
        "precision": model.precision,
        "recall": model.recall,
        "precision_real": real.precision,
        "recall_real": real.recall,
        "precision_noise": chaos.precision,
        "recall_noise": chaos.recall,
        "compared": compared,
    }
    for key in ("precision", "precision_real"):
        # Of `compared` trials, not of all 20 draws: the draws share their images.
        interval = wilson_interval(round(scores[key] * compared), compared)
        scores[f"{key}_interval"] = [interval.low, interval.high]
    # The halves are every second scan and do not depend on the seed, so that the threshold is one number for all runs.
    threshold = copy_threshold(unseen[::2], reference)
    _put_share(scores, "copies", round(copy_share(fake, reference, threshold) * len(fake)), len(fake))
    other = unseen[1::2]
    _put_share(scores, "copies_real", round(copy_share(other, reference, threshold) * len(other)), len(other))
    scores["copies_threshold"] = threshold
    return scores


@dataclass(frozen=True)
class _Comparison:
    frechet: float
    precision: float
    recall: float


def _compare(
    reference: np.ndarray, within: np.ndarray, images: np.ndarray, size: int, rng: np.random.Generator
) -> _Comparison:
    """Means over subsets of `size` of the images (N, D); the reference (M, D), `within` (M, M) apart, stays whole."""
    across, own = pairwise(reference, images), pairwise(images, images)  # (M, N), (N, N)
    moments = Moments.of(reference)
    rows = []
    for chosen in _subsets(len(images), size, rng):
        pr = precision_recall_of_distances(within, across[:, chosen], own[np.ix_(chosen, chosen)], k=3)
        rows.append((frechet_distance(moments, Moments.of(images[chosen])), pr.precision, pr.recall))
    frechet, precision, recall = np.mean(rows, axis=0).tolist()
    return _Comparison(frechet, precision, recall)


@cache
def _train_distances() -> np.ndarray:
    """Distances (M, M) between all training scans: the same for every run, and the slowest step here."""
    train = scan_features(digit_images("train"))
    return pairwise(train, train)


def _subsets(n: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    if size == n:
        yield np.arange(n)
        return
    for _ in range(_SUBSETS):
        yield rng.choice(n, size, replace=False)


def _put_share(scores: Scores, key: str, successes: int, n: int) -> None:
    interval = wilson_interval(successes, n)
    scores[key] = successes / n
    scores[f"{key}_interval"] = [interval.low, interval.high]


def sample_grid(images: Sequence[Image.Image], digits: np.ndarray, scale: int = 4, gap: int = 4) -> Image.Image:
    """One row a digit 0..9, its first ten images or as many as there are, enlarged without smoothing.

    Args:
        images: N images of one size.
        digits: (N,) which digit each was asked to show.
        scale: enlargement.
        gap: pixels between images.
    """
    width, height = images[0].width * scale, images[0].height * scale
    columns = min(_GRID_COLUMNS, int(np.bincount(digits).max()))
    grid = Image.new("RGB", (columns * (width + gap) + gap, 10 * (height + gap) + gap), "white")
    for digit in range(10):
        for column, index in enumerate(np.flatnonzero(digits == digit)[:columns]):
            enlarged = images[index].resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (gap + column * (width + gap), gap + digit * (height + gap)))
    return grid
