"""Documents by structure and features, sums of digits and steps of shapes: oracles get full marks, cheats do not."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unimodal.data.digits import NUMBER_WORDS, digit_images, digits_of
from unimodal.data.shapes import HELD_OUT, Scene, built, render
from unimodal.documents import Document, Part
from unimodal.evaluation.benchmark import Answer, Benchmark, Item, Verdict
from unimodal.evaluation.interleaved import (
    DigitSums,
    Interleaved,
    ShapesSteps,
    images_with_text,
    kinds,
    read_step,
)
from unimodal.evaluation.shapes import read_caption
from unimodal.images import png_bytes
from unimodal.metrics.features import ImageFeatures, as_drawn
from unimodal.metrics.statistics import bootstrap_rows

Content = str | Image.Image


def parts(*contents: Content) -> tuple[Part, ...]:
    return tuple(Part(content) for content in contents)


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.new("RGB", size, colour)


RED, GREEN, BLUE = plain((255, 0, 0)), plain((0, 255, 0), (5, 3)), plain((0, 0, 255))


def rows_of(answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [
        {"id": a.item.id, "sample": a.sample, "task": a.item.task, "score": v.score, "reason": v.reason, **v.fields}
        for a, v in zip(answers, verdicts, strict=True)
    ]


def judged(benchmark: Benchmark, item: Item, *contents: Content) -> Verdict:
    (verdict,) = benchmark.judge([Answer(item, 0, parts(*contents))])
    json.dumps(dict(verdict.fields))
    assert (verdict.score == 1) == (verdict.reason == "")
    return verdict


# ---- kinds and pairs


def test_kinds_join_texts_and_leave_blank_ones_out() -> None:
    assert kinds(parts("a", "b", RED, " \n", BLUE, "", "c")) == ["text", "image", "image", "text"]
    assert kinds(()) == []


def test_images_go_with_the_nearest_text_before_them() -> None:
    prompt = Document(parts("Tell me", RED, "of ships."))
    found = images_with_text(prompt, parts(RED, "A ", "ship", BLUE, GREEN, " ", RED, "sinks"))
    assert [text for _, text in found] == ["of ships.", "A ship", "A ship", "A ship"]
    assert [image.getpixel((0, 0)) for image, _ in found] == [(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 0, 0)]
    assert images_with_text(Document(parts(RED)), parts(BLUE))[0][1] is None


# ---- interleaved


class Colours(ImageFeatures):
    """A space of three colours: an image's mean, and the words of a text."""

    def __init__(self, *args: Any) -> None:
        super().__init__("colours", 3, as_drawn)
        self.seen: list[str] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=(2, 3)) / 255

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        self.seen += texts
        return torch.tensor([[float(word in text) for word in ("red", "green", "blue")] for text in texts])

    def spec(self) -> dict[str, Any]:
        return {"name": self.name}


def prompts_file(folder: Path, *records: dict[str, Any]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


STORY: dict[str, Any] = {
    "prompt": {"parts": [{"text": "Tell a story."}]},
    "asked": ["text", "image", "text", "image"],
    "task": "story",
}


def test_prompts_are_read(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png_bytes(RED))
    edit = {"id": "my-edit", "prompt": {"parts": [{"image": "red.png"}, {"text": "bluer"}]}, "asked": ["image"]}
    benchmark = Interleaved(prompts_file(tmp_path, STORY, edit))
    first, second = benchmark.items()
    assert (first.id, first.task, first.truth["asked"]) == ("00000", "story", STORY["asked"])
    assert (second.id, second.task) == ("my-edit", "documents")
    assert second.prompt.images[0].getpixel((0, 0)) == (255, 0, 0)
    assert not any(part.learn for part in second.prompt.parts)
    assert benchmark.settings(None).max_images == 3
    assert benchmark.spec() == {"agreement": None, "consistency": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"asked": []}, "asked"),
        ({"asked": ["text", "video"]}, "asked"),
        ({"asked": ["text", "text", "image"]}, "no two texts in a row"),
        ({"asked": None}, "asked"),
        ({"prompt": "Tell"}, "prompt"),
        ({"prompt": {"parts": []}}, "parts"),
        ({"prompt": {"parts": [{"image": "../x.png"}]}}, "image"),
        ({"task": 3}, "task"),
        ({"id": "../up"}, "id"),
        ({"order": []}, "'order'"),
    ],
)
def test_prompts_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"prompts\.jsonl:2.*{message}"):
        Interleaved(prompts_file(tmp_path, STORY, STORY | changes))


