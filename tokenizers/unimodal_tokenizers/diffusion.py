"""The mathematics that flow and diffusion share: time, its shift, and the straight path between noise and data.

t = 0 is noise, t = 1 is data. Transfusion (arXiv 2408.11039) and Stable Diffusion 3 (arXiv 2403.03206) count the other
way; importers convert at the edge.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from torch import Tensor


def logit_normal_time(rng: np.random.Generator, mean: float = 0.0, std: float = 1.0) -> float:
    """t = sigmoid(n), n ~ N(mean, std): more weight on the middle of the path (SD3, section 3.1)."""
    return 1.0 / (1.0 + math.exp(-rng.normal(mean, std)))


def shift_time(t: float, shift: float) -> float:
    """Move times towards the noise end: the noise fraction u = 1 - t becomes s u / (1 + (s - 1) u) (SD3, eq. 23)."""
    return t / (1.0 + (shift - 1.0) * (1.0 - t))  # the same in t: exact at both ends


def unshift_time(t: float, shift: float) -> float:
    """The inverse of `shift_time`."""
    return shift_time(t, 1.0 / shift)


def interpolate(
    noise: Float[Tensor, "T D"], data: Float[Tensor, "T D"], t: Float[Tensor, "T 1"]
) -> Float[Tensor, "T D"]:
    """x_t = (1 - t) noise + t data (Flow Matching, arXiv 2210.02747, eq. 22 with sigma_min = 0)."""
    return (1 - t) * noise + t * data


def velocity(noise: Float[Tensor, "T D"], data: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
    """v = dx_t/dt = data - noise."""
    return data - noise


def velocity_to_data(x: Float[Tensor, "T D"], v: Float[Tensor, "T D"], t: Float[Tensor, "T 1"]) -> Float[Tensor, "T D"]:
    """The data a point and its velocity point at: x + (1 - t) v."""
    return x + (1 - t) * v


Velocity = Callable[[Tensor, float], Tensor]  # v(x, t)


def sampling_times(evaluations: int, shift: float, solver: str) -> list[float]:
    """Times from 0 (noise) to 1 (data) between which `solver` makes exactly `evaluations` network evaluations.

    Euler evaluates once a step; Heun twice, but for the last step (which it takes as Euler does), so its count is odd.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected {' or '.join(SOLVERS)}, got {solver}")
    if not shift > 0:
        raise ValueError(f"shift: expected a number above 0, got {shift}")
    if evaluations < 1:
        raise ValueError(f"steps: expected at least 1 network evaluation, got {evaluations}")
    if solver == "heun" and evaluations % 2 == 0:
        raise ValueError(f"steps: the heun solver makes an odd number of network evaluations, got {evaluations}")
    n = (evaluations + 1) // 2 if solver == "heun" else evaluations
    return [shift_time(i / n, shift) for i in range(n + 1)]


def euler(v: Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """x += dt v(x, t); yields the state after each step."""
    for t, s in pairwise(times):
        x = x + (s - t) * v(x, t)
        yield x


def heun(v: Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """x += dt (v(x, t) + v(x + dt v(x, t), t + dt)) / 2, an Euler step at the end (EDM, arXiv 2206.00364, algorithm 1)."""
    for t, s in pairwise(times):
        slope = v(x, t)
        guess = x + (s - t) * slope
        x = guess if s == times[-1] else x + (s - t) * (slope + v(guess, s)) / 2
        yield x


SOLVERS = {"euler": euler, "heun": heun}
