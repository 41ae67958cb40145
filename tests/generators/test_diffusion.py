"""The diffusion generator: what it learns, and that it samples as flow does."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sampling_cases import begun

from unimodal.model import UnifiedModel
from unimodal_generators import Diffusion, DiffusionSettings, FlowSettings
from unimodal_generators.base import Block, Grid, ImageTokens, TokenKind
from unimodal_tokenizers.base import TokenLayout
from unimodal_tokenizers.diffusion import (
    alpha_bars,
    angular_velocity,
    diffuse,
    from_angular_velocity,
    from_data,
    from_noise,
)

LAYOUT = TokenLayout("continuous", dim=12, stride=2)
GRIDS = (Grid(4, 4), Grid(2, 4), Grid(1, 3))
STEPS = (1000, 300, 1)


def corrupted(predicts: str, schedule: str = "cosine"):
    made = Diffusion(LAYOUT, 16, predicts=predicts, schedule=schedule)  # type: ignore[arg-type]
    data = ImageTokens(torch.randn(27, 12, generator=torch.Generator().manual_seed(1)), GRIDS)
    blocks = [
        Block(g, TokenKind.LEARNED, True, True, time=1 - n / 1000, seed=s, n_targets=g.length)
        for g, n, s in zip(GRIDS, STEPS, (5, 6, 2**62), strict=True)
    ]
    noise = torch.cat([torch.randn(b.length, 12, generator=torch.Generator().manual_seed(b.seed)) for b in blocks])
    return made, data.values, noise, made.corrupt(data, blocks)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "scaled_linear"])
@pytest.mark.parametrize("predicts", ["noise", "v", "data"])
def test_what_is_read_and_learned(predicts: str, schedule: str) -> None:
    """x_n = sqrt(abar_n) data + sqrt(1 - abar_n) noise, with n counted from t."""
    _, data, noise, got = corrupted(predicts, schedule)
    bars = alpha_bars(schedule)  # type: ignore[arg-type]
    for n, own in zip(STEPS, (slice(0, 16), slice(16, 24), slice(24, 27)), strict=True):
        a, b = float(np.sqrt(bars[n])), float(np.sqrt(1 - bars[n]))
        torch.testing.assert_close(got.inputs[own], a * data[own] + b * noise[own])
        expected = {"noise": noise, "data": data, "v": a * noise - b * data}[predicts]
        torch.testing.assert_close(got.targets[own], expected[own])


def test_the_loss_is_the_mean_squared_error_of_the_noise() -> None:
    """DDPM, eq. 14: a sum over tokens of means over channels, unweighted."""
    made, _, noise, got = corrupted("noise")
    torch.nn.init.normal_(made.coder.patch_out.weight)
    hidden = torch.randn(27, 16)
    loss = made.loss(hidden, made.embed(got), got)["image"]
    out = hidden @ made.coder.patch_out.weight.T
    torch.testing.assert_close(loss.sum, (out - noise).square().mean(1).sum())
    assert loss.count == 27


def test_schedules_are_as_published() -> None:
    """DDPM's product ends at 4e-5; the cosine is cos^2 where no beta is cut; the ends are data and nearly noise."""
    linear, scaled, cosine = (alpha_bars(s) for s in ("linear", "scaled_linear", "cosine"))  # type: ignore[arg-type]
    assert linear[-1] == pytest.approx(4.036e-5, rel=1e-3)
    assert 1 - linear[1] == pytest.approx(1e-4)
    assert scaled[-1] == pytest.approx(4.66e-3, rel=1e-2)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine[:999], (f / f[0])[:999], rtol=1e-9)
    assert cosine[-1] > 0
    for bars in (linear, scaled, cosine):
        assert bars.shape == (1001,)
        assert bars[0] == 1
        assert (np.diff(bars) < 0).all()


def test_schedules_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    for ours, theirs, begin, end in (
        ("linear", "linear", 1e-4, 0.02), ("scaled_linear", "scaled_linear", 0.00085, 0.012),
        ("cosine", "squaredcos_cap_v2", 1e-4, 0.02),
    ):  # fmt: skip
        scheduler = diffusers.DDPMScheduler(beta_start=begin, beta_end=end, beta_schedule=theirs)
        np.testing.assert_allclose(alpha_bars(ours)[1:], scheduler.alphas_cumprod, rtol=1e-3, atol=1e-8)  # type: ignore[arg-type]