def test_no_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one line"):
        Interleaved(prompts_file(tmp_path))
    with pytest.raises(ValueError, match="no such file"):
        Interleaved(tmp_path / "none.jsonl")


def test_structure_is_the_score(tmp_path: Path) -> None:
    benchmark = Interleaved(prompts_file(tmp_path, STORY))
    (item,) = benchmark.items()
    assert judged(benchmark, item, "a", RED, "b", BLUE).score == 1
    short = judged(benchmark, item, "a", RED, "b")
    assert short.score == 0.75
    assert short.reason == "asked text image text image, made text image text"
    assert judged(benchmark, item, RED, "a", BLUE, "b").score == 0.5
    assert judged(benchmark, item).reason.endswith("made nothing")
    answers = [Answer(item, 0, parts("a", RED, "b", BLUE)), Answer(item, 1, parts("a"))]
    assert benchmark.measures(rows_of(answers, benchmark.judge(answers))) == {"structure exact": 0.5}


@pytest.fixture
def with_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Interleaved]:
    monkeypatch.setattr("unimodal.evaluation.interleaved._clip_features", Colours)
    monkeypatch.setattr("unimodal.evaluation.interleaved._dino_features", Colours)
    return lambda **options: Interleaved(prompts_file(tmp_path, STORY), device="cpu", **options)


def test_agreement_and_consistency_by_hand(with_features: Callable[..., Interleaved]) -> None:
    benchmark = with_features(clip="openai", dino="lvd142m")
    (item,) = benchmark.items()
    right = judged(benchmark, item, "a red sea", RED, "a green sea", GREEN).fields
    assert right["agreement"] == pytest.approx(1)
    assert right["consistency"] == pytest.approx(0)
    assert right["consistency_first"] == pytest.approx(0)
    both = judged(benchmark, item, "a red sea", RED, "a red and green sea", GREEN, RED).fields
    # The third image goes with the text before the second: cosines 1, sqrt(1/2), sqrt(1/2).
    assert both["agreement"] == pytest.approx((1 + 2 * np.sqrt(0.5)) / 3)
    assert both["consistency"] == pytest.approx(1 / 3)
    assert both["consistency_first"] == pytest.approx(1 / 2)
    swapped = judged(benchmark, item, "a green sea", RED, "a red sea", GREEN).fields
    assert swapped["agreement"] == pytest.approx(0)


def test_measures_leave_out_what_has_no_images(with_features: Callable[..., Interleaved]) -> None:
    benchmark = with_features(clip="openai")
    (item,) = benchmark.items()
    bodies = [parts("red", RED, "red", RED), parts("red", RED), parts("red")]
    answers = [Answer(replace(item, id=str(i)), 0, body) for i, body in enumerate(bodies)]
    rows = rows_of(answers, benchmark.judge(answers))
    assert [row["agreement"] for row in rows] == [pytest.approx(1), pytest.approx(1), None]
    assert [row["consistency"] for row in rows] == [pytest.approx(1), None, None]
    assert benchmark.measures(rows) == pytest.approx({
        "structure exact": 1 / 3, "text-image agreement (colours)": 1, "image consistency (colours)": 1,
        "consistency with the first (colours)": 1,
    })  # fmt: skip
    assert benchmark.measures(rows[2:]) == {"structure exact": 0.0}
    assert bootstrap_rows(rows, benchmark.measures, resamples=50)["image consistency (colours)"].low == pytest.approx(1)
    assert benchmark.spec() == {"agreement": {"name": "colours"}, "consistency": {"name": "colours"}}


# ---- digits


@pytest.fixture(scope="module")
def sums() -> DigitSums:
    return DigitSums(sums=60)


def scan(digit: int) -> Image.Image:
    test = digit_images("test")
    return test.image(int(np.flatnonzero(test.labels == digit)[0]))


def drawn(total: int) -> list[Image.Image]:
    return [scan(digit) for digit in digits_of(total)]


def of_two_digits(benchmark: DigitSums) -> tuple[Item, int]:
    item = next(item for item in benchmark.items() if item.truth["sum"] >= 12 and item.truth["sum"] % 11)
    return item, item.truth["sum"]


def test_sums_ask_for_two_unseen_scans(sums: DigitSums) -> None:
    known = {np.asarray(image).tobytes() for image in digit_images("test").images()}
    for item in sums.items():
        assert kinds(item.prompt.parts) == ["image", "text", "image", "text"]
        assert not any(part.learn for part in item.prompt.parts)
        assert {np.asarray(image).tobytes() for image in item.prompt.images} <= known
    assert len({item.truth["sum"] for item in sums.items()}) > 10
    assert [item.prompt for item in DigitSums(60).items()][:3] == [item.prompt for item in sums.items()][:3]
    assert sums.settings(None).max_images == 3


