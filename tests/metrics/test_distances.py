"""Distances between sets of features against closed forms and against scipy, torch-fidelity and torchmetrics."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from unimodal.metrics import distances
from unimodal.metrics.distances import clip_score, cmmd, frechet_distance, inception_score, kernel_distance
from unimodal.metrics.moments import Moments

REL = 1e-6


def gaussian(seed: int, n: int, mean: float = 0.0, scale: float = 1.0, width: int = 5) -> np.ndarray:
    return mean + scale * np.random.default_rng(seed).normal(size=(n, width))


def spread_out(seed: int, n: int, width: int = 48, shift: float = 0.0) -> np.ndarray:
    """Correlated features whose variances differ by orders of magnitude, as Inception's do."""
    mixing = np.random.default_rng(99).normal(size=(width, width)) * np.geomspace(3, 0.01, width)
    return np.maximum(gaussian(seed, n, width=width) @ mixing + shift, 0)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(Moments.of(a), Moments.of(b))


# ---- Frechet


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    # Diagonal covariances commute: the distance is the sum of (mu - mu')^2 + (sigma - sigma')^2.
    base = gaussian(0, 400)
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T  # exactly N(0, 1)
    sigma, other = np.array([1, 2, 0.5, 3, 0]), np.array([2, 2, 1, 0.1, 1])
    expected = ((sigma - other) ** 2).sum() + 5 * 0.7**2
    assert frechet(base * sigma, base * other + 0.7) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_against_scipys_matrix_root() -> None:
    a, b = spread_out(1, 400), spread_out(2, 300, shift=0.3)
    m, n = Moments.of(a), Moments.of(b)
    root = scipy.linalg.sqrtm(m.cov @ n.cov)
    slow = np.square(m.mean - n.mean).sum() + np.trace(m.cov + n.cov - 2 * np.real(root))
    assert frechet(a, b) == pytest.approx(slow, rel=REL)
    assert frechet(b, a) == pytest.approx(slow, rel=REL)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_torch_fidelitys_and_torchmetrics() -> None:
    a, b = spread_out(3, 500), spread_out(4, 350, shift=0.2)
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet(a, b) == pytest.approx(theirs, rel=REL)

    class Same(nn.Module):
        num_features = 48

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    metric = FrechetInceptionDistance(feature=Same())
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    assert frechet(a, b) == pytest.approx(float(metric.compute()), rel=REL)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 400), (40, 40)])
def test_frechet_distance_of_singular_covariances_is_exact(n: int, m: int) -> None:
    # tr (C_a C_b)^1/2 is the nuclear norm of A B^T for centred features A, B: no covariance is made at all.
    a, b = spread_out(5, n) * 100, spread_out(6, m, shift=0.1) * 100
    x, y = (a - a.mean(0)) / np.sqrt(n - 1), (b - b.mean(0)) / np.sqrt(m - 1)
    nuclear = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    slow = np.square(a.mean(0) - b.mean(0)).sum() + np.square(x).sum() + np.square(y).sum() - 2 * nuclear
    assert frechet(a, b) == pytest.approx(slow, rel=1e-9)


def test_frechet_distance_of_constant_features() -> None:
    constant = np.ones((4, 3))
    assert frechet(constant, constant + 2) == pytest.approx(12)


# ---- kernels


def test_kernel_distance_is_torch_fidelitys() -> None:
    real, fake = spread_out(7, 320), spread_out(8, 260, shift=0.2)
    theirs = kid_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), kid_subsets=20, kid_subset_size=100, verbose=False,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0, rng_seed=2020,
    )  # fmt: skip
    found = kernel_distance(real, fake, subsets=20, subset_size=100)
    assert found.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=REL)
    assert found.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=REL)


def test_kernel_distance_against_loops_and_is_unbiased() -> None:
    x, y = gaussian(9, 12, width=3), gaussian(10, 12, 0.5, width=3)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    slow = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / len(pairs)
    slow -= 2 * sum(kernel(x[i], y[j]) for i in range(12) for j in range(12)) / 144
    assert kernel_distance(x, y, subsets=3, subset_size=12).mean == pytest.approx(slow)
    values = [kernel_distance(gaussian(i, 40), gaussian(1000 + i, 40), 1, 40).mean for i in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)  # of equal distributions: zero on average
    assert min(values) < 0


@pytest.mark.parametrize("at_once", [2**24, 40])
def test_cmmd_against_loops_counts_each_feature_with_itself(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_AT_ONCE", at_once)
    x, y = gaussian(11, 14, 3, 8, width=4), gaussian(12, 11, width=4)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.exp(-np.square(p - q).sum() / (2 * 10**2)) for q in b] for p in a]))

    assert cmmd(x, y) == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


# ---- scores of images


def test_inception_score_is_torch_fidelitys() -> None:
    logits = torch.from_numpy(gaussian(13, 203, scale=2.0, width=30))
    theirs = isc_features_to_metric(logits)
    found = inception_score(logits)
    assert found.mean == pytest.approx(theirs["inception_score_mean"], rel=REL)
    assert found.std == pytest.approx(theirs["inception_score_std"], rel=REL)
    in_order = isc_features_to_metric(logits, splits=7, shuffle=False)
    assert inception_score(logits, 7, seed=None).mean == pytest.approx(in_order["inception_score_mean"], rel=REL)


def test_inception_score_of_extremes() -> None:
    sure = 1e3 * np.eye(10).repeat(20, axis=0)
    assert inception_score(sure, splits=1).mean == pytest.approx(10)
    assert inception_score(sure[:20], splits=2).mean == pytest.approx(1)
    assert inception_score(np.zeros((20, 10))).mean == pytest.approx(1)


def test_clip_score_is_the_cosine_clamped_and_in_percent() -> None:
    image, text = (
        torch.tensor([[3.0, 0.0], [1.0, 1.0], [1.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]),
    )
    assert clip_score(image, text).tolist() == pytest.approx([100, 50 * 2**0.5, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet(gaussian(0, 9), gaussian(0, 9, width=4)), "b: expected 5 features as in a, got 4"),
        (lambda: kernel_distance(gaussian(0, 9), gaussian(0, 50), 2, 10), "at most the 9 real features, got 10"),
        (lambda: kernel_distance(gaussian(0, 50), gaussian(0, 9), 2, 10), "at most the 9 fake features, got 10"),
        (lambda: kernel_distance(gaussian(0, 50), gaussian(0, 50), 2, 1), "expected at least 2 and 1, got 1 and 2"),
        (lambda: kernel_distance(gaussian(0, 50), gaussian(0, 50, width=4), 2, 9), "fake: expected 5 features"),
        (lambda: cmmd(gaussian(0, 9), gaussian(0, 9, width=4)), "fake: expected 5 features"),
        (lambda: cmmd(gaussian(0, 9), np.full((3, 5), np.inf)), "fake: expected finite"),
        (lambda: inception_score(gaussian(0, 9)), r"logits: expected \(N, D\) with N >= 10"),
        (lambda: inception_score(gaussian(0, 9), splits=0), "splits: expected at least 1"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
