import numpy as np
import pytest

from unimodal.data.digits import (
    NUMBER_WORDS,
    DigitsSource,
    Kind,
    Split,
    caption,
    caption_digit,
    digit_images,
    digits_of,
    image_to_values,
    number_sentences,
    sum_answer,
    values_to_image,
)
from unimodal.data.source import Source
from unimodal.documents import Document

KINDS: tuple[Kind, ...] = ("text_to_image", "image_to_text", "sum", "text")


def scans(split: Split) -> dict[bytes, int]:
    digits = digit_images(split)
    return {digits.image(i).tobytes(): int(digits.labels[i]) for i in range(len(digits))}


def test_no_scan_is_on_both_sides_and_all_are_on_one() -> None:
    train, test = scans("train"), scans("test")
    assert not train.keys() & test.keys()
    assert len(digit_images("train")) + len(digit_images("test")) == len(digit_images()) == 1797
    assert 0.17 < len(digit_images("test")) / 1797 < 0.23
    assert min(np.bincount(digit_images("test").labels)) >= 20
    # The split is part of what a score means: a change of it is a change of every number published.
    assert len(digit_images("test")) == 374


def test_values_and_pixels_convert_there_and_back() -> None:
    values = digit_images().values
    assert values.max() == 16
    assert values_to_image(np.full((8, 8), 16)).getpixel((0, 0)) == (255, 255, 255)
    for scan in values[:50]:
        assert np.array_equal(np.rint(image_to_values(values_to_image(scan))), scan)


def test_the_cached_scans_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        digit_images("train").values[0, 0, 0] = 1


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_depend_on_their_arguments_only(kind: Kind, split: Split) -> None:
    source = DigitsSource(kind, split)
    assert isinstance(source, Source)
    for index in (0, len(source) - 1):
        document = source.document(index, np.random.default_rng([3, index]))
        assert document == DigitsSource(kind, split).document(index, np.random.default_rng([3, index]))
        assert document.kind == source.kind == kind
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f"got {index}"):
            source.document(index, np.random.default_rng(0))


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_name_their_scan(split: Split) -> None:
    known = scans(split)
    for index in range(0, len(known), 37):
        drawn = DigitsSource("text_to_image", split).document(index, np.random.default_rng(0))
        read = DigitsSource("image_to_text", split).document(index, np.random.default_rng(0))
        assert caption_digit(drawn.text) == known[drawn.images[0].tobytes()]
        assert [(part.is_image, part.learn) for part in drawn.parts] == [(False, False), (True, True)]
        assert [(part.is_image, part.learn) for part in read.parts] == [(True, False), (False, True)]
        assert (read.text, read.images) == (drawn.text, drawn.images)


@pytest.mark.parametrize("split", ["train", "test"])
def test_sums_are_right_and_use_scans_of_their_split(split: Split) -> None:
    known, source = scans(split), DigitsSource("sum", split)
    totals = set()
    for index in range(150):
        document = source.document(index, np.random.default_rng([1, index]))
        left, plus, right, equals, word, *answer = document.parts
        a, b, *drawn = (known[image.tobytes()] for image in document.images)
        total = sum_answer(word.text)
        assert total == a + b
        assert (plus.text, equals.text) == (" plus ", " equals ")
        assert tuple(drawn) == digits_of(total)
        assert [part.learn for part in document.parts] == [False] * 4 + [True] * (1 + len(answer))
        totals.add(total)
        assert left.is_image
        assert right.is_image
    assert len(totals) >= 15


def test_sentences_are_true_and_split_apart() -> None:
    value = {word: number for number, word in enumerate(NUMBER_WORDS)}
    for sentence in number_sentences():
        words = sentence.split()
        match words:
            case [a, "plus", b, "equals", c]:
                assert value[a] + value[b] == value[c]
            case [a, "minus", b, "equals", c]:
                assert value[a] - value[b] == value[c]
            case [a, "is", relation, "than", b]:
                assert (value[a] < value[b]) == (relation == "less")
            case ["after", a, "comes", b]:
                assert value[a] + 1 == value[b]
            case ["before", a, "comes", b]:
                assert value[a] - 1 == value[b]
            case _:
                pytest.fail(sentence)
    train, test = set(number_sentences("train")), set(number_sentences("test"))
    assert not train & test
    assert train | test == set(number_sentences())
    assert len(test) > 30


@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_holds_every_text_of_its_documents(kind: Kind) -> None:
    source = DigitsSource(kind, "train")
    corpus = set(source.corpus())

    def texts(document: Document) -> set[str]:
        return {part.text for part in document.parts if part.is_text}

    for index in range(0, len(source), 7):
        assert texts(source.document(index, np.random.default_rng(index))) <= corpus


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("twelve", 12), (" Twelve. ", 12), ("zero", 0), ("12", 12), ("", None), ("twelve twelve", None),
        ("a twelve", None), ("nineteen", None), ("1 2", None), ("-3", None), ("\u0661", None), ("9999", None),
    ],
)  # fmt: skip
def test_sum_answer(text: str, number: int | None) -> None:
    assert sum_answer(text) == number


def test_caption_digit_takes_exact_captions_only() -> None:
    assert [caption_digit(caption(digit)) for digit in range(10)] == list(range(10))
    assert caption_digit(" a handwritten two\n") == 2
    assert caption_digit("a handwritten two three") is None
    assert caption_digit("") is None


def test_digits_of() -> None:
    assert [digits_of(number) for number in (0, 9, 10, 18)] == [(0,), (9,), (1, 0), (1, 8)]
    with pytest.raises(ValueError, match="got -1"):
        digits_of(-1)
