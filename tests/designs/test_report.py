"""What is said of the designs: no more than the intervals do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from designs_cases import sheet
from PIL import Image
from scipy import stats

from experiments.designs.cost import Costs
from experiments.designs.elsewhere import given, left_over, read_rows
from experiments.designs.gallery import DRAWS, gallery
from experiments.designs.report import interval, orderings, table, verdict, write_report
from experiments.designs.running import Row, plan
from experiments.designs.table import CLAIMS, DESIGNS, DIGITS, SHAPES, World
from unimodal.metrics.shares import wilson_interval

PAGE = Path(__file__).parents[2] / "experiments" / "designs"
NAMES = [design.name for design in DESIGNS]


def row(name: str, seed: int, value: float, at: str = "steps") -> Row:
    found: dict[str, Any] = {"name": name, "seed": seed, "at": at, "world": "digits", "machine": "one"}
    for score, trials in DIGITS.scores.items():
        asked = wilson_interval(round(trials * value), trials)
        found |= {score: value, f"{score}_interval": [asked.low, asked.high]}
    costs = (
        "frechet",
        "frechet_real",
        "recall",
        "copies",
        "optimizer_steps",
        "documents",
        "flops",
        "tokens",
        "parameters",
        "learning",
        "seconds_an_image",
        "train_seconds",
    )
    return found | dict.fromkeys(costs, 1.0) | {"samples": "samples.png"}


def test_the_gallery_shows_the_first_draws_of_every_design(tmp_path: Path) -> None:
    sheet(tmp_path / "samples.png")
    gallery([row("janus", 0, 0.5), row("bagel", 0, 0.5), row("bagel", 1, 0.5)], tmp_path, tmp_path / "gallery.png")
    with Image.open(tmp_path / "gallery.png") as picture:
        shown = picture.convert("RGB")
    assert shown.height == 2 * (36 + 3)  # a line a design
    for draw in range(DRAWS):
        for digit in range(10):
            at = (130 + 36 * (10 * draw + digit) + 16 * draw + 20, 20)
            near = np.abs(np.array(shown.getpixel(at)) - (20 * digit, 0, 10 * draw))
            assert near.max() <= 8


def test_over_seeds_an_interval_is_student_s() -> None:
    values = [0.91, 0.94, 0.90]
    found = interval([row("x", i, v) for i, v in enumerate(values)], "asked_digit", 500)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, min(1.0, expected.high)))


def test_of_one_seed_it_is_that_of_the_run() -> None:
    found, asked = interval([row("x", 0, 0.9)], "asked_digit", 500), wilson_interval(450, 500)
    assert (found.low, found.high) == (asked.low, asked.high)


def test_seeds_that_agree_by_chance_are_not_certain() -> None:
    found, asked = interval([row("x", i, 1.0) for i in range(3)], "asked_digit", 500), wilson_interval(500, 500)
    assert (found.low, found.high) == (asked.low, asked.high)  # all were asked the same: not of 1,500


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [([0.9], [0.5], "came out, of one seed"), ([0.5], [0.9], "the other way round, of one seed"),
     ([0.90], [0.88], "not separated"), ([0.90, 0.91, 0.92], [0.5, 0.52, 0.51], "came out"),
     ([0.9, 0.5, 0.7], [0.5, 0.52, 0.51], "not separated")],
)  # fmt: skip
def test_an_ordering_needs_intervals_apart(better: list[float], worse: list[float], said: str) -> None:
    a, b = ([row(n, i, v) for i, v in enumerate(values)] for n, values in (("a", better), ("b", worse)))
    assert said in verdict(a, b, "asked_digit", DIGITS)
    if len(better) > 1:
        assert "one seed" not in verdict(a, b, "asked_digit", DIGITS)


@pytest.mark.parametrize(("world", "results"), [(DIGITS, "digits.json"), (SHAPES, "shapes.json")])
def test_the_tables_of_the_page_are_those_of_the_committed_rows(world: World, results: str) -> None:
    page = (PAGE / "README.md").read_text()
    rows = json.loads((PAGE / "results" / results).read_text())
    for at in ("steps", "flops"):
        mine = [row for row in rows if row["at"] == at]
        assert table(mine, world) in page
        assert orderings(mine, world) in page


@pytest.mark.slow  # it counts what every design costs
@pytest.mark.parametrize(("world", "results", "seeds"), [(DIGITS, "digits.json", 3), (SHAPES, "shapes.json", 1)])
def test_the_committed_rows_are_of_today_s_settings(world: World, results: str, seeds: int, tmp_path: Path) -> None:
    rows, costs = read_rows([PAGE / "results" / results]), Costs(tmp_path)
    runs = [plan(design, world, seed, 1200, costs) for seed in range(seeds) for design in DESIGNS]
    found = given(rows, runs, 1200 * world.step_flops)
    assert set(found) == {run.name for run in runs}
    assert not left_over(rows, (row for mine in found.values() for row in mine))


def test_the_report_has_every_design_both_points_and_every_claim(tmp_path: Path) -> None:
    rows = [row(name, 0, 0.5, at) for name in NAMES for at in ("steps", "flops")]
    sheet(tmp_path / "samples.png")
    write_report(rows, DIGITS, tmp_path)
    text = (tmp_path / "digits" / "report.md").read_text()
    assert text.count("| bagel |") == 2
    assert "Equal steps" in text
    assert "several machines" not in text
    write_report([*rows, row("bagel", 1, 0.5) | {"machine": "two"}], DIGITS, tmp_path)
    assert "Trained on several machines (one; two)" in (tmp_path / "digits" / "report.md").read_text()
    assert "Equal training FLOPs" in text
    assert all(text.count(claim.text) == 2 for claim in CLAIMS)
    assert table([row("bagel", 0, 0.5)], DIGITS).count("\n") == 2
    assert orderings([row("bagel", 0, 0.5)], DIGITS).count("\n") == 1  # half of a pair says nothing
