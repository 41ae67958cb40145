"""Whole models of several codebooks, squares of tokens, row ends and a shared vocabulary: drawn as learned."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sampling_cases import begun
from shape_checks import first_checked

from unimodal.backbone import Experts
from unimodal.decoding import decode, to_image
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.export import ExportInfo, build, load_export, save_export
from unimodal.model import UnifiedModel
from unimodal.packing import pack, to_tensor
from unimodal.text import TextTokenizer
from unimodal.training.optimizers import parameter_groups
from unimodal.training.stages import freeze
from unimodal_generators import ChoiceSettings
from unimodal_generators.base import Grid, ImageTokens, Known
from unimodal_generators.shuffle import windows

Make = Callable[..., UnifiedModel]
GRIDS = (Grid(4, 4), Grid(2, 4))
KINDS = ["autoregressive", "codes", "shared", "rows", "digits", "depth", "squares"]
GREEDY = ChoiceSettings(temperature=0.0)


# ---- sampling


def sampled(
    model: UnifiedModel, prompts: Sequence[str], settings: ChoiceSettings = GREEDY, seeds: Sequence[int] = (),
    grid: Grid = GRIDS[0], known: Known | None = None,
) -> ImageTokens:  # fmt: skip
    session, rngs = begun(model, prompts, settings.guidance != 1), [torch.Generator().manual_seed(s) for s in seeds]
    with torch.no_grad():
        *_, final = model.generator.sample(
            session, [grid] * len(prompts), settings, rngs or [torch.Generator()] * len(prompts), known
        )
    return final


def likeliest(model: UnifiedModel, prompts: Sequence[str], images: ImageTokens, monkeypatch: pytest.MonkeyPatch):
    """Of every code of drawn images, what a training pass finds likeliest there; in the order of tokens."""
    pixels = [to_image(p) for p in model.tokenizer.decode_each(images)]
    documents = [Document((Part(p, learn=False), Part(i))) for p, i in zip(prompts, pixels, strict=True)]
    sequenced = [model.sequencer.document(d, (0, i), train=False) for i, d in enumerate(documents)]
    seen = []
    head, noise = model.generator.head, model.generator.token_noise
    loss = head.loss
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model.generator, "token_noise", 0.0)
        patch.setattr(type(head), "loss", lambda self, *a: seen.append(a) or loss(*a))
        model(pack(sequenced, model.backbone.config.experts, "previous"))
    assert noise == model.generator.token_noise
    ((hidden, ids),) = seen
    best = [head.logits(hidden, ids[:, :q]).argmax(-1) for q in range(ids.shape[1])]
    order = [windows(grid, model.generator.side) + grid.length * i for i, grid in enumerate(images.grids)]
    found = torch.empty_like(ids)
    found[torch.cat(order)] = torch.stack(best, dim=1)
    return found.view(images.values.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_are_the_likeliest_of_a_training_pass(
    make: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = make(kind).double(), ["seven", "a handwritten three"]
    final = sampled(model, prompts)
    books = len(model.tokenizer.layout.codebooks)
    assert final.values.shape == ((32,) if books == 1 else (32, books))
    assert torch.equal(likeliest(model, prompts, final, monkeypatch), final.values)
    assert final.values.unique().numel() > 1


def test_so_are_those_of_squares_in_an_oblong_image(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two by six: the order of windows is not its own inverse."""
    model, prompts = make("squares", image_sizes=[(4, 12)]).double(), ["seven", "three"]
    final = sampled(model, prompts, grid=Grid(2, 6))
    assert torch.equal(likeliest(model, prompts, final, monkeypatch), final.values)
    assert not torch.equal(windows(Grid(2, 6), 2), windows(Grid(2, 6), 2).argsort())


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_has_exactly_its_tokens_and_positions(make: Make, kind: str) -> None:
    model = make(kind)
    session = begun(model, ["seven", "a handwritten three"], guided=True)
    before, following = list(session._state.cache.lengths), list(session._state.next)
    with torch.no_grad():
        *_, final = model.generator.sample(
            session, [Grid(2, 4)] * 2, ChoiceSettings(guidance=2.0), [torch.Generator(), torch.Generator()]
        )
    (block,) = model.generator.plan_context(Grid(2, 4))
    assert block.length == {"rows": 10, "squares": 3}.get(kind, 8)
    assert len(final.values) == 16
    assert final.values.view(16, -1).max(0).values.lt(torch.tensor(model.tokenizer.layout.codebooks)).all()
    assert session._state.cache.lengths == [n + block.length for n in before]
    assert session._state.next == [n + block.length for n in following]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_its_neighbours(make: Make, kind: str) -> None:
    model, prompts, seeds = make(kind).double(), ["a handwritten seven", "three", ""], [3, 4, 5]
    settings = ChoiceSettings(guidance=2.0, top_k=12, top_p=0.9, temperature=1.3)
    together = sampled(model, prompts, settings, seeds)
    assert torch.equal(sampled(model, prompts, settings, seeds).values, together.values)
    for i, one in enumerate(together.split()):
        assert torch.equal(sampled(model, [prompts[i]], settings, [seeds[i]]).values, one.values)
    other = sampled(model, prompts, settings, [3, 4, 6]).values
    assert torch.equal(other[:32], together.values[:32])
    assert not torch.equal(other[32:], together.values[32:])


