"""Token diffusion: what is masked and learned, the head against slow ways and closed forms, both samplers."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling_cases import begun, sampled
from scipy import stats
from token_diffusion_cases import GRIDS, LAYOUT, ORDERS, made, planned, tokens
from torch import Tensor

from unimodal.decoding import Session
from unimodal.model import UnifiedModel
from unimodal_generators import FlowSettings, TokenDiffusion, TokenDiffusionSettings
from unimodal_generators.base import Block, Corrupted, Embeddings, Grid, ImageTokens, Known, TokenKind
from unimodal_generators.token_diffusion import CorruptedTokens, cosine_counts
from unimodal_tokenizers import diffusion
from unimodal_tokenizers.base import TokenLayout

# ---- what is learned


def test_orders_decide_who_reads_and_who_sees() -> None:
    raster, random = made("raster"), made("random")
    assert (raster.reads, raster.repeats) == ("previous", False)
    assert (random.reads, random.repeats) == ("own", True)
    (a,), (b,) = (g.plan(GRIDS[0], np.random.default_rng(0)) for g in (raster, random))
    assert (a.bidirectional, a.private, a.n_targets) == (False, False, 16)
    assert (b.bidirectional, b.private) == (True, True)
    (c,), (d,) = (g.plan_context(GRIDS[0]) for g in (raster, random))
    assert (c.kind, c.bidirectional, c.private) == (TokenKind.CLEAN, False, False)
    assert (d.kind, d.bidirectional, d.private) == (TokenKind.CLEAN, True, False)


def test_the_masked_share_is_mar_s_truncated_normal() -> None:
    generator, rng = made(), np.random.default_rng(0)
    shares = np.array([generator._masked_share(rng) for _ in range(4000)])
    published = stats.truncnorm((0.7 - 1.0) / 0.25, 0, loc=1.0, scale=0.25)
    assert stats.kstest(shares, published.cdf).pvalue > 0.01
    rng = np.random.default_rng(0)
    counts = [generator.plan(Grid(8, 8), rng)[0].n_targets for _ in range(300)]
    assert 45 <= min(counts) < 48 < 63 < max(counts) == 64


def test_masks_and_draws_are_functions_of_the_block_s_seed() -> None:
    for order in ORDERS:
        generator, data = made(order), tokens()
        blocks = planned(generator)
        together = generator.corrupt(data, blocks)
        assert together.noise is not None
        assert together.head_time is not None
        torch.manual_seed(5)
        assert torch.equal(generator.corrupt(data, blocks).noise, together.noise)  # type: ignore[arg-type]
        at = 0
        for i, one in enumerate(data.split()):
            alone = generator.corrupt(one, blocks[i : i + 1])
            assert alone.noise is not None
            n = blocks[i].n_targets
            assert torch.equal(alone.noise, together.noise[at : at + n])
            assert torch.equal(alone.head_time, together.head_time[at : at + n])  # type: ignore[arg-type]
            if order == "random":
                assert together.where is not None
                assert alone.where is not None
                first = sum(g.length for g in GRIDS[:i])
                assert torch.equal(alone.where + first, together.where[at : at + n])
            at += n
        assert at == len(together.noise)
        other = generator.corrupt(data, [replace(b, seed=b.seed ^ 1) for b in blocks])
        assert (other.noise - together.noise).abs().mean() > 0.5  # type: ignore[operator]


def test_masked_tokens_are_read_as_the_mask_and_only_they() -> None:
    generator, data = made(mask_min=0.3, mask_std=1.0), tokens()
    corrupted = generator.corrupt(data, planned(generator))
    assert corrupted.where is not None
    values = generator.embed(corrupted).values
    hidden = set(corrupted.where.tolist())
    assert 0 < len(hidden) < 27
    for i in range(27):
        torch.testing.assert_close(values[i], generator.mask if i in hidden else generator.token_in(data.values[i]))
    spoilt = replace(corrupted, inputs=data.values.index_fill(0, corrupted.where, 9.0))
    assert torch.equal(generator.embed(spoilt).values, values)


def test_input_noise_is_read_and_never_predicted() -> None:
    generator, data = made("raster", input_noise=0.5), tokens()
    corrupted = generator.corrupt(data, planned(generator))
    assert torch.equal(corrupted.targets, data.values)  # type: ignore[arg-type]
    assert float((corrupted.inputs - data.values).std()) == pytest.approx(0.5, abs=0.08)
    assert torch.equal(generator.context(data).inputs, data.values)


def slow_loss(generator: TokenDiffusion, hidden: Tensor, corrupted: CorruptedTokens) -> tuple[Tensor, int]:
    """Token by token and draw by draw."""
    assert corrupted.noise is not None
    assert corrupted.head_time is not None
    assert corrupted.targets is not None
    learned = range(len(hidden)) if corrupted.where is None else corrupted.where.tolist()
    total, count = hidden.new_zeros(()), 0
    for row, i in enumerate(learned):
        errors, data = [], corrupted.targets[row]
        for noise, t in zip(corrupted.noise[row], corrupted.head_time[row], strict=True):
            v = generator.head(hidden[i], (1 - t) * noise + t * data, t)
            errors.append(((v - (data - noise)) ** 2).mean())
        total, count = total + torch.stack(errors).mean(), count + 1
    return total, count


@pytest.mark.parametrize("order", ORDERS)
def test_the_loss_and_its_gradients_are_the_slow_ones(order: str) -> None:
    generator = made(order).double()
    data = ImageTokens(tokens().values.double(), GRIDS)
    blocks = planned(generator)
    corrupted = generator.corrupt(data, blocks)
    hidden = torch.randn(27, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    term = generator.loss(hidden, Embeddings(hidden), corrupted)["image"]
    total, count = slow_loss(generator, hidden, corrupted)
    assert term.count == count == sum(b.n_targets for b in blocks)
    torch.testing.assert_close(term.sum, total)
    watched = [hidden, *generator.head.parameters()]
    for ours, theirs in zip(torch.autograd.grad(term.sum, watched), torch.autograd.grad(total, watched), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("order", ORDERS)
def test_no_images_are_an_exact_zero(order: str) -> None:
    generator = made(order)
    corrupted = generator.corrupt(ImageTokens(torch.empty(0, 12), ()), [])
    embedded = generator.embed(corrupted)
    loss = generator.loss(embedded.values, embedded, corrupted)["image"]
    assert (loss.sum.detach().item(), loss.count) == (0.0, 0)
    loss.sum.backward()
    assert all(p.grad is not None and not p.grad.any() for p in generator.parameters())


# ---- the samplers


class Counted:
    """A session that counts what is asked of the network."""

    def __init__(self, session: Session) -> None:
        self.session, self.peeks, self.appends = session, 0, 0
        self.branches = session.branches

    @property
    def last(self) -> Tensor:
        return self.session.last

    def peek(self, *args: Any) -> Tensor:
        self.peeks += 1
        return self.session.peek(*args)

    def append(self, *args: Any) -> Tensor:
        self.appends += 1
        return self.session.append(*args)

    def rows(self, indices: Sequence[int]) -> "Counted":
        return Counted(self.session.rows(indices))


@given(tokens=st.integers(0, 80), extra=st.integers(0, 80), steps=st.integers(1, 80))
def test_the_cosine_schedule_draws_every_token_once(tokens: int, extra: int, steps: int) -> None:
    length = max(1, tokens + extra)
    steps = min(steps, length)
    counts = cosine_counts(tokens, length, steps)
    assert sum(counts) == tokens
    assert len(counts) == min(tokens, steps)
    assert all(count >= 1 for count in counts)
    left = tokens
    for k, count in enumerate(counts, start=1):  # as MAR says it
        rest = math.floor(tokens * math.cos(math.pi / 2 * k / len(counts)))
        rest = max(1, min(left - 1, rest)) if k < len(counts) else 0
        assert count == left - rest
        left = rest


@pytest.mark.parametrize("steps", [1, 5, 16, None])
def test_steps_are_evaluations_of_the_backbone(make: Callable[..., UnifiedModel], steps: int | None) -> None:
    model = make("token_random")
    session = Counted(begun(model, ["seven"]))
    previews = sampled(session, model, [Grid(4, 4)], TokenDiffusionSettings(steps=steps, head_steps=1), [0])
    assert (session.peeks, session.appends) == (steps or 16, 0)
    assert len(previews) == (steps or 16)
    changed = [int((a.values != b.values).any(1).sum()) for a, b in itertools.pairwise(previews)]
    assert changed == cosine_counts(16, 16, steps)[1:]
    raster = make("token_raster")
    session = Counted(begun(raster, ["seven"]))
    rows = sampled(session, raster, [Grid(4, 4)], TokenDiffusionSettings(head_steps=1), [0])
    assert (session.peeks, session.appends, rows[-1].values.shape) == (0, 16, (16, 12))
    for done, row in enumerate(rows, start=1):
        assert torch.equal(row.values[: 4 * done], rows[-1].values[: 4 * done])


@pytest.mark.parametrize("steps", [None, 8])
def test_where_much_is_given_the_rest_is_drawn_in_the_last_steps(
    make: Callable[..., UnifiedModel], steps: int | None
) -> None:
    """So guidance of the last half acts on it, and that of the first does not: as on the last tokens of any image."""
    model, grid = make("token_random").double(), Grid(4, 4)
    mask = torch.arange(16) < 12
    known = Known(ImageTokens(torch.zeros(16, 12, dtype=torch.float64), (grid,)), mask)

    def drawn(**settings: Any) -> Tensor:
        asked = TokenDiffusionSettings(steps=steps, head_steps=2, rescale=0.5, **settings)
        return sampled(begun(model, ["seven"], True), model, [grid], asked, [0], known)[-1].values

    whole, early, late = (drawn(guidance=4.0, interval=ends) for ends in ((0.0, 1.0), (0.0, 0.4), (0.5, 1.0)))
    assert torch.equal(late, whole)
    assert torch.equal(early, drawn())
    assert not torch.equal(late, early)


@pytest.mark.filterwarnings("error::UserWarning")
def test_images_that_have_nothing_to_draw_in_a_step_are_not_rescaled(make: Callable[..., UnifiedModel]) -> None:
    model, grid = make("token_random"), Grid(4, 4)
    masks = torch.cat([torch.arange(16) < 12, torch.zeros(16, dtype=torch.bool)])
    known = Known(ImageTokens(torch.zeros(32, 12), (grid,) * 2), masks)
    settings = TokenDiffusionSettings(head_steps=1, guidance=2.0, rescale=0.5)
    out = sampled(begun(model, ["seven", "one"], True), model, [grid] * 2, settings, [0, 1], known)[-1].values
    assert out.isfinite().all()


def test_random_order_by_hand(make: Callable[..., UnifiedModel]) -> None:
    """An order and noise of the document's generator; masked tokens are peeked at, guided more and more, and put in."""
    model = make("token_random").double()
    generator = model.generator
    assert isinstance(generator, TokenDiffusion)
    session, grid = begun(model, ["seven"], guided=True), Grid(4, 4)
    settings = TokenDiffusionSettings(guidance=2.5, steps=3, head_steps=2, growth="linear")
    final = sampled(session, model, [grid], settings, [11])[-1].values
    rng = torch.Generator().manual_seed(11)
    order = torch.randperm(16, generator=rng).tolist()
    noise = torch.randn(16, 12, generator=rng, dtype=torch.float64)
    x, block = (
        torch.zeros(16, 12, dtype=torch.float64),
        Block(grid, TokenKind.LEARNED, bidirectional=True, private=True),
    )
    with torch.no_grad():
        for count in cosine_counts(16, 16, 3):
            left = [i for i in range(16) if i in order]
            rows = [generator.mask if i in left else generator.token_in(x[i]) for i in range(16)]
            hidden = session.peek(Embeddings(torch.stack(rows)), [block])
            scale = 1 + (16 - len(order) + count) / 16 * 1.5  # by the tokens that are there, not by the steps
            for i in order[:count]:
                token = noise[i]
                for step in range(2):
                    t = torch.tensor(step / 2, dtype=torch.float64)
                    c, u = (generator.head(h[i], token, t) for h in hidden)
                    token = token + (u + scale * (c - u)) / 2
                x[i] = token
            order = order[count:]
    torch.testing.assert_close(final, x, atol=1e-9, rtol=1e-9)


