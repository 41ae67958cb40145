"""Flow matching inside the transformer: what is read off a noised image is its velocity.

BAGEL (arXiv 2505.14683), JanusFlow (arXiv 2411.07975), LlamaFusion (arXiv 2412.15188).

Letters: T tokens of all images, D channels of a token, C width, G guidance branches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unimodal_generators.base import DenoisingSettings, SamplingSettings
from unimodal_generators.denoising import DenoisingGenerator, Estimate, TimeInput
from unimodal_generators.patch_coders import LinearCoder, PatchCoder
from unimodal_generators.schedulers import FLOW_SCHEDULERS, check_solver, run_flow_scheduler
from unimodal_tokenizers import diffusion
from unimodal_tokenizers.base import Grid, TokenLayout


@dataclass(frozen=True)
class FlowSettings(DenoisingSettings):
    """How a flow image is sampled.

    Args:
        steps: network evaluations, exactly.
        solver: euler, heun, or a flow scheduler of diffusers by its class name (`FLOW_SCHEDULERS`).
        shift: above 1, more steps near the noise; a number, or a rule of how many tokens an image has.
    """

    steps: int = 20
    solver: str = "euler"
    shift: diffusion.Shift = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_solver(self.solver, tuple(diffusion.SOLVERS), FLOW_SCHEDULERS, "flow")
        self.times(1)  # refuses what cannot be

    def times(self, tokens: int) -> list[float]:
        """The ends of the solver's steps, from noise to data, for images of that many tokens."""
        like = "heun" if "heun" in self.solver.lower() else "euler"  # twice as many evaluations a step, or one
        return diffusion.sampling_times(self.steps, diffusion.shift_of(self.shift, tokens), like)


class Flow(DenoisingGenerator):
    """Learns v = data - noise of a noised copy (rectified flow, arXiv 2209.03003); samples by solving dx/dt = v.

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        time_shift: training times are moved towards the noise by this factor (SD3, section 5.3.2), a number or a rule of
            how many tokens an image has.
        time_draw: how training times are drawn before that: "logit_normal" (SD3, section 3.1) or "uniform" in [0, 1).
        time_mean: of the normal of "logit_normal".
        time_std: likewise.
        time: how the network is told the time: "add", "token" or "adaln"; see `DenoisingGenerator`.
        predicts: what the network gives: the velocity, or the data, whose velocity is (data - x_t) / (1 - t). The loss is
            the velocity's in both cases (JiT, arXiv 2511.13720: data lie near few dimensions, noise does not).
        coder: between token vectors and the backbone.
        bidirectional: whether an image's patches see each other in the backbone, or only those before them.
        sampling: defaults of the sampler.
    """

    settings: ClassVar = FlowSettings

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        time_shift: diffusion.Shift = 1.0,
        time_draw: Literal["logit_normal", "uniform"] = "logit_normal",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        time: TimeInput = "add",
        predicts: Literal["velocity", "data"] = "velocity",
        coder: Callable[[TokenLayout, int], PatchCoder] = LinearCoder,
        bidirectional: bool = True,
        sampling: FlowSettings = FlowSettings(),
    ) -> None:
        super().__init__(layout, width, time, coder, bidirectional, sampling)
        if time_draw == "uniform" and (time_mean, time_std) != (0.0, 1.0):
            raise ValueError(f"time_mean, time_std: expected none with time_draw uniform, got {time_mean}, {time_std}")
        diffusion.check_times(time_mean, time_std, time_shift)
        self.predicts, self.time_draw = predicts, time_draw
        self.time_shift, self.time_mean, self.time_std = time_shift, time_mean, time_std

    def draw_time(self, grid: Grid, rng: np.random.Generator) -> float:
        """A training time, shifted."""
        uniform = self.time_draw == "uniform"
        t = rng.random() if uniform else diffusion.logit_normal_time(rng, self.time_mean, self.time_std)
        return diffusion.shift_time(t, diffusion.shift_of(self.time_shift, grid.length))

    def noised(
        self, noise: Float[Tensor, "T D"], data: Float[Tensor, "T D"], t: Float[Tensor, "#T 1"]
    ) -> Float[Tensor, "T D"]:
        """x_t on the straight path."""
        return diffusion.interpolate(noise, data, t)

    def target(
        self, noise: Float[Tensor, "T D"], data: Float[Tensor, "T D"], t: Float[Tensor, "#T 1"]
    ) -> Float[Tensor, "T D"]:
        """The velocity; near the data as small as `convert` makes it, or the difference would be a bias."""
        v = diffusion.velocity(noise, data)
        return v if self.predicts == "velocity" else v * (1 - t) / (1 - t).clamp_min(diffusion.NEAREST)

    def convert(
        self, out: Float[Tensor, "*G T D"], x: Float[Tensor, "T D"], t: Float[Tensor, "#T 1"]
    ) -> Float[Tensor, "*G T D"]:
        """The velocity at x_t."""
        return out if self.predicts == "velocity" else diffusion.data_to_velocity(out, x, t)

    def solve(
        self,
        estimate: Estimate,
        noise: Float[Tensor, "T D"],
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
    ) -> Iterator[tuple[float, Float[Tensor, "T D"]]]:
        """dx/dt = v."""
        assert isinstance(settings, FlowSettings)
        return solve_flow(estimate, noise, grids, settings)


def solve_flow(
    estimate: Estimate, noise: Float[Tensor, "T D"], grids: Sequence[Grid], settings: FlowSettings
) -> Iterator[tuple[float, Float[Tensor, "T D"]]]:
    """Solve dx/dt = v(x, t) from noise; time and state after each step of the solver."""
    shifts = {diffusion.shift_of(settings.shift, grid.length) for grid in grids}
    if len(shifts) != 1:
        raise ValueError(f"shift: by a rule, images of one call need one number of tokens, got {sorted(set(grids))}")
    times = settings.times(grids[0].length)
    if settings.solver in diffusion.SOLVERS:
        states = diffusion.SOLVERS[settings.solver](estimate, noise, times)
    else:
        states = run_flow_scheduler(settings.solver, estimate, noise, times)
    yield from zip(times[1:], states, strict=True)
