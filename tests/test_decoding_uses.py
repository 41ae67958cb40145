"""Uses of decoding: streamed, stopped, inpainted; best of several; drawn, looked at and drawn again."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from generator_cases import WHOLE
from PIL import Image
from shape_checks import unchecked

from unimodal.decoding import decode, stream
from unimodal.decoding_settings import DecodingSettings, Inpaint, Piece
from unimodal.documents import Document, Part
from unimodal.evaluation.likelihood import log_likelihoods
from unimodal.model import UnifiedModel
from unimodal.refine import Look, _try_seed, best_of, look_again, reads_back
from unimodal_generators import FlowSettings, Regression
from unimodal_generators.base import Known
from unimodal_tokenizers.base import Grid, ImageTokens

Make = Callable[..., UnifiedModel]
PROMPT = Document((Part("a handwritten seven", learn=False),), "text_to_image")
OTHER = Document((Part("three plus", learn=False),), "text_to_image")


def picture(seed: int = 0, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def contents(parts: Sequence[Part]) -> list[str | bytes]:
    return [p.content if isinstance(p.content, str) else p.content.tobytes() for p in parts]


def joined(pieces: Sequence[Piece], document: int) -> list[str | bytes]:
    """The pieces of one document put together, previews left out."""
    found: list[str | bytes] = []
    for piece in pieces:
        if piece.document != document or piece.preview is not None:
            continue
        if piece.image is not None:
            found.append(piece.image.tobytes())
        elif found and isinstance(found[-1], str):
            found[-1] += piece.text
        else:
            found.append(piece.text)
    return found


# ---- streaming


@pytest.mark.parametrize("start", ["text", "image"])
@pytest.mark.parametrize("previews", [False, True])
def test_pieces_joined_are_the_document(model: UnifiedModel, start: str, previews: bool) -> None:
    settings = DecodingSettings(start=start, max_tokens=12, max_images=2, temperature=1.5)  # type: ignore[arg-type]
    prompts = [PROMPT, OTHER, PROMPT]
    whole = decode(model, prompts, settings, [3, 4, 5])
    pieces = list(stream(model, prompts, settings, [3, 4, 5], previews=previews))
    for i, (prompt, document) in enumerate(zip(prompts, whole, strict=True)):
        assert joined(pieces, i) == contents(document.parts[len(prompt.parts) :])
    assert all((p.text != "") + (p.image is not None) + (p.preview is not None) == 1 for p in pieces)


def test_an_image_is_previewed_step_by_step(make: Make) -> None:
    settings = DecodingSettings("image", max_tokens=0, max_images=1, image=FlowSettings(steps=5))
    pieces = list(stream(make("flow"), [PROMPT, OTHER], settings, [0, 1], previews=True))
    assert [p.document for p in pieces] == [0, 1] * 5
    assert [p.image is not None for p in pieces] == [False] * 8 + [True] * 2
    assert len({p.preview.tobytes() for p in pieces if p.preview is not None}) == 8
    assert all(p.preview is None for p in stream(make("flow"), [PROMPT], settings, [0]))


PREVIEWS = {
    "flow": 19, "both": 19, "unet": 19, "diffusion": 7, "autoregressive": 3, "codes": 3, "shared": 3, "rows": 3, "digits": 3,
    "squares": 1, "masked": 7, "parallel": 7, "joint": 7, "next_scale": 2, "token_raster": 3, "token_random": 2,
    "regression": 3, "prefilled_private": 0, "queries": 19, "janus": 3,
}  # fmt: skip
"""Of an image of 4 x 4 tokens: a step each, or a row, or a scale; all but the last, which is the image."""


@pytest.mark.parametrize("name", WHOLE)
def test_every_generator_shows_what_it_has(make: Make, name: str) -> None:
    pieces = list(
        stream(make(name), [PROMPT], DecodingSettings("image", max_tokens=0, max_images=1), [1], previews=True)
    )
    previews = [np.asarray(p.preview) for p in pieces if p.preview is not None]
    assert len(previews) == PREVIEWS[name]
    final = np.asarray(pieces[-1].image)
    rows = len(previews) + 1
    if name in ("autoregressive", "token_raster", "regression", "squares"):  # what was drawn stays
        for done, preview in enumerate(previews, start=1):
            height = done * 8 // rows
            assert np.array_equal(preview[:height], final[:height])
            assert np.array_equal(preview[height], preview[height - 2])  # and goes on below
            assert not np.array_equal(preview, final)


def test_a_preview_shows_what_was_given_below(make: Make) -> None:
    settings = DecodingSettings("image", max_tokens=0, max_images=1)
    free = np.full((8, 8), 255, dtype=np.uint8)
    free[6:] = 0
    pieces = list(
        stream(
            make("autoregressive"), [PROMPT], settings, [1], [Inpaint(picture(), Image.fromarray(free))], previews=True
        )
    )
    first, final = pieces[0].preview, pieces[-1].image
    assert first is not None
    assert final is not None
    assert np.array_equal(np.asarray(first)[6:], np.asarray(final)[6:])
    assert not np.array_equal(np.asarray(first)[:6], np.asarray(final)[:6])


@pytest.mark.parametrize("name", ["metamorph", "blip3o"])
def test_a_decoder_that_draws_does_so_from_the_document_s_seed(make: Make, name: str) -> None:
    model = make(name).double()
    try:
        prompts, seeds = [PROMPT, PROMPT, OTHER], [3, 4, 5]
        settings = DecodingSettings("image", max_tokens=9, max_images=2, temperature=1.5)
        together = decode(model, prompts, settings, seeds)
        alone = [decode(model, [p], settings, [s])[0] for p, s in zip(prompts, seeds, strict=True)]
        previewed = list(stream(model, prompts, settings, seeds, previews=True))
    finally:
        model.float()
    assert [contents(d.parts) for d in together] == [contents(d.parts) for d in alone]
    for i, (prompt, document) in enumerate(zip(prompts, together, strict=True)):
        assert joined(previewed, i) == contents(document.parts[len(prompt.parts) :])  # previews draw nothing of it
    assert together[0].images[0].tobytes() != together[1].images[0].tobytes()


def test_between_pieces_the_model_is_as_it_was(make: Make) -> None:
    model = make("flow").train()
    seen = 0
    for _ in stream(model, [PROMPT], DecodingSettings(max_tokens=4, max_images=1), [0]):
        assert model.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        seen += 1
    assert seen > 0
    assert list(stream(model, [], DecodingSettings(), [])) == []


def test_a_letter_comes_when_all_its_bytes_are_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("flow")
    ids = [i for byte in "ü".encode() for i in [_byte(model, byte)]]
    script(model, monkeypatch, [*ids, *model.text.encode("n"), model.text.special.eos])
    texts = [p.text for p in stream(model, [PROMPT], DecodingSettings(max_tokens=9, max_images=0), [0])]
    assert texts == ["ü", "n"]
    script(model, monkeypatch, [ids[0], model.text.special.eos])  # and what never becomes one comes in the end
    assert [p.text for p in stream(model, [PROMPT], DecodingSettings(max_tokens=9, max_images=0), [0])] == ["\ufffd"]


def _byte(model: UnifiedModel, byte: int) -> int:
    """The id of a single byte: byte-level BPE spells printable ones as themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    found = model.text.bpe.token_to_id(chr(byte) if byte in printable else chr(256 + others.index(byte)))
    assert found is not None
    return int(found)


