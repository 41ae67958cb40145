"""Distances between sets of features, and scores of sets: Frechet (FID), kernel (KID), CMMD, Inception score, CLIPScore.

All of it is float64. What the features are is not known here; only features of Inception make a FID. Letters: N real
features, M generated ones, D their width, C classes, K the features of a subset.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unimodal.metrics.moments import Moments, checked_features

SEED = 2020
"""Of subsets and permutations: torch-fidelity's, so that numbers can be compared."""

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
CLIP_SCORE_SCALE = 100.0
_AT_ONCE = 2**24  # kernel values at once: 128 MB


@dataclass(frozen=True)
class Spread:
    """A mean over parts of the sample, and their standard deviation (divided by their number)."""

    mean: float
    std: float


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al., arXiv 1706.08500, equation 6).

    |mu_a - mu_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^1/2. The last trace is the sum of the singular values of
    C_a^1/2 C_b^1/2, both roots by eigh: real and exact to rounding where covariances are singular, which the eigenvalues
    of the product are not (a zero eigenvalue comes out as 1e-16 of the largest, and its root as 1e-8).

    Raises:
        ValueError: other widths.
    """
    if a.width != b.width:
        raise ValueError(f"b: expected {a.width} features as in a, got {b.width}")
    product = torch.from_numpy(_root(a.cov).T @ _root(b.cov))
    trace_root = float(torch.linalg.svdvals(product).sum()) if product.numel() else 0.0
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * trace_root
    return max(0.0, float(distance))  # equal sets come out a rounding error below zero


def _root(cov: np.ndarray) -> np.ndarray:
    """R (D, r) with R R^T = cov, without the directions that are rounding errors."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    keep = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def kernel_distance(
    real: np.ndarray | Tensor, fake: np.ndarray | Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> Spread:
    """KID (Binkowski et al., arXiv 1801.01401, section 4): unbiased squared MMD with the kernel (x.y / D + 1)^3.

    The mean over random subsets of equal size from both sets. It may be slightly negative. Subsets are those that
    torch-fidelity draws with this seed when `fake` is its first input.

    Args:
        real: (N, D).
        fake: (M, D).
        subsets: how many are averaged.
        subset_size: features of each set in a subset.
        seed: of the draws.

    Raises:
        ValueError: a set with fewer than `subset_size` features, or fewer than 2 asked for.
    """
    if subset_size < 2 or subsets < 1:
        raise ValueError(f"subset_size and subsets: expected at least 2 and 1, got {subset_size} and {subsets}")
    a, b = checked_features("fake", fake, 2), checked_features("real", real, 2)
    _same_width(b, a)
    for name, values in (("real", b), ("fake", a)):
        if len(values) < subset_size:
            raise ValueError(f"subset_size: expected at most the {len(values)} {name} features, got {subset_size}")
    rng = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x = a[rng.choice(len(a), subset_size, replace=False)]
        y = b[rng.choice(len(b), subset_size, replace=False)]
        found.append(_unbiased_mmd(_cubic(x, x), _cubic(x, y), _cubic(y, y)))
    return Spread(float(np.mean(found)), float(np.std(found)))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _unbiased_mmd(xx: np.ndarray, xy: np.ndarray, yy: np.ndarray) -> float:
    """Gretton et al., A Kernel Two-Sample Test, JMLR 13 (2012), equation 3: no feature is compared with itself."""
    k = len(xx)
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (k * (k - 1))
    return float(within - 2 * xy.mean())


def cmmd(real: np.ndarray | Tensor, fake: np.ndarray | Tensor) -> float:
    """CMMD (Jayasumana et al., arXiv 2401.09603): squared MMD with a Gaussian kernel of sigma 10, times 1000.

    The authors' code takes the biased, minimum-variance estimate, in which every feature is also compared with itself
    (JMLR 13, equation 5); so does this. Features are CLIP embeddings of unit length.

    Args:
        real: (N, D).
        fake: (M, D).
    """
    x, y = checked_features("real", real, 1), checked_features("fake", fake, 1)
    _same_width(x, y)
    return CMMD_SCALE * (_gaussian_mean(x, x) + _gaussian_mean(y, y) - 2 * _gaussian_mean(x, y))


def _gaussian_mean(x: np.ndarray, y: np.ndarray) -> float:
    """Mean kernel value over all pairs, in pieces."""
    rows = max(1, _AT_ONCE // len(y))
    squares = np.square(y).sum(1)
    total = 0.0
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        distances = np.square(part).sum(1)[:, None] + squares - 2 * part @ y.T
        total += float(np.exp(-distances.clip(min=0) / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(x) * len(y))


def inception_score(logits: np.ndarray | Tensor, splits: int = 10, seed: int | None = SEED) -> Spread:
    """Inception score (Salimans et al., arXiv 1606.03498, section 4): exp of the mean KL(p(y | x) || p(y)) in each split.

    Args:
        logits: (M, C): of Inception without the bias of its last layer, as the original computes them.
        splits: parts that are scored apart; their mean is the score.
        seed: of the permutation before splitting, torch-fidelity's; None: in the order given.

    Raises:
        ValueError: fewer images than splits.
    """
    if splits < 1:
        raise ValueError(f"splits: expected at least 1, got {splits}")
    values = torch.from_numpy(checked_features("logits", logits, splits))
    if seed is not None:
        values = values[torch.from_numpy(np.random.RandomState(seed).permutation(len(values)))]
    p, entropy = values.softmax(1), torch.special.entr  # -p log p, 0 at 0
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        scores.append(float((entropy(part.mean(0)).sum() - entropy(part).sum(1).mean()).exp()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


def clip_score(image: Float[Tensor, "B D"], text: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """CLIPScore of each image with its text: 100 max(cos, 0).

    Hessel et al., arXiv 2104.08718, with the weight 100 that torchmetrics takes instead of the paper's 2.5.
    """
    cosine = torch.nn.functional.cosine_similarity(image.double(), text.double(), dim=1)
    return CLIP_SCORE_SCALE * cosine.clamp(min=0)


def _same_width(real: np.ndarray, fake: np.ndarray) -> None:
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"fake: expected {real.shape[1]} features as the real ones have, got {fake.shape[1]}")
