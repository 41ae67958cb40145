"""Decoding documents: limits, refusals, and what comes back."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shape_checks import unchecked

from unimodal.decoding import decode, stream, to_image
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import GENERATED, Document, Part
from unimodal.model import UnifiedModel
from unimodal.session import Session
from unimodal.text import TextTokenizer
from unimodal_generators import (
    ChoiceSettings,
    DiffusionSettings,
    FlowSettings,
    MaskedSettings,
    RegressionSettings,
    SamplingSettings,
    TokenDiffusionSettings,
)
from unimodal_generators.base import Branch

Make = Callable[..., UnifiedModel]
PROMPT = Document((Part("a handwritten seven", learn=False),), "text_to_image")


def picture(seed: int = 0, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prefer(model: UnifiedModel, monkeypatch: pytest.MonkeyPatch, *script: int | str) -> None:
    """Make the model want to say `script` (ids, or texts), then the last of it for ever.

    Documents of one batch follow it together, step by step; where an id is ruled out, the likeliest other one is said.
    """
    ids = [i for s in script for i in (model.text.encode(s) if isinstance(s, str) else [s])]
    ends = {model.text.special.eos, model.text.special.boi}
    logits = model.backbone.logits
    block = 1 if model.generator.text is None else model.generator.text.block

    def wanted() -> Iterator[list[int]]:
        """What is said of each block, in every step that draws it; one that holds an end goes no further."""
        at = 0
        while True:
            said = [ids[min(at + n, len(ids) - 1)] for n in range(block)]
            yield from [said] * block
            at += next((n + 1 for n, i in enumerate(said) if i in ends), block)

    steps = wanted()

    def scripted(hidden: torch.Tensor) -> torch.Tensor:
        scores = logits(hidden)
        said = torch.tensor(next(steps)).repeat(len(hidden) // block)
        scores[torch.arange(len(hidden)), said] += 1e6
        return scores

    monkeypatch.setattr(model.backbone, "logits", scripted)


def contents(document: Document) -> list[str | bytes]:
    return [p.content if isinstance(p.content, str) else p.content.tobytes() for p in document.parts]


def new(document: Document, prompt: Document) -> tuple[Part, ...]:
    return document.parts[len(prompt.parts) :]


# ---- limits


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_max_tokens(model: UnifiedModel, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    prefer(model, monkeypatch, "n")
    (out,) = decode(model, [PROMPT], DecodingSettings(max_tokens=limit), [0])
    assert [p.content for p in new(out, PROMPT)] == (["n" * limit] if limit else [])


def test_max_tokens_counts_over_all_texts(model: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(model, monkeypatch, "ab", model.text.special.boi, "c")
    (out,) = decode(model, [PROMPT], DecodingSettings(max_tokens=5, max_images=1), [0])
    first, image, second = new(out, PROMPT)
    assert (first.content, second.content) == ("ab", "ccc")
    assert image.is_image


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_max_images(model: UnifiedModel, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """A model that wants nothing but images gets as many as it may, and has to say something else then."""
    prefer(model, monkeypatch, model.text.special.boi)
    (out,) = decode(model, [PROMPT], DecodingSettings(max_tokens=3, max_images=limit), [0])
    assert len(out.images) == limit
    assert [p.is_image for p in new(out, PROMPT)][:limit] == [True] * limit


def test_an_end_ends(model: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(model, monkeypatch, "ab", model.text.special.eos)
    (out,) = decode(model, [PROMPT], DecodingSettings(max_tokens=50), [0])
    assert [p.content for p in new(out, PROMPT)] == ["ab"]
    monkeypatch.undo()
    prefer(model, monkeypatch, model.text.special.eos)
    (out,) = decode(model, [PROMPT], DecodingSettings(max_tokens=50), [0])
    assert out == PROMPT  # no empty text


def test_an_image_first(model: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(model, monkeypatch, model.text.special.eos)
    (out,) = decode(model, [PROMPT], DecodingSettings(start="image", max_images=1), [0])
    (part,) = new(out, PROMPT)
    assert part.image.size == (8, 8)
    (wide,) = decode(model, [PROMPT], DecodingSettings(start="image", max_images=1, size=(4, 8)), [0])
    assert wide.images[0].size == (8, 4)


# ---- the context


@pytest.mark.parametrize("generator", ["flow", "autoregressive"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_document_stops_where_its_context_ends(
    make: Make, monkeypatch: pytest.MonkeyPatch, generator: str, guidance: float
) -> None:
    model = make(generator, context_length=40)
    prefer(model, monkeypatch, "n")
    image = model.generator.sampling.override(guidance=guidance)
    (out,) = decode(model, [PROMPT], DecodingSettings(max_tokens=1000, image=image), [0])
    prompt = 1 + len(model.text.encode("a handwritten seven"))
    assert [p.content for p in new(out, PROMPT)] == ["n" * (40 - prompt)]


def test_an_image_that_does_not_fit_is_not_begun(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one image of 4 x 4 and its two boundaries, not for two."""
    for generator in ("flow", "autoregressive"):
        model = make(generator)
        prompt = 1 + len(model.text.encode("a handwritten seven"))
        for context, drawn in ((prompt + 17, 0), (prompt + 18, 1), (prompt + 35, 1), (prompt + 36, 2)):
            model = make(generator, context_length=context)
            with monkeypatch.context() as patch:
                prefer(model, patch, model.text.special.boi)
                (out,) = decode(model, [PROMPT], DecodingSettings(max_tokens=1000, max_images=9), [0])
            assert len(out.images) == drawn


