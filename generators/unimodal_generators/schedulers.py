"""Sampling with the schedulers of diffusers, which is imported when one is asked for.

Diffusers counts sigma = 1 - t from noise to data and takes velocities as noise - data; of DDPM's path, sigma = b / a. Its
own spacings of sigmas waste an evaluation or end early, so they are given.

Letters: T tokens of all images, D channels of a token, K solver steps.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""Solvers in the logarithm of the signal-to-noise ratio: of straight paths and of DDPM's. (DEIS cannot end at the data.)"""

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", *MULTISTEP)
"""Those that solve dx/dt = v. None of them draws noise: an image depends on its own generator alone."""

NOISIEST = 1 - 1e-6  # sigma at which they begin: their logarithm of 1 - sigma is finite there


def check_solver(solver: str, own: Sequence[str], schedulers: Sequence[str], kind: str) -> None:
    """Refuse a solver that is neither ours nor one of those schedulers, and a scheduler that is not installed."""
    if solver in own:
        return
    if solver not in schedulers:
        known = f"{', '.join(own)} or one of these {kind} schedulers of diffusers: {', '.join(schedulers)}"
        raise ValueError(f"solver: expected {known}, got {solver}")
    try:
        importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError(f"solver: {solver} needs diffusers, which is not installed") from error


def run_flow_scheduler(
    name: str, velocity: Callable[[Tensor, float], Tensor], x: Float[Tensor, "T D"], times: Sequence[float]
) -> Iterator[Float[Tensor, "T D"]]:
    """Solve dx/dt = v from noise; yields the state after each of the K steps between `times`."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if name in MULTISTEP else {}
    sigmas = [min(1 - t, NOISIEST) for t in times]
    return _run(_scheduler(name, flow), lambda x, i: -velocity(x, times[i]), x, sigmas)


def run_diffusion_scheduler(
    name: str, data: Callable[[Tensor, int], Tensor], x: Float[Tensor, "T D"], sigmas: Sequence[float]
) -> Iterator[Float[Tensor, "T D"]]:
    """From noise to data along DDPM's path; `data(x, i)` is what x at `sigmas[i]` = b / a is taken to come from."""
    return _run(_scheduler(name, {"prediction_type": "sample"}), data, x, sigmas)


def _scheduler(name: str, settings: dict[str, Any]) -> Any:
    return getattr(importlib.import_module("diffusers"), name)(**settings)


def _run(
    scheduler: Any, output: Callable[[Tensor, int], Tensor], x: Float[Tensor, "T D"], sigmas: Sequence[float]
) -> Iterator[Float[Tensor, "T D"]]:
    """`output(x, i)` is the network's at `sigmas[i]`. A scheduler of order 2 evaluates it twice a step, but for the last."""
    points = [0, *(i for i in range(1, len(sigmas) - 1) for _ in range(scheduler.order))]
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor([*(sigmas[i] for i in points), sigmas[-1]], dtype=torch.float64)
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]  # names of the points: nothing is computed of them
    scheduler.set_begin_index(0)
    for evaluation, i in enumerate(points, start=1):
        x = scheduler.step(output(x, i), scheduler.timesteps[evaluation - 1], x, return_dict=False)[0]
        if evaluation % scheduler.order == 0 or evaluation == len(points):
            yield x
