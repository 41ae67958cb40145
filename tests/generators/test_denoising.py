"""What samplers of flow and diffusion must do, on data whose denoiser is known in closed form."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from unimodal_generators import Diffusion, DiffusionSettings, Flow, FlowSettings
from unimodal_generators.base import Block, Corrupted, Embeddings, Grid, ImageTokens, Known, SamplingSettings, per_token
from unimodal_generators.denoising import DenoisingGenerator
from unimodal_generators.schedulers import FLOW_SCHEDULERS, MULTISTEP
from unimodal_tokenizers.base import TokenLayout
from unimodal_tokenizers.diffusion import LogShift, RootShift

LAYOUT = TokenLayout("continuous", dim=1, stride=1)
MEAN, STD = 0.7, 0.4  # of every token
RHO = 0.9  # correlation of an image's two tokens, where they are not independent


def posterior(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rho: float) -> tuple[torch.Tensor, torch.Tensor]:
    """E[data | x] and E[noise | x], x = a data + b noise; sums and differences of pairs of tokens are independent."""
    a, b = (s.expand(len(x), 1).unflatten(0, (-1, 2)) for s in (a, b))
    x = x.unflatten(0, (-1, 2))
    off = x - a * MEAN
    mean = off.mean(1, keepdim=True)
    shares = [a * s**2 / (a**2 * s**2 + b**2) for s in (STD * math.sqrt(1 + rho), STD * math.sqrt(1 - rho))]
    data = MEAN + shares[0] * mean + shares[1] * (off - mean)
    return data.flatten(0, 1), ((x - a * data) / b).flatten(0, 1)


def exact(generator: DenoisingGenerator, rho: float = 0.0) -> DenoisingGenerator:
    """The generator, knowing what its network would have to learn."""

    def embed(corrupted: Corrupted) -> Embeddings:
        return Embeddings(corrupted.inputs)

    def predict(hidden: torch.Tensor, embeddings: Embeddings, corrupted: Corrupted) -> torch.Tensor:
        t = per_token(corrupted.time, corrupted.grids)[:, None].double()
        a, b = (t, 1 - t) if isinstance(generator, Flow) else generator.schedule.at(t, hidden)
        parts = [posterior(x, a, b, rho) for x in hidden]  # of each branch
        return torch.stack([generator.target(noise, data, t) for data, noise in parts])

    generator.embed, generator.predict = embed, predict  # type: ignore[method-assign, assignment]
    return generator.double()


class Echo:
    """A session whose network is the identity. Branches beyond the first are moved by `shift`."""

    def __init__(self, branches: int = 1, shift: float = 0.0) -> None:
        self.branches, self.shift = branches, shift
        self.evaluated: list[int] = []
        self.inputs: list[torch.Tensor] = []

    @property
    def last(self) -> torch.Tensor:
        return torch.full((1, 1, 1), torch.nan)  # nobody reads it

    def append(self, embeddings: Embeddings, blocks: Sequence[Block]) -> torch.Tensor:
        raise AssertionError("denoisers append nothing")

    def peek(self, embeddings: Embeddings, blocks: Sequence[Block], branches: int | None = None) -> torch.Tensor:
        self.evaluated.append(branches or self.branches)
        self.inputs.append(embeddings.values)
        return torch.stack([embeddings.values + (g > 0) * self.shift for g in range(self.evaluated[-1])])

    def rows(self, indices: Sequence[int]) -> "Echo":
        return self


def drawn(
    generator: DenoisingGenerator, settings: SamplingSettings, grids: Sequence[Grid], known: Known | None = None,
    session: Echo | None = None, seed: int = 0,
) -> list[ImageTokens]:  # fmt: skip
    rngs = [torch.Generator().manual_seed(seed + i) for i in range(len(grids))]
    return list(generator.sample(session or Echo(), grids, settings, rngs, known))


def error(generator: DenoisingGenerator, settings: FlowSettings | DiffusionSettings) -> float:
    """Wasserstein-2 distance of what is drawn from what the equation's exact solution draws.

    Each step is affine in x, so the map from noise to data is y + k x, and two tokens give y and k.
    """
    session = Echo()
    *_, last = drawn(exact(generator), settings, [Grid(1, 2)], session=session)
    assert len(session.evaluated) == settings.steps
    noise = torch.randn(2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = float((last.values[1] - last.values[0]) / (noise[1] - noise[0]))
    y = float(last.values[0] - k * noise[0])
    if isinstance(generator, Flow):
        return math.hypot(y - MEAN, k - STD)
    a = float(generator.schedule.shares[generator.schedule.noisiest])  # where it begins is not quite noise
    begin = math.sqrt((a * STD) ** 2 + 1 - a**2)  # (x - a MEAN) / begin is constant along the path
    return math.hypot(y - (MEAN - STD * a * MEAN / begin), k - STD / begin)


def diffusion_of(schedule: str = "cosine", predicts: str = "noise") -> Diffusion:
    return Diffusion(LAYOUT, 8, schedule=schedule, predicts=predicts)  # type: ignore[arg-type]


@pytest.mark.parametrize(("solver", "steps", "bound"), [
    ("euler", 200, 1e-2), ("heun", 99, 1e-3), ("FlowMatchEulerDiscreteScheduler", 200, 1e-2),
    ("FlowMatchHeunDiscreteScheduler", 99, 1e-3), ("DPMSolverMultistepScheduler", 200, 1e-3),
    ("UniPCMultistepScheduler", 200, 1e-3),
])  # fmt: skip
def test_flows_of_a_gaussian_meet_the_closed_form(solver: str, steps: int, bound: float) -> None:
    assert error(Flow(LAYOUT, 8), FlowSettings(steps=steps, solver=solver)) < bound
    assert error(Flow(LAYOUT, 8), FlowSettings(steps=steps, solver=solver, shift=2.0)) < 2 * bound


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("predicts", ["noise", "v", "data"])
@pytest.mark.parametrize(("solver", "steps", "bound"), [
    ("ddim", 200, 1e-2), ("heun", 99, 1e-3), ("DPMSolverMultistepScheduler", 100, 1e-3),
    ("UniPCMultistepScheduler", 100, 1e-3),
])  # fmt: skip
def test_diffusions_of_a_gaussian_meet_the_closed_form(
    schedule: str, predicts: str, solver: str, steps: int, bound: float
) -> None:
    assert error(diffusion_of(schedule, predicts), DiffusionSettings(steps=steps, solver=solver)) < bound


@pytest.mark.parametrize(("made", "settings", "few", "many", "order"), [
    (Flow, FlowSettings(solver="euler"), 100, 200, 1), (Flow, FlowSettings(solver="heun", steps=1), 99, 199, 2),
    (Flow, FlowSettings(solver="FlowMatchEulerDiscreteScheduler"), 100, 200, 1),
    (Flow, FlowSettings(solver="FlowMatchHeunDiscreteScheduler", steps=1), 99, 199, 2),
    (Flow, FlowSettings(solver="DPMSolverMultistepScheduler"), 200, 400, 2),
    (Flow, FlowSettings(solver="UniPCMultistepScheduler"), 100, 200, 2),
    (Diffusion, DiffusionSettings(solver="ddim"), 100, 200, 1),
    (Diffusion, DiffusionSettings(solver="heun", steps=1), 25, 49, 2),
])  # fmt: skip
def test_the_error_falls_at_the_solver_s_order(
    made: type[DenoisingGenerator], settings: FlowSettings, few: int, many: int, order: int
) -> None:
    errors = [error(made(LAYOUT, 8), settings.override(steps=n)) for n in (few, many)]  # type: ignore[arg-type, call-arg]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("solver", MULTISTEP)
def test_multistep_solvers_of_diffusions_beat_the_first_order(schedule: str, solver: str) -> None:
    """They are given times out of 1,000, whole numbers: rounded, steps are uneven, and the order is not clean."""
    errors = [error(diffusion_of(schedule), DiffusionSettings(steps=n, solver=solver)) for n in (25, 100)]
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("solver", FLOW_SCHEDULERS)
def test_every_count_of_evaluations_is_kept(solver: str) -> None:
    """Also the smallest; the last state is the data and each step has its preview."""
    twice = "Heun" in solver
    for steps in (1, 3, 5) if twice else (1, 2, 3, 16):
        session = Echo()
        states = drawn(exact(Flow(LAYOUT, 8)), FlowSettings(steps=steps, solver=solver), [Grid(1, 2)], session=session)
        assert len(session.evaluated) == steps
        assert len(states) == ((steps + 1) // 2 if twice else steps)
        assert all(state.values.isfinite().all() for state in states)


@pytest.mark.parametrize("solver", ["ddim", "heun", *MULTISTEP])
def test_so_is_that_of_diffusions(solver: str) -> None:
    for steps in (1, 3, 17, 99):
        session = Echo()
        settings = DiffusionSettings(steps=steps, solver=solver)
        states = drawn(exact(diffusion_of()), settings, [Grid(1, 2)], session=session)
        assert len(session.evaluated) == steps
        assert len(states) == ((steps + 1) // 2 if solver == "heun" else steps)
        assert all(state.values.isfinite().all() for state in states)


@pytest.mark.parametrize(("ours", "theirs", "steps"), [
    ("euler", "FlowMatchEulerDiscreteScheduler", 8), ("heun", "FlowMatchHeunDiscreteScheduler", 9),
])  # fmt: skip
def test_diffusers_steps_are_ours(ours: str, theirs: str, steps: int) -> None:
    """Sign, order of sigmas and previews: the same states at every step."""
    states = [
        drawn(exact(Flow(LAYOUT, 8)), FlowSettings(steps=steps, solver=s, shift=3.0), [Grid(2, 2)])
        for s in (ours, theirs)
    ]
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_samples_have_the_moments_of_the_data(eta: float) -> None:
    """By the closed form of each step, which is affine with noise; and the data's own to the first order."""
    generator, settings = exact(diffusion_of()), DiffusionSettings(steps=200, eta=eta)
    *_, last = drawn(generator, settings, [Grid(200, 200)])
    points, a = settings.points(generator.schedule.noisiest), generator.schedule.shares
    mean, variance = 0.0, 1.0
    for n, m in pairwise(points):
        b2_n, b2_m = 1 - a[n] ** 2, 1 - a[m] ** 2
        share = a[n] * STD**2 / ((a[n] * STD) ** 2 + b2_n)  # data = MEAN + share (x - a_n MEAN)
        s2 = eta**2 * b2_m / b2_n * (1 - (a[n] / a[m]) ** 2)
        lean = math.sqrt(b2_m - s2) / math.sqrt(b2_n)  # x_m = (a_m - lean a_n) data + lean x_n + s z
        k = (a[m] - lean * a[n]) * share + lean
        mean = k * mean + (a[m] - lean * a[n]) * MEAN * (1 - share * a[n])
        variance = k**2 * variance + s2
    assert float(last.values.mean()) == pytest.approx(mean, abs=4 * STD / 200)  # 4 standard errors of 40 000
    assert float(last.values.var()) == pytest.approx(variance, abs=4 * STD**2 * math.sqrt(2 / 40_000))
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert math.sqrt(variance) == pytest.approx(STD, abs=0.015)