def test_documents_stop_one_by_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reaches the end of its context while its neighbours go on."""
    model = make("flow", context_length=40)
    prompts = [Document((Part("x" * n, learn=False),)) for n in (30, 10, 38)]
    prefer(model, monkeypatch, "n")
    out = decode(model, prompts, DecodingSettings(max_tokens=20), [0, 1, 2])
    lengths = [1 + len(model.text.encode("x" * n)) for n in (30, 10, 38)]
    assert [d.text.count("n") for d in out] == [min(20, 40 - n) for n in lengths]


def test_a_prompt_longer_than_the_context_is_refused_with_numbers(make: Make) -> None:
    model = make("flow", context_length=40)
    long = Document((Part(picture(), learn=False), Part(picture(1), learn=False), Part("seven", learn=False)))
    tokens = 1 + 2 * 18 + len(model.text.encode("seven"))
    assert tokens > 40 - 2
    with pytest.raises(ValueError, match=r"prompt 1: it has \d+ tokens, .* sequence\.context_length 40") as error:
        decode(
            model, [PROMPT, Document((*long.parts, Part(" and some more", learn=False)))], DecodingSettings(), [0, 1]
        )
    more = tokens + len(model.text.encode("seven and some more")) - len(model.text.encode("seven"))
    assert int(str(error.value).split("it has ")[1].split()[0]) == pytest.approx(more, abs=3)  # merges across parts


def test_an_image_asked_for_without_room_is_refused_with_numbers(make: Make) -> None:
    model = make("flow", context_length=30)
    prompt = Document((Part("x" * 20, learn=False),))
    tokens = 1 + len(model.text.encode("x" * 20))
    with pytest.raises(
        ValueError, match=rf"prompt 0: {tokens} tokens and an image of 16 .* sequence\.context_length 30"
    ):
        decode(model, [prompt], DecodingSettings(start="image"), [0])


def test_prompts_of_any_shape_share_a_batch(model: UnifiedModel) -> None:
    """Long text then an image, beside an image then long text: each needs no more room than alone."""
    words = "a handwritten seven plus three plus seven equals ten and so on and on and on"
    prompts = [
        Document((Part(words, learn=False), Part(picture(0), learn=False))),
        Document((Part(picture(1, 4, 8), learn=False), Part(words, learn=False))),
        Document(()),
    ]
    model = model.double()
    try:
        settings = DecodingSettings(max_tokens=2, max_images=0, temperature=1.0)
        together = decode(model, prompts, settings, [1, 2, 3])
        alone = [decode(model, [p], settings, [s])[0] for p, s in zip(prompts, (1, 2, 3), strict=True)]
    finally:
        model.float()
    assert [contents(d) for d in together] == [contents(d) for d in alone]


# ---- what comes back


def test_a_prompt_s_parts_are_kept(model: UnifiedModel) -> None:
    prompt = Document(
        (Part("three", learn=False, role="question"), Part(picture(), learn=False), Part(" plus ")), "sum"
    )
    (out,) = decode(model, [prompt], DecodingSettings(max_tokens=4, max_images=1), [0])
    assert out.kind == "sum"
    assert out.parts[:3] == prompt.parts
    assert all(part.role == GENERATED for part in new(out, prompt))
    assert len(out.parts) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_text_never_holds_special_or_unused_ids(
    make: Make, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Ids are watched where they become text: a model that prefers bos, eoi and rows without a token gets none of them."""
    model = make("flow")
    model.text = TextTokenizer.train(["a handwritten seven"], 270)
    special, rows = model.text.special, model.backbone.config.vocabulary
    assert rows > len(model.text)
    logits, seen = model.backbone.logits, []

    def tempting(hidden: torch.Tensor) -> torch.Tensor:
        scores = logits(hidden)
        scores[:, [special.bos, special.eoi, *range(len(model.text), rows)]] += 1e4
        return scores

    def watched(ids: Sequence[int]) -> str:
        seen.extend(ids)
        return "text"

    monkeypatch.setattr(model.backbone, "logits", tempting)
    monkeypatch.setattr(model.text, "decode", watched)
    decode(model, [PROMPT] * 3, DecodingSettings(max_tokens=10, max_images=1, temperature=temperature), [0, 1, 2])
    assert len(seen) > 5
    assert max(seen) < special.bos


