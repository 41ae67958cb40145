"""An image's size, written before it: where it stands, when it is learned, and who chooses it."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import pack
from unimodal_generators.base import TokenKind

Make = Callable[..., UnifiedModel]
PROMPT = Document((Part("seven", learn=False),))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def flat(model: UnifiedModel, document: Document, key: tuple[int, ...] = (0, 0), train: bool = False) -> list:
    """Text as (id, learned), images as their kind."""
    laid = model.sequencer.document(document, key, train=train)
    found: list = []
    for s in laid.segments:
        found += list(zip(s.ids, s.targets, strict=True)) if s.kind == TokenKind.TEXT else [s.kind]
    return found


@pytest.mark.parametrize("generator", ["flow", "autoregressive"])
def test_a_size_stands_between_begin_of_image_and_the_image(make: Make, generator: str) -> None:
    model = make(generator, write_size=True)
    special, wide, square = model.text.special, model.text.encode("8x4\n"), model.text.encode("8x8\n")
    document = Document((Part(picture(4, 8), learn=False), Part(picture(8, 8))))
    drawn = [TokenKind.LEARNED, TokenKind.CLEAN] if generator == "flow" else [TokenKind.LEARNED]
    assert flat(model, document) == [
        (special.bos, False), (special.boi, False), *((i, False) for i in wide), TokenKind.CLEAN, (special.eoi, False),
        (special.boi, True), *((i, True) for i in square), *drawn, (special.eoi, False), (special.eos, True),
    ]  # fmt: skip
    p = pack([model.sequencer.document(document, (0, 0), train=False)], model.backbone.config.experts, "previous")
    assert p.counts["text"] == 2 + len(square)


def test_without_the_rule_nothing_is_written(make: Make) -> None:
    model = make("autoregressive")
    assert model.sequencer.size(8, 8) == ()
    assert len(flat(model, Document((Part(picture(8, 8)),)))) == 5


def test_a_prompt_is_laid_out_as_a_document(make: Make) -> None:
    """And sizes are structure: every branch of guidance reads them, also one that does not get the image."""
    model = make("flow", write_size=True)
    document = Document((Part("a", learn=False), Part(picture(4, 8), learn=False), Part("b", learn=False)))
    first, image, last = model.sequencer.prompt(document)
    size = model.sequencer.size(4, 8)
    assert first.ids == (model.text.special.bos, *model.text.encode("a"), model.text.special.boi, *size)
    assert first.structural == (True, False, True, *[True] * len(size))
    assert image.image is not None
    trained = [i for entry in flat(model, document) if isinstance(entry, tuple) for i in entry[:1]]
    assert trained == [*first.ids, *last.ids, model.text.special.eos]


def test_dropped_text_and_dropped_images_leave_sizes_unlearned_in_place(make: Make) -> None:
    model = make("flow", write_size=True, drop_text=0.99, drop_images=0.99)
    document = Document((Part("a", learn=False), Part(picture(4, 8), learn=False), Part(picture(8, 8))))
    special, wide, square = model.text.special, model.sequencer.size(4, 8), model.sequencer.size(8, 8)
    begin = [special.bos, special.boi, *wide, special.eoi, special.boi, *square]
    found = flat(model, document, train=True)
    assert found[: len(begin)] == [(i, False) for i in begin]
    assert found[len(begin)] == TokenKind.LEARNED


def test_no_size_begins_another(make: Make) -> None:
    model = make("flow", write_size=True, image_sizes=[(8, 8), (8, 80), (80, 8), (4, 8)])
    written = [model.sequencer.size(*size) for size in model.sequence.image_sizes]
    for one, other in itertools.permutations(written, 2):
        assert other[: len(one)] != one


def want(model: UnifiedModel, monkeypatch: pytest.MonkeyPatch, *ids: int) -> None:
    """Scores that like `ids` above all others, the earlier the more."""
    logits = model.backbone.logits

    def tempting(hidden: torch.Tensor) -> torch.Tensor:
        scores = logits(hidden)
        for rank, i in enumerate(ids):
            scores[:, i] += 1e6 / 2**rank
        return scores

    monkeypatch.setattr(model.backbone, "logits", tempting)


@pytest.mark.parametrize(("said", "size"), [("8x4\n", (8, 4)), ("8x8\n", (8, 8))])
@pytest.mark.parametrize("generator", ["flow", "autoregressive"])
def test_the_model_chooses_among_the_recipe_s_sizes(
    make: Make, monkeypatch: pytest.MonkeyPatch, generator: str, said: str, size: tuple[int, int]
) -> None:
    model = make(generator, write_size=True)
    sizes = [model.sequencer.size(*s) for s in model.sequence.image_sizes]
    fork = next(i for i, (a, b) in enumerate(zip(*sizes, strict=False)) if a != b)
    want(model, monkeypatch, model.text.special.bos, model.text.encode(said)[fork], model.text.special.eos)
    (out,) = decode(model, [PROMPT], DecodingSettings(start="image", max_images=1), [0])
    assert out.images[0].size == size
    (forced,) = decode(model, [PROMPT], DecodingSettings(start="image", max_images=1, size=(4, 8)), [0])
    assert forced.images[0].size == (8, 4)


@pytest.mark.parametrize("generator", ["flow", "autoregressive", "squares"])
def test_documents_of_one_batch_have_sizes_of_their_own(make: Make, generator: str) -> None:
    model = make(generator, write_size=True).double()
    prompts = [Document((Part(w, learn=False),)) for w in ("a", "seven", "three plus", "", "b", "ten")]
    image = model.generator.sampling.override(guidance=2.0)
    settings = DecodingSettings("image", max_tokens=6, max_images=2, temperature=20.0, image=image)
    together = decode(model, prompts, settings, range(6))
    alone = [decode(model, [p], settings, [i])[0] for i, p in enumerate(prompts)]
    assert len({d.images[0].size for d in together}) == 2
    for a, b in zip(together, alone, strict=True):
        assert [p.content if p.is_text else p.content.tobytes() for p in a.parts] == [
            p.content if p.is_text else p.content.tobytes() for p in b.parts
        ]


def test_what_is_written_counts_towards_the_context(make: Make) -> None:
    model = make("autoregressive", write_size=True, context_length=30)
    size, prompt = len(model.sequencer.size(8, 8)), 1 + len(model.text.encode("seven"))
    room = 30 - prompt - 16 - size - 2
    assert room >= 0
    words = Document((Part("seven" + "#" * room, learn=False),))
    assert decode(model, [words], DecodingSettings("image", max_tokens=0, max_images=1, size=(8, 8)), [0])[0].images
    longer = Document((Part("seven" + "#" * (room + 1), learn=False),))
    with pytest.raises(ValueError, match=rf"and an image of {16 + size} are more than"):
        decode(model, [longer], DecodingSettings("image", max_tokens=0, max_images=1), [0])
