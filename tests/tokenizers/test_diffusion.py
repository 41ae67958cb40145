"""Time, shift, path and solvers: there and back, and against closed forms, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unimodal_tokenizers.diffusion import (
    NEAREST,
    SOLVERS,
    data_to_velocity,
    interpolate,
    logit_normal_time,
    sampling_times,
    shift_time,
    velocity,
)

times = st.floats(0, 1)
shifts = st.floats(0.1, 20)
MEAN, STD = 0.7, 0.3  # of the Gaussian the solvers are tried on


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(t=times, shift=shifts)
def test_unshift_undoes_shift(t: float, shift: float) -> None:
    assert shift_time(shift_time(t, shift), 1 / shift) == pytest.approx(t, abs=1e-9)
    assert shift_time(t, 1.0) == pytest.approx(t, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(t=st.floats(0.01, 0.99), shift=st.floats(1.01, 20))
def test_a_shift_above_one_moves_towards_noise_and_multiplies_the_odds(t: float, shift: float) -> None:
    moved = shift_time(t, shift)
    assert moved < t
    # u' / (1 - u') = s u / (1 - u): the signal-to-noise ratio falls by s
    assert (1 - moved) / moved == pytest.approx(shift * (1 - t) / t)


def test_shift_keeps_the_ends() -> None:
    assert shift_time(0.0, 3.0) == 0.0
    assert shift_time(1.0, 3.0) == 1.0
    assert shift_time(0.5, 3.0) == 0.25  # u = 1/2 becomes 3/4


@settings(max_examples=30, deadline=None)
@given(t=times, seed=st.integers(0, 1000))
def test_the_path_and_its_velocity_give_the_data_back(t: float, seed: int) -> None:
    noise, data = some(seed, 5, 2), some(seed + 1, 5, 2)
    time = torch.full((5, 1), t, dtype=torch.float64)
    x, v = interpolate(noise, data, time), velocity(noise, data)
    torch.testing.assert_close(x + (1 - time) * v, data, rtol=0, atol=1e-12)
    back = data_to_velocity(data, x, time)
    torch.testing.assert_close(back, v if 1 - t >= NEAREST else v * (1 - t) / NEAREST, rtol=0, atol=1e-11)


def test_the_path_starts_at_noise_ends_at_data_and_moves_by_the_velocity() -> None:
    noise, data = some(0, 5, 2), some(1, 5, 2)
    zero, h = torch.zeros(5, 1, dtype=torch.float64), 0.25
    assert torch.equal(interpolate(noise, data, zero), noise)
    assert torch.equal(interpolate(noise, data, zero + 1), data)
    moved = interpolate(noise, data, zero + 0.5 + h) - interpolate(noise, data, zero + 0.5)
    torch.testing.assert_close(moved / h, velocity(noise, data))


def test_logit_normal_times_far_out_are_the_ends() -> None:
    rng = np.random.default_rng(0)
    assert logit_normal_time(rng, mean=-1000.0) == pytest.approx(0.0, abs=1e-300)
    assert logit_normal_time(rng, mean=1000.0) == 1.0


def test_logit_normal_times_have_the_median_of_their_mean() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([logit_normal_time(rng, mean=1.0, std=0.5) for _ in range(4000)])
    assert (drawn > 0).all()
    assert (drawn < 1).all()
    assert np.median(drawn) == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.01)
    assert np.log(drawn / (1 - drawn)).std() == pytest.approx(0.5, abs=0.02)


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """E[data - noise | x_t = x] for noise ~ N(0, 1) and data ~ N(MEAN, STD^2)."""
    variance = (1 - t) ** 2 + (t * STD) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def error(solver: str, evaluations: int, shift: float = 1.0) -> float:
    """Wasserstein-2 distance between what the solver draws and the data, by the closed form x_1 = MEAN + STD x_0.

    Each step is affine in x, so the solver's map is a + b x, its samples are N(a, b^2), and two points give a and b.
    """
    x, calls = torch.tensor([0.0, 1.0], dtype=torch.float64), 0

    def counted(x: Tensor, t: float) -> Tensor:
        nonlocal calls
        calls += 1
        return gaussian_velocity(x, t)

    *_, last = SOLVERS[solver](counted, x, sampling_times(evaluations, shift, solver))
    assert calls == evaluations
    a, b = float(last[0]), float(last[1] - last[0])
    return float(np.hypot(a - MEAN, b - STD))


def test_heun_at_99_evaluations_meets_the_closed_form() -> None:
    assert error("heun", 99) < 1e-3


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_at_the_order_of_the_solver(solver: str, order: int) -> None:
    few, many = {"euler": (100, 200), "heun": (99, 199)}[solver]
    assert np.log2(error(solver, few) / error(solver, many)) == pytest.approx(order, abs=0.25)


@settings(max_examples=30, deadline=None)
@given(evaluations=st.integers(1, 60), shift=shifts, solver=st.sampled_from(["euler", "heun"]))
def test_times_rise_from_noise_to_data_and_cost_what_was_asked(evaluations: int, shift: float, solver: str) -> None:
    if solver == "heun" and evaluations % 2 == 0:
        with pytest.raises(ValueError, match=f"steps: the heun solver .* odd .* got {evaluations}"):
            sampling_times(evaluations, shift, solver)
        return
    points = sampling_times(evaluations, shift, solver)
    assert points[0] == pytest.approx(0, abs=1e-12)
    assert points[-1] == 1
    assert sorted(set(points)) == points
    error(solver, evaluations, shift)  # counts the evaluations


def test_no_evaluation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps: expected at least 1 .* got 0"):
        sampling_times(0, 1.0, "euler")