def test_perfect_sums_score_one(sums: DigitSums) -> None:
    answers = [
        Answer(item, 0, parts(NUMBER_WORDS[item.truth["sum"]], *drawn(item.truth["sum"]))) for item in sums.items()
    ]
    verdicts = sums.judge(answers)
    assert [verdict.score for verdict in verdicts] == [1.0] * 60
    shares = sums.measures(rows_of(answers, verdicts))
    assert shares == {"structure right": 1.0, "text right": 1.0, "drawn right": 1.0}
    assert 0.95 < sums.spec()["judge_accuracy"] <= 1


def test_cheats_at_sums_are_seen(sums: DigitSums) -> None:
    item, total = of_two_digits(sums)
    word, images = NUMBER_WORDS[total], drawn(total)

    def verdict(*contents: Content) -> tuple[float | bool, ...]:
        found = judged(sums, item, *contents)
        return found.score, *(bool(found.fields[f"{name}_right"]) for name in ("structure", "text", "drawn"))

    assert verdict(word, *images) == (1, True, True, True)
    assert verdict(str(total), *images) == (1, True, True, True)
    assert verdict(*images, word) == (0, False, True, True)  # wrong order
    assert verdict(images[0], word, images[1]) == (0, False, True, True)
    assert verdict(word, *images, scan(0)) == (0, False, True, False)  # one image too many
    assert verdict(word, images[0]) == (0, False, True, False)
    assert verdict(*images) == (0, False, False, True)  # no text
    assert verdict(word) == (0, False, True, False)
    assert verdict(word, *images[::-1]) == (0, True, True, False)
    assert verdict(NUMBER_WORDS[total - 1], *drawn(total - 1)) == (0, True, False, False)  # a wrong sum drawn well
    assert verdict(f"{word} {word}", *images) == (0, True, False, True)
    assert verdict() == (0, False, False, False)
    assert "of 8x8 pixels, drew 4x4, 8x8" in judged(sums, item, word, RED, images[1]).reason


# ---- shapes


STEPS = ShapesSteps(count=40)


def built_item(index: int) -> tuple[Item, list[str], list[Scene]]:
    """An item and the document that it begins."""
    texts, scenes = built("test", 32, np.random.default_rng((0, index)))
    item = STEPS.items()[index]
    assert item.prompt.text == texts[0]
    return item, texts, scenes


def perfect(texts: list[str], scenes: list[Scene]) -> list[Content]:
    contents: list[Content] = [render(scenes[0])]
    for text, scene in zip(texts[1:], scenes[1:], strict=True):
        contents += [text, render(scene)]
    return [*contents, " done"]


def three_things() -> tuple[Item, list[str], list[Scene]]:
    return next(found for i in range(40) if len((found := built_item(i))[1]) == 3)


def test_perfect_steps_score_one() -> None:
    answers = []
    for i in range(40):
        item, texts, scenes = built_item(i)
        answers.append(Answer(item, 0, parts(*perfect(texts, scenes))))
    verdicts = STEPS.judge(answers)
    assert [verdict.reason for verdict in verdicts] == [""] * 40
    assert [verdict.score for verdict in verdicts] == [1.0] * 40
    assert set(STEPS.measures(rows_of(answers, verdicts)).values()) == {1.0}
    scenes = built_item(0)[2]
    drawn = [box["image"] for box in verdicts[0].fields["boxes"]]  # each box on the image that it was found in
    assert [drawn.count(i) for i in range(len(scenes))] == [len(scene.things) for scene in scenes]


def test_steps_begin_with_what_training_never_shows() -> None:
    for item in STEPS.items():
        step = read_step(item.prompt.text)
        assert step is not None
        assert step[0] in HELD_OUT
        assert step[1] is None
        assert read_caption(item.prompt.text) is None  # a caption would ask for one image and no more


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("first a red circle", (("circle", "red"), None)),
        ("a red circle", None),
        (" then an orange square left of it", (("square", "orange"), "left of")),
        ("then a blue heart below it\n", (("heart", "blue"), "below")),
        ("first an red circle", None),
        ("then a orange square left of it", None),
        ("first a circle", None),
        ("then a red circle", None),
        ("then a red circle near it", None),
        ("first a red circle left of it", None),
        ("first a red circle and more", None),
        ("", None),
    ],
)
def test_the_grammar_of_steps(text: str, step: Any) -> None:
    assert read_step(text) == step


