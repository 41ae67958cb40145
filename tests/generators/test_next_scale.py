"""Next-scale prediction: what a scale reads, who sees it, and how all of its ids are drawn at once."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sampling_cases import begun, sampled
from shape_checks import first_checked

from unimodal.backbone import BackboneConfig, Experts
from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import PackedSequence, pack, to_tensor
from unimodal.sequence_rules import SequenceRules
from unimodal.text import TextTokenizer
from unimodal_generators import ChoiceSettings, FlowSettings, MaskedSettings, NextScale
from unimodal_generators.base import Block, Embeddings, Grid, ImageTokens, Known, TokenKind
from unimodal_generators.choice import choose
from unimodal_tokenizers import MultiscaleVQ
from unimodal_tokenizers.base import TokenLayout

LAYOUT = TokenLayout("multiscale", dim=4, stride=2, codebooks=(16,), scales=(1, 2, 4))
SQUARE, WIDE = LAYOUT.grid(8, 8), LAYOUT.grid(4, 8)


def tokenizer(*scales: int) -> MultiscaleVQ:
    torch.manual_seed(1)
    made = MultiscaleVQ(codebook=16, dim=4, channels=[8, 8], blocks=1, scales=scales or (1, 2, 4)).eval()
    with torch.no_grad():
        for parameter in made.phi.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made.requires_grad_(False)


def generator(token_noise: float = 0.0) -> NextScale:
    torch.manual_seed(0)
    made = NextScale(LAYOUT, 32, token_noise)
    made.bind(tokenizer())
    return made


def tokens(grids: Sequence[Grid] = (SQUARE, WIDE, SQUARE)) -> ImageTokens:
    count = sum(grid.length for grid in grids)
    return ImageTokens(torch.randint(16, (count,), generator=torch.Generator().manual_seed(1)), tuple(grids))


def planned(made: NextScale, data: ImageTokens) -> list[Block]:
    return [b for i, grid in enumerate(data.grids) for b in made.plan(grid, np.random.default_rng(i))]


# ---- what is learned


def test_a_scale_reads_what_the_coarser_ones_say() -> None:
    """By hand, an image at a time: nothing at first, then the sums so far, brought to the scale's size."""
    made, codes, data = generator(), tokenizer(), tokens()
    learned, context = made.corrupt(data, planned(made, data)), made.context(data)
    read, finished = [], []
    for one in data.split():
        (grid,) = one.grids
        said = torch.zeros(1, 4, grid.h, grid.w)
        for k, (ids, size) in enumerate(zip(one.values.split(grid.lengths), grid.sizes, strict=True)):
            read.append(F.adaptive_avg_pool2d(said, size)[0].flatten(1).T)
            x = codes.lookup(ids).T.reshape(1, 4, *size)
            if size != (grid.h, grid.w):
                x = F.interpolate(x, (grid.h, grid.w), mode="bicubic")
            said = said + codes.phi[k](x)
        finished.append(said[0].flatten(1).T)
    torch.testing.assert_close(learned.inputs, torch.cat(read))
    torch.testing.assert_close(context.inputs, torch.cat(finished))
    assert torch.equal(learned.targets, data.values)
    assert context.targets is None
    assert learned.grids == data.grids
    assert context.grids == (Grid(4, 4), Grid(2, 4), Grid(4, 4))
    scale = [0] + [1] * 4 + [2] * 16 + [0] + [1] * 2 + [2] * 8 + [0] + [1] * 4 + [2] * 16
    expected = made.code_in(learned.inputs) + made.scale.weight[scale]
    torch.testing.assert_close(made.embed(learned).values, expected)
    torch.testing.assert_close(made.embed(context).values, made.code_in(context.inputs) + made.scale.weight[3])


def test_blocks_are_scales_seen_by_what_follows() -> None:
    made = generator()
    blocks = made.plan(SQUARE, np.random.default_rng(0))
    assert [(b.offset, b.length, b.n_targets) for b in blocks] == [(0, 1, 1), (1, 4, 4), (5, 16, 16)]
    assert [b.complete for b in blocks] == [False, False, True]
    assert len({b.seed for b in blocks}) == 3
    assert {(b.kind, b.bidirectional, b.private) for b in blocks} == {(TokenKind.LEARNED, True, False)}
    (context,) = made.plan_context(SQUARE)
    assert (context.kind, context.length, context.n_targets) == (TokenKind.CLEAN, 16, 0)
    assert (context.bidirectional, context.private, context.complete) == (True, False, True)
    assert made.reads == "own"
    assert made.repeats  # the last scale's ids are read by nobody else


