"""Nearest neighbours between two sets of features: precision, recall, density, coverage, copies of training images.

Letters: N real features or scans, M generated ones, D their width, k the neighbour whose distance is a ball's radius.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from unimodal.metrics.moments import checked_features

_AT_ONCE = 2**23  # distances at once: 64 MB, a few times
_NEAR = 1e-10  # of squared lengths: below it a squared distance is taken from differences
_PAIRS = 1024  # differences at once


@dataclass(frozen=True)
class PrecisionRecall:
    """Share of fakes among the reals, and of reals among the fakes."""

    precision: float
    recall: float


@dataclass(frozen=True)
class ManifoldScores:
    """Precision and recall, and density and coverage, which outliers disturb less.

    Attributes:
        precision: share of the generated ones among the reals.
        recall: share of the reals among the generated ones.
        density: in how many balls of reals a generated one lies, over k.
        coverage: share of reals whose ball holds a generated one.
        inside: (M,) bool, which of the generated ones precision counts.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    inside: np.ndarray = field(repr=False, compare=False)

    def by_name(self) -> dict[str, float]:
        """The four numbers."""
        return {name: getattr(self, name) for name in ("precision", "recall", "density", "coverage")}


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, equations 1 and 2) of small sets.

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour in the
    set. Precision is the share of fakes inside the manifold of the reals, recall the share of reals inside that of the
    fakes.

    Args:
        real: (N, D).
        fake: (M, D).
        k: neighbour that sets the radius, itself not counted.

    Raises:
        ValueError: `k` < 1, or a set of k or fewer points.
    """
    _check_neighbour("k", k)
    real, fake = checked_features("real", real, k + 1), checked_features("fake", fake, k + 1)
    return precision_recall_of_distances(pairwise(real, real), pairwise(real, fake), pairwise(fake, fake), k)


def precision_recall_of_distances(
    real_real: np.ndarray, real_fake: np.ndarray, fake_fake: np.ndarray, k: int
) -> PrecisionRecall:
    """The same from distances (N, N), (N, M), (M, M)."""
    radius_real = np.partition(real_real, k, axis=1)[:, k]  # (N,): entry 0 is the point itself
    radius_fake = np.partition(fake_fake, k, axis=1)[:, k]  # (M,)
    return PrecisionRecall(
        precision=float((real_fake <= radius_real[:, None]).any(axis=0).mean()),
        recall=float((real_fake <= radius_fake[None, :]).any(axis=1).mean()),
    )


def precision_recall_density_coverage(
    real: np.ndarray, fake: np.ndarray, k: int = 3, k_coverage: int = 5
) -> ManifoldScores:
    """All four, in pieces: beside the features in float64 it needs a few hundred MB, however many they are.

    Precision and recall as above, with closed balls. Density and coverage (Naeem et al., arXiv 2002.09797, equations 3
    and 4) with open balls, as the authors' code has them: how many balls of reals a fake lies in, over k; and the share of
    reals whose ball holds a fake.

    Args:
        real: (N, D).
        fake: (M, D).
        k: of precision and recall; 3 is ADM's and torch-fidelity's.
        k_coverage: of density and coverage; 5 is the authors'.

    Raises:
        ValueError: a `k` < 1, other widths, or too few points for `k`.
    """
    _check_neighbour("k", k)
    _check_neighbour("k_coverage", k_coverage)
    real = checked_features("real", real, max(k, k_coverage) + 1)
    fake = checked_features("fake", fake, k + 1)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"fake: expected {real.shape[1]} features as the real ones have, got {fake.shape[1]}")
    radii_real, radii_fake = ball_radii(real, (k, k_coverage)), ball_radii(fake, (k,))[:, 0]
    inside, balls = np.zeros(len(fake), dtype=bool), 0
    recalled, covered = np.zeros(len(real), dtype=bool), np.zeros(len(real), dtype=bool)
    for rows in _pieces(len(real), len(fake)):
        squares = _squares(real[rows], fake)  # (rows, M)
        inside |= (squares <= radii_real[rows, :1]).any(axis=0)
        recalled[rows] = (squares <= radii_fake).any(axis=1)
        within = squares < radii_real[rows, 1:]
        balls += int(within.sum())
        covered[rows] = within.any(axis=1)
    return ManifoldScores(
        precision=float(inside.mean()),
        recall=float(recalled.mean()),
        density=balls / (k_coverage * len(fake)),
        coverage=float(covered.mean()),
        inside=inside,
    )


def ball_radii(points: np.ndarray, neighbours: tuple[int, ...]) -> np.ndarray:
    """Squared distance (N, number of neighbours) of each point to its k-th nearest others."""
    found = [
        np.partition(_squares(points[rows], points), neighbours, axis=1)[:, neighbours]
        for rows in _pieces(len(points), len(points))
    ]
    return np.concatenate(found)


def _pieces(rows: int, columns: int) -> list[slice]:
    size = max(1, _AT_ONCE // max(1, columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances (N, M).

    By a matrix product, which is fast and loses half of the digits where points nearly coincide; those few are taken from
    differences, so that equal points are exactly 0 apart.
    """
    lengths = np.square(a).sum(1)[:, None] + np.square(b).sum(1)
    found = lengths - 2 * (a @ b.T)
    i, j = np.nonzero(found < _NEAR * lengths)
    for start in range(0, len(i), _PAIRS):
        near = i[start : start + _PAIRS], j[start : start + _PAIRS]
        found[near] = np.square(a[near[0]] - b[near[1]]).sum(1)
    return found


def pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances (N, M) between rows of (N, D) and (M, D).

    From differences, not from a^2 + b^2 - 2ab: equal rows must be exactly 0 apart, or copies would not count as copies.
    """
    rows = max(1, 4_000_000 // max(1, b.size))  # at most 32 MB of differences at once
    pieces = [np.sqrt(np.square(a[i : i + rows, None] - b[None]).sum(-1)) for i in range(0, len(a), rows)]
    return np.concatenate(pieces) if pieces else np.zeros((0, len(b)))


def nearest_distances(samples: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Distance (M,) of every sample (M, D) to the nearest of train (N, D)."""
    return pairwise(checked_features("samples", samples, 1), checked_features("train", train, 1)).min(axis=1)


def copy_share(samples: np.ndarray, train: np.ndarray, threshold: float) -> float:
    """Share of samples (M, D) nearer than `threshold` to some training image (N, D)."""
    return float((nearest_distances(samples, train) < threshold).mean())


def copy_threshold(held_out: np.ndarray, train: np.ndarray) -> float:
    """Distance to the nearest training image that 1 % of unseen real images (M, D) fall below."""
    return float(np.percentile(nearest_distances(held_out, train), 1))


def _check_neighbour(name: str, k: int) -> None:
    if k < 1:
        raise ValueError(f"{name}: expected 1 or more, got {k}")