def wrong(item: Item, *contents: Content) -> set[str]:
    """The rules that an answer breaks."""
    found = judged(STEPS, item, *contents)
    names = ("structure", "texts", "things", "places", "kept")
    broken = {name for name in names if found.fields[f"{name}_right"] is False}
    assert bool(broken) == (found.score == 0)
    return broken


def test_cheats_at_structure_are_seen() -> None:
    item, texts, scenes = three_things()
    whole = perfect(texts, scenes)
    assert wrong(item, *whole) == set()
    assert wrong(item, *whole[:3], " done") == set()  # two things are a document too
    assert wrong(item, whole[0], "done") == {"structure"}  # one is not
    assert wrong(item, *whole[:-1], "then a red star above it", whole[4], "done") >= {"structure", "things"}
    assert wrong(item, *whole[:-1], whole[4], "done") >= {"structure", "things"}  # an image without a step
    assert wrong(item, *whole[:-1]) == {"structure"}  # no end
    assert wrong(item, *whole[:4]) == {"texts"}  # ends in a step
    assert "structure" in wrong(item, texts[1], *whole)
    assert wrong(item, whole[0], whole[2], "done") >= {"structure", "things"}  # no text between
    assert wrong(item) == {"structure"}
    # A text in two parts is one text.
    assert wrong(item, whole[0], texts[1][:9], texts[1][9:], *whole[2:]) == set()


def test_cheats_at_texts_and_things_are_seen() -> None:
    item, texts, scenes = three_things()
    whole = perfect(texts, scenes)
    assert wrong(item, whole[0], "then something else", *whole[2:]) == {"texts", "things"}
    assert wrong(item, whole[0], texts[0], *whole[2:]) >= {"texts"}  # a first step again
    assert wrong(item, *whole[:-1], " done and gone") == {"texts"}
    assert wrong(item, whole[0], whole[1], whole[0], *whole[3:]) == {"things"}  # nothing put in
    assert wrong(item, whole[2], whole[1], whole[2], *whole[3:]) == {"things"}  # put in too early
    thing = scenes[0].things[0]
    other = render(scenes[0].swapped(thing, replace(thing, colour="white" if thing.colour != "white" else "black")))
    assert wrong(item, other, *whole[1:]) == {"things"}
    assert wrong(item, plain((192, 192, 192), (32, 32)), *whole[1:]) == {"things"}
    assert wrong(item, plain((192, 192, 192), (8, 8)), *whole[1:]) == {"things"}


def test_rules_that_nothing_could_break_are_not_counted_as_kept() -> None:
    item, texts, scenes = three_things()
    answers = [Answer(item, i, parts(*contents)) for i, contents in enumerate(([render(scenes[0])], [], [texts[1]]))]
    verdicts = STEPS.judge(answers)
    rules = [{name: v.fields[f"{name}_right"] for name in ("texts", "things", "places", "kept")} for v in verdicts]
    assert rules[0] == {"texts": None, "things": True, "places": None, "kept": None}  # one image and no more
    assert rules[1] == {"texts": None, "things": None, "places": None, "kept": None}
    assert rules[2] == {"texts": True, "things": None, "places": None, "kept": None}
    measured = STEPS.measures(rows_of(answers, verdicts))
    assert measured == {"structure right": 0.0, "texts right": 1.0, "things right": 1.0}


def test_things_have_to_stay_and_to_stand_where_told() -> None:
    item, texts, scenes = three_things()
    whole = perfect(texts, scenes)
    step = read_step(texts[1])
    assert step is not None
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[str(step[1])]
    assert wrong(item, whole[0], texts[1].replace(str(step[1]), opposite), *whole[2:]) == {"places"}
    # The same things turned by 180 degrees: everything moves, relations turn too.
    turned = Scene(tuple(replace(t, x=32 - t.x - t.size, y=32 - t.y - t.size) for t in scenes[-1].things), 32)
    assert wrong(item, *whole[:4], render(turned), "done") >= {"kept", "places"}
    # A shift that keeps every relation.
    thing = scenes[0].things[0]
    away = replace(thing, x=(0 if thing.x > 10 else 32 - thing.size), y=(0 if thing.y > 10 else 32 - thing.size))
    assert "kept" in wrong(item, render(Scene((away,), 32)), *whole[1:])