def test_the_same_seeds_give_the_same_documents(model: UnifiedModel) -> None:
    settings = DecodingSettings(max_tokens=8, max_images=1, temperature=2.0, start="image")
    first, again = (decode(model, [PROMPT, PROMPT], settings, [5, 6]) for _ in range(2))
    assert [contents(d) for d in first] == [contents(d) for d in again]
    assert contents(first[0]) != contents(first[1])
    torch.manual_seed(99)
    swapped = decode(model, [PROMPT, PROMPT], settings, [6, 5])
    assert [contents(d) for d in swapped] == [contents(d) for d in first[::-1]]


def test_greedy_text_needs_no_seed(model: UnifiedModel) -> None:
    settings = DecodingSettings(max_tokens=8, max_images=0)
    (a,), (b,) = decode(model, [PROMPT], settings, [1]), decode(model, [PROMPT], settings, [2])
    assert contents(a) == contents(b)
    # Where text is drawn by the block, which ids stay first is left to chance too.
    image = None if model.generator.text is None else model.generator.sampling.override(choice_temperature=0.0)
    settings = DecodingSettings(max_tokens=8, max_images=0, temperature=5.0, top_k=1, image=image)
    (k,) = decode(model, [PROMPT], settings, [3])
    assert contents(k) == contents(a)
    (p,) = decode(model, [PROMPT], replace(settings, temperature=1.0, top_k=0, top_p=1e-9), [4])
    assert contents(p) == contents(a)


def test_an_empty_document_is_continued(model: UnifiedModel) -> None:
    (out,) = decode(model, [Document(())], DecodingSettings(max_tokens=4, start="image", max_images=1), [0])
    assert out.parts[0].is_image


def test_no_documents_give_none(model: UnifiedModel) -> None:
    assert decode(model, [], DecodingSettings(), []) == []