def test_eta_one_is_the_ancestral_sampler() -> None:
    """DDPM, eq. 6 and 7, with the betas of the steps that are taken."""
    generator, settings = exact(diffusion_of("linear")), DiffusionSettings(steps=3, eta=1.0)
    states = drawn(generator, settings, [Grid(1, 2)])
    rng = torch.Generator().manual_seed(0)
    x, *z = (torch.randn(2, 1, generator=rng, dtype=torch.float64) for _ in range(4))
    points = [1000, 667, 333, 0]
    for n, m, noise, state in zip(points, points[1:], z, states, strict=False):
        bar_n, bar_m = (generator.schedule.shares[i] ** 2 for i in (n, m))
        alpha = bar_n / bar_m
        a, b = (torch.tensor([[s]], dtype=torch.float64) for s in (math.sqrt(bar_n), math.sqrt(1 - bar_n)))
        data, _ = posterior(x, a, b, 0.0)
        mean = (math.sqrt(bar_m) * (1 - alpha) * data + math.sqrt(alpha) * (1 - bar_m) * x) / (1 - bar_n)
        x = mean + math.sqrt((1 - bar_m) / (1 - bar_n) * (1 - alpha)) * noise
        torch.testing.assert_close(state.values, x)


@pytest.mark.parametrize("solver", ["ddim", "heun", *MULTISTEP])
def test_clipped_data_lie_within(solver: str) -> None:
    """Of any solver; what lies within already is left alone."""
    settings = DiffusionSettings(steps=9, solver=solver)
    *_, free = drawn(exact(diffusion_of()), settings, [Grid(4, 4)])
    *_, wide = drawn(exact(diffusion_of()), settings.override(clip=1e9), [Grid(4, 4)])
    *_, narrow = drawn(exact(diffusion_of()), settings.override(clip=0.5), [Grid(4, 4)])
    torch.testing.assert_close(wide.values, free.values)
    assert float(free.values.max()) > 0.7
    assert float(narrow.values.max()) < 0.55  # Heun's last step keeps a little noise


