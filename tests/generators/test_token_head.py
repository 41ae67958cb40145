"""The head of token diffusion: its noisings in closed form, what it learns, which solvers it has."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from shape_checks import first_checked
from token_diffusion_cases import DDPM, LAYOUT, made, planned, tokens
from torch import Tensor, nn

from unimodal_generators import HeadDiffusion, HeadFlow, TokenDiffusion, TokenDiffusionSettings
from unimodal_generators.base import Embeddings, Grid, ImageTokens
from unimodal_tokenizers.base import TokenLayout
from unimodal_tokenizers.diffusion import alpha_bars


@pytest.mark.parametrize(
    ("settings", "message"), [({"std": -1.0}, r"std: .* got -1"), ({"mean": math.nan}, r"mean: .* nan")]
)
def test_times_that_cannot_be_drawn_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=rf"noising\.{message}"):
        HeadFlow(**settings)


class Gaussian(nn.Module):
    """The exact velocity of data N(mu, s^2); the branch of guidance is told from the first channel of z."""

    def __init__(self, mu: float, s: float) -> None:
        super().__init__()
        self.mu, self.s = mu, s

    def forward(self, z: Tensor, x: Tensor, t: Tensor) -> Tensor:
        spread = (1 - t) ** 2 + (t * self.s) ** 2
        v = self.mu + (t * self.s**2 - (1 - t)) / spread * (x - t * self.mu)
        return v.expand(*z.shape[:-1], x.shape[-1])


def gaussian_error(solver: str, steps: int, temperature: float = 1.0) -> float:
    generator = made().double()
    generator.head = Gaussian(0.7, 0.3)  # type: ignore[assignment]
    noise = torch.randn(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = TokenDiffusionSettings(head_steps=steps, solver=solver, temperature=temperature)  # type: ignore[arg-type]
    drawn = generator.draw(torch.zeros(1, 50, 32, dtype=torch.float64), noise, settings, [50], [], 0.0)
    return float((drawn - (0.7 + 0.3 * temperature * noise)).square().mean().sqrt())


def test_a_gaussian_token_in_closed_form() -> None:
    """The straight path takes a Gaussian's noise to mu + s noise; temperature shrinks it about the mean."""
    assert gaussian_error("heun", 99) < 1e-3
    assert gaussian_error("euler", 200) < 1e-2
    assert gaussian_error("heun", 99, temperature=0.5) < 1e-3
    assert gaussian_error("euler", 400) / gaussian_error("euler", 200) == pytest.approx(1 / 2, rel=0.1)
    assert gaussian_error("heun", 199) / gaussian_error("heun", 99) == pytest.approx(1 / 4, rel=0.2)


class GaussianNoise(Gaussian):
    """The expected noise of DDPM's x_n = a data + b noise, data N(mu, s^2): b (x - a mu) / (a^2 s^2 + b^2)."""

    def __init__(self, mu: float, s: float, noising: HeadDiffusion) -> None:
        super().__init__(mu, s)
        self.shares = noising.schedule.shares

    def forward(self, z: Tensor, x: Tensor, t: Tensor) -> Tensor:
        a = self.shares[round(1000 * (1 - t.flatten()[0].item()))]
        noise = (1 - a**2) ** 0.5 * (x - a * self.mu) / (a**2 * self.s**2 + 1 - a**2)
        return noise.expand(*z.shape[:-1], x.shape[-1])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ddpm_draws_a_gaussian_by_its_moments(schedule: Any) -> None:
    """4,000 tokens of two channels; less noise is added where the temperature is lower, and none where it is 0."""
    noising = HeadDiffusion(schedule)
    generator = TokenDiffusion(TokenLayout("continuous", 2, 1), 8, noising=noising, sampling=DDPM).double()
    generator.head = GaussianNoise(0.7, 0.3, noising)  # type: ignore[assignment]
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def drawn(temperature: float, seed: int = 0) -> Tensor:
        settings, rng = DDPM.override(head_steps=250, temperature=temperature), torch.Generator().manual_seed(seed)
        return generator.draw(torch.zeros(1, 4000, 8, dtype=torch.float64), noise, settings, [4000], [rng], 0.0)

    whole, cool, still = drawn(1.0), drawn(0.7), drawn(0.0)
    torch.testing.assert_close(whole.mean(0), torch.full((2,), 0.7, dtype=torch.float64), atol=0.02, rtol=0)
    torch.testing.assert_close(whole.std(0), torch.full((2,), 0.3, dtype=torch.float64), atol=0.02, rtol=0)
    assert (still.std(0) < cool.std(0)).all()
    assert (cool.std(0) < 0.9 * whole.std(0)).all()
    assert torch.equal(still, drawn(0.0, seed=1))  # where it begins is all that is drawn
    assert not torch.equal(whole, drawn(1.0, seed=1))


