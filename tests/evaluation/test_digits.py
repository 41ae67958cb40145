"""The scores against slow independent versions, against an oracle that must get full marks, and against cheats."""

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from torch import nn

from unimodal.data.digits import (
    NUMBER_WORDS,
    caption,
    caption_digit,
    digit_images,
    digits_of,
)
from unimodal.decoding import DecodingSettings
from unimodal.documents import GENERATED, Document, Part
from unimodal.evaluation.digits import (
    Judge,
    Scores,
    copy_share,
    copy_threshold,
    evaluate_digits,
    frechet_distance,
    image_features,
    image_set_scores,
    nearest_distances,
    pairwise,
    precision_recall,
    scan_features,
    wilson_interval,
)
from unimodal.evaluation.page import (
    Curve,
    RunDescription,
    plot_curves,
    print_scores,
    read_curves,
    score_rows,
)

KEYS = [
    "judge_accuracy", "asked_digit", "image_to_text", "sums_text", "sums_drawn", "frechet", "frechet_real",
    "frechet_noise", "precision", "recall", "copies", "copies_real", "train_seconds", "parameters",
]  # fmt: skip


# ---- the pure functions


def gaussian(seed: int, n: int, mean: float = 0.0, scale: float = 1.0, width: int = 5) -> np.ndarray:
    return mean + scale * np.random.default_rng(seed).normal(size=(n, width))


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    # Diagonal covariances commute: the distance is the sum of (mu - mu')^2 + (sigma - sigma')^2.
    base = gaussian(0, 400)
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T  # exactly N(0, 1)
    sigma, other = np.array([1, 2, 0.5, 3, 0]), np.array([2, 2, 1, 0.1, 1])
    expected = ((sigma - other) ** 2).sum() + 5 * 0.7**2
    assert frechet_distance(base * sigma, base * other + 0.7) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_against_eigenvalues_of_the_product() -> None:
    a, b = gaussian(1, 60) @ gaussian(2, 5), gaussian(3, 50, 0.3) @ gaussian(4, 5)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root_trace = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).sum().real
    slow = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace
    assert frechet_distance(a, b) == pytest.approx(slow, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(slow, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def slow_precision_recall(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def radius(points: np.ndarray, i: int) -> float:
        return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    def inside(point: np.ndarray, points: np.ndarray, radii: list[float]) -> bool:
        return any(math.dist(point, other) <= r for other, r in zip(points, radii, strict=True))

    radii_real = [radius(real, i) for i in range(len(real))]
    radii_fake = [radius(fake, i) for i in range(len(fake))]
    precision = sum(inside(point, real, radii_real) for point in fake) / len(fake)
    return precision, sum(inside(point, fake, radii_fake) for point in real) / len(real)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_against_the_slow_version(k: int) -> None:
    real, fake = gaussian(5, 40), gaussian(6, 30, 0.5, 0.7)
    fake[:6] = fake[0]  # duplicates: radius zero
    found = precision_recall(real, fake, k)
    assert (found.precision, found.recall) == pytest.approx(slow_precision_recall(real, fake, k))
    assert 0 < found.recall < found.precision < 1


def test_precision_recall_of_extremes() -> None:
    real = gaussian(7, 50)
    same, far = precision_recall(real, real), precision_recall(real, real + 100)
    assert (same.precision, same.recall) == (1, 1)
    assert (far.precision, far.recall) == (0, 0)
    one_point = precision_recall(real, np.repeat(gaussian(8, 1), 20, axis=0))
    assert one_point.recall == 0


def test_pairwise_is_exactly_zero_for_equal_rows_and_right_in_pieces() -> None:
    a, b = 1e6 + gaussian(9, 300, width=64), 1e6 + gaussian(10, 900, width=64)
    b[7] = a[200]
    found = pairwise(a, b)  # 300 x 900 x 64 is done in several pieces
    assert found[200, 7] == 0
    for i, j in ((0, 0), (150, 899), (299, 3)):
        assert found[i, j] == pytest.approx(math.dist(a[i], b[j]))


def test_copies_against_the_slow_version() -> None:
    train, samples = gaussian(11, 30), gaussian(12, 20)
    samples[3] = train[5]
    slow = [min(math.dist(sample, other) for other in train) for sample in samples]
    assert nearest_distances(samples, train) == pytest.approx(slow)
    threshold = sorted(slow)[4]
    assert copy_share(samples, train, threshold) == 4 / 20  # nearer than, not as near as
    assert copy_share(train, train, 1e-9) == 1
    assert copy_threshold(samples, train) == pytest.approx(np.percentile(slow, 1))


def test_wilson_interval_solves_its_equation() -> None:
    z = 1.959964
    for successes, n in ((0, 10), (3, 10), (345, 360), (360, 360)):
        interval = wilson_interval(successes, n)
        share = successes / n
        assert 0 <= interval.low <= share <= interval.high <= 1
        for end in (interval.low, interval.high):
            if 0 < end < 1:
                assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n))
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(gaussian(0, 1), gaussian(0, 9)), r"a: expected \(N, D\) with N >= 2"),
        (lambda: frechet_distance(gaussian(0, 9), gaussian(0, 9, width=4)), "b: expected 5 features as in a, got 4"),
        (lambda: frechet_distance(np.full((9, 2), np.nan), gaussian(0, 9)), "a: expected finite numbers"),
        (lambda: precision_recall(gaussian(0, 9), gaussian(0, 3)), r"fake: expected .* N >= 4"),
        (lambda: precision_recall(gaussian(0, 9), gaussian(0, 9), k=0), "k: expected 1 or more"),
        (lambda: image_features([Image.new("RGB", (8, 9))]), "expected 8x8 pixels, as the digits are, got 8x9"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- the judge


def test_the_judge_reads_unseen_scans() -> None:
    judge, test = Judge(), digit_images("test")
    assert judge.accuracy > 0.97
    assert (judge.read(test.images()) == test.labels).mean() == pytest.approx(judge.accuracy)
    assert judge.read([]).tolist() == []


# ---- the protocol


class Player:
    """Stands in for a model: tells the task from the prompt, and answers as its four methods say."""

    def __init__(self) -> None:
        judge = Judge()
        test = digit_images("test")
        read = judge.read(test.images())
        self.known = {test.image(i).tobytes(): int(test.labels[i]) for i in range(len(test))}
        # Unseen scans that the judge reads right: what a perfect model would draw.
        self.legible = [
            [test.image(i) for i in range(len(test)) if test.labels[i] == read[i] == digit] for digit in range(10)
        ]
        self.batches: list[int] = []

    def draw(self, digit: int, rng: np.random.Generator) -> Image.Image:
        return self.legible[digit][rng.integers(len(self.legible[digit]))]

    def say(self, digit: int) -> str:
        return caption(digit)

    def write(self, total: int) -> str:
        return NUMBER_WORDS[total]

    def digits(self, total: int) -> tuple[int, ...]:
        return digits_of(total)

    def __call__(
        self, model: object, documents: Sequence[Document], settings: DecodingSettings, seeds: Sequence[int]
    ) -> list[Document]:
        assert len(documents) == len(seeds) == len(set(seeds))
        self.batches.append(len(documents))
        return [self.answer(d, settings, np.random.default_rng(s)) for d, s in zip(documents, seeds, strict=True)]

    def answer(self, document: Document, settings: DecodingSettings, rng: np.random.Generator) -> Document:
        assert not any(part.learn for part in document.parts)
        contents: list[str | Image.Image]
        if document.kind == "text_to_image":
            assert (settings.start, settings.max_images, settings.max_tokens) == ("image", 1, 0)
            digit = caption_digit(document.text)
            assert digit is not None
            contents = [self.draw(digit, rng)]
        elif document.kind == "image_to_text":
            assert (settings.start, settings.max_images) == ("text", 0)
            contents = [self.say(self.known[document.images[0].tobytes()])]
        else:
            total = sum(self.known[image.tobytes()] for image in document.images)
            contents = [self.write(total), *(self.draw(digit, rng) for digit in self.digits(total))]
        return document.extended(Part(content, role=GENERATED) for content in contents)


def run(player: Player, out: Path, asked: int = 500, **settings: object) -> Scores:
    return evaluate_digits(nn.Linear(3, 2), out, asked=asked, sums=40, decode_fn=player, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scores, Path, Player]:
    out, player = tmp_path_factory.mktemp("oracle") / "out", Player()
    return run(player, out, train_seconds=12.5, batch=70, description=RunDescription(title="oracle & co")), out, player


def test_an_oracle_gets_full_marks(oracle: tuple[Scores, Path, Player]) -> None:
    scores, out, player = oracle
    assert [scores[key] for key in ("asked_digit", "image_to_text", "sums_text", "sums_drawn")] == [1, 1, 1, 1]
    assert scores["recall"] >= scores["recall_real"] / 2
    assert scores["copies"] <= scores["copies_real"] + 0.02
    assert scores["frechet"] < 3 * scores["frechet_real"] < scores["frechet_noise"] / 10
    assert set(KEYS) <= scores.keys()
    assert (scores["parameters"], scores["train_seconds"], scores["samples"]) == (8, 12.5, 500)
    assert scores["asked_digit_interval"] == pytest.approx([0.9924, 1], abs=1e-4)
    assert max(player.batches) == 70
    assert json.loads((out / "scores.json").read_text()) == scores
    assert Image.open(out / "samples.png").size == (10 * 36 + 4, 10 * 36 + 4)
    assert {path.name for path in out.iterdir()} == {"scores.json", "samples.png", "index.html"}


def test_the_page_stands_alone(oracle: tuple[Scores, Path, Player]) -> None:
    page = (oracle[1] / "index.html").read_text()
    assert "<h1>oracle &amp; co</h1>" in page
    assert page.count('<div class="document">') == 5
    assert set(re.findall(r'src="([^,]*),', page)) == {"data:image/png;base64"}
    assert "<script" not in page
    assert "http" not in page
    for key in ("asked_digit", "recall_real", "copies_real"):
        assert key in page


class Prototypes(Player):
    """Draws one training scan a digit, whatever the seed."""

    def draw(self, digit: int, rng: np.random.Generator) -> Image.Image:
        train = digit_images("train")
        return train.image(int(np.flatnonzero(train.labels == digit)[4]))


def test_prototypes_have_no_recall_and_are_copies(tmp_path: Path) -> None:
    scores = run(Prototypes(), tmp_path)
    assert scores["asked_digit"] > 0.99
    assert scores["recall"] < scores["recall_real"] / 10
    assert scores["copies"] == 1
    rows = {row.name: row.met for row in score_rows(scores, RunDescription())}
    assert rows["asked_digit"] is True
    assert rows["recall"] is False
    assert rows["copies"] is False
    assert rows["judge_accuracy"] is None


class Wrong(Player):
    """Right sums with a wrong drawing, or more images than the answer has; half of the captions with words added."""

    def digits(self, total: int) -> tuple[int, ...]:
        return (*digits_of(total), 3) if total % 2 else digits_of(total)

    def write(self, total: int) -> str:
        return NUMBER_WORDS[(total + 1) % 19] if total < 5 else NUMBER_WORDS[total]

    def say(self, digit: int) -> str:
        return caption(digit) + (" plus" if digit >= 5 else "")


def test_text_and_drawing_of_a_sum_are_judged_apart_and_against_the_truth(tmp_path: Path) -> None:
    player = Wrong()
    scores = run(player, tmp_path, asked=40)
    labels = digit_images("test").labels
    assert scores["image_to_text"] == (labels < 5).mean()
    assert 0 < scores["sums_drawn"] < 1
    assert 0 < scores["sums_text"] < 1
    assert scores["sums_drawn"] != scores["sums_text"]


def test_scores_repeat_and_depend_on_the_seed(tmp_path: Path) -> None:
    player = Player()
    first = run(player, tmp_path / "a", asked=40, batch=7)
    assert run(player, tmp_path / "b", asked=40, batch=100) == first
    other = run(player, tmp_path / "c", asked=40, seed=1)
    assert other["frechet"] != first["frechet"]
    assert other["copies_threshold"] == first["copies_threshold"]  # a yardstick for all runs


def test_real_against_real_is_what_the_model_is_compared_with() -> None:
    unseen = scan_features(digit_images("test"))
    scores = image_set_scores(unseen, seed=0)
    for key in ("frechet", "precision", "recall"):
        assert scores[key] == pytest.approx(scores[f"{key}_real"])
    noise = image_set_scores(np.random.default_rng(1).uniform(0, 16, (374, 64)), seed=0)
    assert noise["frechet"] == pytest.approx(scores["frechet_noise"], rel=0.05)
    assert (noise["precision"], noise["recall"], noise["copies"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"asked": 45}, "asked: expected a multiple of 10"),
        ({"asked": 30}, "at least 40, got 30"),
        ({"batch": 0}, "expected 1 or more"),
        ({"out": "file"}, "out: expected a folder, got the file"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / str(settings.pop("out", "out"))
    with pytest.raises(ValueError, match=message):
        evaluate_digits(nn.Linear(1, 1), out, **settings)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


class Silent(Player):
    def answer(self, document: Document, settings: DecodingSettings, rng: np.random.Generator) -> Document:
        return document


def test_a_decoder_that_draws_nothing_is_an_error_not_a_score(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one image for each of 40 captions, got 0 images"):
        run(Silent(), tmp_path, asked=40)
    assert not list(tmp_path.iterdir())


# ---- curves and table

CSV = """epoch,step,train/loss,val/sum/text,lr-AdamW
0,9,2.5,,0.1
0,19,,1.25,
1,29,1.5,,0.1
"""


def test_curves_skip_blank_cells_and_other_columns(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(CSV)
    curves = read_curves(tmp_path / "metrics.csv")
    assert curves == {"train/loss": Curve((9, 29), (2.5, 1.5)), "val/sum/text": Curve((19,), (1.25,))}
    plot = plot_curves(curves)
    assert plot is not None
    assert plot.width > plot.height > 200
    assert plot_curves({}) is None


def test_bad_metrics_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    with pytest.raises(ValueError, match=r"expected a metrics\.csv, got no file"):
        read_curves(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected a column step, got a, b"):
        read_curves(path)
    path.write_text(CSV.replace("1.25", "much"))
    with pytest.raises(ValueError, match=r"metrics\.csv:3: val/sum/text: expected a number, got 'much'"):
        read_curves(path)


def test_the_terminal_table_names_every_score(oracle: tuple[Scores, Path, Player]) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    print_scores(oracle[0], console=console)
    text = console.export_text()
    for key in KEYS[:-2]:
        assert key in text
    assert "100.0 %" in text
    assert "≥ 98 %" in text
