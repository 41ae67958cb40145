"""Drawing ids from scores."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal_generators.choice import choose, restrict


def rngs(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def slow(scores: np.ndarray, top_k: int, top_p: float) -> list[int]:
    """Ids that stay, of one row without ties at the k-th, in plain steps."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    if top_k:
        ranked = ranked[:top_k]
    weights = np.exp([scores[i] - scores[ranked[0]] for i in ranked])
    probabilities = weights / weights.sum()
    kept, reached = [], 0.0
    for i, probability in zip(ranked, probabilities, strict=True):
        if kept and reached >= top_p:
            break
        kept.append(i)
        reached += probability
    return sorted(kept)


@given(
    rows=st.integers(1, 4), entries=st.integers(1, 12), top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.77, 0.95, 1.0]), seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=100, deadline=None, derandomize=True)
def test_what_is_left_equals_a_slow_count(rows: int, entries: int, top_k: int, top_p: float, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(0, 2, (rows, entries))
    left = restrict(torch.from_numpy(scores), top_k, top_p)
    for row, one in zip(left, scores, strict=True):
        kept = row.isfinite().nonzero().squeeze(1)
        assert kept.tolist() == slow(one, top_k, top_p)
        torch.testing.assert_close(row[kept], torch.from_numpy(one)[kept])


def test_by_hand() -> None:
    scores = torch.tensor([[0.5, 0.1, 0.3, 0.1]], dtype=torch.float64).log()
    left = {
        p: restrict(scores, 0, p).isfinite()[0].nonzero().squeeze(1).tolist() for p in (0.2, 0.49, 0.51, 0.79, 0.81)
    }
    assert left[0.2] == left[0.49] == [0]
    assert left[0.51] == left[0.79] == [0, 2]
    assert len(left[0.81]) == 3
    assert restrict(scores, 2, 1.0).isfinite().tolist() == [[True, False, True, False]]
    assert restrict(scores, 2, 0.6).isfinite().tolist() == [[True, False, False, False]]  # 0.5 of 0.8 is above 0.6


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8)])
def test_frequencies_are_those_of_the_softmax(top_k: int, top_p: float) -> None:
    n, temperature = 20_000, 0.7
    scores = torch.randn(8, generator=torch.Generator().manual_seed(4))
    (rng,) = rngs(0)
    ids = choose(scores.expand(n, 8), [rng] * n, temperature, top_k, top_p)
    kept = slow((scores.double() / temperature).numpy(), top_k, top_p)
    expected = torch.zeros(8, dtype=torch.float64)
    expected[kept] = (scores[kept].double() / temperature).softmax(0)
    found = torch.bincount(ids, minlength=8).double() / n
    assert (found[expected == 0] == 0).all()
    spread = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() <= 4 * spread).all()


def test_temperature_zero_is_greedy_and_draws_nothing() -> None:
    scores = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    used = rngs(0, 1, 2, 3, 4)
    before = [rng.get_state() for rng in used]
    assert torch.equal(choose(scores, used, 0.0, 3, 0.5), scores.argmax(-1))
    assert all(torch.equal(rng.get_state(), state) for rng, state in zip(used, before, strict=True))


def test_a_low_temperature_is_nearly_greedy_and_a_high_one_nearly_uniform() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.5]]).expand(3000, 3)
    (rng,) = rngs(0)
    assert (choose(scores, [rng] * 3000, 0.01) == 1).all()
    share = torch.bincount(choose(scores, [rng] * 3000, 1000.0), minlength=3) / 3000
    assert ((share - 1 / 3).abs() < 0.05).all()


def test_rows_draw_from_their_own_generator() -> None:
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    together = choose(scores, rngs(7, 8, 9, 10), 1.5, 20, 0.9)
    alone = torch.cat([choose(scores[i : i + 1], rngs(7 + i), 1.5, 20, 0.9) for i in range(4)])
    assert torch.equal(together, alone)
    mixed = choose(scores[[2, 0]], rngs(9, 7), 1.5, 20, 0.9)
    assert mixed.tolist() == [together[2], together[0]]
    assert len(set(choose(scores[:1].expand(20, -1), rngs(*range(20)), 1.5).tolist())) > 5


def test_what_is_ruled_out_is_never_drawn() -> None:
    scores = torch.zeros(500, 4)
    scores[:, [0, 3]] = -torch.inf
    (rng,) = rngs(3)
    assert set(choose(scores, [rng] * 500, 1.0).tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-0.1, 0, 1.0), "temperature: .* got -0.1"),
        ((1.0, -1, 1.0), "top_k: .* got -1"),
        ((1.0, 0, 0.0), "top_p: .* got 0.0"),
        ((1.0, 0, 1.5), "top_p: .* got 1.5"),
        ((0.0, -1, 1.0), "top_k"),
        ((float("nan"), 0, 1.0), "temperature"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: tuple[float, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(torch.zeros(1, 3), rngs(0), *settings)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (2, 1.0), (3, 0.99)])
def test_of_equals_no_more_than_k_stay(top_k: int, top_p: float) -> None:
    """Scores of half precision are often equal."""
    left = restrict(torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 2.0, 2.0, 2.0, 2.0]]), top_k, top_p)
    assert left.isfinite().sum(-1).tolist() == [top_k, top_k]
    assert left[left.isfinite()].unique().tolist() == [1.0, 2.0]