def script(model: UnifiedModel, monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> None:
    """Make the model say these ids one after the other."""
    steps = iter(ids)
    rows = model.backbone.config.rows

    def scripted(hidden: torch.Tensor) -> torch.Tensor:
        scores = hidden.new_zeros(len(hidden), rows)
        scores[:, next(steps)] = 1e6
        return scores

    monkeypatch.setattr(model.backbone, "logits", scripted)


# ---- stop strings


@pytest.mark.parametrize(("said", "stop", "left"), [
    ("one. two", (".",), "one"), ("one. two", ("two", ". t"), "one"), ("stop", ("stop",), ""), ("abc", ("x",), "abc"),
    ("aab", ("aab", "ab"), ""), ("ab", ("b",), "a"),
])  # fmt: skip
def test_a_document_ends_before_a_stop(
    make: Make, monkeypatch: pytest.MonkeyPatch, said: str, stop: tuple[str, ...], left: str
) -> None:
    model = make("flow")
    ids = [*model.text.encode(said), model.text.special.eos]
    settings = DecodingSettings(max_tokens=20, max_images=0, stop=stop)
    script(model, monkeypatch, ids)
    (document,) = decode(model, [PROMPT], settings, [0])
    assert contents(document.parts[1:]) == ([left] if left else [])
    script(model, monkeypatch, ids)
    pieces = list(stream(model, [PROMPT], settings, [0]))
    assert "".join(p.text for p in pieces) == left  # nothing of a stop is ever shown


def test_an_empty_stop_is_refused() -> None:
    for stop in (("a", ""), "ab"):
        with unchecked(), pytest.raises(ValueError, match="stop: expected a tuple of texts that are not empty, got"):
            DecodingSettings(stop=stop)  # type: ignore[arg-type]
    with unchecked(), pytest.raises(ValueError, match="start: expected text or image, got 'picture'"):
        DecodingSettings("picture")  # type: ignore[arg-type]


# ---- inpainting


def mask(top: int, left: int, height: int = 8, width: int = 8) -> Image.Image:
    """Draw the right lower part from (top, left) on."""
    free = np.zeros((height, width), dtype=np.uint8)
    free[top:, left:] = 255
    return Image.fromarray(free)


DRAWING = DecodingSettings("image", max_tokens=0, max_images=1)


@pytest.fixture
def inpainter(model: UnifiedModel) -> UnifiedModel:
    if not model.generator.inpaints:
        with pytest.raises(ValueError, match=r"inpaint: \w+ cannot keep what is given of an image"):
            decode(model, [PROMPT], DRAWING, [0], [Inpaint(picture(), mask(4, 4))])
        pytest.skip("this generator keeps nothing that is given, and says so")
    return model


def test_a_tokenizer_that_looks_around_does_not_see_what_is_to_be_drawn() -> None:
    image, other = picture(7), np.array(picture(7))
    other[4:, 4:] = 0
    shown = [Inpaint(i, mask(4, 4)).shown() for i in (image, Image.fromarray(other))]
    assert np.array_equal(*shown)
    assert np.array_equal(shown[0][:4], np.asarray(image)[:4])


def test_given_pixels_stay_and_the_rest_is_drawn(make: Make) -> None:
    model, image = make("flow"), picture(7)
    (document,) = decode(model, [PROMPT], DRAWING, [0], [Inpaint(image, mask(4, 4))])
    before, after = np.asarray(image), np.asarray(document.images[0])
    assert np.array_equal(before[:4], after[:4])
    assert np.array_equal(before[4:, :4], after[4:, :4])
    assert not np.array_equal(before[4:, 4:], after[4:, 4:])


def test_what_is_to_be_drawn_is_not_looked_at(inpainter: UnifiedModel) -> None:
    image, other = picture(7), np.array(picture(7))
    other[4:, 4:] = 0
    drawn = [
        decode(inpainter, [PROMPT], DRAWING, [0], [Inpaint(i, mask(4, 4))])[0].images[0].tobytes()
        for i in (image, Image.fromarray(other))
    ]
    assert drawn[0] == drawn[1]


def test_images_and_masks_are_read_as_files_are() -> None:
    """Turned as they say, and on white: a mask that lets everything through is all to be drawn, as the command reads it."""
    wide = picture(3, 4, 8)
    turned = wide.copy()
    turned.getexif()[0x0112] = 6  # a quarter to the right
    one = Inpaint(turned, Image.new("L", (4, 8), 0))
    assert np.array_equal(one.shown(), np.rot90(np.asarray(wide), -1))
    with pytest.raises(ValueError, match="redraw: expected a mask of 4x8 pixels, as the image has, got 8x4"):
        Inpaint(turned, Image.new("L", (8, 4), 0))
    grid = Grid(4, 4)
    for mode, black, other in (("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)), ("RGB", (0, 0, 0), (0, 0, 1)), ("1", 0, 1)):
        for colour, given in ((black, True), (other, False)):
            assert Inpaint(picture(), Image.new(mode, (8, 8), colour)).given(grid).unique().tolist() == [given]


def test_a_token_that_is_given_in_part_is_drawn() -> None:
    given = Inpaint(picture(), mask(5, 3)).given(Grid(4, 4))
    assert given.view(4, 4).tolist() == [[True] * 4] * 2 + [[True, False, False, False]] * 2


def test_nothing_given_is_drawing_and_all_given_is_the_image(inpainter: UnifiedModel) -> None:
    (plain,) = decode(inpainter, [PROMPT], DRAWING, [3])
    (free,) = decode(inpainter, [PROMPT], DRAWING, [3], [Inpaint(picture(), mask(0, 0))])
    assert contents(free.parts) == contents(plain.parts)
    (given,) = decode(inpainter, [PROMPT], DRAWING, [3], [Inpaint(picture(), mask(8, 8))])
    pixels = inpainter.tokenizer.decode(inpainter.tokenizer.encode(_tensor(picture())))[0]
    shown = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(given.images[0]), shown)


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_neighbours_of_an_inpainted_image_do_not_change(inpainter: UnifiedModel) -> None:
    inpaint = [None, Inpaint(picture(5), mask(2, 4)), None]
    prompts, seeds = [PROMPT, PROMPT, OTHER], [1, 2, 3]
    inpainter = inpainter.double()
    try:
        together = decode(inpainter, prompts, DRAWING, seeds, inpaint)
        alone = [decode(inpainter, [p], DRAWING, [s], [i])[0] for p, s, i in zip(prompts, seeds, inpaint, strict=True)]
    finally:
        inpainter.float()
    assert [contents(d.parts) for d in together] == [contents(d.parts) for d in alone]


def test_what_is_given_of_an_image_is_given_of_every_try(make: Make) -> None:
    model, known = make("flow"), [Inpaint(picture(), mask(8, 8)), None]
    seen: list[Document] = []

    def first(documents: Sequence[Document]) -> list[float]:
        seen.extend(documents)
        return [0.0] * len(documents)

    best_of(model, [PROMPT, OTHER], DRAWING, [5, 6], 3, first, known)
    tries = look_again(model, [PROMPT, OTHER], DRAWING, [5, 6], 3, lambda document, read: False, inpaint=known)
    for drawn in ([d.images[-1] for d in seen[::2]], [look.document.images[-1] for look in tries[0]]):
        assert [image.tobytes() for image in drawn] == [picture().tobytes()] * 3
    for drawn in ([d.images[-1] for d in seen[1::2]], [look.document.images[-1] for look in tries[1]]):
        assert len({image.tobytes() for image in drawn} | {picture().tobytes()}) == 4


def test_only_the_first_image_is_inpainted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("flow")
    script(model, monkeypatch, [model.text.special.boi, *[model.text.special.eos] * 9])
    settings = DecodingSettings("image", max_tokens=9, max_images=2)
    (document,) = decode(model, [PROMPT], settings, [0], [Inpaint(picture(), mask(8, 8))])
    first, second = document.images
    assert first.tobytes() == picture().tobytes()
    assert second.tobytes() != first.tobytes()


def test_bad_masks_are_refused(inpainter: UnifiedModel) -> None:
    with pytest.raises(ValueError, match="redraw: expected a mask of 8x8 pixels, as the image has, got 8x4"):
        Inpaint(picture(), mask(0, 0, height=4))
    inpaint = [None, Inpaint(picture(0, 4, 8), mask(0, 0, height=4))]
    with pytest.raises(ValueError, match="prompt 1: inpaint: expected an image of 8x8 pixels, got 8x4"):
        decode(inpainter, [PROMPT] * 2, DRAWING, [0, 1], inpaint)
    with pytest.raises(ValueError, match=r"inpaint: expected one a document \(2\), got 1"):
        decode(inpainter, [PROMPT] * 2, DRAWING, [0, 1], [None])


# ---- the best of several


def test_the_best_of_one_is_decoding(model: UnifiedModel) -> None:
    (one,) = best_of(model, [PROMPT], DRAWING, [5], 1, lambda documents: [0.0] * len(documents))
    assert contents(one.parts) == contents(decode(model, [PROMPT], DRAWING, [5])[0].parts)


def test_the_best_of_several_is_the_one_the_scorer_likes(model: UnifiedModel) -> None:
    seen: list[Document] = []

    def brightness(documents: Sequence[Document]) -> list[float]:
        seen.extend(documents)
        return [float(np.asarray(d.images[-1]).mean()) for d in documents]

    best = best_of(model, [PROMPT, OTHER], DRAWING, [5, 6], 4, brightness)
    assert len(seen) == 8
    draws = not isinstance(model.generator, Regression)  # which gives the mean, whatever the seed
    assert len({d.images[-1].tobytes() for d in seen}) == (8 if draws else 2)  # every try has draws of its own
    for prompt, found in zip((PROMPT, OTHER), best, strict=True):
        tries = [d for d in seen if d.parts[0] == prompt.parts[0]]
        assert contents(found.parts) == contents(max(tries, key=lambda d: brightness([d])[0]).parts)
    alone = best_of(model, [OTHER], DRAWING, [6], 4, brightness)
    assert contents(alone[0].parts) == contents(best[1].parts)


def test_best_of_refuses_what_means_nothing(model: UnifiedModel) -> None:
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        best_of(model, [PROMPT], DRAWING, [0], 0, lambda documents: [0.0])
    with pytest.raises(ValueError, match="scorer: expected 2 scores, got 1"):
        best_of(model, [PROMPT], DRAWING, [0], 2, lambda documents: [0.0])


def test_a_model_scores_by_reading_its_own_image(model: UnifiedModel) -> None:
    documents = decode(model, [PROMPT, OTHER], DRAWING, [1, 2])
    scores = reads_back(model)(documents)
    for document, score in zip(documents, scores, strict=True):
        look = Document((Part(document.images[-1], learn=False),))
        ((likelihood,),) = log_likelihoods(model, [look], [[document.parts[0].text]])
        assert score == pytest.approx(likelihood.mean, abs=1e-5)
    photo = Document((PROMPT.parts[0], Part(picture(), learn=False), Part(" is it?", learn=False)))
    # An image that was given says nothing of the model.
    assert reads_back(model)([PROMPT, documents[0], photo]) == pytest.approx(
        [-math.inf, scores[0], -math.inf], abs=1e-5
    )
    assert reads_back(model)([PROMPT]) == [-math.inf]


def test_tries_that_draw_nothing_do_not_take_the_others_with_them(make: Make) -> None:
    model, settings = make("flow"), DecodingSettings("text", max_tokens=3, max_images=1, temperature=1.5)
    prompts, seeds = [PROMPT] * 12, list(range(12))
    tries = [decode(model, prompts, settings, [_try_seed(s, n) for s in seeds]) for n in range(2)]
    drew = [[len(d.parts) > 1 and any(p.is_image for p in d.parts) for d in row] for row in tries]
    assert [True, False] in [list(pair) for pair in zip(*drew, strict=True)]
    best = best_of(model, prompts, settings, seeds, 2, reads_back(model))
    for document, drawn in zip(best, zip(*drew, strict=True), strict=True):
        assert any(p.is_image for p in document.parts) == any(drawn)


# ---- draw, look, draw again


def test_what_reads_right_is_not_drawn_again(model: UnifiedModel) -> None:
    looks = look_again(model, [PROMPT, OTHER], DRAWING, [1, 2], 3, lambda document, read: True)
    assert [len(tries) for tries in looks] == [1, 1]
    assert contents(looks[0][0].document.parts) == contents(decode(model, [PROMPT], DRAWING, [1])[0].parts)


def test_what_reads_wrong_is_drawn_again_up_to_a_limit(model: UnifiedModel) -> None:
    asked: list[str] = []

    def third_time(document: Document, read: str) -> bool:
        asked.append(document.parts[0].text)
        return document.parts[0] == PROMPT.parts[0] and asked.count(PROMPT.parts[0].text) == 2

    looks = look_again(model, [PROMPT, OTHER], DRAWING, [1, 2], 3, third_time)
    assert [len(tries) for tries in looks] == [2, 3]
    assert [tries[-1].agrees for tries in looks] == [True, False]
    draws = not isinstance(model.generator, Regression)
    assert len({t.document.images[-1].tobytes() for t in looks[1]}) == (3 if draws else 1)
    for tries in looks:
        for one in tries:
            seen = Document((Part(one.document.images[-1], learn=False),))
            read = decode(model, [seen], DecodingSettings(max_tokens=64, max_images=0), [0])[0].parts[1:]
            assert one.read == "".join(part.text for part in read)
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        look_again(model, [PROMPT], DRAWING, [1], 0, third_time)
    with pytest.raises(ValueError, match="max_images: expected at least 1 to look at, got 0"):
        look_again(model, [PROMPT], DecodingSettings(max_images=0), [1], 1, third_time)
    for seeds in ([], [1, 2]):
        with pytest.raises(ValueError, match=rf"seeds: expected one a document \(1\), got {len(seeds)}"):
            look_again(model, [PROMPT], DRAWING, seeds, 1, third_time)


def test_a_try_that_draws_nothing_does_not_fit(make: Make) -> None:
    """A model that may think first may also end without an image: one such try must not take the others with it."""
    model, settings = make("flow"), DecodingSettings("text", max_tokens=3, max_images=1, temperature=1.5)
    seeds = list(range(12))
    looks = look_again(model, [PROMPT] * 12, settings, seeds, 2, lambda document, read: True)
    first = decode(model, [PROMPT] * 12, settings, seeds)
    assert {len(document.images) for document in first} == {0, 1}
    for tries, document in zip(looks, first, strict=True):
        assert contents(tries[0].document.parts) == contents(document.parts)
        assert [one.agrees for one in tries] == (
            [True] if document.images else [False, bool(tries[-1].document.images)]
        )
        assert all(one.read == "" for one in tries if not one.document.images)


def test_what_does_not_fit_may_be_shown_to_the_model(make: Make) -> None:
    def corrected(document: Document, look: Look) -> Document:
        wrong = Part(f" reads {look.read}. Again: ", learn=False)
        return Document((*document.parts, Part(look.document.images[-1], learn=False), wrong), document.kind)

    model = make("flow")
    (tries,) = look_again(model, [PROMPT], DRAWING, [1], 2, lambda document, read: False, again=corrected)
    assert contents(tries[0].document.parts) == contents(decode(model, [PROMPT], DRAWING, [1])[0].parts)
    shown = corrected(PROMPT, tries[0])
    assert contents(tries[1].document.parts[:-1]) == contents(shown.parts)
    (redrawn,) = decode(model, [shown], DRAWING, [_try_seed(1, 1)])
    assert contents(tries[1].document.parts) == contents(redrawn.parts)


def test_a_mask_of_another_number_of_tokens_is_refused() -> None:
    tokens = ImageTokens(torch.zeros(4, 2), (Grid(2, 2),))
    with pytest.raises(ValueError, match=r"known: expected a mask of 4 tokens, got \[3\]"):
        Known(tokens, torch.zeros(3, dtype=torch.bool))
