"""Intervals and tests over items: bootstrap by item within its task, paired sign flips, Holm's correction.

Answers to one prompt are alike, so the item is what is drawn, with all its answers: an interval over answers alone is
too narrow. So are several questions about one image: where items are of clusters, whole clusters are drawn, among those
that have items of the same tasks (so that no task is ever empty).
Letters: R resamples, G groups (tasks), N items of one group, K clusters, V distinct ones among them.

B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13: percentile intervals, resampling of
clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float

Row = dict[str, Any]
"""A line of results.jsonl: `id` names the item, `task` its group, `cluster` (optional) what is drawn together; besides,
sample, score, reason, files and a verdict's fields."""

_AT_ONCE = 4_000_000  # numbers drawn at once: 32 MB
_EXACT = 13  # items up to which all 2^N sign flips are listed


@dataclass(frozen=True)
class Interval:
    """Ends of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """How much better b is than a on the same items.

    Attributes:
        difference: headline of b less headline of a.
        interval: of the difference, by bootstrap over the same items.
        p: two-sided p-value of no difference, by flips of the items' signs.
        items: how many there are.
    """

    difference: float
    interval: Interval
    p: float
    items: int


def mean_of_means(means: Float[np.ndarray, "G R"]) -> Float[np.ndarray, " R"]:
    """Every group counts the same, however many items it has."""
    return means.mean(axis=0)


def bootstrap_interval(
    groups: Mapping[str, Sequence[float | Sequence[float]]],
    combine: Callable[[Float[np.ndarray, "G R"]], Float[np.ndarray, " R"]] = mean_of_means,
    *,
    clusters: Mapping[str, Sequence[str]] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a function of group means; items are drawn with replacement within their group.

    Args:
        groups: name -> a value an item, or the values of an item's samples, which count by their mean.
        combine: headline of each resample from its G group means; the default is their mean.
        clusters: name -> the cluster of each of its items, which is drawn whole, through all groups; None: each item alone.
        resamples: R.
        seed: of the draws.
        level: share that the interval should cover.

    Raises:
        ValueError: no group, a group or item without values, a value that is not finite, not one cluster an item,
            `resamples` or `level` out of range.
    """
    _check(resamples, level)
    if not groups:
        raise ValueError("groups: expected at least one, got none")
    rng = np.random.default_rng(seed)
    values = {name: _item_values(name, found) for name, found in groups.items()}
    drawn = np.sum([_resampled(stratum, resamples, rng) for stratum in _strata(values, clusters)], axis=0)  # (R, 2, G)
    return _percentiles(combine((drawn[:, 0] / drawn[:, 1]).T), level)


