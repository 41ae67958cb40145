"""The small network that draws one token given its hidden state, and the ways between a token and noise.

MAR (arXiv 2406.11838), DDPM (arXiv 2006.11239), flow matching (arXiv 2210.02747).

Letters: m tokens, K noise draws a token, D channels of a token, C width of a hidden state z, W width of the head; t time,
0 noise, 1 data, and DDPM's steps n = N (1 - t), 0 data to N noise; a, b the shares of data and of noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unimodal_tokenizers import diffusion
from unimodal_tokenizers.base import precise
from unimodal_tokenizers.diffusion import STEPS

Estimate = Callable[[Tensor, float], Tensor]  # what the head says of x at t


@runtime_checkable
class HeadSettings(Protocol):
    """What of a sampler's settings a head is drawn with: `TokenDiffusionSettings`, whose file imports this one."""

    @property
    def head_steps(self) -> int:
        """Evaluations a token, exactly."""

    @property
    def solver(self) -> str | None:
        """One of the noising's own; None: its first."""

    @property
    def shift(self) -> float:
        """Of a flow's times."""

    @property
    def temperature(self) -> float:
        """Deviation of what is drawn at random."""


class HeadNoising(ABC):
    """A way between a token and noise: what the head learns, and how a token is drawn with it."""

    solvers: ClassVar[tuple[str, ...]]  # the first is what is taken where none is named

    def check(self, settings: HeadSettings) -> None:
        """Refuse what `solve` could not do.

        Raises:
            ValueError: naming the setting, what was expected, and what came.
        """
        if settings.solver not in (None, *self.solvers):
            listed = " or ".join(self.solvers)
            raise ValueError(f"solver: expected {listed} of a {type(self).__name__}, got {settings.solver}")

    @abstractmethod
    def draw_time(self, shape: Sequence[int], rng: torch.Generator) -> Float[Tensor, "m K"]:
        """Training times, on the host."""

    @abstractmethod
    def noised(
        self, noise: Float[Tensor, "m D"], data: Float[Tensor, "m D"], t: Float[Tensor, "m 1"]
    ) -> Float[Tensor, "m D"]:
        """x_t."""

    @abstractmethod
    def target(
        self, noise: Float[Tensor, "m D"], data: Float[Tensor, "m D"], t: Float[Tensor, "m 1"]
    ) -> Float[Tensor, "m D"]:
        """What the head is to say of x_t."""

    @abstractmethod
    def solve(
        self,
        estimate: Estimate,
        noise: Float[Tensor, "m D"],
        draw: Callable[[], Tensor],
        settings: HeadSettings,
    ) -> Float[Tensor, "m D"]:
        """Tokens from noise, in exactly `head_steps` evaluations; `draw` gives more noise, each token's its own."""


class HeadFlow(HeadNoising):
    """The straight path, whose velocity is learned.

    Args:
        mean: of the logit-normal that training times are drawn from.
        std: likewise.
    """

    solvers = ("euler", "heun")

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        diffusion.check_times(mean, std, name="noising.")
        self.mean, self.std = mean, std

    def draw_time(self, shape: Sequence[int], rng: torch.Generator) -> Float[Tensor, "m K"]:
        """As `diffusion.logit_normal_time`."""
        return (self.mean + self.std * torch.randn(*shape, generator=rng)).sigmoid()

    def noised(
        self, noise: Float[Tensor, "m D"], data: Float[Tensor, "m D"], t: Float[Tensor, "m 1"]
    ) -> Float[Tensor, "m D"]:
        """(1 - t) noise + t data."""
        return diffusion.interpolate(noise, data, t)

    def target(
        self, noise: Float[Tensor, "m D"], data: Float[Tensor, "m D"], t: Float[Tensor, "m 1"]
    ) -> Float[Tensor, "m D"]:
        """v."""
        return diffusion.velocity(noise, data)

    def solve(
        self,
        estimate: Estimate,
        noise: Float[Tensor, "m D"],
        draw: Callable[[], Tensor],
        settings: HeadSettings,
    ) -> Float[Tensor, "m D"]:
        """dx/dt = v from noise of deviation `temperature`; nothing more is drawn."""
        solver = settings.solver or self.solvers[0]
        times = diffusion.sampling_times(settings.head_steps, settings.shift, solver)
        *_, x = diffusion.SOLVERS[solver](estimate, settings.temperature * noise, times)
        return x