# ---- guidance


@pytest.mark.parametrize(
    ("interval", "inside"), [((0.0, 1.0), range(8)), ((0.25, 0.75), range(2, 7)), ((1.0, 1.0), [])]
)
def test_outside_its_interval_guidance_costs_nothing(interval: tuple[float, float], inside: Sequence[int]) -> None:
    """One branch is evaluated there, and it is the conditional one."""
    generator = Flow(LAYOUT, 1)
    generator.embed = lambda corrupted: Embeddings(torch.ones_like(corrupted.inputs))  # type: ignore[method-assign]
    generator.predict = lambda hidden, embeddings, corrupted: hidden  # type: ignore[method-assign, assignment]
    session = Echo(2, shift=-1.0)  # c = 1, u = 0
    settings = FlowSettings(steps=8, guidance=3.0, interval=interval)
    *_, last = drawn(generator.double(), settings, [Grid(1, 2)], session=session)
    assert session.evaluated == [2 if i in inside else 1 for i in range(8)]
    noise = torch.randn(2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(last.values, noise + (3 * len(inside) + 8 - len(inside)) / 8)


@pytest.mark.parametrize("settings", [
    FlowSettings(steps=5), FlowSettings(steps=5, solver="heun"), DiffusionSettings(steps=5, eta=1.0),
    FlowSettings(steps=5, solver="UniPCMultistepScheduler"),
])  # fmt: skip
def test_an_interval_that_is_never_reached_is_no_guidance(settings: FlowSettings | DiffusionSettings) -> None:
    made = Flow(LAYOUT, 8) if isinstance(settings, FlowSettings) else diffusion_of()
    generator = exact(made)
    *_, plain = drawn(generator, settings, [Grid(2, 2)])
    *_, guided = drawn(
        generator, settings.override(guidance=4.0, interval=(1.0, 1.0)), [Grid(2, 2)], session=Echo(2, 9.0)
    )
    *_, whole = drawn(generator, settings.override(guidance=4.0), [Grid(2, 2)], session=Echo(2, 9.0))
    assert torch.equal(guided.values, plain.values)
    assert not torch.allclose(whole.values, plain.values)


# ---- given tokens


SAMPLERS = [
    FlowSettings(steps=30), FlowSettings(steps=31, solver="heun"), FlowSettings(steps=30, solver="UniPCMultistepScheduler"),
    FlowSettings(steps=31, solver="FlowMatchHeunDiscreteScheduler"), DiffusionSettings(steps=30),
    DiffusionSettings(steps=30, eta=1.0), DiffusionSettings(steps=31, solver="heun"),
    DiffusionSettings(steps=30, solver="DPMSolverMultistepScheduler"),
]  # fmt: skip


@pytest.mark.parametrize("settings", SAMPLERS, ids=lambda s: f"{type(s).__name__}-{s.solver}-{getattr(s, 'eta', '')}")
def test_given_tokens_come_out_as_given_and_the_rest_fits_them(settings: FlowSettings | DiffusionSettings) -> None:
    """Of pairs with correlation RHO one is given, 2 STD from the mean: the other follows, by half of its 1.8 STD or more.

    Not by all of it, even with an exact network: it was led by tokens that had not heard of the given ones yet. That is what
    RePaint resamples for.
    """
    made = Flow(LAYOUT, 8) if isinstance(settings, FlowSettings) else diffusion_of()
    generator, grids = exact(made, RHO), [Grid(1, 2)] * 400
    tokens = torch.full((800, 1), MEAN + 2 * STD, dtype=torch.float64)
    tokens[1::2] = torch.nan  # what is not known is not read
    mask = torch.tensor([True, False]).repeat(400)
    session = Echo()
    states = drawn(generator, settings, grids, Known(ImageTokens(tokens, tuple(grids)), mask), session)
    first, second = states[-1].values[0::2], states[-1].values[1::2]
    assert torch.equal(first, tokens[0::2])
    assert MEAN + 0.5 * 2 * RHO * STD - 0.1 * STD < float(second.mean()) < MEAN + 2 * RHO * STD
    assert float(drawn(generator, settings, grids)[-1].values.mean()) == pytest.approx(MEAN, abs=0.15 * STD)
    noise = torch.cat([torch.randn(2, 1, generator=torch.Generator().manual_seed(i), dtype=torch.float64)[:1]
                       for i in range(400)])  # fmt: skip
    for x in session.inputs:  # the network sees given tokens on the straight line from their noise to them
        cross = torch.stack([x[0::2, 0], noise[:, 0], torch.ones(400, dtype=torch.float64)])
        assert torch.linalg.matrix_rank(cross, atol=1e-3) <= 2


@pytest.mark.parametrize("settings", SAMPLERS[:1] + SAMPLERS[5:6], ids=["flow", "diffusion"])
def test_all_given_and_none_given(settings: FlowSettings | DiffusionSettings) -> None:
    made = Flow(LAYOUT, 8) if isinstance(settings, FlowSettings) else diffusion_of()
    generator, grids = exact(made), [Grid(2, 2), Grid(1, 2)]
    tokens = ImageTokens(torch.randn(6, 1, dtype=torch.float64), tuple(grids))
    *_, whole = drawn(generator, settings, grids, Known(tokens, torch.ones(6, dtype=torch.bool)))
    assert torch.equal(whole.values, tokens.values)
    *_, none = drawn(generator, settings, grids, Known(tokens, torch.zeros(6, dtype=torch.bool)))
    *_, plain = drawn(generator, settings, grids)
    assert torch.equal(none.values, plain.values)


# ---- times


def test_training_times_may_be_uniform() -> None:
    made, rng = Flow(LAYOUT, 8, time_draw="uniform", time_shift=3.0), np.random.default_rng(0)
    times = np.array([made.plan(Grid(1, 1), rng)[0].time for _ in range(4000)])
    u = 3 * times / (1 + 2 * times)  # undoes the shift
    assert np.abs(np.sort(u) - (np.arange(4000) + 0.5) / 4000).max() < 0.03  # Kolmogorov-Smirnov
    with pytest.raises(ValueError, match=r"time_mean, time_std: expected none with time_draw uniform, got 0.5, 1.0"):
        Flow(LAYOUT, 8, time_draw="uniform", time_mean=0.5)


def test_diffusion_times_are_the_schedule_s_steps() -> None:
    made, rng = diffusion_of(), np.random.default_rng(0)
    steps = np.array([(1 - made.plan(Grid(1, 1), rng)[0].time) * 1000 for _ in range(4000)])
    assert np.allclose(steps, steps.round())
    assert (steps.min(), steps.max()) == (pytest.approx(1, abs=5), pytest.approx(1000, abs=5))
    assert steps.min() > 0.5  # never the data itself
    assert steps.mean() == pytest.approx(500.5, abs=20)


@pytest.mark.parametrize(("rule", "shifts"), [
    (RootShift(256), {64: 0.5, 256: 1.0, 1024: 2.0}),  # SD3, eq. 23
    (LogShift(), {256: math.exp(0.5), 4096: math.exp(1.15), 2176: math.exp(0.825)}),  # FLUX.1
])  # fmt: skip
def test_larger_images_are_shifted_more(rule: RootShift | LogShift, shifts: dict[int, float]) -> None:
    made = Flow(LAYOUT, 8, time_shift=rule)
    for tokens, shift in shifts.items():
        grid, rngs = Grid(1, tokens), [np.random.default_rng(5) for _ in range(2)]
        by_rule, constant = made.draw_time(grid, rngs[0]), Flow(LAYOUT, 8, time_shift=shift).draw_time(grid, rngs[1])
        assert by_rule == pytest.approx(constant)
        times = [FlowSettings(steps=4, shift=s).times(tokens) for s in (rule, shift)]
        assert times[0] == pytest.approx(times[1])
    settings = FlowSettings(steps=2, shift=rule)
    by_rule, constant = (drawn(exact(Flow(LAYOUT, 8)), s, [Grid(8, 8)])[-1].values
                         for s in (settings, settings.override(shift=rule(64))))  # fmt: skip
    assert torch.equal(by_rule, constant)
    with pytest.raises(ValueError, match=r"shift: by a rule, images of one call need one number of tokens"):
        drawn(exact(Flow(LAYOUT, 8)), settings, [Grid(8, 8), Grid(4, 8)])


@pytest.mark.parametrize(("make", "message"), [
    (lambda: FlowSettings(solver="DDIMScheduler"), r"solver: expected euler, heun or one .* got DDIMScheduler"),
    (lambda: FlowSettings(solver="ddim"), r"solver: expected euler, heun or one of these flow .* got ddim"),
    (lambda: FlowSettings(solver="FlowMatchHeunDiscreteScheduler", steps=20), r"steps: .* odd .* got 20"),
    (lambda: FlowSettings(shift=0.0), r"shift: expected a number above 0, got 0"),
    (lambda: FlowSettings().override(solver="heun", steps=4), r"steps: .* odd .* got 4"),
    (lambda: RootShift(0), r"shift\.tokens: expected at least 1, got 0"),
    (lambda: LogShift((5, 0.1), (5, 0.2)), r"shift: expected 0 < small < large tokens, got 5 and 5"),
    (lambda: DiffusionSettings(solver="euler"), r"solver: expected ddim, heun or one of these diffusion .* got euler"),
    (lambda: DiffusionSettings(solver="FlowMatchEulerDiscreteScheduler"), r"solver: .* got FlowMatchEuler"),
    (lambda: DiffusionSettings(steps=1001), r"steps: expected 1 to 1000 network evaluations, got 1001"),
    (lambda: DiffusionSettings(steps=0), r"steps: expected 1 to 1000 network evaluations, got 0"),
    (lambda: DiffusionSettings(steps=4, solver="heun"), r"steps: .* odd .* got 4"),
    (lambda: DiffusionSettings(clip=0.0), r"clip: expected none, or a number above 0, got 0"),
    (lambda: DiffusionSettings(eta=1.5), r"eta: expected a share from 0 to 1, got 1.5"),
    (lambda: DiffusionSettings(eta=0.5, steps=5, solver="heun"), r"eta: heun draws no noise, expected 0, got 0.5"),
])  # fmt: skip
def test_what_means_nothing_is_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_scheduler_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"solver: UniPCMultistepScheduler needs diffusers, which is not installed"):
        FlowSettings(solver="UniPCMultistepScheduler")
    FlowSettings(solver="heun", steps=3)
