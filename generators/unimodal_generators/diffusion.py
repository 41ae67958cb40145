"""Denoising diffusion inside the transformer: what is read off a noised image is its noise (Transfusion as published).

Transfusion (arXiv 2408.11039), DDPM (arXiv 2006.11239), DDIM (arXiv 2010.02502).

Letters: T tokens of all images, D channels of a token, G guidance branches; n steps of the schedule, 0 data to N noise;
a, b the shares of data and noise, a^2 + b^2 = 1. Outside, time is t = 1 - n / N: 0 noise, 1 data, as everywhere.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unimodal_generators.base import DenoisingSettings, SamplingSettings
from unimodal_generators.denoising import DenoisingGenerator, Estimate, TimeInput, draw_noise
from unimodal_generators.patch_coders import LinearCoder, PatchCoder
from unimodal_generators.schedulers import MULTISTEP, check_solver, run_diffusion_scheduler
from unimodal_tokenizers import diffusion
from unimodal_tokenizers.base import Grid, TokenLayout
from unimodal_tokenizers.diffusion import STEPS


@dataclass(frozen=True)
class DiffusionSettings(DenoisingSettings):
    """How a diffusion image is sampled.

    Args:
        steps: network evaluations, exactly.
        solver: ddim, heun (of dx/dphi = v, a = cos phi), or a scheduler of diffusers by its class name (`MULTISTEP`).
        eta: of ddim, how much of the noise is drawn anew: 0 nothing, 1 as DDPM's ancestral sampler does.
        clip: largest value the data are taken to have, as DDPM does with pixels (1.0); None leaves them. Predicted noise
            needs it where next to nothing is left of the data, and errors are divided by that.
    """

    steps: int = 50
    solver: str = "ddim"
    eta: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_solver(self.solver, ("ddim", "heun"), MULTISTEP, "diffusion")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected a share from 0 to 1, got {self.eta}")
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta: {self.solver} draws no noise, expected 0, got {self.eta}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: expected none, or a number above 0, got {self.clip}")
        self.points(STEPS)  # refuses what cannot be

    def points(self, noisiest: int) -> list[int]:
        """n from the noisiest to 0, evenly ("trailing", arXiv 2305.08891, table 2).

        Heun's last step is of the first order, so it is the smallest there is: from 1.
        """
        if not 1 <= self.steps <= noisiest:
            raise ValueError(f"steps: expected 1 to {noisiest} network evaluations, got {self.steps}")
        heun = self.solver == "heun"
        times = diffusion.sampling_times(self.steps, 1.0, "heun" if heun else "euler")
        if heun and self.steps > 1:
            return [*(round(n) for n in np.linspace(noisiest, 1, len(times) - 1)), 0]
        return [round(noisiest * (1 - t)) for t in times]


class Diffusion(DenoisingGenerator):
    """Learns to tell the noise of a noised copy; samples from noise to data step by step.

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        schedule: "cosine" (as Transfusion), "linear" (DDPM) or "scaled_linear" (latent diffusion).
        predicts: what the network gives and what the loss is of: the noise (DDPM, eq. 14), "v" (arXiv 2202.00512), or
            the data.
        time: how the network is told the time: "add", "token" or "adaln"; see `DenoisingGenerator`.
        coder: between token vectors and the backbone.
        bidirectional: whether an image's patches see each other, or only those before them.
        sampling: defaults of the sampler.
    """

    settings: ClassVar = DiffusionSettings

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        schedule: diffusion.NoiseSchedule = "cosine",
        predicts: Literal["noise", "v", "data"] = "noise",
        time: TimeInput = "add",
        coder: Callable[[TokenLayout, int], PatchCoder] = LinearCoder,
        bidirectional: bool = True,
        sampling: DiffusionSettings = DiffusionSettings(),
    ) -> None:
        super().__init__(layout, width, time, coder, bidirectional, sampling)
        self.predicts = predicts
        self.schedule = diffusion.Schedule(schedule)

    def draw_time(self, grid: Grid, rng: np.random.Generator) -> float:
        """n is uniform from 1 to N (DDPM)."""
        return 1 - int(rng.integers(1, STEPS + 1)) / STEPS

    def noised(
        self, noise: Float[Tensor, "T D"], data: Float[Tensor, "T D"], t: Float[Tensor, "#T 1"]
    ) -> Float[Tensor, "T D"]:
        """x_n."""
        return diffusion.diffuse(noise, data, *self.schedule.at(t, data))

    def target(
        self, noise: Float[Tensor, "T D"], data: Float[Tensor, "T D"], t: Float[Tensor, "#T 1"]
    ) -> Float[Tensor, "T D"]:
        """The noise, v, or the data."""
        if self.predicts == "v":
            return diffusion.angular_velocity(noise, data, *self.schedule.at(t, data))
        return noise if self.predicts == "noise" else data

    def check_sampling(self, settings: SamplingSettings, grids: Sequence[Grid]) -> None:
        """At most a step for every level of noise."""
        super().check_sampling(settings, grids)
        assert isinstance(settings, DiffusionSettings)
        settings.points(self.schedule.noisiest)

    def solve(
        self,
        estimate: Estimate,
        noise: Float[Tensor, "T D"],
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
    ) -> Iterator[tuple[float, Float[Tensor, "T D"]]]:
        """Down the schedule."""
        assert isinstance(settings, DiffusionSettings)
        points = settings.points(self.schedule.noisiest)

        def parts(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
            """The data and the noise that x_n is taken to come from."""
            a, b = self.schedule.of(n)
            given = {"noise": diffusion.from_noise, "v": diffusion.from_angular_velocity, "data": diffusion.from_data}
            data, noise = given[self.predicts](x, estimate(x, 1 - n / STEPS), a, b)
            clip = settings.clip
            return (data, noise) if clip is None else diffusion.from_data(x, data.clamp(-clip, clip), a, b)

        if settings.solver == "ddim":
            draw = partial(draw_noise, grids, rngs, self.layout.dim)
            states = diffusion.ddim(parts, noise, self.schedule, points, settings.eta, draw)
        elif settings.solver == "heun":
            states = self._heun(parts, noise, points)
        else:
            sigmas = [math.sqrt(1 / self.schedule.shares[n] ** 2 - 1) for n in points]
            states = run_diffusion_scheduler(settings.solver, lambda x, i: parts(x, points[i])[0], noise, sigmas)
        for n, x in zip(points[1:], states, strict=True):
            yield 1 - n / STEPS, x

    def _heun(
        self, parts: Callable[[Tensor, int], tuple[Tensor, Tensor]], x: Float[Tensor, "T D"], points: Sequence[int]
    ) -> Iterator[Float[Tensor, "T D"]]:
        """dx/dphi = v by Heun's method; in phi the path has an even speed at both ends, in sigma = b / a it has not."""
        angles = [math.acos(self.schedule.shares[n]) for n in points]
        at = dict(zip(angles, points, strict=True))

        def v(x: Tensor, phi: float) -> Tensor:
            data, noise = parts(x, at[phi])
            return math.cos(phi) * noise - math.sin(phi) * data

        return diffusion.SOLVERS["heun"](v, x, angles)