class HeadDiffusion(HeadNoising):
    """DDPM: the noise is learned, and tokens are drawn by its ancestral sampler (MAR, whose variances are learned too).

    Args:
        schedule: "cosine" (MAR), "linear" or "scaled_linear".
    """

    solvers = ("ddpm",)

    def __init__(self, schedule: diffusion.NoiseSchedule = "cosine") -> None:
        self.schedule = diffusion.Schedule(schedule)

    def check(self, settings: HeadSettings) -> None:
        """Its steps are those of the schedule."""
        super().check(settings)
        steps, most = settings.head_steps, self.schedule.noisiest
        if steps > most:
            raise ValueError(f"head_steps: expected at most {most} of the schedule, got {steps}")
        if settings.shift != 1:
            raise ValueError(f"shift: ddpm goes by its own schedule, expected 1, got {settings.shift}")

    def draw_time(self, shape: Sequence[int], rng: torch.Generator) -> Float[Tensor, "m K"]:
        """The step is uniform from 1 to N."""
        return 1 - torch.randint(1, STEPS + 1, tuple(shape), generator=rng) / STEPS

    def noised(
        self, noise: Float[Tensor, "m D"], data: Float[Tensor, "m D"], t: Float[Tensor, "m 1"]
    ) -> Float[Tensor, "m D"]:
        """a data + b noise."""
        return diffusion.diffuse(noise, data, *self.schedule.at(t, data))

    def target(
        self, noise: Float[Tensor, "m D"], data: Float[Tensor, "m D"], t: Float[Tensor, "m 1"]
    ) -> Float[Tensor, "m D"]:
        """The noise (DDPM, eq. 14)."""
        return noise

    def solve(
        self,
        estimate: Estimate,
        noise: Float[Tensor, "m D"],
        draw: Callable[[], Tensor],
        settings: HeadSettings,
    ) -> Float[Tensor, "m D"]:
        """DDPM's eq. 11 over evenly chosen steps; what is added is `temperature` times what DDPM adds, as MAR has it."""
        steps = settings.head_steps
        points = [round(self.schedule.noisiest * (1 - i / steps)) for i in range(steps + 1)]

        def parts(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
            return diffusion.from_noise(x, estimate(x, 1 - n / STEPS), *self.schedule.of(n))

        *_, x = diffusion.ddim(parts, noise, self.schedule, points, 1.0, lambda: settings.temperature * draw())
        return x


class TokenHead(nn.Module):
    """What a token's noising asks for, given x_t, t and z: a residual MLP whose norms they modulate (MAR, section 4.1).

    Args:
        dim: channels D of a token.
        condition: width C of a hidden state.
        width: W of the head.
        depth: residual blocks.
    """

    def __init__(self, dim: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.x_in = nn.Linear(dim, width)
        self.z_in = nn.Linear(condition, width)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, dim)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, z: Float[Tensor, "*#rest C"], x: Float[Tensor, "*#rest D"], t: Float[Tensor, "*#rest"]
    ) -> Float[Tensor, "*rest D"]:
        """Velocities or noises, in fp32 or better."""
        weight = self.x_in.weight
        time = self.time_in(diffusion.timestep_embedding(t.flatten()).to(weight.dtype))
        c = F.silu(self.z_in(z.to(weight.dtype)) + time.view(*t.shape, time.shape[-1]))  # (*rest, W)
        h = self.x_in(x.to(weight.dtype))  # (*rest, W)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        out = self.out(modulate(self.norm(h), shift, scale))
        return precise(out)


class HeadBlock(nn.Module):
    """h + gate * MLP((1 + scale) LN(h) + shift), modulated by the condition (adaLN-Zero, DiT, arXiv 2212.09748)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Float[Tensor, "*#rest W"], c: Float[Tensor, "*#rest W"]) -> Float[Tensor, "*rest W"]:
        """One residual step."""
        shift, scale, gate = self.modulation(c).chunk(3, dim=-1)
        return h + gate * self.mlp(modulate(self.norm(h), shift, scale))


def modulate(
    h: Float[Tensor, "*#rest W"], shift: Float[Tensor, "*#rest W"], scale: Float[Tensor, "*#rest W"]
) -> Float[Tensor, "*rest W"]:
    """(1 + scale) h + shift."""
    return h * (1 + scale) + shift