def test_what_a_diffusion_head_learns_is_the_noise() -> None:
    """DDPM's eq. 14 written out, at drawn steps of the schedule."""
    generator = made(noising=HeadDiffusion(), sampling=DDPM)
    corrupted = generator.corrupt(tokens(), planned(generator))
    assert corrupted.noise is not None
    assert corrupted.head_time is not None
    assert corrupted.targets is not None
    hidden = torch.randn(27, 32, generator=torch.Generator().manual_seed(3))
    abar = alpha_bars("cosine")
    total, steps = 0.0, set()
    for row, i in enumerate(corrupted.where.tolist()):  # type: ignore[union-attr]
        for noise, t in zip(corrupted.noise[row], corrupted.head_time[row], strict=True):
            n = round(1000 * (1 - float(t)))
            steps.add(n)
            x = float(abar[n]) ** 0.5 * corrupted.targets[row] + float(1 - abar[n]) ** 0.5 * noise
            total += float((generator.head(hidden[i], x, t) - noise).square().mean()) / len(corrupted.noise[row])
    term = generator.loss(hidden, Embeddings(hidden), corrupted)["image"]
    assert float(term.sum) == pytest.approx(total, rel=1e-4)
    assert len(steps) > 20
    assert min(steps) >= 1
    assert max(steps) <= 1000


@pytest.mark.slow
@pytest.mark.parametrize("noising", [None, HeadDiffusion()], ids=["flow", "ddpm"])
def test_a_head_learns_the_tokens_of_each_hidden_state(noising: HeadDiffusion | None) -> None:
    """Two hidden states, two Gaussians: a trained head draws each of them."""
    torch.manual_seed(0)
    generator = TokenDiffusion(
        TokenLayout("continuous", 2, 1), 2, order="raster", head_width=48, head_depth=2, noising=noising, multiply=8,
        sampling=TokenDiffusionSettings() if noising is None else DDPM.override(head_steps=100),
    )  # fmt: skip
    optimizer = torch.optim.Adam(generator.head.parameters(), 3e-3)
    slower = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    z = torch.eye(2).repeat(16, 1)
    mean, deviation = torch.tensor([[1.0, -1.0], [-0.5, 0.5]]), torch.tensor([[0.2], [0.6]])
    grid, rng = Grid(1, 32), np.random.default_rng(0)
    for _ in first_checked(range(400 if noising is None else 600)):
        data = ImageTokens((mean + deviation * torch.randn(16, 2, 2)).flatten(0, 1), (grid,))
        corrupted = generator.corrupt(data, generator.plan(grid, rng))
        term = generator.loss(z, Embeddings(z), corrupted)["image"]
        optimizer.zero_grad()
        (term.sum / term.count).backward()
        optimizer.step()
        slower.step()
    with torch.no_grad():
        drawn = generator.draw(
            torch.eye(2).repeat(2000, 1)[None],
            torch.randn(4000, 2),
            generator.sampling,
            [4000],
            [torch.Generator()],
            0.0,
        )
    drawn = drawn.unflatten(0, (2000, 2))
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.12, rtol=0)
    torch.testing.assert_close(drawn.std(0), deviation.expand(2, 2), atol=0.15, rtol=0)


def test_a_fresh_head_predicts_no_velocity() -> None:
    head = TokenDiffusion(LAYOUT, 32).head
    assert head(torch.randn(3, 32), torch.randn(3, 12), torch.rand(3)).abs().max() == 0
    assert head.bfloat16()(torch.randn(3, 32), torch.randn(3, 12), torch.rand(3)).dtype == torch.float32


def test_every_step_of_the_head_is_guided() -> None:
    generator = made().double()
    z = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = TokenDiffusionSettings(guidance=3.0, head_steps=3, temperature=0.8, renorm="channel")
    x = 0.8 * noise
    for i in range(3):
        c, u = (generator.head(branch, x, x.new_full((), i / 3)) for branch in z)
        v = u + 3.0 * (c - u)
        x = x + v * (c.norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True)).clamp(0, 1) / 3
    torch.testing.assert_close(generator.draw(z, noise, settings, [1, 2], [], 0.5), x)


def test_a_solver_of_the_other_noising_is_refused() -> None:
    assert made(noising=HeadDiffusion()).sampling.solver is None  # its own
    with pytest.raises(ValueError, match="solver: expected ddpm of a HeadDiffusion, got euler"):
        made(noising=HeadDiffusion(), sampling=TokenDiffusionSettings(solver="euler"))
    with pytest.raises(ValueError, match="head_steps: expected at most 996 of the schedule, got 997"):
        made(noising=HeadDiffusion(), sampling=TokenDiffusionSettings(head_steps=997))
    with pytest.raises(ValueError, match=r"shift: ddpm .* expected 1, got 2\.0"):
        made(noising=HeadDiffusion(), sampling=TokenDiffusionSettings(shift=2.0))
    with pytest.raises(ValueError, match="solver: expected euler or heun of a HeadFlow, got ddpm"):
        made(sampling=DDPM)