def test_data_and_noise_come_back_from_each() -> None:
    noise, data = (torch.randn(5, 3, dtype=torch.float64) for _ in range(2))
    a, b = torch.tensor([[0.6]], dtype=torch.float64), torch.tensor([[0.8]], dtype=torch.float64)
    x = diffuse(noise, data, a, b)
    v = angular_velocity(noise, data, a, b)
    for back in (from_noise(x, noise, a, b), from_angular_velocity(x, v, a, b), from_data(x, data, a, b)):
        torch.testing.assert_close(back[0], data)
        torch.testing.assert_close(back[1], noise)


def test_the_schedule_is_exact_whatever_the_weights_type(make: Callable[..., UnifiedModel]) -> None:
    generator = make("diffusion").bfloat16().generator
    assert generator.schedule.shares.dtype == np.float64
    a, b = generator.schedule.at(torch.tensor([[0.999]]), torch.zeros(1))
    assert float(a) == pytest.approx(float(generator.schedule.shares[1]))
    assert float(b) == pytest.approx(float(np.sqrt(1 - generator.schedule.shares[1] ** 2)), rel=1e-4)


@pytest.mark.parametrize(("generator", "settings"), [
    ("flow", FlowSettings(steps=3, solver="UniPCMultistepScheduler")),
    ("flow", FlowSettings(steps=3, solver="FlowMatchHeunDiscreteScheduler")),
    ("flow", FlowSettings(steps=3, renorm="global", rescale=0.5)),
    ("unet", FlowSettings(steps=3)), ("convnext", FlowSettings(steps=3)),
    ("diffusion", DiffusionSettings(steps=3, eta=1.0)), ("diffusion", DiffusionSettings(steps=3, solver="heun")),
    ("diffusion", DiffusionSettings(steps=3, solver="DPMSolverMultistepScheduler")),
])  # fmt: skip
def test_an_image_does_not_depend_on_its_neighbours(
    make: Callable[..., UnifiedModel], generator: str, settings: FlowSettings | DiffusionSettings
) -> None:
    """With guidance, images of two sizes; in fp32, and in float64, where nothing magnifies rounding."""
    model, settings = make(generator), settings.override(guidance=2.0)
    prompts, grids, seeds = ["a handwritten seven", "three", ""], [Grid(4, 4), Grid(2, 4), Grid(4, 4)], [3, 4, 5]

    def drawn(which: list[int]) -> list[ImageTokens]:
        rngs = [torch.Generator().manual_seed(seeds[i]) for i in which]
        sizes = [grids[i] for i in which]
        with torch.no_grad():
            session = begun(model, [prompts[i] for i in which], guided=True)
            *_, last = model.generator.sample(session, sizes, settings, rngs)
        return last.split()

    one_step = settings.solver in ("euler", "ddim")  # several evaluations together magnify rounding
    for dtype, atol in ((torch.float32, 1e-5 if one_step else 1e-4), (torch.float64, 1e-9)):
        model.to(dtype)
        for i, one in enumerate(drawn([0, 1, 2])):
            scale = float(one.values.abs().max())  # a network that learned nothing draws large values
            torch.testing.assert_close(drawn([i])[0].values / scale, one.values / scale, atol=atol, rtol=0)


def test_settings_of_another_generator_are_refused(make: Callable[..., UnifiedModel]) -> None:
    model = make("diffusion")
    session = begun(model, ["seven"], guided=True)
    with pytest.raises(ValueError, match="sampling: expected DiffusionSettings, got FlowSettings"):
        list(model.generator.sample(session, [Grid(4, 4)], FlowSettings(), [torch.Generator()]))
    with pytest.raises(ValueError, match="tokenizer: Diffusion takes continuous tokens, got discrete"):
        Diffusion(TokenLayout("discrete", dim=1, stride=2, codebooks=(16,)), 32)
