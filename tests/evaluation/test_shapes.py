"""Benchmarks of the shapes world: full marks for whoever does it right, and each cheat caught where it cheats."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from unimodal.data.shapes import COLOURS, Scene, asked, edited, held_out, render, render_prompt
from unimodal.data.shapes.captions import described
from unimodal.documents import Part
from unimodal.evaluation.benchmark import Answer, Benchmark, Item, Verdict
from unimodal.evaluation.shapes import GenEvalShapes, ShapesCaptions, ShapesEdits, ShapesQuestions, read_caption

COLOUR_TASKS = {"colors", "color_attr"}


def judged(benchmark: Benchmark, items: list[Item], contents: list[Any]) -> list[Verdict]:
    return benchmark.judge([Answer(i, 0, (Part(c),)) for i, c in zip(items, contents, strict=True)])


def by_task(items: list[Item], verdicts: list[Verdict]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for item, verdict in zip(items, verdicts, strict=True):
        scores.setdefault(item.task, []).append(verdict.score)
    return {task: sum(s) / len(s) for task, s in scores.items()}


@pytest.fixture(scope="module", params=[32, 64])
def geneval(request: pytest.FixtureRequest) -> tuple[GenEvalShapes, list[Item], list[Scene]]:
    benchmark = GenEvalShapes(per_task=20, samples=1, size=request.param)
    items = list(benchmark.items())
    scenes = [render_prompt(dict(item.truth), np.random.default_rng(i), request.param) for i, item in enumerate(items)]
    return benchmark, items, scenes


def test_a_perfect_renderer_has_full_marks(geneval: tuple[GenEvalShapes, list[Item], list[Scene]]) -> None:
    benchmark, items, scenes = geneval
    verdicts = judged(benchmark, items, [render(scene) for scene in scenes])
    assert by_task(items, verdicts) == dict.fromkeys(
        ("single_object", "two_object", "counting", "colors", "position", "color_attr"), 1.0
    )
    assert len(items) == 8 + 5 * 20 - max(0, 20 - len([i for i in items if i.task == "colors"]))


def test_a_colour_blind_renderer_fails_the_colour_tasks_alone(
    geneval: tuple[GenEvalShapes, list[Item], list[Scene]],
) -> None:
    benchmark, items, scenes = geneval
    names = list(COLOURS)
    blind = [
        replace(scene, things=tuple(replace(t, colour=names[names.index(t.colour) - 1]) for t in scene.things))
        for scene in scenes
    ]
    scores = by_task(items, judged(benchmark, items, [render(scene) for scene in blind]))
    assert {task for task, value in scores.items() if value < 1} == COLOUR_TASKS
    assert all(scores[task] == 0 for task in COLOUR_TASKS)


def test_a_renderer_that_forgets_or_mirrors_fails_where_that_matters(
    geneval: tuple[GenEvalShapes, list[Item], list[Scene]],
) -> None:
    benchmark, items, scenes = geneval
    fewer = [replace(scene, things=scene.things[:-1]) for scene in scenes]
    scores = by_task(items, judged(benchmark, items, [render(scene) for scene in fewer]))
    assert set(scores.values()) == {0.0}
    turned = [render(scene).rotate(180) for scene in scenes]
    position = [v.score for i, v in zip(items, judged(benchmark, items, turned), strict=True) if i.task == "position"]
    assert sum(position) == 0


def test_prompts_of_the_test_split_name_pairs_that_training_never_shows() -> None:
    for item in GenEvalShapes(per_task=30).items():
        if item.task in COLOUR_TASKS:
            assert any(held_out(clause["class"], clause["color"]) for clause in item.truth["include"])


def test_the_rows_have_what_the_gallery_and_the_totals_need() -> None:
    benchmark = GenEvalShapes(per_task=3, samples=2)
    item = benchmark.items()[-1]
    (verdict,) = judged(benchmark, [item], [render(render_prompt(dict(item.truth), np.random.default_rng(0), 32))])
    assert {box["label"] for box in verdict.fields["boxes"]} == {c["class"] for c in item.truth["include"]}
    rows = [{"tag": "colors", "id": "a", "correct": c} for c in (True, False)] + [
        {"tag": "colors", "id": "b", "correct": False}
    ]
    assert benchmark.measures(rows) == {"correct images": 1 / 3, "correct prompts": 1 / 2}


def test_questions_are_answered_by_the_very_word() -> None:
    benchmark = ShapesQuestions(count=60)
    items = list(benchmark.items())
    right = [item.truth["answer"] for item in items]
    assert all(v.score == 1 for v in judged(benchmark, items, [f" {a.capitalize()}" for a in right]))
    assert all(v.score == 0 for v in judged(benchmark, items, [f"{a} indeed" for a in right]))
    assert all(v.score == 0 for v in judged(benchmark, items, ["" for _ in items]))
    assert {item.task for item in items} == {"exists", "count", "colour", "shape", "relation", "where"}
    scene, question = asked("test", 32, np.random.default_rng((0, 7)))
    assert items[7].truth["answer"] == question.answer.strip()
    assert items[7].prompt.images[0].tobytes() == render(scene).tobytes()


def test_true_captions_are_right_and_changed_ones_are_not() -> None:
    benchmark = ShapesCaptions(count=150)
    items = list(benchmark.items())
    texts = [described("test", 32, np.random.default_rng((0, i)))[0] for i in range(150)]
    verdicts = judged(benchmark, items, texts)
    assert [(t, v.reason) for t, v in zip(texts, verdicts, strict=True) if v.score < 1] == []
    colour = dict(zip(COLOURS, [*list(COLOURS)[1:], "red"], strict=True))
    wrong = [" ".join(colour.get(word, word) for word in text.split()) for text in texts]
    assert sum(v.score for v in judged(benchmark, items, wrong)) == 0
    turned = [t.replace(" left of ", " right of ") for t in texts]
    changed = [i for i, (a, b) in enumerate(zip(texts, turned, strict=True)) if a != b]
    assert changed
    assert sum(judged(benchmark, items, turned)[i].score for i in changed) == 0
    assert all(v.score == 0 for v in judged(benchmark, items, [f"{t} and a red circle" for t in texts]))


@pytest.mark.parametrize(
    ("text", "things", "stated"),
    [
        ("a red circle", {("circle", "red"): 1}, []),
        ("a photo of two red crosses", {("cross", "red"): 2}, []),
        ("an orange star above a blue square", {("star", "orange"): 1, ("square", "blue"): 1},
         [(("star", "orange"), "above", ("square", "blue"))]),
        ("three objects: a red circle and two pink hearts", {("circle", "red"): 1, ("heart", "pink"): 2}, []),
        ("a red ring left of a blue ring, with a green star and a black star",
         {("ring", "red"): 1, ("ring", "blue"): 1, ("star", "green"): 1, ("star", "black"): 1},
         [(("ring", "red"), "left of", ("ring", "blue"))]),
    ],
)  # fmt: skip
def test_captions_are_read(text: str, things: dict[Any, int], stated: list[Any]) -> None:
    assert read_caption(text) == (Counter(things), stated)


def test_a_number_of_all_objects_is_theirs() -> None:
    said = "a red circle and two blue stars"
    assert (
        read_caption(f"three objects: {said}") == read_caption(f"a photo of {said}") == read_caption(said) is not None
    )
    for number in ("two", "four", "zero"):
        assert read_caption(f"{number} objects: {said}") is None


@pytest.mark.parametrize(
    "text",
    ["", "a circle", "red circle", "a red circle a red ring", "a red dog", "a red circle of", "two objects: a red dog"],
)
def test_what_is_no_caption_is_not_read(text: str) -> None:
    assert read_caption(text) is None


def test_edits_are_right_when_the_one_thing_changed_and_nothing_else() -> None:
    benchmark = ShapesEdits(count=60)
    items = list(benchmark.items())
    edits = [edited("test", 32, np.random.default_rng((0, i))) for i in range(60)]
    right = judged(benchmark, items, [render(edit.after) for edit in edits])
    assert [(e.text, v.reason) for e, v in zip(edits, right, strict=True) if v.score < 1] == []
    assert sum(v.score for v in judged(benchmark, items, [render(edit.before) for edit in edits])) == 0
    turned = [render(edit.after).rotate(180) for edit in edits]
    assert sum(v.score for v in judged(benchmark, items, turned)) < 6
    assert {item.task for item in items} == {"recolour", "reshape", "remove", "add", "move"}


@pytest.mark.parametrize("cls", [ShapesQuestions, ShapesCaptions, ShapesEdits])
def test_items_do_not_depend_on_how_many_there_are(cls: Any) -> None:
    few, many = cls(count=3).items(), cls(count=9).items()
    assert [(i.id, i.task, i.truth) for i in few] == [(i.id, i.task, i.truth) for i in many[:3]]
    assert cls(count=3, seed=1).items()[0].truth != few[0].truth


@pytest.mark.parametrize(
    ("cls", "settings"), [(ShapesEdits, {"count": 0}), (GenEvalShapes, {"samples": 0}), (ShapesQuestions, {"size": 16})]
)
def test_what_cannot_be_is_named(cls: Any, settings: dict[str, int]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}: expected"):
        cls(**settings)
