"""The mathematics that flow and diffusion share: time, its shift, the straight path between noise and data, and DDPM's.

t = 0 is noise, t = 1 is data. Transfusion (arXiv 2408.11039), Stable Diffusion 3 (arXiv 2403.03206) and DDPM (arXiv
2006.11239) count the other way; importers convert at the edge.

Letters: T tokens, D channels; n DDPM's steps, 0 data to N noise; a, b the shares of data and of noise, a^2 + b^2 = 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def logit_normal_time(rng: np.random.Generator, mean: float = 0.0, std: float = 1.0) -> float:
    """t = sigmoid(n), n ~ N(mean, std): more weight on the middle of the path (SD3, section 3.1)."""
    return 1.0 / (1.0 + math.exp(min(-rng.normal(mean, std), 700.0)))  # above that exp overflows


def shift_time(t: float, shift: float) -> float:
    """Move times towards the noise end: the noise fraction u = 1 - t becomes s u / (1 + (s - 1) u) (SD3, eq. 23)."""
    return t / (1.0 + (shift - 1.0) * (1.0 - t))  # the same in t: exact at both ends


@dataclass(frozen=True)
class RootShift:
    """A shift by an image's tokens n: s = sqrt(n / tokens), so that as much of a larger image is hidden (SD3, eq. 23).

    Args:
        tokens: of the images that are not shifted.
    """

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"shift.tokens: expected at least 1, got {self.tokens}")

    def __call__(self, tokens: int) -> float:
        """s of images of that many tokens."""
        return math.sqrt(tokens / self.tokens)


@dataclass(frozen=True)
class LogShift:
    """A shift by an image's tokens n: log s is on a line through two points (FLUX.1, whose numbers are the defaults).

    Args:
        small: n and log s of small images.
        large: of large ones.
    """

    small: tuple[int, float] = (256, 0.5)
    large: tuple[int, float] = (4096, 1.15)

    def __post_init__(self) -> None:
        if not 0 < self.small[0] < self.large[0]:
            raise ValueError(f"shift: expected 0 < small < large tokens, got {self.small[0]} and {self.large[0]}")

    def __call__(self, tokens: int) -> float:
        """s of images of that many tokens."""
        (n0, y0), (n1, y1) = self.small, self.large
        return math.exp(y0 + (y1 - y0) * (tokens - n0) / (n1 - n0))


Shift = float | RootShift | LogShift


def shift_of(shift: Shift, tokens: int) -> float:
    """s for images of that many tokens."""
    return shift(tokens) if callable(shift) else shift


def check_times(mean: float, std: float, shift: Shift = 1.0, name: str = "time_") -> None:
    """ValueError, naming the setting, for what training times cannot be drawn with."""
    if not callable(shift) and not 0 < shift < math.inf:
        raise ValueError(f"{name}shift: expected a number above 0, got {shift}")
    if not math.isfinite(mean):
        raise ValueError(f"{name}mean: expected a number, got {mean}")
    if not 0 <= std < math.inf:
        raise ValueError(f"{name}std: expected 0 or more, got {std}")


def interpolate(
    noise: Float[Tensor, "*shape"], data: Float[Tensor, "*shape"], t: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """x_t = (1 - t) noise + t data (Flow Matching, arXiv 2210.02747, the optimal transport path with sigma_min = 0)."""
    return (1 - t) * noise + t * data


def velocity(noise: Float[Tensor, "*shape"], data: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """v = dx_t/dt = data - noise."""
    return data - noise


NEAREST = 0.05
"""Least 1 - t that a difference from the data is divided by (JiT, arXiv 2511.13720)."""


def data_to_velocity(
    data: Float[Tensor, "*#shape"], x: Float[Tensor, "*#shape"], t: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """The velocity of a point on its way to the data: (data - x) / (1 - t), no larger near the data than at `NEAREST`."""
    return (data - x) / (1 - t).clamp_min(NEAREST)


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
    """x += dt (v(x, t) + v(x + dt v(x, t), t + dt)) / 2, an Euler step at the end (EDM, arXiv 2206.00364)."""
    for t, s in pairwise(times):
        slope = v(x, t)
        guess = x + (s - t) * slope
        x = guess if s == times[-1] else x + (s - t) * (slope + v(guess, s)) / 2
        yield x


SOLVERS = {"euler": euler, "heun": heun}


NoiseSchedule = Literal["linear", "scaled_linear", "cosine"]


FAINTEST = 0.006
"""Least share of the data at which sampling begins (DPM-Solver++ begins cosine schedules at a log of it of -5.1): errors of
a predicted noise are divided by it."""


def alpha_bars(schedule: NoiseSchedule, steps: int = 1000) -> Float[np.ndarray, "{steps}+1"]:
    """abar_n = prod (1 - beta_i), i = 1 .. n; abar_0 = 1 is the data, and the last is nearly noise.

    "linear": beta from 1e-4 to 0.02 (DDPM). "scaled_linear": squares of what is linear from sqrt(0.00085) to
    sqrt(0.012) (latent diffusion, arXiv 2112.10752). "cosine": abar_n = f(n) / f(0), f = cos^2, each beta at most 0.999
    (Improved DDPM, arXiv 2102.09672). The first two are of 1000 steps.
    """
    if schedule == "linear":
        betas = np.linspace(1e-4, 0.02, steps)
    elif schedule == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2
    elif schedule == "cosine":
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    else:
        raise ValueError(f"schedule: expected linear, scaled_linear or cosine, got {schedule}")
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


STEPS = 1000
"""N of every published schedule."""


class Schedule:
    """DDPM's steps n, 0 data to N noise. Outside, time is t = 1 - n / N: 0 noise, 1 data, as everywhere.

    Attributes:
        shares: a_n in float64: exact whatever the weights' type.
        noisiest: n at which sampling begins.
    """

    def __init__(self, name: NoiseSchedule) -> None:
        self.shares = np.sqrt(alpha_bars(name, STEPS))
        self.noisiest = int(np.flatnonzero(self.shares >= FAINTEST)[-1])

    def at(self, t: Float[Tensor, "#T 1"], like: Tensor) -> tuple[Float[Tensor, "#T 1"], Float[Tensor, "#T 1"]]:
        """a and b at times that are whole steps, in the type of `like`."""
        n = ((1 - t.double()) * STEPS).round().long()
        a = torch.from_numpy(self.shares).to(t.device)[n]
        return a.to(like.dtype), (1 - a**2).sqrt().to(like.dtype)

    def of(self, n: int) -> tuple[float, float]:
        """a and b of a step."""
        return float(self.shares[n]), math.sqrt(1 - self.shares[n] ** 2)


def diffuse(
    noise: Float[Tensor, "T D"], data: Float[Tensor, "T D"], a: Float[Tensor, "#T 1"], b: Float[Tensor, "#T 1"]
) -> Float[Tensor, "T D"]:
    """x_n = a data + b noise, a = sqrt(abar_n), b = sqrt(1 - abar_n) (DDPM, eq. 4)."""
    return a * data + b * noise


def angular_velocity(
    noise: Float[Tensor, "T D"], data: Float[Tensor, "T D"], a: Float[Tensor, "#T 1"], b: Float[Tensor, "#T 1"]
) -> Float[Tensor, "T D"]:
    """v = dx/dphi = a noise - b data, where a = cos phi and b = sin phi (arXiv 2202.00512)."""
    return a * noise - b * data


def from_noise(x: Tensor, noise: Tensor, a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """Data and noise of x_n and its noise: data = (x - b noise) / a."""
    return (x - b * noise) / a, noise


def from_angular_velocity(x: Tensor, v: Tensor, a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """Data and noise of x_n and its v: data = a x - b v, noise = b x + a v (arXiv 2202.00512)."""
    return a * x - b * v, b * x + a * v


def from_data(x: Tensor, data: Tensor, a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """Data and noise of x_n and its data: noise = (x - a data) / b."""
    return data, (x - a * data) / b


def ddim(
    parts: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    x: Float[Tensor, "T D"],
    schedule: Schedule,
    points: Sequence[int],
    eta: float,
    draw: Callable[[], Tensor],
) -> Iterator[Float[Tensor, "T D"]]:
    """x_m = a_m data + sqrt(b_m^2 - s^2) noise + s z (DDIM, arXiv 2010.02502, eq. 12), s by eq. 16; eta = 1 is DDPM's eq. 7.

    Args:
        parts: the data and the noise that x_n is taken to come from.
        x: where it begins.
        schedule: of which `points` are.
        points: n, from noise to 0.
        eta: how much of the noise is drawn anew.
        draw: z, asked for where some of it is added: at no last step.
    """
    for n, m in pairwise(points):
        data, noise = parts(x, n)
        (a_n, a_m), (b2_n, b2_m) = schedule.shares[[n, m]], 1 - schedule.shares[[n, m]] ** 2
        s = eta * math.sqrt(b2_m / b2_n * (1 - (a_n / a_m) ** 2))
        x = a_m * data + math.sqrt(b2_m - s**2) * noise
        if eta and m:
            x = x + s * draw().to(x)
        yield x


def timestep_embedding(t: Float[Tensor, " N"], dim: int = 256) -> Float[Tensor, "N {dim}"]:
    """Sines and cosines of 1000 t (DDPM, arXiv 2006.11239, whose times are counted to 1000)."""
    half = dim // 2
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angle = 1000.0 * t[:, None] * frequency  # (N, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)
