"""Structure, agreement and consistency by hand and against slow versions."""

import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch

from unimodal.metrics.interleaved import (
    ImageConsistency,
    StructureMatch,
    StructureScore,
    TextImageAgreement,
    consistency,
    cosines,
    structure_match,
)

T, I = "text", "image"  # noqa: E741


def slow_distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """By its recursive definition."""

    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return distance(len(a), len(b))


@pytest.mark.parametrize(
    ("asked", "made", "match"),
    [
        ([T, I, T, I], [T, I, T, I], StructureMatch(0, 1.0, True)),
        ([T, I, T, I], [T, I, T], StructureMatch(1, 0.75, False)),
        ([T, I, T, I], [I, T, I, T], StructureMatch(2, 0.5, False)),  # one left out, one put in
        ([T, I], [I, T], StructureMatch(2, 0.0, False)),
        ([T, I], [T, I, I, I], StructureMatch(2, 0.5, False)),
        ([T, I], [], StructureMatch(2, 0.0, False)),
        ([], [I], StructureMatch(1, 0.0, False)),
        ([], [], StructureMatch(0, 1.0, True)),
    ],
)
def test_structure_by_hand(asked: list[str], made: list[str], match: StructureMatch) -> None:
    assert structure_match(asked, made) == match


def test_structure_equals_the_recursive_definition() -> None:
    short = [p for n in range(5) for p in itertools.product((T, I), repeat=n)]
    for a, b in itertools.product(short, repeat=2):
        found = structure_match(a, b)
        assert found.distance == slow_distance(a, b)
        assert found.exact == (a == b)


def vectors(*rows: Sequence[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_cosines_by_hand() -> None:
    found = cosines(vectors((1, 0), (3, 4), (0, 2), (0, 0)), vectors((5, 0), (4, 3), (0, -1), (1, 0)))
    assert found.tolist() == pytest.approx([1.0, 0.96, -1.0, 0.0])


def test_consistency_by_hand() -> None:
    # Right, right, up: pairs 1, 0, 0; with the first 1, 0.
    found = consistency(vectors((2, 0), (5, 0), (0, 3)))
    assert (found.pairwise, found.first) == (pytest.approx(1 / 3), pytest.approx(0.5))
    # A slow turn: neighbours stay alike, the last is far from the first.
    turn = consistency(vectors((1, 0), (1, 1), (0, 1), (-1, 1)))
    assert turn.first == pytest.approx((np.sqrt(0.5) + 0 - np.sqrt(0.5)) / 3, abs=1e-9)
    assert turn.pairwise > turn.first


def test_consistency_equals_a_double_loop() -> None:
    features = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    rows = features.double().numpy()
    pairs = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(rows, 2)]
    found = consistency(features)
    assert found.pairwise == pytest.approx(np.mean(pairs), rel=1e-9)
    assert found.first == pytest.approx(np.mean(pairs[:5]), rel=1e-9)


def test_one_image_has_no_consistency() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        consistency(torch.ones(1, 4))


def test_structure_metric_is_the_mean_and_adds_up_over_processes() -> None:
    asked, made = [[T, I], [T, I], [I]], [[T, I], [T], [T, I]]
    whole = StructureScore()
    whole.update(asked, made)
    assert {k: v.item() for k, v in whole.compute().items()} == pytest.approx({"exact": 1 / 3, "similarity": 2 / 3})
    parts = [StructureScore(), StructureScore()]
    parts[0].update(asked[:1], made[:1])
    parts[1].update(asked[1:], made[1:])
    for name in ("exact", "similarity", "documents"):
        assert getattr(whole, name) == sum(getattr(part, name) for part in parts)
    empty = StructureScore()
    empty.update([], [])
    assert empty.compute()["exact"] == 0


def test_agreement_metric_counts_every_image_once() -> None:
    metric = TextImageAgreement()
    metric.update(vectors((1, 0)), vectors((1, 0)))
    metric.update(vectors((1, 0), (1, 0), (0, 1)), vectors((0, 1), (-1, 0), (0, 2)))
    assert metric.compute().item() == pytest.approx((1 + 0 - 1 + 1) / 4)


def test_consistency_metric_counts_every_document_once() -> None:
    metric = ImageConsistency()
    metric.update(vectors((1, 0), (1, 0)))
    metric.update(vectors((1, 0)))  # has no pairs
    metric.update(vectors((1, 0), (0, 1), (0, 1)))
    found = metric.compute()
    assert found["pairwise"].item() == pytest.approx((1 + 1 / 3) / 2)
    assert found["first"].item() == pytest.approx((1 + 0) / 2)