@pytest.mark.parametrize("kind", KINDS)
def test_given_tokens_are_kept_and_the_others_follow(make: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = make(kind).double(), ["seven", "a handwritten three"]
    free = sampled(model, prompts)
    books, rng = torch.tensor(model.tokenizer.layout.codebooks), torch.Generator().manual_seed(3)
    values = (torch.rand(32, len(books), generator=rng) * books).long().view(free.values.shape)
    mask = torch.zeros(32, dtype=torch.bool)
    mask[[5, 6, 12]] = mask[[16 + 10, 16 + 15]] = True
    some = sampled(model, prompts, known=Known(ImageTokens(values, free.grids), mask))
    assert torch.equal(some.values[mask], values[mask])
    best = likeliest(model, prompts, some, monkeypatch)
    assert torch.equal(best[~mask], some.values[~mask])  # each given all before it, what was put there included
    early = torch.arange(16 if kind != "squares" else 0)[:5]
    assert torch.equal(some.values[early], free.values[early])  # before the first given one nobody knows of it
    assert not torch.equal(some.values, free.values)
    everything = Known(ImageTokens(values, free.grids), torch.ones(32, dtype=torch.bool))
    assert torch.equal(sampled(model, prompts, known=everything).values, values)
    nothing = Known(ImageTokens(values, free.grids), torch.zeros(32, dtype=torch.bool))
    assert torch.equal(sampled(model, prompts, known=nothing).values, free.values)
    alone = Known(ImageTokens(values[16:], free.grids[1:]), mask[16:])
    assert torch.equal(sampled(model, prompts[1:], known=alone).values, some.values[16:])


@pytest.mark.parametrize("kind", ["digits", "depth", "squares", "shared"])
def test_guidance_is_on_the_scores_of_each_code(make: Make, kind: str) -> None:
    model = make(kind).double()
    settings = ChoiceSettings(guidance=3.0, temperature=0.0)
    final = sampled(model, ["seven"], settings)
    generator = model.generator
    with torch.no_grad():
        states = begun(model, ["seven"], guided=True).last[:, 0]
        states = states if generator.shuffle is None else generator.shuffle.part(states)[:, 0]
        codes: list[int] = []
        for _ in model.tokenizer.layout.codebooks:
            c, u = generator.head.logits(states, torch.tensor([codes, codes], dtype=torch.long).view(2, -1))
            codes.append(int((u + 3.0 * (c - u)).argmax()))
    assert final.values[0].view(-1).tolist() == codes


@pytest.mark.parametrize("kind", ["shared", "digits", "depth", "squares"])
def test_overfits_four_images(make: Make, kind: str) -> None:
    """Drawn greedily, each of four captions gives the very ids of its image."""
    model = make(kind, learn_end=False, drop_text=0.0, context_length=96)
    model.generator.token_noise = 0.0
    words = ["one", "two", "three", "four"]
    noise = [np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in range(4)]
    learned = [Document((Part(w, learn=False), Part(Image.fromarray(n)))) for w, n in zip(words, noise, strict=True)]
    p = pack(
        [model.sequencer.document(d, (0, i)) for i, d in enumerate(learned)], model.backbone.config.experts, "previous"
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3, weight_decay=0)
    for _ in first_checked(range(80)):
        term = model(p)["image"]
        optimizer.zero_grad()
        (term.sum / term.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert term.count == p.counts["image"] == 64
    settings = DecodingSettings(start="image", max_tokens=0, max_images=1, image=GREEDY)
    drawn = decode(model, [Document((Part(word, learn=False),)) for word in words], settings, [1, 2, 3, 4])
    expected = model.tokenizer.encode(to_tensor(noise)).values
    got = model.tokenizer.encode(to_tensor([np.asarray(d.images[0]) for d in drawn])).values
    assert (got == expected).double().mean() == 1.0, float(term.sum.detach()) / 64


# ---- a shared vocabulary


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("added", [0, 6])
def test_shared_rows_are_the_model_s(make: Make, mixed: list[Document], tied: bool, added: int) -> None:
    """One softmax over words, special tokens and image ids, for both losses; tied rows where the head is."""
    settings = {"tied_head": tied, "added_tokens": added, "embedding_scale": 3.0}
    model = make("shared", experts=Experts(), backbone=settings).double()
    backbone = model.backbone
    assert not list(model.generator.parameters())
    owners = ["embedding"] if tied else ["embedding", "head"]
    rows = [n for n, p in model.named_parameters() if list(p.shape) == [16, 32]]
    assert rows == [f"backbone.{owner}.images" for owner in owners]
    ids = torch.arange(16)
    read = model.generator.embed(model.generator.context(ImageTokens(ids, (Grid(4, 4),)))).values
    assert torch.equal(read, 3.0 * backbone.embedding.images)
    p = pack([model.sequencer.document(mixed[0], (0, 0))], backbone.config.experts, "previous")
    states: list[torch.Tensor] = []
    handle = backbone.register_forward_hook(lambda module, inputs, output: states.append(output))
    losses = model(p)
    handle.remove()
    table = torch.cat((backbone.embedding if tied else backbone.head).tables)
    assert len(table) == 300 + added + 16
    targets = model.encode(p.images).values + 300 + added
    scores = states[0] @ table.T
    for name, reads, wanted in (("image", p.image_reads, targets), ("text", p.text_reads, p.text_targets)):
        expected = F.cross_entropy(scores[reads], wanted, reduction="sum")
        torch.testing.assert_close(losses[name].sum, expected)
    torch.testing.assert_close(backbone.logits(states[0]), scores)  # two products: some processors add up otherwise


def test_words_are_never_image_ids_and_images_never_words(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that wants to say nothing but the others' ids."""
    model = make("shared")
    with torch.no_grad():
        model.backbone.embedding.images.mul_(50.0)
    said: list[int] = []
    monkeypatch.setattr(model.text, "decode", lambda ids: said.extend(ids) or "text")
    settings = DecodingSettings(max_tokens=12, max_images=2, temperature=50.0)
    decode(model, [Document((Part("seven", learn=False),))] * 3, settings, [0, 1, 2])
    assert len(said) > 5
    assert max(said) < model.text.special.bos
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(5000.0)
    drawn = sampled(model, ["seven"] * 2, ChoiceSettings(temperature=5.0), [0, 1])
    assert 0 <= drawn.values.min() <= drawn.values.max() < 16


def test_a_copy_is_bound_to_its_own_rows(make: Make) -> None:
    model = make("shared")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.embedding.images.zero_()
    data = ImageTokens(torch.arange(16), (Grid(4, 4),))
    assert not other.generator.embed(other.generator.context(data)).values.any()
    assert model.generator.embed(model.generator.context(data)).values.any()
    assert not other.generator.head.logits(torch.ones(1, 32), torch.zeros(1, 0, dtype=torch.long)).any()


def test_shared_rows_learn_without_decay_and_beside_a_frozen_table(make: Make) -> None:
    """Anole (arXiv 2407.06135): image rows alone learn."""
    model = make("shared")
    images = model.backbone.embedding.images
    plain = [g["params"] for g in parameter_groups(model, 0.1) if g["weight_decay"] == 0]
    assert any(images is p for p in plain[0])
    freeze(model, ["text", "image", "embedding"])
    assert [p for p in model.parameters() if p.requires_grad] == [images]


@pytest.mark.parametrize(
    "settings",
    [
        {"vocabulary": "shared", "end_of_row": True},
        {"shuffle": 2, "depth": {"layers": 1, "width": 8, "heads": 2}, "inputs": "codes"},
    ],
    ids=["shared", "squares"],
)
def test_an_export_comes_back_as_it_was(settings: dict, tmp_path: Path) -> None:
    name = "init_args"
    config = {
        "class_path": "unimodal.model.UnifiedModel",
        name: {
            "tokenizer": {
                "class_path": "unimodal_tokenizers.GridTokenizer",
                name: {
                    "quantizer": {
                        "class_path": "unimodal_tokenizers.quantizers.VectorQuantizer",
                        name: {"entries": 16, "dim": 4},
                    },
                    "channels": [8, 8],
                    "blocks": 1,
                },
            },
            "generator": {"class_path": "unimodal_generators.Autoregressive", name: settings},
            "backbone": {
                "width": 32, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 16, "vocabulary": 300,
                "positions": "sequential",
            },
            "sequence": {"image_sizes": [[8, 8]], "context_length": 96, "write_size": True},
        },
    }  # fmt: skip
    model = build(config, "model").eval()
    model.text = TextTokenizer.train(["seven"], 300)
    save_export(tmp_path / "export", model, config, ExportInfo("model", "raw", "test", "none"))
    again = load_export(tmp_path / "export", "model")
    assert list(again.state_dict()) == list(model.state_dict())
    one, other = sampled(model, ["seven"]), sampled(again, ["seven"])
    assert torch.equal(one.values, other.values)


def test_an_image_that_squares_do_not_tile_is_refused_when_the_model_is_built(make: Make) -> None:
    with pytest.raises(ValueError, match=r"generator\.shuffle: expected images of multiples of 2 tokens, got 3x4"):
        make("squares", image_sizes=[(8, 8), (6, 8)])
