"""Neighbours between sets: against loops over points, against torch-fidelity, and at extremes."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from unimodal.metrics import manifolds
from unimodal.metrics.manifolds import (
    ball_radii,
    copy_share,
    copy_threshold,
    nearest_distances,
    pairwise,
    precision_recall,
    precision_recall_density_coverage,
)
from unimodal.metrics.shares import wilson_interval


def gaussian(seed: int, n: int, mean: float = 0.0, scale: float = 1.0, width: int = 5) -> np.ndarray:
    return mean + scale * np.random.default_rng(seed).normal(size=(n, width))


def radius(points: np.ndarray, i: int, k: int) -> float:
    return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


def slow_precision_recall(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def inside(point: np.ndarray, points: np.ndarray, radii: list[float]) -> bool:
        return any(math.dist(point, other) <= r for other, r in zip(points, radii, strict=True))

    radii_real = [radius(real, i, k) for i in range(len(real))]
    radii_fake = [radius(fake, i, k) for i in range(len(fake))]
    precision = sum(inside(point, real, radii_real) for point in fake) / len(fake)
    return precision, sum(inside(point, fake, radii_fake) for point in real) / len(real)


def slow_density_coverage(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    radii = [radius(real, i, k) for i in range(len(real))]
    hits = [[math.dist(real[i], point) < radii[i] for point in fake] for i in range(len(real))]
    return sum(map(sum, hits)) / (k * len(fake)), sum(map(any, hits)) / len(real)


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


@pytest.mark.parametrize("at_once", [2**23, 97])
def test_all_four_against_the_slow_versions_in_any_pieces(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifolds, "_AT_ONCE", at_once)
    monkeypatch.setattr(manifolds, "_PAIRS", 7)
    real, fake = gaussian(5, 40), gaussian(6, 30, 0.5, 0.7)
    fake[:6], fake[7], real[3:12] = fake[0], real[20], real[3]  # copies and duplicates: radius and distance zero
    for shift in (0, 300):  # far from the origin a product loses the digits that differences keep
        found = precision_recall_density_coverage(real + shift, fake + shift, k=3, k_coverage=5)
        slow = (*slow_precision_recall(real, fake, 3), *slow_density_coverage(real, fake, 5))
        assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(slow)
    assert 0 < found.coverage < 1
    assert found.density != found.precision


def test_precision_and_recall_are_torch_fidelitys() -> None:
    real, fake = gaussian(15, 300, width=16), gaussian(16, 260, 0.4, 0.8, width=16)
    found = precision_recall_density_coverage(real, fake)
    theirs = prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True,
        verbose=False,
    )  # fmt: skip
    assert (found.precision, found.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)
    assert 0.1 < found.recall < found.precision < 1


def test_density_may_exceed_one_and_coverage_sees_a_collapse() -> None:
    real = gaussian(17, 200, width=2)
    collapsed = np.repeat(real.mean(0, keepdims=True), 100, axis=0) + gaussian(18, 100, scale=1e-3, width=2)
    found = precision_recall_density_coverage(real, collapsed)
    assert found.density > 1
    assert found.precision == 1
    assert found.coverage < 0.5


def test_inside_the_manifold_one_by_one() -> None:
    real, fake = gaussian(5, 40), gaussian(6, 30, 0.5, 0.7)
    found = precision_recall_density_coverage(real, fake).inside
    radii = np.sort(np.linalg.norm(real[:, None] - real[None], axis=-1), axis=1)[:, 3]
    assert found.tolist() == [bool((np.linalg.norm(real - point, axis=1) <= radii).any()) for point in fake]
    assert found.mean() == precision_recall(real, fake).precision


def test_equal_points_are_exactly_zero_apart_however_far_from_the_origin() -> None:
    points = 1e3 + gaussian(19, 30, width=64)
    points[10:15] = points[10]
    other = points + 1e-7 * gaussian(
        20, 30, width=64
    )  # a copy but for rounding: squares of 1e-13 beside lengths of 1e8
    assert (ball_radii(points, (3,))[10:15] == 0).all()
    same, near = (precision_recall_density_coverage(points[10:15].repeat(2, axis=0), p) for p in (points, other))
    assert same.inside.tolist() == [10 <= i < 15 for i in range(30)]
    assert not near.inside.any()


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
    assert wilson_interval(0, 10).low == 0
    assert wilson_interval(10, 10).high == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: precision_recall(gaussian(0, 9), gaussian(0, 3)), r"fake: expected .* N >= 4"),
        (lambda: precision_recall(gaussian(0, 9), gaussian(0, 9), k=0), "k: expected 1 or more"),
        (lambda: precision_recall_density_coverage(gaussian(0, 5), gaussian(0, 9)), r"real: expected .* N >= 6"),
        (lambda: precision_recall_density_coverage(gaussian(0, 9), gaussian(0, 9, width=4)), "fake: expected 5 feat"),
        (lambda: precision_recall_density_coverage(gaussian(0, 9), gaussian(0, 9), k_coverage=0), "k_coverage: exp"),
        (lambda: nearest_distances(gaussian(0, 9), np.full((3, 5), np.nan)), "train: expected finite numbers"),
        (lambda: wilson_interval(3, 2), "got 3 of 2"),
        (lambda: wilson_interval(0, 0), "got 0 of 0"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