def test_the_loss_is_a_sum_of_cross_entropies() -> None:
    made, data = generator(), tokens()
    corrupted = made.corrupt(data, planned(made, data))
    hidden = torch.randn(len(data.values), 32, generator=torch.Generator().manual_seed(2))
    loss = made.loss(hidden, Embeddings(hidden), corrupted)["image"]
    assert loss.count == 21 + 11 + 21
    expected = F.cross_entropy(made.head(hidden), data.values, reduction="sum")
    torch.testing.assert_close(loss.sum, expected)


def test_no_images_are_an_exact_zero() -> None:
    made, none = generator(), ImageTokens(torch.empty(0, dtype=torch.long), ())
    loss = made.loss(torch.empty(0, 32), made.embed(made.corrupt(none, [])), made.corrupt(none, []))["image"]
    assert (loss.sum.detach().item(), loss.count) == (0.0, 0)
    assert made.embed(made.context(none)).values.shape == (0, 32)


def test_token_noise_changes_what_is_read_and_never_what_is_predicted() -> None:
    made, clean = generator(0.25), generator()
    data = tokens((SQUARE, WIDE))
    blocks = planned(made, data)
    noisy = made.corrupt(data, blocks)
    assert torch.equal(noisy.targets, data.values)
    assert torch.equal(made.corrupt(data, blocks).inputs, noisy.inputs)
    assert not torch.equal(noisy.inputs, clean.corrupt(data, blocks).inputs)
    assert torch.equal(made.context(data).inputs, clean.context(data).inputs)
    alone = made.corrupt(data.select([1]), blocks[3:])
    torch.testing.assert_close(alone.inputs, noisy.inputs[21:])
    ids = torch.zeros(4096, dtype=torch.long)
    read = made._read(ids, Block(Grid(64, 64), TokenKind.LEARNED, bidirectional=True, private=False, seed=3))
    assert 0.21 < (read != 0).float().mean() < 0.26  # a quarter, of which one in sixteen happens upon the same id
    with pytest.raises(ValueError, match=r"token_noise: expected a share .* got 1"):
        NextScale(LAYOUT, 32, token_noise=1.0)


# ---- who sees whom


