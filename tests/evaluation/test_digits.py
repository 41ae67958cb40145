"""The scores against slow independent versions, against an oracle that must get full marks, and against cheats."""

import io
import json
import re
from collections.abc import Sequence
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
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import GENERATED, Document, Part
from unimodal.evaluation.digits import (
    Judge,
    Scores,
    evaluate_digits,
    image_features,
    image_set_scores,
    scan_features,
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


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 8x8 pixels, as the digits are, got 8x9"):
        image_features([Image.new("RGB", (8, 9))])


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