def bootstrap_rows(
    rows: Sequence[Row],
    measure: Callable[[Sequence[Row]], Mapping[str, float]],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile intervals of any measure of a set of answers, e.g. F1 or any-of-N.

    What is drawn, within its task, is an item with all its rows, or all rows of one `cluster` where rows have that field
    (questions about one image), among the clusters with rows of the same tasks. An item that is drawn twice gets another
    `id` (and `cluster`) the second time: a measure that groups rows by them must see two items. The fields are otherwise
    the same. A measure that is not defined on some rows leaves its name out; its interval is then over the resamples that
    do define it.

    Args:
        rows: the answers; each has `id` and `task`.
        measure: names to numbers, of any number of rows.
        resamples: how often the measure is taken.
        seed: of the draws.
        level: share that the intervals should cover.

    Raises:
        ValueError: no rows, or a measure that is not finite, or one that no resample defines.
    """
    _check(resamples, level)
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    clusters: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        key = ("", str(row["cluster"])) if "cluster" in row else (str(row["task"]), str(row["id"]))
        clusters.setdefault(key, []).append(row)
    by_tasks: dict[frozenset[str], list[list[Row]]] = {}
    for found in clusters.values():
        by_tasks.setdefault(frozenset(str(row["task"]) for row in found), []).append(found)
    strata = list(by_tasks.values())

    @cache
    def copy(stratum: int, index: int, time: int) -> list[Row]:
        found = strata[stratum][index]
        if time == 0:
            return found
        names = [name for name in ("id", "cluster") if name in found[0]]
        return [row | {name: f"{row[name]}#{time}" for name in names} for row in found]

    rng = np.random.default_rng(seed)
    point, drawn = measure(rows), []
    for _ in range(resamples):
        chosen: list[Row] = []
        for s, stratum in enumerate(strata):
            for index, times in enumerate(rng.multinomial(len(stratum), np.full(len(stratum), 1 / len(stratum)))):
                for time in range(times):
                    chosen += copy(s, index, time)
        drawn.append(measure(chosen))
    return {name: _percentiles(_defined(name, drawn), level) for name in point}


def paired_test(
    a: Mapping[str, float],
    b: Mapping[str, float],
    tasks: Mapping[str, str],
    *,
    weights: Mapping[str, float] | None = None,
    clusters: Mapping[str, str] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedTest:
    """Compare two systems on the same items.

    The headline is the weighted mean of the tasks' means. Under the null hypothesis either system could have given either
    value of an item, so the sign of every item's difference is a fair coin (R. A. Fisher, The Design of Experiments, 1935,
    section 21); the items of a cluster share one coin. All flips are listed for up to 13 items or clusters that differ;
    beyond, `resamples` of them are drawn, and the observed one counts among them: (1 + as extreme) / (1 + drawn), which is
    never 0.

    Args:
        a: item -> value of the first system, the mean of its answers.
        b: the same of the second.
        tasks: item -> task.
        weights: task -> weight, in any unit; None: every task the same.
        clusters: item -> what it is drawn and flipped together with; items that are not in it stand alone.
        resamples: of the bootstrap, and sign flips drawn.
        seed: of both.
        level: share that the interval should cover.

    Raises:
        ValueError: other items in `b` or `tasks` than in `a`, or none; a task without a weight, or weights that are
            negative or all 0.
    """
    _same_items("b", a, b)
    _same_items("tasks", a, tasks)
    differences: dict[str, list[float]] = {}
    together: dict[str, list[str]] = {}
    for item, value in a.items():
        differences.setdefault(tasks[item], []).append(float(b[item]) - float(value))
        together.setdefault(tasks[item], []).append((clusters or {}).get(item, item))
    if weights is not None and (missing := sorted(set(differences) - set(weights))):
        raise ValueError(f"weights: expected one of each task, got none of {missing[0]!r}")
    share = np.array([1.0 if weights is None else weights[task] for task in differences])
    if not (np.isfinite(share).all() and share.min() >= 0 and share.sum() > 0):
        raise ValueError(f"weights: expected finite ones from 0, not all 0, got {dict(weights or {})}")
    share = share / share.sum()  # (G,)
    interval = bootstrap_interval(
        differences, share.__matmul__, clusters=together, resamples=resamples, seed=seed, level=level
    )
    terms = np.concatenate([w * np.array(d) / len(d) for w, d in zip(share, differences.values(), strict=True)])
    names = [name for found in together.values() for name in found]
    p = sign_flip_p(np.bincount(_numbers(names), terms), resamples=resamples, seed=seed)
    return PairedTest(float(terms.sum()), interval, p, len(a))


def sign_flip_p(terms: Float[np.ndarray, " N"], *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a sum whose terms have, under the null hypothesis, either sign with equal chance."""
    terms = terms[terms != 0]  # a zero has no sign: leaving it out changes nothing
    if not len(terms):
        return 1.0
    limit = abs(terms.sum()) * (1 - 1e-9)  # flips that give the same sum again must count, whatever their rounding
    if len(terms) <= _EXACT:
        bits = np.arange(2 ** len(terms))[:, None] >> np.arange(len(terms)) & 1  # (2^N, N)
        return float((np.abs((2 * bits - 1) @ terms) >= limit).mean())
    rng, extreme = np.random.default_rng(seed), 0
    for count in _chunks(resamples, len(terms)):
        signs = 2.0 * rng.integers(0, 2, (count, len(terms)), dtype=np.int8) - 1
        extreme += int((np.abs(signs @ terms) >= limit).sum())
    return (1 + extreme) / (1 + resamples)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values of several tests corrected so that the chance of any false alarm is kept.

    S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979): the k-th smallest of m
    is multiplied by m - k + 1, never below the one before it, at most 1.
    """
    corrected, before = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        before = max(before, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = before
    return {name: corrected[name] for name in p}


def _strata(
    values: Mapping[str, np.ndarray], clusters: Mapping[str, Sequence[str]] | None
) -> list[Float[np.ndarray, "_ 2 G"]]:
    """What is drawn from: sum and count in every group of each cluster, apart for clusters with items of other groups."""
    if clusters is None:
        numbers = np.arange(sum(map(len, values.values())))
    else:
        for name, found in values.items():
            if len(clusters.get(name, ())) != len(found):
                raise ValueError(
                    f"clusters[{name!r}]: expected {len(found)}, one an item, got {clusters.get(name)!r:.60}"
                )
        numbers = _numbers([cluster for name in values for cluster in clusters[name]])
    group = np.repeat(np.arange(len(values)), [len(found) for found in values.values()])
    table = np.zeros((numbers.max() + 1, 2, len(values)))
    np.add.at(table[:, 0], (numbers, group), np.concatenate(list(values.values())))
    np.add.at(table[:, 1], (numbers, group), 1)
    kinds, kind = np.unique(table[:, 1] > 0, axis=0, return_inverse=True)
    return [table[kind.reshape(-1) == i] for i in reversed(range(len(kinds)))]  # those of the first group first


def _numbers(names: Sequence[str]) -> np.ndarray:
    """The number of each name, 0 .. different names - 1, in the order in which they first come."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names])