def picture(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def one_pack(model: UnifiedModel, *documents: Document) -> PackedSequence:
    laid = [model.sequencer.document(d, (0, i), train=False) for i, d in enumerate(documents)]
    return pack(laid, model.backbone.config.experts, model.generator.reads)


def states(model: UnifiedModel, packed: PackedSequence, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states in the order of reading, of a pack whose images have these ids."""
    seen: list[torch.Tensor] = []
    handle = model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output))
    grids = model.encode(packed.images).grids
    model.encode = lambda images: ImageTokens(ids, grids)  # type: ignore[method-assign]
    with torch.no_grad():
        model(packed)
    del model.encode
    handle.remove()
    return seen[0][packed.inverse]


def test_a_scale_s_ids_are_seen_by_finer_scales_and_by_what_follows(make: Callable[..., UnifiedModel]) -> None:
    """bos a boi, scales of 1, 4 and 16, the finished image of 16, eoi b eos."""
    model = make("next_scale").double()
    packed = one_pack(model, Document((Part("a", learn=False), Part(picture(0)), Part("b"))))
    ids = model.encode(packed.images).values
    before = states(model, packed, ids)
    assert len(before) == 3 + 21 + 16 + 3
    for changed, unmoved in ((0, 4), (2, 8), (20, 24)):  # an id of each scale, and the tokens up to that scale's end
        other = ids.clone()
        other[changed] = (other[changed] + 8) % 16
        moved = (states(model, packed, other) - before).abs().amax(-1) > 1e-9
        assert not moved[:unmoved].any()
        assert moved[unmoved:].any()
        assert moved[24:40].any()  # the finished image knows every id
        assert moved[-2:].all()  # and so does text


def test_positions_go_on_behind_what_stays(make: Callable[..., UnifiedModel]) -> None:
    model = make("next_scale", backbone={"positions": "sequential"})
    laid = model.sequencer.document(Document((Part("a", learn=False), Part(picture(0)), Part("b"))), (0,), train=False)
    assert np.concatenate([s.positions for s in laid.segments])[:, 0].tolist() == list(range(3 + 21 + 16 + 3))
    block = make("next_scale", backbone={"positions": "block"})
    laid = block.sequencer.document(Document((Part("a", learn=False), Part(picture(0)), Part("b"))), (0,), train=False)
    expected = [0, 1, 2, *[3] * 21, *[4] * 16, 5, 6, 7]
    assert np.concatenate([s.positions for s in laid.segments])[:, 0].tolist() == expected


def test_an_image_counts_once_however_many_blocks_it_has(make: Callable[..., UnifiedModel]) -> None:
    model = make("next_scale")
    document = Document((Part(picture(1, 4, 8), learn=False), Part(picture(0)), Part(picture(2)), Part("b")))
    packed = one_pack(model, document)
    assert len(packed.learned_images) == 2
    assert len(packed.learned_blocks) == 6
    assert len(packed.context_images) == len(packed.context_blocks) == 3
    assert packed.counts["image"] == 42 == len(packed.image_reads)
    rows = packed.image_rows[packed.inverse]
    kinds = [(int(row), len(list(run))) for row, run in itertools.groupby(rows.tolist())]
    assert [kind for kind in kinds if kind[0]] == [(3, 8), (1, 21), (4, 16), (2, 21), (5, 16)]


# ---- sampling


@pytest.mark.parametrize("size", [(8, 8), (4, 8)])
def test_an_image_has_exactly_its_tokens_and_coarser_previews(
    make: Callable[..., UnifiedModel], size: tuple[int, int]
) -> None:
    model = make("next_scale")
    grid = model.tokenizer.layout.grid(*size)
    session = begun(model, ["seven", "a handwritten three"], guided=True)
    before, following = list(session._state.cache.lengths), list(session._state.next)
    *previews, final = sampled(session, model, [grid] * 2, ChoiceSettings(guidance=2.0), [0, 1])
    assert final.grids == (grid, grid)
    assert 0 <= final.values.min() <= final.values.max() < 16
    assert session._state.cache.lengths == [n + grid.length for n in before]
    assert session._state.next == [n + grid.length for n in following]
    assert len(previews) == 2  # a step a scale
    for k, preview in enumerate(previews, start=1):
        assert preview.grids == final.first(k).grids
        assert torch.equal(preview.values, final.first(k).values)
        assert model.tokenizer.decode(preview).shape == (2, 3, *size)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_ids_by_hand(make: Callable[..., UnifiedModel], guidance: float) -> None:
    """The likeliest ids of each scale given the coarser ones, from blocks that are all known beforehand."""
    model = make("next_scale").double()
    settings = ChoiceSettings(temperature=0.0, guidance=guidance)
    grid = model.tokenizer.layout.grid(8, 8)
    *_, final = sampled(begun(model, ["seven"], guidance != 1), model, [grid], settings, [0])
    session, out = begun(model, ["seven"], guidance != 1), []
    clean = NextScale(model.tokenizer.layout, 32).double()
    clean.load_state_dict(model.generator.state_dict())
    clean.bind(model.tokenizer)
    blocks = clean.plan(grid, np.random.default_rng(0))
    with torch.no_grad():
        values = clean.embed(clean.corrupt(final, blocks)).values
        for value, block in zip(values.split(grid.lengths), blocks, strict=True):
            out.append(session.append(Embeddings(value), [block]))
        c, *u = clean.logits(torch.cat(out, 1))
    scores = c if not u else u[0] + guidance * (c - u[0])
    assert torch.equal(scores.argmax(-1), final.values)


def test_one_scale_is_one_parallel_step() -> None:
    """Nothing is read, one block is computed, and every id is drawn from it."""
    torch.manual_seed(0)
    config = BackboneConfig(
        width=32, depth=2, heads=2, kv_heads=1, mlp_width=48, vocabulary=300, positions="block", experts=Experts()
    )
    rules = SequenceRules(image_sizes=[(8, 8)], context_length=96)
    model = UnifiedModel(tokenizer(4), NextScale, config, rules).double().eval()
    model.text = TextTokenizer.train(["seven"], 300)
    grid = model.tokenizer.layout.grid(8, 8)
    (final,) = sampled(begun(model, ["seven"]), model, [grid], ChoiceSettings(), [5])
    block = Block(grid, TokenKind.LEARNED, bidirectional=True, private=False)
    made = model.generator
    assert isinstance(made, NextScale)
    with torch.no_grad():
        start = made.code_in(torch.zeros(16, 4, dtype=torch.float64)) + made.scale.weight[0]
        hidden = begun(model, ["seven"]).peek(Embeddings(start), [block])[0]
        expected = choose(made.logits(hidden), [torch.Generator().manual_seed(5)] * 16, temperature=1.0)
    assert torch.equal(final.values, expected)
    assert len(set(final.values.tolist())) > 1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_does_not_depend_on_its_neighbours(make: Callable[..., UnifiedModel], guidance: float) -> None:
    model = make("next_scale").double()
    settings = ChoiceSettings(guidance=guidance, top_k=12, top_p=0.9)
    prompts, seeds, grid = ["a handwritten seven", "three", ""], [3, 4, 5], model.tokenizer.layout.grid(8, 8)
    *_, together = sampled(begun(model, prompts, guidance != 1), model, [grid] * 3, settings, seeds)
    for i, one in enumerate(together.split()):
        *_, alone = sampled(begun(model, [prompts[i]], guidance != 1), model, [grid], settings, [seeds[i]])
        assert torch.equal(one.values, alone.values)
    *_, again = sampled(begun(model, prompts, guidance != 1), model, [grid] * 3, settings, [3, 4, 6])
    assert torch.equal(again.values[:42], together.values[:42])
    assert not torch.equal(again.values[42:], together.values[42:])


def test_guidance_outside_its_interval_is_left_out(make: Callable[..., UnifiedModel]) -> None:
    """Of three scales the first alone is guided: it changes, and drawing the rest is the conditional model's."""
    model = make("next_scale").double()
    grid = model.tokenizer.layout.grid(8, 8)
    guided = ChoiceSettings(guidance=8.0, interval=(0.0, 0.0), temperature=0.0)
    *_, final = sampled(begun(model, ["seven"], True), model, [grid], guided, [0])
    made = model.generator
    assert isinstance(made, NextScale)
    session = begun(model, ["seven"])
    block = Block(grid, TokenKind.LEARNED, bidirectional=True, private=False)
    with torch.no_grad():
        read = made.inputs(final.values[None], grid)[0]
        rows = torch.tensor([0] + [1] * 4 + [2] * 16)
        values = made._embed(read, rows).values
        out = [session.append(Embeddings(values[a:b]), [block.piece(a, b - a)]) for a, b in ((0, 1), (1, 5), (5, 21))]
        ids = made.logits(torch.cat(out, 1)[0]).argmax(-1)
    assert torch.equal(ids[1:], final.values[1:])
    assert ids[0] != final.values[0]


def test_documents_stop_where_the_context_has_room_for_scales_and_image(make: Callable[..., UnifiedModel]) -> None:
    """bos, boi, the scales, the finished image, eoi."""
    settings = DecodingSettings(start="image", max_tokens=1, max_images=1)
    (drawn,) = decode(make("next_scale", context_length=3 + 21 + 16), [Document(())], settings, [0])
    assert len(drawn.images) == 1
    with pytest.raises(ValueError, match="prompt 0: 1 tokens and an image of 37 are more than"):
        decode(make("next_scale", context_length=2 + 21 + 16), [Document(())], settings, [0])


# ---- bad input


def test_sizes_of_one_call_are_equal(make: Callable[..., UnifiedModel]) -> None:
    model = make("next_scale")
    grids = [model.tokenizer.layout.grid(8, 8), model.tokenizer.layout.grid(4, 8)]
    with pytest.raises(ValueError, match="need one size"):
        sampled(begun(model, ["a", "b"]), model, grids, ChoiceSettings(), [0, 1])


def test_settings_of_another_generator_are_refused(make: Callable[..., UnifiedModel]) -> None:
    model = make("next_scale")
    with pytest.raises(ValueError, match="sampling: expected ChoiceSettings, got FlowSettings"):
        sampled(begun(model, ["a"]), model, [SQUARE], FlowSettings(), [0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampling: expected ChoiceSettings, got MaskedSettings"):
        sampled(begun(model, ["a"]), model, [SQUARE], MaskedSettings(), [0])  # its steps would be ignored


def test_given_tokens_are_refused(make: Callable[..., UnifiedModel]) -> None:
    model = make("next_scale")
    known = Known(ImageTokens(torch.zeros(21, dtype=torch.long), (SQUARE,)), torch.ones(21, dtype=torch.bool))
    with pytest.raises(ValueError, match="known: NextScale cannot keep given tokens"):
        sampled(begun(model, ["a"]), model, [SQUARE], ChoiceSettings(), [0], known)


def test_other_tokenizers_are_refused_by_name() -> None:
    for kind in ("continuous", "discrete"):
        with pytest.raises(ValueError, match=f"tokenizer: NextScale takes multiscale tokens, got {kind}"):
            NextScale(TokenLayout(kind, dim=4, stride=2, codebooks=(16,)), 32)  # type: ignore[arg-type]


# ---- it learns


def test_overfits_four_images(make: Callable[..., UnifiedModel]) -> None:
    """Drawn greedily, each of four captions gives the very ids of its image."""
    model = make("next_scale", learn_end=False, drop_text=0.0, context_length=96)
    words = ["one", "two", "three", "four"]
    noise = [np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in range(4)]
    learned = [Document((Part(w, learn=False), Part(Image.fromarray(n)))) for w, n in zip(words, noise, strict=True)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3, weight_decay=0)
    for step in first_checked(range(120)):
        laid = [model.sequencer.document(d, (step, i)) for i, d in enumerate(learned)]
        term = model(pack(laid, model.backbone.config.experts, model.generator.reads))["image"]
        optimizer.zero_grad()
        (term.sum / term.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert float(term.sum.detach()) / term.count < 0.05
    expected = model.tokenizer.encode(to_tensor(noise)).values
    settings = ChoiceSettings(temperature=0.0)
    grid = model.tokenizer.layout.grid(8, 8)
    *_, drawn = sampled(begun(model, words), model, [grid] * 4, settings, [1, 2, 3, 4])
    assert torch.equal(drawn.values, expected)
