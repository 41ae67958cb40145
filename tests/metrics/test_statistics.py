"""Intervals and tests against scipy, enumeration, simulation and hand calculation."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from unimodal.metrics.statistics import (
    Interval,
    PairedTest,
    bootstrap_interval,
    bootstrap_rows,
    holm,
    paired_test,
    sign_flip_p,
)


def slow_interval(groups: dict[str, list[float]], resamples: int, seed: int) -> Interval:
    """By drawing items one index at a time."""
    rng = np.random.default_rng(seed)
    headline = [
        np.mean([np.mean([values[i] for i in rng.integers(0, len(values), len(values))]) for values in groups.values()])
        for _ in range(resamples)
    ]
    low, high = np.percentile(headline, [2.5, 97.5])
    return Interval(float(low), float(high))


def width(interval: Interval) -> float:
    return interval.high - interval.low


# ---- bootstrap_interval


def test_interval_equals_scipys_on_one_group() -> None:
    values = np.random.default_rng(0).normal(size=60).tolist()
    ours = bootstrap_interval({"all": values}, resamples=40_000)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=40_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.01)  # standard error of an end: about 0.002
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_interval_equals_slow_resampling_within_tasks() -> None:
    rng = np.random.default_rng(0)
    groups = {"a": (rng.random(40) < 0.9).astype(float).tolist(), "b": rng.random(7).tolist(), "c": [0.5]}
    ours, slow = bootstrap_interval(groups), slow_interval(groups, 4000, 1)
    assert ours.low == pytest.approx(slow.low, abs=0.01)
    assert ours.high == pytest.approx(slow.high, abs=0.01)


def test_tasks_are_strata() -> None:
    # Two tasks that are constant: whatever is drawn within them, the headline is the mean of the two.
    assert bootstrap_interval({"easy": [1.0] * 9, "hard": [0.0] * 90}) == Interval(0.5, 0.5)


def test_combine_sees_means_in_the_groups_order() -> None:
    interval = bootstrap_interval({"a": [1.0, 1.0], "b": [3.0]}, lambda means: means[1] - means[0])
    assert interval == Interval(2.0, 2.0)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    # Prompts of unequal difficulty, four answers each: the value that is covered is the mean difficulty.
    rng, covered, runs = np.random.default_rng(0), 0, 400
    for run in range(runs):
        difficulty = rng.beta(2, 1, size=(2, 60))
        answers = rng.random((2, 60, 4)) < difficulty[..., None]
        groups = {"a": answers[0].astype(float).tolist(), "b": answers[1].astype(float).tolist()}
        interval = bootstrap_interval(groups, resamples=500, seed=run)
        covered += interval.low <= 2 / 3 <= interval.high
    assert 0.92 <= covered / runs <= 0.975  # 0.95 less the known slight shortfall, +- 2 standard errors


def test_clustered_is_wider_than_naive_where_answers_agree() -> None:
    rng = np.random.default_rng(0)
    items = np.repeat((rng.random(100) < 0.5).astype(float)[:, None], 4, axis=1)  # all four answers alike
    clustered = bootstrap_interval({"t": items.tolist()})
    naive = bootstrap_interval({"t": items.ravel().tolist()})
    assert width(clustered) == pytest.approx(2 * width(naive), rel=0.08)  # sqrt(4)


def slow_cluster_interval(groups: dict[str, Any], clusters: dict[str, Any], resamples: int) -> Interval:
    """Draws the clusters that have items of the same groups, one by one, and takes every mean of what was drawn."""
    held: dict[str, dict[str, list[float]]] = {}
    for name in groups:
        for value, cluster in zip(groups[name], clusters[name], strict=True):
            held.setdefault(cluster, {}).setdefault(name, []).append(value)
    rng, found = np.random.default_rng(5), []
    for _ in range(resamples):
        drawn: dict[str, list[float]] = {name: [] for name in groups}
        for kind in {frozenset(one) for one in held.values()}:
            same = [one for one in held.values() if frozenset(one) == kind]
            for i in rng.integers(0, len(same), len(same)):
                for name, values in same[i].items():
                    drawn[name] += values
        found.append(np.mean([np.mean(values) for values in drawn.values()]))
    return Interval(*(float(q) for q in np.quantile(found, [0.025, 0.975])))


def test_questions_about_one_image_are_drawn_together_through_all_groups() -> None:
    """Of 60 images, 40 have questions of both groups, of unequal number; all answers about an image are mostly alike."""
    rng = np.random.default_rng(0)
    groups: dict[str, list[float]] = {"open": [], "binary": []}
    clusters: dict[str, list[str]] = {"open": [], "binary": []}
    for image in range(60):
        right = rng.random() < 0.6
        for name in ("open", "binary") if image < 40 else ("open",) if image < 50 else ("binary",):
            for _ in range(int(rng.integers(1, 6))):
                groups[name].append(float(right != (rng.random() < 0.1)))
                clusters[name].append(f"image {image}")
    together, apart = bootstrap_interval(groups, clusters=clusters), bootstrap_interval(groups)
    assert width(together) > 2 * width(apart)
    slow = slow_cluster_interval(groups, clusters, 3000)
    assert together.low == pytest.approx(slow.low, abs=0.02)
    assert together.high == pytest.approx(slow.high, abs=0.02)
    rows = [
        {"id": f"{name} {i}", "task": name, "cluster": cluster, "score": value}
        for name in groups
        for i, (value, cluster) in enumerate(zip(groups[name], clusters[name], strict=True))
    ]

    def headline(drawn: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {"headline": float(np.mean([np.mean([r["score"] for r in drawn if r["task"] == t]) for t in groups]))}

    by_rows = bootstrap_rows(rows, headline, resamples=2000)["headline"]
    assert by_rows.low == pytest.approx(slow.low, abs=0.025)
    assert by_rows.high == pytest.approx(slow.high, abs=0.025)
    alone = {name: [f"{name} {i}" for i in range(len(values))] for name, values in groups.items()}
    assert bootstrap_interval(groups, clusters=alone) == apart
    with pytest.raises(ValueError, match=r"clusters\['open'\]: expected \d+, one an item"):
        bootstrap_interval(groups, clusters={**clusters, "open": ["image 1"]})


def test_an_items_value_is_the_mean_of_its_samples() -> None:
    uneven = [[1.0, 0.0, 0.0, 0.0], [1.0], [0.0, 1.0]]
    assert bootstrap_interval({"t": uneven}, seed=3) == bootstrap_interval({"t": [0.25, 1.0, 0.5]}, seed=3)


def test_interval_is_reproducible_and_widens_with_level() -> None:
    values = {"t": np.random.default_rng(0).random(30).tolist()}
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    assert width(bootstrap_interval(values, level=0.99)) > width(bootstrap_interval(values)) * 1.2


def test_ten_thousand_resamples_of_geneval_are_fast() -> None:
    rng = np.random.default_rng(0)
    groups = {str(n): rng.random(n).tolist() for n in (80, 99, 80, 94, 100, 100)}  # 553 items, all values distinct
    start = time.perf_counter()
    bootstrap_interval(groups)
    assert time.perf_counter() - start < 3  # 0.3 s on an idle core


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ({}, {}, "groups"),
        ({"t": []}, {}, "groups"),
        ({"t": [[1.0], []]}, {}, "groups"),
        ({"t": [float("nan")]}, {}, "finite"),
        ({"t": [1.0]}, {"resamples": 0}, "resamples"),
        ({"t": [1.0]}, {"level": 1.0}, "level"),
    ],
)
def test_interval_refuses(groups: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(groups, **options)


# ---- bootstrap_rows


def make_rows(items: int, samples: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"id": f"{i:03d}", "sample": s, "task": "ab"[i % 2], "score": float(rng.random() < 0.3)}
        for i in range(items)
        for s in range(samples)
    ]


def mean_score(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {"mean": float(np.mean([row["score"] for row in rows]))}


def any_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    best: dict[str, float] = {}
    for row in rows:
        best[row["id"]] = max(best.get(row["id"], 0.0), row["score"])
    return {"any": float(np.mean(list(best.values()))), "items": float(len(best))}


def test_rows_of_a_mean_agree_with_the_interval_of_values() -> None:
    rows = make_rows(60, 3)
    by_item: dict[str, list[list[float]]] = {"a": [], "b": []}
    for i in range(60):
        by_item["ab"[i % 2]].append([row["score"] for row in rows if row["id"] == f"{i:03d}"])
    ours, other = bootstrap_rows(rows, mean_score, resamples=3000)["mean"], bootstrap_interval(by_item)
    assert ours.low == pytest.approx(other.low, abs=0.015)
    assert ours.high == pytest.approx(other.high, abs=0.015)


def test_an_item_drawn_twice_counts_twice() -> None:
    # Were the two copies merged, "items" would fall to 63 % and any-of-N would see twice as many answers.
    intervals = bootstrap_rows(make_rows(50, 4), any_of, resamples=200)
    assert intervals["items"] == Interval(50.0, 50.0)
    values = [[max(r["score"] for r in g)] for _, g in itertools.groupby(make_rows(50, 4), key=lambda r: r["id"])]
    plain = bootstrap_interval({"a": values[::2], "b": values[1::2]})
    assert intervals["any"].low == pytest.approx(plain.low, abs=0.03)
    assert intervals["any"].high == pytest.approx(plain.high, abs=0.03)


def test_rows_of_one_cluster_are_drawn_together() -> None:
    # Two questions on an image are both right or both wrong; a measure of pairs must never see half a pair.
    rows = [
        {"id": f"{i}-{q}", "cluster": f"image{i}", "task": "t", "score": float(i % 2)}
        for i in range(20)
        for q in (0, 1)
    ]

    def pairs(drawn: Sequence[dict[str, Any]]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for row in drawn:
            found.setdefault(row["cluster"], []).append(row["score"])
        assert all(len(pair) == 2 for pair in found.values())
        assert len({row["id"] for row in drawn}) == len(drawn) == 40
        return {"both": float(np.mean([min(pair) for pair in found.values()]))}

    both = bootstrap_rows(rows, pairs, resamples=500)["both"]
    alone = bootstrap_rows([{k: v for k, v in r.items() if k != "cluster"} for r in rows], mean_score, resamples=500)
    assert width(both) > 1.2 * width(alone["mean"])


def test_rows_keep_their_strata_and_the_originals_their_ids() -> None:
    rows = make_rows(20, 1)
    before = [dict(row) for row in rows]

    def shares(drawn: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {"a": sum(row["task"] == "a" for row in drawn) / len(drawn)}

    assert bootstrap_rows(rows, shares, resamples=50)["a"] == Interval(0.5, 0.5)
    assert rows == before


def test_a_measure_may_be_undefined_on_some_resamples() -> None:
    rows = make_rows(6, 1)

    def precision(drawn: Sequence[dict[str, Any]]) -> dict[str, float]:
        chosen = [row["score"] for row in drawn if row["id"] in ("000", "001")]
        return {"precision": 1.0 + float(np.mean(chosen))} if chosen else {}

    missing = sum(not precision([rows[i] for i in np.random.default_rng(k).integers(0, 6, 6)]) for k in range(100))
    assert missing > 0
    interval = bootstrap_rows(rows, precision, resamples=200)["precision"]
    assert 1.0 <= interval.low <= interval.high <= 2.0  # nowhere a 0 for what is undefined


def test_rows_refuse_measures_that_are_not_numbers() -> None:
    rows = make_rows(6, 1)
    with pytest.raises(ValueError, match=r"finite values of ratio.*got nan or infinity"):
        bootstrap_rows(rows, lambda drawn: {"ratio": 1.0 if drawn is rows else float("nan")})
    with pytest.raises(ValueError, match=r"finite values of x.*got none"):
        bootstrap_rows(rows, lambda drawn: {"x": 1.0} if drawn is rows else {})
    with pytest.raises(ValueError, match="rows"):
        bootstrap_rows([], mean_score)


# ---- paired_test


def enumerated_p(a: dict[str, float], b: dict[str, float], tasks: dict[str, str]) -> float:
    """All flips, the headline taken anew for each."""

    def headline(values: dict[str, float]) -> float:
        by_task: dict[str, list[float]] = {}
        for item, value in values.items():
            by_task.setdefault(tasks[item], []).append(value)
        return float(np.mean([np.mean(v) for v in by_task.values()]))

    difference = {item: b[item] - a[item] for item in a}
    observed = abs(headline(difference))
    flips = [
        headline({item: sign * d for sign, (item, d) in zip(signs, difference.items(), strict=True)})
        for signs in itertools.product((-1, 1), repeat=len(a))
    ]
    return float(np.mean([abs(flip) >= observed - 1e-12 for flip in flips]))


def random_pair(items: int, seed: int, shift: float = 0.0) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    rng = np.random.default_rng(seed)
    names = [f"i{k}" for k in range(items)]
    a = {name: float(rng.random()) for name in names}
    b = {name: a[name] + float(rng.normal(shift, 0.2)) for name in names}
    return a, b, {name: "xyz"[k % 3 if k % 5 else 0] for k, name in enumerate(names)}


@pytest.mark.parametrize("seed", range(4))
def test_p_is_exact_for_few_items(seed: int) -> None:
    a, b, tasks = random_pair(9, seed, 0.1)
    assert paired_test(a, b, tasks).p == pytest.approx(enumerated_p(a, b, tasks), abs=1e-12)


def test_p_counts_ties_of_binary_scores() -> None:
    a = dict.fromkeys("abcdefgh", 0.0)
    b = dict(zip("abcdefgh", [1.0, 1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0], strict=True))
    result = paired_test(a, b, dict.fromkeys("abcdefgh", "t"))
    assert result.p == pytest.approx(stats.binomtest(3, 4).pvalue)  # the sign test, by hand 10/16
    assert result.difference == pytest.approx(0.25)


def test_drawn_flips_agree_with_all_flips_and_with_scipy() -> None:
    terms = np.random.default_rng(0).normal(0.08, 0.3, size=40)
    theirs = stats.permutation_test(
        (terms,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        rng=np.random.default_rng(2),
    )
    assert sign_flip_p(terms, resamples=40_000) == pytest.approx(theirs.pvalue, rel=0.1)
    few = terms[:14]  # one more than is listed
    listed = np.mean([abs(np.dot(s, few)) >= abs(few.sum()) - 1e-12 for s in itertools.product((-1, 1), repeat=14)])
    assert sign_flip_p(few, resamples=40_000) == pytest.approx(listed, abs=0.01)


def test_p_is_uniform_under_the_null_and_never_zero() -> None:
    rng = np.random.default_rng(0)
    found = [sign_flip_p(rng.normal(size=30), resamples=300, seed=k) for k in range(500)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert sign_flip_p(np.ones(50), resamples=99) == pytest.approx(1 / 100)
    assert sign_flip_p(np.zeros(5)) == 1.0


def test_difference_is_b_less_a_of_the_headline_with_its_interval() -> None:
    a, b, tasks = random_pair(90, 1, 0.1)
    result = paired_test(a, b, tasks)
    means = [np.mean([b[i] - a[i] for i in a if tasks[i] == t]) for t in "xyz"]
    assert result.difference == pytest.approx(np.mean(means))
    assert result.interval.low < result.difference < result.interval.high
    back = paired_test(b, a, tasks)
    assert back.difference == pytest.approx(-result.difference)
    assert back.p == pytest.approx(result.p, abs=0.01)


def test_pairs_are_narrower_than_two_systems_apart() -> None:
    a, b, tasks = random_pair(90, 1)
    apart = [bootstrap_interval({t: [v[i] for i in v if tasks[i] == t] for t in "xyz"}) for v in (a, b)]
    assert width(paired_test(a, b, tasks).interval) < 0.8 * np.hypot(width(apart[0]), width(apart[1]))


def test_weights_make_the_headline_a_mean_over_items() -> None:
    a, b, tasks = random_pair(31, 2, 0.1)
    sizes = {t: float(sum(task == t for task in tasks.values())) for t in "xyz"}
    result = paired_test(a, b, tasks, weights=sizes)
    assert result.difference == pytest.approx(np.mean([b[i] - a[i] for i in a]))
    assert result.difference != pytest.approx(paired_test(a, b, tasks).difference)


def test_other_items_are_refused() -> None:
    tasks = {"x": "t", "y": "t"}
    with pytest.raises(ValueError, match=r"'y' only in a"):
        paired_test({"x": 1.0, "y": 1.0}, {"x": 1.0}, tasks)
    with pytest.raises(ValueError, match=r"'z' only in b"):
        paired_test({"x": 1.0, "y": 1.0}, {"x": 1.0, "y": 1.0, "z": 0.0}, tasks)
    with pytest.raises(ValueError, match="tasks"):
        paired_test({"x": 1.0}, {"x": 1.0}, tasks)
    with pytest.raises(ValueError, match="at least one"):
        paired_test({}, {}, {})
    for weights, message in (({}, "got none of 'u'"), ({"u": 0.0}, "not all 0"), ({"u": float("nan")}, "finite")):
        with pytest.raises(ValueError, match=f"weights: expected .*{message}"):
            paired_test({"x": 1.0}, {"x": 1.0}, {"x": "u"}, weights=weights)


def test_equal_systems_do_not_differ() -> None:
    a, _, tasks = random_pair(20, 0)
    assert paired_test(a, a, tasks) == PairedTest(0.0, Interval(0.0, 0.0), 1.0, 20)


# ---- holm


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_items_of_a_cluster_share_one_coin() -> None:
    # 8 images of 5 questions each, b right about all questions on 7 of them: 8 coins, not 40.
    a = {f"{image}-{q}": 0.0 for image in range(8) for q in range(5)}
    b = {item: float(item[0] != "0") for item in a}
    tasks = {item: ("even", "odd")[int(item[-1]) % 2] for item in a}
    clusters = {item: item[0] for item in a}
    assert paired_test(a, b, tasks, clusters=clusters).p == 2 / 2**7  # the seven that differ, all one way
    found, alone = paired_test(a, b, tasks, clusters=clusters), paired_test(a, b, tasks)
    assert alone.p < 0.001
    assert width(found.interval) > 1.6 * width(alone.interval)  # sqrt(5), cut off at 1
    assert found.difference == alone.difference == pytest.approx(7 / 8)
