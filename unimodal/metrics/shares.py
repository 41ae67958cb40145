"""Intervals of shares of independent trials."""

from __future__ import annotations

from scipy.stats import binomtest

from unimodal.metrics.statistics import Interval


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927).

    Raises:
        ValueError: `n` is not positive, or `successes` not among 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes: expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    found = binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
    return Interval(float(found.low), float(found.high))