def _resampled(clusters: Float[np.ndarray, "K 2 G"], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Sums and counts (R, 2, G) of K clusters drawn with replacement.

    How often each of the V distinct clusters comes is multinomial, and sums depend on nothing else: scores of 0 and 1
    need two numbers a resample, not N.
    """
    distinct, counts = np.unique(clusters.reshape(len(clusters), -1), axis=0, return_counts=True)
    share = counts / len(clusters)
    chunks = _chunks(resamples, len(distinct))
    drawn = [rng.multinomial(len(clusters), share, size=count) @ distinct for count in chunks]
    return np.concatenate(drawn).reshape(resamples, 2, -1)


def _chunks(total: int, width: int) -> list[int]:
    """`total` rows of `width` numbers in pieces of bounded size."""
    most = max(1, _AT_ONCE // width)
    return [min(most, total - start) for start in range(0, total, most)]


def _item_values(name: str, values: Sequence[float | Sequence[float]]) -> np.ndarray:
    """A value an item, (N,) float64: the mean of its samples."""
    if not len(values) or any(np.size(value) == 0 for value in values):
        raise ValueError(f"groups[{name!r}]: expected at least one value an item, got an empty list")
    means = np.array([np.mean(value) for value in values], dtype=np.float64)
    if not np.isfinite(means).all():
        raise ValueError(f"groups[{name!r}]: expected finite values, got nan or infinity")
    return means


def _percentiles(values: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _defined(name: str, drawn: Sequence[Mapping[str, float]]) -> np.ndarray:
    """The values of one measure on the resamples that define it."""
    values = np.array([measured[name] for measured in drawn if name in measured], dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        found = "none" if not len(values) else "nan or infinity"
        raise ValueError(
            f"measure: expected finite values of {name}, or its name left out where undefined, got {found}"
        )
    return values


def _check(resamples: int, level: float) -> None:
    if resamples < 1:
        raise ValueError(f"resamples: expected 1 or more, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a share between 0 and 1, got {level}")


def _same_items(name: str, a: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    if not a:
        raise ValueError("a: expected at least one item, got none")
    for item in [*(a.keys() - other.keys()), *(other.keys() - a.keys())][:1]:
        side = "a" if item in a else name
        raise ValueError(f"{name}: expected the same items as in a, got {item!r} only in {side}")
