"""Regression: means of tokens, one by one or all at once, without chance."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sampling_cases import begun

from unimodal.decoding import Session
from unimodal.model import UnifiedModel
from unimodal.packing import pack
from unimodal_generators import FlowSettings, Regression, RegressionSettings
from unimodal_generators.base import Block, Embeddings, Grid, ImageTokens, Known, TokenKind
from unimodal_tokenizers.base import TokenLayout

LAYOUT = TokenLayout("continuous", dim=12, stride=2)
GRIDS = (Grid(4, 4), Grid(2, 4))


def made(**settings: Any) -> Regression:
    torch.manual_seed(0)
    return Regression(LAYOUT, 32, **settings)


def tokens(grids: Sequence[Grid] = GRIDS) -> ImageTokens:
    rng = torch.Generator().manual_seed(1)
    return ImageTokens(torch.randn(sum(g.length for g in grids), 12, generator=rng), tuple(grids))


def sampled(
    session: Session, model: UnifiedModel, grids: Sequence[Grid], settings: Any = None,
    known: Known | None = None,
) -> ImageTokens:  # fmt: skip
    with torch.no_grad():
        *_, out = model.generator.sample(
            session, grids, settings or RegressionSettings(), [torch.Generator()] * len(grids), known
        )
    return out


@pytest.mark.parametrize(("settings", "reads", "repeats", "bidirectional", "private"), [
    ({}, "previous", False, False, False),
    ({"order": "parallel"}, "own", False, True, False),
    ({"order": "parallel", "private": True}, "own", True, True, True),
])  # fmt: skip
def test_orders_decide_who_reads_and_who_sees(
    settings: dict[str, Any], reads: str, repeats: bool, bidirectional: bool, private: bool
) -> None:
    generator = made(**settings)
    assert (generator.reads, generator.repeats, generator.inpaints) == (reads, repeats, reads == "previous")
    (block,) = generator.plan(GRIDS[0], np.random.default_rng(0))
    assert (block.kind, block.n_targets) == (TokenKind.LEARNED, 16)
    assert (block.bidirectional, block.private) == (bidirectional, private)
    (context,) = generator.plan_context(GRIDS[0])
    assert (context.kind, context.bidirectional, context.private) == (TokenKind.CLEAN, bidirectional, False)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_the_loss_by_hand(loss: str) -> None:
    generator, data = made(loss=loss), tokens()
    hidden = torch.randn(24, 32, generator=torch.Generator().manual_seed(3))
    corrupted = generator.corrupt(data, [generator.plan(g, np.random.default_rng(0))[0] for g in GRIDS])
    term = generator.loss(hidden, Embeddings(hidden), corrupted)["image"]
    out, total = generator.head(hidden).detach(), 0.0
    for a, b in zip(out, data.values, strict=True):
        cosine = float(a @ b / (a.norm() * b.norm()))
        total += float(((a - b) ** 2).mean()) if loss == "mse" else 1 - cosine
    assert term.count == 24
    assert float(term.sum.detach()) == pytest.approx(total, rel=1e-5)
    lengths = generator.predict(hidden).detach().norm(dim=-1)
    if loss == "cosine":
        torch.testing.assert_close(lengths, torch.full((24,), 12**0.5))


@pytest.mark.parametrize("order", ["raster", "parallel"])
def test_guidance_of_a_cosine_changes_directions_alone(make: Callable[..., UnifiedModel], order: str) -> None:
    model = make("cosine" if order == "raster" else "prefilled").double()
    assert isinstance(model.generator, Regression)
    model.generator.metric = "cosine"
    plain, guided = (
        sampled(begun(model, ["seven"], True), model, [Grid(4, 4)], RegressionSettings(guidance=scale)).values
        for scale in (1.0, 3.0)
    )
    torch.testing.assert_close(guided.norm(dim=-1), torch.full((16,), 12**0.5, dtype=torch.float64))
    assert not torch.allclose(guided, plain, atol=1e-3)


def test_queries_know_nothing_of_the_tokens(make: Callable[..., UnifiedModel], mixed: list[Any]) -> None:
    """In parallel the loss depends on the tokens as targets alone, and as context where queries are private."""
    model = make("prefilled")
    values = []
    for seed in (0, 1):
        data = ImageTokens(torch.randn(24, 12, generator=torch.Generator().manual_seed(seed)), GRIDS)
        corrupted = model.generator.corrupt(data, [])
        values.append(model.generator.embed(corrupted).values)
        context = model.generator.embed(model.generator.context(data)).values
        torch.testing.assert_close(context, model.generator.token_in(data.values))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], model.generator.query.expand(24, -1))


@pytest.mark.parametrize("name", ["regression", "cosine", "prefilled", "prefilled_private"])
def test_no_images_are_an_exact_zero(make: Callable[..., UnifiedModel], name: str) -> None:
    generator = make(name).generator
    corrupted = generator.corrupt(ImageTokens(torch.empty(0, 12), ()), [])
    embedded = generator.embed(corrupted)
    loss = generator.loss(embedded.values, embedded, corrupted)["image"]
    assert (loss.sum.detach().item(), loss.count) == (0.0, 0)
    (loss.sum + generator.embed(generator.context(ImageTokens(torch.empty(0, 12), ()))).values.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in generator.parameters())


@pytest.mark.parametrize("name", ["regression", "cosine"])
def test_one_by_one_is_a_training_pass_over_its_own_tokens(make: Callable[..., UnifiedModel], name: str) -> None:
    """Put what was sampled into a training pass: it is predicted to the last digits, so its loss is zero."""
    model = make(name).double()
    out = sampled(begun(model, ["seven"]), model, [Grid(4, 4)])
    assert _loss_of(model, "seven", out) < 1e-9


@pytest.mark.parametrize("name", ["prefilled", "prefilled_private"])
def test_all_at_once_is_a_training_pass_too(make: Callable[..., UnifiedModel], name: str) -> None:
    model = make(name).double()
    out = sampled(begun(model, ["seven"]), model, [Grid(4, 4)])
    assert _loss_of(model, "seven", out) < 1e-9


def _loss_of(model: UnifiedModel, prompt: str, drawn: ImageTokens) -> float:
    """Of an image behind a prompt, tokens given."""
    from PIL import Image

    from unimodal.documents import Document, Part

    document = Document((Part(prompt, learn=False), Part(Image.new("RGB", (8, 8)))))
    packed = pack([model.sequencer.document(document, (0, 0, 0), train=False)], model.backbone.config.experts,
                  model.generator.reads)  # fmt: skip
    model.encode = lambda images: drawn  # type: ignore[method-assign]
    with torch.no_grad():
        return float(model(packed)["image"].sum)


@pytest.mark.parametrize("name", ["regression", "prefilled", "prefilled_private"])
def test_samples_are_guided_means_without_chance(make: Callable[..., UnifiedModel], name: str) -> None:
    model = make(name).double()
    grids = [Grid(4, 4)] * 2
    settings = RegressionSettings(guidance=2.5, renorm="global")
    together = sampled(begun(model, ["a seven", "three"], True), model, grids, settings)
    for prompt, one in zip(("a seven", "three"), together.split(), strict=True):
        alone = sampled(begun(model, [prompt], True), model, grids[:1], settings)
        torch.testing.assert_close(one.values, alone.values, atol=1e-9, rtol=1e-9)
    if name != "regression":
        session = begun(model, ["a seven"], True)
        block = replace(model.generator.plan_context(Grid(4, 4))[0], kind=TokenKind.LEARNED)
        hidden = session.peek(Embeddings(model.generator.query.expand(16, -1)), [block])
        c, u = model.generator.predict(hidden).detach()
        v = u + 2.5 * (c - u)
        torch.testing.assert_close(together.values[:16], v * min(1.0, float(c.norm() / v.norm())))


def test_images_of_several_sizes_in_parallel(make: Callable[..., UnifiedModel]) -> None:
    for name in ("prefilled", "prefilled_private"):
        model = make(name).double()
        both = sampled(begun(model, ["a", "a"]), model, GRIDS).split()
        for grid, one in zip(GRIDS, both, strict=True):
            torch.testing.assert_close(one.values, sampled(begun(model, ["a"]), model, [grid]).values)


def test_what_follows_sees_queries_or_tokens(make: Callable[..., UnifiedModel]) -> None:
    lengths = {}
    for name in ("prefilled", "prefilled_private", "regression"):
        session = begun(make(name), ["a"])
        before = session.length(0)
        sampled(session, make(name), [Grid(4, 4)])
        lengths[name] = session.length(0) - before
    assert lengths == {"prefilled": 16, "prefilled_private": 0, "regression": 16}


def test_given_tokens_stay_and_are_read(make: Callable[..., UnifiedModel]) -> None:
    model, grids = make("regression"), (Grid(4, 4), Grid(4, 4))
    data, mask = tokens(grids), torch.zeros(32, dtype=torch.bool)
    mask[:5] = True
    free = sampled(begun(model, ["a", "b"]), model, grids)
    out = sampled(begun(model, ["a", "b"]), model, grids, known=Known(data, mask))
    assert torch.equal(out.values[mask], data.values[mask])
    assert ((out.values - free.values)[5:16].abs().amax(1) > 1e-4).all()
    torch.testing.assert_close(out.values[16:], free.values[16:])
    with pytest.raises(ValueError, match="known: Regression cannot keep given tokens"):
        sampled(begun(make("prefilled"), ["a", "b"]), make("prefilled"), grids, known=Known(data, mask))


def test_private_tokens_that_are_read_are_refused() -> None:
    with pytest.raises(ValueError, match="private: expected false in raster order"):
        made(private=True)


def test_samples_that_cannot_be_are_refused(make: Callable[..., UnifiedModel]) -> None:
    model = make("regression")
    with pytest.raises(ValueError, match="sampling: expected RegressionSettings, got FlowSettings"):
        sampled(begun(model, ["a"]), model, [Grid(4, 4)], FlowSettings())
    with pytest.raises(ValueError, match="raster-order images of one call need one size"):
        sampled(begun(model, ["a", "b"]), model, GRIDS)
    half = RegressionSettings(guidance=2.0, interval=(0.5, 1.0))
    with pytest.raises(ValueError, match="interval: in parallel there is one step"):
        sampled(begun(make("prefilled"), ["a"], True), make("prefilled"), [Grid(4, 4)], half)
    with pytest.raises(ValueError, match="tokenizer: Regression takes continuous tokens, got discrete"):
        Regression(TokenLayout("discrete", dim=1, stride=2, codebooks=(16,)), 32)


def test_the_kind_of_a_block_is_what_its_tokens_are() -> None:
    assert made(order="parallel")._block(GRIDS[0]) == Block(GRIDS[0], TokenKind.LEARNED, True, False)