def test_a_model_in_training_is_left_in_training(model: UnifiedModel) -> None:
    model.train()
    try:
        (out,) = decode(model, [PROMPT], DecodingSettings(max_tokens=2, max_images=0), [0])
        assert model.training
        assert not model.tokenizer.training
        with pytest.raises(ValueError, match="prompt 0"):
            decode(model, [Document((Part("x " * 400),))], DecodingSettings(), [0])
        assert model.training
    finally:
        model.eval()
    assert contents(out) == contents(decode(model, [PROMPT], DecodingSettings(max_tokens=2, max_images=0), [0])[0])


def test_pixels_become_pictures() -> None:
    pixels = torch.tensor([-1.0, 1.0, 0.0, -2.0, 2.0, 0.5]).view(1, 1, 6).expand(3, 1, 6)
    assert np.asarray(to_image(pixels))[0, :, 0].tolist() == [0, 255, 128, 0, 255, 191]
    every = torch.arange(256).view(1, 16, 16).expand(3, 16, 16) / 127.5 - 1
    assert np.array_equal(np.asarray(to_image(every))[..., 1], np.arange(256).reshape(16, 16))


# ---- refusals


def refused(
    model: UnifiedModel, message: str, documents: int = 1, seeds: int | None = None, **settings: object
) -> None:
    chosen = DecodingSettings(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        decode(model, [PROMPT] * documents, chosen, range(documents if seeds is None else seeds))


def test_a_size_the_recipe_does_not_draw_is_refused(model: UnifiedModel) -> None:
    refused(model, "size: this recipe draws 8x8, 8x4, got 12x16", size=(16, 12))
    refused(model, "size: .* got 4x8", size=(8, 4))  # sizes are (height, width), said as width x height


def test_guidance_without_dropped_text_is_refused(make: Make) -> None:
    model = make("flow", drop_text=0.0)
    refused(model, r"guidance: .*sequence\.drop_text.* got 2\.0", image=FlowSettings(guidance=2.0))
    assert len(decode(model, [PROMPT], DecodingSettings(max_tokens=0, image=FlowSettings(guidance=1.0)), [0])) == 1


@pytest.mark.parametrize(("documents", "seeds"), [(2, 1), (1, 2), (1, 0), (0, 1)])
def test_seeds_are_one_a_document(model: UnifiedModel, documents: int, seeds: int) -> None:
    refused(model, rf"seeds: expected one a document \({documents}\), got {seeds}", documents, seeds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: .* got -1"),
        ({"top_p": 0.0}, "top_p: .* got 0"),
        ({"top_p": 1.1}, r"top_p: .* got 1\.1"),
        ({"top_k": -3}, "top_k: .* got -3"),
        ({"max_tokens": -1}, "max_tokens and max_images: .* got -1 and 4"),
        ({"start": "image", "max_images": 0}, "max_images: expected at least 1 to start with an image, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodingSettings(**settings)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", None])
def test_what_is_no_seed_is_refused(model: UnifiedModel, seed: Any) -> None:
    with unchecked(), pytest.raises(ValueError, match=r"seeds: expected whole numbers from 0 to 2\*\*64 - 1, got"):
        decode(model, [PROMPT], DecodingSettings(max_tokens=0), [seed])


def test_any_whole_number_is_a_seed(make: Make) -> None:
    settings = DecodingSettings("image", max_tokens=0, max_images=1)
    with unchecked():
        drawn = [
            decode(make("flow"), [PROMPT], settings, [seed])[0].images[0] for seed in (3, np.int64(3), np.uint8(3))
        ]
    assert len({image.tobytes() for image in drawn}) == 1


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("masked", MaskedSettings(steps=17), "steps: expected at most one an id"),
        ("masked", MaskedSettings(text_steps=3), "text_steps: expected none, because .* got 3"),
        ("autoregressive", FlowSettings(), "sampling: expected ChoiceSettings, got FlowSettings"),
        ("next_scale", MaskedSettings(), "sampling: expected ChoiceSettings, got MaskedSettings"),
        ("token_raster", TokenDiffusionSettings(steps=3), "steps: raster order .* got 3"),
        ("prefilled", RegressionSettings(interval=(0.0, 0.5)), "interval: in parallel there is one step"),
        ("joint", MaskedSettings(text_steps=4), r"text_steps: expected at most one an id of a block \(3\), got 4"),
        ("cosine", RegressionSettings(renorm="global"), "renorm, rescale: a cosine's .* got global and 0.0"),
        ("cosine", RegressionSettings(rescale=0.5), "renorm, rescale: a cosine's .* got none and 0.5"),
        ("diffusion", DiffusionSettings(steps=1000), "steps: expected 1 to 996 network evaluations, got 1000"),
        ("diffusion", FlowSettings(), "sampling: expected DiffusionSettings, got FlowSettings"),
        ("queries", ChoiceSettings(), "sampling: expected FlowSettings, got ChoiceSettings"),
    ],
)
def test_settings_of_images_are_refused_before_a_text_begins(
    make: Make, name: str, image: SamplingSettings, message: str
) -> None:
    pieces = stream(make(name), [PROMPT], DecodingSettings(image=image), [0])
    with pytest.raises(ValueError, match=message):
        next(pieces)