def test_guidance_grows_of_text_and_images() -> None:
    settings = TokenDiffusionSettings(guidance=3.0, image_guidance=2.0, growth="linear")
    assert [(s.guidance, s.image_guidance) for s in map(settings.grown, (0.5, 1.0))] == [(2.0, 1.5), (3.0, 2.0)]
    assert replace(settings, growth="none").grown(0.5).guidance == 3.0


def test_raster_order_by_hand(make: Callable[..., UnifiedModel]) -> None:
    model = make("token_raster").double()
    generator = model.generator
    assert isinstance(generator, TokenDiffusion)
    settings, grid = TokenDiffusionSettings(guidance=2.5, head_steps=2, temperature=0.9), Grid(4, 4)
    final = sampled(begun(model, ["seven"], guided=True), model, [grid], settings, [11])[-1]
    noise = torch.randn(16, 12, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    session, block = begun(model, ["seven"], guided=True), Block(grid, TokenKind.LEARNED, False, False)
    hidden = session.last
    with torch.no_grad():
        for i in range(16):
            token = 0.9 * noise[i]
            for step in range(2):
                t = torch.tensor(step / 2, dtype=torch.float64)
                c, u = (generator.head(h[0], token, t) for h in hidden)
                token = token + (u + 2.5 * (c - u)) / 2
            torch.testing.assert_close(final.values[i], token, atol=1e-9, rtol=1e-9)
            hidden = session.append(Embeddings(generator.token_in(token)[None]), [block.piece(i, 1)])


@pytest.mark.parametrize("name", ["token_raster", "token_random", "mar", "mar_raster"])
def test_an_image_does_not_depend_on_its_neighbours(make: Callable[..., UnifiedModel], name: str) -> None:
    model = make(name).double()
    order = model.generator.order
    grids = [Grid(4, 4), Grid(2, 4) if order == "random" else Grid(4, 4), Grid(4, 4)]
    settings = TokenDiffusionSettings(
        guidance=2.0, steps=3 if order == "random" else None, head_steps=2, renorm="global", growth="linear",
        solver=model.generator.sampling.solver,
    )  # fmt: skip
    prompts, seeds = ["a handwritten seven", "three", ""], [3, 4, 5]
    together = sampled(begun(model, prompts, True), model, grids, settings, seeds)[-1].split()
    for i, one in enumerate(together):
        session = begun(model, prompts[i : i + 1], True)
        alone = sampled(session, model, grids[i : i + 1], settings, seeds[i : i + 1])[-1]
        torch.testing.assert_close(one.values, alone.values, atol=1e-9, rtol=1e-9)
    again = sampled(begun(model, prompts, True), model, grids, settings, [3, 4, 6])[-1].split()
    torch.testing.assert_close(again[1].values, together[1].values, atol=1e-9, rtol=1e-9)
    assert (again[2].values - together[2].values).abs().mean() > 0.1


@pytest.mark.parametrize("order", ORDERS)
def test_given_tokens_stay_and_are_seen(make: Callable[..., UnifiedModel], order: str) -> None:
    model = make(f"token_{order}")
    grids = (Grid(4, 4), Grid(4, 4))
    steps = 6 if order == "random" else None
    settings = TokenDiffusionSettings(steps=steps, head_steps=2)
    mask = torch.zeros(32, dtype=torch.bool)
    mask[:5] = mask[16:30] = True  # the second image has fewer unknown tokens than steps
    data = tokens(grids)
    free = sampled(begun(model, ["a", "b"]), model, grids, settings, [1, 2])[-1].values
    out = sampled(begun(model, ["a", "b"]), model, grids, settings, [1, 2], Known(data, mask))[-1].values
    assert torch.equal(out[mask], data.values[mask])
    assert ((out - free)[~mask].abs().amax(1) > 1e-3).all()
    alone = Known(data.split()[1], mask[16:])
    one = sampled(begun(model, ["b"]), model, grids[1:], settings, [2], alone)[-1].values
    torch.testing.assert_close(one, out[16:], atol=1e-4, rtol=1e-4)
    every = Known(data, torch.ones(32, dtype=torch.bool))
    session = Counted(begun(model, ["a", "b"]))
    assert torch.equal(sampled(session, model, grids, settings, [1, 2], every)[-1].values, data.values)
    assert session.peeks == 0


def test_no_noise_is_no_chance(make: Callable[..., UnifiedModel]) -> None:
    model = make("token_raster")
    still = TokenDiffusionSettings(head_steps=2, temperature=0.0)
    first, second = (sampled(begun(model, ["a"]), model, [Grid(4, 4)], still, [s])[-1].values for s in (1, 2))
    assert torch.equal(first, second)


def test_one_step_draws_all_tokens_at_once(make: Callable[..., UnifiedModel]) -> None:
    """Then the order no longer matters: every token is its own flow given its own hidden state."""
    model = make("token_random").double()
    generator = model.generator
    (out,) = sampled(begun(model, ["a"]), model, [Grid(4, 4)], TokenDiffusionSettings(steps=1, head_steps=3), [7])
    rng = torch.Generator().manual_seed(7)
    torch.randperm(16, generator=rng)
    noise = torch.randn(16, 12, generator=rng, dtype=torch.float64)
    block = Block(Grid(4, 4), TokenKind.LEARNED, bidirectional=True, private=True)
    with torch.no_grad():
        z = begun(model, ["a"]).peek(Embeddings(generator.mask.expand(16, -1)), [block])[0]
        times = diffusion.sampling_times(3, 1.0, "euler")
        *_, x = diffusion.euler(lambda x, t: generator.head(z, x, x.new_full((), t)), noise, times)
    torch.testing.assert_close(out.values, x, atol=1e-9, rtol=1e-9)


# ---- refusals


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": -0.1}, r"temperature: .* got -0\.1"),
    ({"steps": 0}, "steps: .* got 0"),
    ({"rescale": 2.0}, r"rescale: .* got 2\.0"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenDiffusionSettings(**settings)


@pytest.mark.parametrize(("settings", "message"), [
    ({"multiply": 0}, "multiply: .* got 0"),
    ({"mask_min": 0.0}, r"mask_min, mask_std: .* got 0\.0"),
    ({"input_noise": 0.1}, r"input_noise: .* 0 in random order, got 0\.1"),
    ({"order": "raster", "sampling": TokenDiffusionSettings(steps=3)}, "steps: raster order .* got 3"),
])  # fmt: skip
def test_generators_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenDiffusion(LAYOUT, 32, **settings)


def test_discrete_tokenizers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="tokenizer: TokenDiffusion takes continuous tokens, got discrete"):
        TokenDiffusion(TokenLayout("discrete", dim=1, stride=2, codebooks=(16,)), 32)


def test_samples_that_cannot_be_are_refused(make: Callable[..., UnifiedModel]) -> None:
    random, raster = make("token_random"), make("token_raster")
    mixed = [Grid(4, 4), Grid(2, 4)]
    for model, grids, settings, message in (
        (random, mixed[:1], FlowSettings(), "sampling: expected TokenDiffusionSettings, got FlowSettings"),
        (random, mixed[:1], TokenDiffusionSettings(steps=17), r"steps: expected at most one a token \(16\), got 17"),
        (random, mixed, TokenDiffusionSettings(), "steps: images of several sizes need a number"),
        (raster, mixed[:1], TokenDiffusionSettings(steps=4), "steps: raster order .* got 4"),
        (raster, mixed, TokenDiffusionSettings(), "raster-order images of one call need one size"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled(begun(model, ["a"] * len(grids)), model, grids, settings, range(len(grids)))
    for wrong, message in (
        ({"head_steps": 0}, "head_steps: .* got 0"), ({"head_steps": 4, "solver": "heun"}, "head_steps: .* odd .* got 4"),
        ({"shift": -1.0}, "shift: .* got -1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TokenDiffusionSettings(**wrong)


def test_context_is_the_tokens() -> None:
    generator, data = made(), tokens()
    context = generator.context(data)
    assert type(context) is Corrupted
    assert torch.equal(generator.embed(context).values, generator.token_in(data.values))
