"""Next-token prediction of image ids."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_cases import begun, sampled
from shape_checks import first_checked

from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import pack, to_tensor
from unimodal_generators import Autoregressive, ChoiceSettings, FlowSettings, MaskedSettings
from unimodal_generators.base import Block, Embeddings, Grid, ImageTokens, TokenKind
from unimodal_tokenizers.base import TokenLayout

LAYOUT = TokenLayout("discrete", dim=1, stride=2, codebooks=(16,))
GRIDS = (Grid(4, 4), Grid(2, 4))


def scores_of(made: Autoregressive, hidden: torch.Tensor) -> torch.Tensor:
    """Of the only codebook, before which no other one is drawn."""
    return made.head.logits(hidden, torch.zeros(*hidden.shape[:-1], 0, dtype=torch.long))


def generator() -> Autoregressive:
    torch.manual_seed(0)
    made = Autoregressive(LAYOUT, 32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def tokens() -> ImageTokens:
    return ImageTokens(torch.randint(16, (24,), generator=torch.Generator().manual_seed(1)), GRIDS)


def test_the_loss_is_a_sum_of_cross_entropies() -> None:
    made, data = generator(), tokens()
    corrupted = made.corrupt(data, [made.plan(g, np.random.default_rng(0))[0] for g in GRIDS])
    hidden = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    losses = made.loss(hidden, Embeddings(hidden), corrupted)
    total = 0.0
    for state, target in zip(hidden, data.values.tolist(), strict=True):
        scores = made.head(state).tolist()
        total += float(np.log(np.sum(np.exp(scores))) - scores[target])
    assert list(losses) == ["image"]
    assert losses["image"].count == 24
    assert float(losses["image"].sum.detach()) == pytest.approx(total, rel=1e-5)


def test_what_is_read_and_what_is_learned_are_the_ids() -> None:
    made, data = generator(), tokens()
    learned = made.corrupt(data, [made.plan(g, np.random.default_rng(0))[0] for g in GRIDS])
    context = made.context(data)
    assert learned.targets is not None
    assert torch.equal(learned.targets, data.values)
    assert torch.equal(learned.inputs, context.inputs)
    assert context.targets is None
    assert torch.equal(context.time, torch.ones(2))
    torch.testing.assert_close(made.embed(learned).values, made.embedding.weight[data.values])


def test_blocks_are_causal_and_visible() -> None:
    made = generator()
    (learned,), (context,) = made.plan(GRIDS[0], np.random.default_rng(0)), made.plan_context(GRIDS[0])
    assert (learned.kind, context.kind) == (TokenKind.LEARNED, TokenKind.CLEAN)
    assert (learned.n_targets, context.n_targets) == (16, 0)
    for block in (learned, context):
        assert (block.bidirectional, block.private, block.length) == (False, False, 16)
    assert made.reads == "previous"
    assert not made.repeats  # a learned image is its own context


def test_no_images_are_an_exact_zero() -> None:
    made, none = generator(), ImageTokens(torch.empty(0, dtype=torch.long), ())
    loss = made.loss(torch.empty(0, 32), made.embed(made.corrupt(none, [])), made.corrupt(none, []))["image"]
    assert (loss.sum.detach().item(), loss.count) == (0.0, 0)


def test_scores_are_in_full_precision() -> None:
    assert scores_of(generator().bfloat16(), torch.randn(2, 32).bfloat16()).dtype == torch.float32


def test_continuous_tokenizers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="tokenizer: Autoregressive takes discrete or sequence tokens, got continuous"):
        Autoregressive(TokenLayout("continuous", dim=12, stride=2), 32)


@pytest.mark.parametrize("grid", GRIDS)
def test_an_image_has_exactly_its_tokens(make: Callable[..., UnifiedModel], grid: Grid) -> None:
    model = make("autoregressive")
    session = begun(model, ["seven", "a handwritten three"], guided=True)
    before, following = list(session._state.cache.lengths), list(session._state.next)
    *_, final = sampled(session, model, [grid] * 2, ChoiceSettings(guidance=2.0), [0, 1])
    assert final.values.shape == (2 * grid.length,)
    assert final.values.dtype == torch.long
    assert 0 <= final.values.min() <= final.values.max() < 16
    assert final.grids == (grid, grid)
    assert session._state.cache.lengths == [n + grid.length for n in before]  # all of them stay, in both branches
    assert session._state.next == [n + grid.length for n in following]


def test_greedy_ids_by_hand(make: Callable[..., UnifiedModel]) -> None:
    """The likeliest id given everything before it, from a training pass over the whole image."""
    model = make("autoregressive").double()
    grid = Grid(4, 4)
    *_, final = sampled(begun(model, ["seven"]), model, [grid], ChoiceSettings(temperature=0.0), [0])
    session, states = begun(model, ["seven"]), []
    states.append(session.last[0, 0])
    block = Block(grid, TokenKind.LEARNED, bidirectional=False, private=False)
    with torch.no_grad():
        states += list(session.append(Embeddings(model.generator.embedding(final.values)), [block])[0, :-1])
        scores = scores_of(model.generator, torch.stack(states))
    assert torch.equal(scores.argmax(-1), final.values)


def test_guidance_is_on_scores(make: Callable[..., UnifiedModel]) -> None:
    model = make("autoregressive").double()
    settings = ChoiceSettings(guidance=3.0, temperature=0.0)
    *_, final = sampled(begun(model, ["seven"], guided=True), model, [Grid(4, 4)], settings, [0])
    with torch.no_grad():
        c, u = scores_of(model.generator, begun(model, ["seven"], guided=True).last[:, 0])
    assert int(final.values[0]) == int((u + 3.0 * (c - u)).argmax())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_does_not_depend_on_its_neighbours(make: Callable[..., UnifiedModel], guidance: float) -> None:
    model = make("autoregressive").double()
    settings = ChoiceSettings(guidance=guidance, top_k=12, top_p=0.9)
    prompts, seeds, grid = ["a handwritten seven", "three", ""], [3, 4, 5], Grid(4, 4)
    *_, together = sampled(begun(model, prompts, guidance != 1), model, [grid] * 3, settings, seeds)
    for i, one in enumerate(together.split()):
        *_, alone = sampled(begun(model, [prompts[i]], guidance != 1), model, [grid], settings, [seeds[i]])
        assert torch.equal(one.values, alone.values)
    *_, again = sampled(begun(model, prompts, guidance != 1), model, [grid] * 3, settings, [3, 4, 6])
    assert torch.equal(again.values[:32], together.values[:32])
    assert not torch.equal(again.values[32:], together.values[32:])


def test_sizes_of_one_call_are_equal(make: Callable[..., UnifiedModel]) -> None:
    model = make("autoregressive")
    with pytest.raises(ValueError, match="need one size"):
        sampled(begun(model, ["a", "b"]), model, GRIDS, ChoiceSettings(), [0, 1])


def test_settings_of_another_generator_are_refused(make: Callable[..., UnifiedModel]) -> None:
    model = make("autoregressive")
    with pytest.raises(ValueError, match="sampling: expected ChoiceSettings, got FlowSettings"):
        sampled(begun(model, ["a"]), model, [GRIDS[0]], FlowSettings(), [0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampling: expected ChoiceSettings, got MaskedSettings"):
        sampled(begun(model, ["a"]), model, [GRIDS[0]], MaskedSettings(), [0])  # its steps would be ignored


def test_overfits_four_images(make: Callable[..., UnifiedModel]) -> None:
    """Drawn greedily, each of four captions gives the very ids of its image."""
    model = make("autoregressive", learn_end=False, drop_text=0.0, context_length=96)
    words = ["one", "two", "three", "four"]
    noise = [np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in range(4)]
    learned = [
        Document((Part(w, learn=False), Part(Image.fromarray(n))), "") for w, n in zip(words, noise, strict=True)
    ]
    packed = pack([model.sequencer.document(d, (0, i)) for i, d in enumerate(learned)], model.backbone.config.experts,
                  model.generator.reads)  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3, weight_decay=0)
    for _ in first_checked(range(80)):
        term = model(packed)["image"]
        optimizer.zero_grad()
        (term.sum / term.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert float(term.sum.detach()) / term.count < 0.05
    prompts = [Document((Part(word, learn=False),)) for word in words]
    image = ChoiceSettings(temperature=0.0)
    settings = DecodingSettings(start="image", max_tokens=0, max_images=1, image=image)
    drawn = decode(model, prompts, settings, [1, 2, 3, 4])
    expected = model.tokenizer.encode(to_tensor(noise)).values
    got = model.tokenizer.encode(to_tensor([np.asarray(d.images[0]) for d in drawn])).values
    assert torch.equal(got, expected)


def test_token_noise_changes_what_is_read_and_never_what_is_predicted() -> None:
    made = Autoregressive(LAYOUT, 32, token_noise=0.25)
    grid = Grid(16, 16)
    ids = torch.randint(16, (2 * 256,), generator=torch.Generator().manual_seed(0))
    tokens = ImageTokens(ids, (grid, grid))
    blocks = made.plan(grid, np.random.default_rng(1)) + made.plan(grid, np.random.default_rng(2))
    read = made.corrupt(tokens, blocks)
    assert torch.equal(read.targets, ids)
    changed = (read.inputs != ids).float().mean()
    assert 0.17 < changed < 0.30  # a quarter, of which one in sixteen happens upon the same id
    assert torch.equal(made.corrupt(tokens, blocks).inputs, read.inputs)
    alone = made.corrupt(ImageTokens(ids[256:], (grid,)), blocks[1:])
    assert torch.equal(alone.inputs, read.inputs[256:])
    assert torch.equal(made.context(tokens).inputs, ids)
    with pytest.raises(ValueError, match=r"token_noise: expected a share .* got 1"):
        Autoregressive(LAYOUT, 32, token_noise=1.0)