def test_settings_of_images_do_not_matter_where_none_is_drawn(make: Make) -> None:
    model, reading = make("masked", drop_text=0.0), DecodingSettings(max_tokens=2, max_images=0)
    plain = decode(model, [PROMPT], reading, [0])
    for image in (MaskedSettings(steps=17), MaskedSettings(guidance=2.0), FlowSettings()):
        assert decode(model, [PROMPT], replace(reading, image=image), [0]) == plain
    with pytest.raises(ValueError, match=r"negative: expected none where no image is drawn \(max_images 0\), got 'x'"):
        DecodingSettings(max_images=0, negative="x")


def test_a_prompt_is_as_long_as_its_longest_branch(make: Make) -> None:
    """Words to be led away from stand for a prompt's text in one branch: their tokens are not added up."""
    model = make("flow", context_length=60)
    words = "".join("x " for _ in range(17))
    prompt = Document((Part("seven", learn=False), Part(picture(0), learn=False), Part(words, learn=False)))
    settings = DecodingSettings(
        max_tokens=1, max_images=1, image=FlowSettings(guidance=2.0), negative=words.replace("x", "y")
    )
    assert len(decode(model, [prompt], settings, [0])) == 1
    with pytest.raises(ValueError, match=r"prompt 0: it has \d+ tokens, with \d+ of negative in the place of its text"):
        decode(model, [prompt], replace(settings, negative=words * 2), [0])
    long = Document((Part("x " * 80, learn=False),))
    with pytest.raises(ValueError, match=r"prompt 0: it has \d+ tokens, more than"):  # whatever the other words
        decode(model, [long], settings, [0])


def test_reading_computes_one_branch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, branches = make("flow"), []
    start = Session.start

    def started(model: UnifiedModel, documents: int, asked: Sequence[Branch], capacity: int) -> Session:
        branches.append(len(asked))
        return start(model, documents, asked, capacity)

    monkeypatch.setattr(Session, "start", started)
    guided = FlowSettings(guidance=3.0)
    read = decode(model, [PROMPT], DecodingSettings(max_tokens=8, max_images=0, image=guided), [0])
    plain = decode(model, [PROMPT], DecodingSettings(max_tokens=8, max_images=0), [0])
    decode(model, [PROMPT], DecodingSettings(max_tokens=8, max_images=1, image=guided), [0])
    assert branches == [1, 1, 2]
    assert read == plain


def test_another_generator_s_settings_are_refused(make: Make) -> None:
    model = make("autoregressive")
    refused(model, "sampling: expected ChoiceSettings, got FlowSettings", start="image", image=FlowSettings())
