"""Readers of the three sets on small files in their formats, and what becomes of a judge's opinions."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from unimodal.documents import Part
from unimodal.evaluation.benchmark import Answer, Verdict
from unimodal.evaluation.command import parse
from unimodal.evaluation.interleaved import kinds
from unimodal.evaluation.isg import ISG
from unimodal.evaluation.judge import Endpoint, Opinion, Question
from unimodal.evaluation.judged import UNREAD, InterleavedBench, JudgedSet, OpenING
from unimodal.images import png_bytes

SHADES = {name: shade for shade, name in enumerate(("q1", "q2", "g1", "g2"), start=1)}


class FakeJudge:
    """Answers by a rule on the question; keeps what it was asked, call by call."""

    rule: Callable[[Question], Opinion] = staticmethod(lambda question: Opinion(question.high, "good"))
    calls: ClassVar[list[list[Question]]] = []

    def __init__(self, endpoint: Endpoint, cache: Path) -> None:
        self.endpoint, self.cache = endpoint, cache

    def ask(self, questions: Sequence[Question]) -> list[Opinion]:
        FakeJudge.calls.append(list(questions))
        return [FakeJudge.rule(question) for question in questions]

    def spec(self, wordings: Sequence[str]) -> dict[str, Any]:
        return {"model": self.endpoint.model, "wordings": list(wordings)}


@pytest.fixture(autouse=True)
def judge(monkeypatch: pytest.MonkeyPatch) -> type[FakeJudge]:
    monkeypatch.setattr("unimodal.evaluation.judged.OpenAIJudge", FakeJudge)
    monkeypatch.setattr(FakeJudge, "rule", staticmethod(lambda question: Opinion(question.high, "good")))
    monkeypatch.setattr(FakeJudge, "calls", [])
    return FakeJudge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, shade in SHADES.items():
        (tmp_path / "images" / f"{name}.png").write_bytes(png_bytes(shade_of(shade)))
    return tmp_path


def shade_of(shade: int) -> Image.Image:
    return Image.new("RGB", (2, 2), (shade, 0, 0))


def seen(parts: Sequence[Part]) -> list[str | int]:
    """Texts, and images by their shade."""
    return [part.text if part.is_text else int(part.image.getpixel((0, 0))[0]) for part in parts]  # type: ignore[index]


def answer(benchmark: JudgedSet, index: int, *contents: str | Image.Image) -> Answer:
    return Answer(benchmark.items()[index], 0, tuple(Part(content) for content in contents))


def rows_of(answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    rows = [
        {"id": a.item.id, "task": a.item.task, "score": v.score, **v.fields}
        for a, v in zip(answers, verdicts, strict=True)
    ]
    return json.loads(json.dumps(rows))


AT: dict[str, Any] = {"base_url": "http://localhost:1/v1", "judge_model": "m", "cache": Path("said.jsonl")}


# ---- InterleavedBench

BENCH = [
    {
        "id": "wikihow_next_step_0_1", "task_name": "wikihow", "image": ["images/q1.png", "images/q2.png", "images/g1.png"],
        "conversations": [
            {"from": "human", "value": "First <image>. Then <image>\nGo on."},
            {"from": "gpt", "value": "Stir it. <image>"},
        ],
    },
    {
        "id": "edit_3", "task_name": "image_editing", "image": ["images/q2.png", "images/g1.png"],
        "conversations": [{"from": "human", "value": "<image>Make it blue."}],
    },
]  # fmt: skip


def bench(folder: Path, entries: Any = None, **options: Any) -> InterleavedBench:
    file = folder / "interleaved_bench.json"
    file.write_text(json.dumps(BENCH if entries is None else entries))
    return InterleavedBench(file, without_text=options.pop("without_text", ["image_editing"]), **AT, **options)


def test_interleavedbench_is_read(folder: Path) -> None:
    first, second = bench(folder).items()
    assert seen(first.prompt.parts) == ["First ", 1, ". Then ", 2, "\nGo on."]  # the answer's image is not given away
    assert (first.task, first.truth["id"]) == ("wikihow", "wikihow_next_step_0_1")
    assert seen(second.prompt.parts) == [2, "Make it blue."]
    assert not any(part.learn for part in first.prompt.parts)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "a JSON list"),
        ([], "at least one entry"),
        ([{"id": "x"}], r"interleaved_bench\.json\[0\]: expected id"),
        ([BENCH[1] | {"image": []}], r"\[0\]: expected a <image> for each of 0 images, got 1"),
        ([BENCH[1] | {"image": ["images/none.png"]}], r"\[0\].*none\.png"),
        ([BENCH[1] | {"image": ["../x.png"]}], "inside the folder"),
    ],
)
def test_interleavedbench_refuses(folder: Path, entries: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(folder, entries)


def test_tasks_without_text_must_be_the_files_own(folder: Path) -> None:
    with pytest.raises(ValueError, match="tasks image_editing, wikihow, got editing"):
        bench(folder, without_text=["editing"])


def test_images_may_lie_elsewhere_and_the_file_must_be_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    file = tmp_path / "json" / "b.json"
    file.write_text(json.dumps(BENCH))
    assert len(InterleavedBench(file, without_text=[], folder=folder, **AT).items()) == 2
    with pytest.raises(ValueError, match=r"data: expected a file, got .*none\.json"):
        InterleavedBench(tmp_path / "none.json", without_text=[], **AT)


def test_what_the_judge_is_shown(folder: Path, judge: type[FakeJudge]) -> None:
    benchmark = bench(folder)
    benchmark.judge([answer(benchmark, 0, "Stir it.", shade_of(9))])
    ((*questions,),) = judge.calls
    assert len(questions) == 5
    for question, aspect in zip(questions, benchmark.aspects, strict=True):
        assert aspect.name in question.instructions
        assert aspect.wording in question.instructions
        assert (question.low, question.high) == (0, 5)
        asked = ["What was asked:", "First ", 1, ". Then ", 2, "\nGo on."]
        assert seen(question.parts) == [*asked, "What was answered:", "Stir it.", 9]
    assert len({question.instructions for question in questions}) == 5


def test_scores_are_means_of_aspects_and_text_is_left_out_where_none_is_asked(
    folder: Path, judge: type[FakeJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "text quality": 1,
        "perceptual quality": 2,
        "image coherence": 3,
        "text-image coherence": 4,
        "helpfulness": 5,
    }

    def rule(question: Question) -> Opinion:
        (name,) = [name for name in given if question.instructions.split("others: ")[1].startswith(f"{name},")]
        return Opinion(given[name], f"because {name}")

    monkeypatch.setattr(judge, "rule", staticmethod(rule))
    benchmark = bench(folder)
    answers = [answer(benchmark, 0, "a", shade_of(9)), answer(benchmark, 1, shade_of(9))]
    verdicts = benchmark.judge(answers)
    assert verdicts[0].score == pytest.approx((1 + 2 + 3 + 4 + 5) / 5 / 5)
    assert verdicts[1].score == pytest.approx((2 + 3 + 5) / 3 / 5)
    assert (
        verdicts[1].reason == "perceptual quality: because perceptual quality; image coherence: because image coherence"
    )
    assert verdicts[1].fields["aspects"] == {"perceptual quality": 2, "image coherence": 3, "helpfulness": 5}
    measures = benchmark.measures(rows_of(answers, verdicts))
    assert measures["text quality (0 to 5)"] == 1  # over the one answer that it applies to
    assert measures["image coherence (0 to 5)"] == 3
    assert measures[UNREAD] == 0
    assert len(judge.calls) == 1  # all at once, so that the endpoint is kept busy


def test_an_unread_opinion_counts_least_and_is_counted(
    folder: Path, judge: type[FakeJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(question: Question) -> Opinion:
        return Opinion(None, "unparsable: hm") if "helpfulness" in question.instructions else Opinion(5, "good")

    monkeypatch.setattr(judge, "rule", staticmethod(rule))
    benchmark = bench(folder)
    answers = [answer(benchmark, 0, "a")]
    (verdict,) = benchmark.judge(answers)
    assert verdict.score == pytest.approx(4 / 5)
    assert verdict.reason == "helpfulness: unparsable: hm"
    assert verdict.fields["aspects"]["helpfulness"] is None
    measures = benchmark.measures(rows_of(answers, [verdict]))
    assert measures[UNREAD] == pytest.approx(1 / 5)
    assert measures["helpfulness (0 to 5)"] == 0


def test_an_empty_answer_is_not_judged(folder: Path, judge: type[FakeJudge]) -> None:
    benchmark = bench(folder)
    answers = [answer(benchmark, 0, " \n"), answer(benchmark, 0, "a")]
    empty, full = benchmark.judge(answers)
    assert (empty.score, empty.reason) == (0.0, "an empty answer")
    assert (full.score, full.reason) == (1.0, "")
    assert sum(map(len, judge.calls)) == 5
    measures = benchmark.measures(rows_of(answers, [empty, full]))
    assert measures["helpfulness (0 to 5)"] == 2.5
    assert UNREAD not in benchmark.measures(rows_of(answers[:1], [empty]))


def test_spec_and_name(folder: Path) -> None:
    benchmark = bench(folder)
    assert benchmark.name == "interleavedbench-aspects"
    spec = benchmark.spec()
    assert spec["judge"]["wordings"] == [aspect.instructions for aspect in benchmark.aspects]
    assert spec["without_text"] == ["image_editing"]
    assert benchmark.settings(None).max_images == 10


def test_the_judge_is_reached_before_anything_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(endpoint: Endpoint, cache: Path) -> None:
        raise ValueError(f"no key in {endpoint.key_variable}")

    monkeypatch.setattr("unimodal.evaluation.judged.OpenAIJudge", refuse)
    with pytest.raises(ValueError, match="no key in MY_KEY"):
        bench(folder, entries=[{"id": "broken"}], key_variable="MY_KEY")


# ---- OpenING

OPENING = {
    "total_uid": "1502046", "meta_task_id": "15", "meta_task_name": "Multimodal Brainstorming", "subtask_id": "2",
    "subtask_name": "Academic Scenarios", "data_id": "46",
    "conversations": [
        {"input": [
            {"text": "Finish it. <BEGIN> One evening <image>", "image": "./images/q1.png"},
            {"text": "<image> He looked in.", "image": "./images/q2.png"},
        ]},
        {"output": [
            {"text": "A bird! <image>", "image": "./images/g1.png"},
            {"text": "It flew off.", "image": None},
            {"text": "They waved. <image>", "image": "./images/g2.png"},
        ]},
    ],
}  # fmt: skip


def opening(folder: Path, *entries: dict[str, Any]) -> OpenING:
    file = folder / "test_data.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries or [OPENING]))
    return OpenING(file, **AT)


def test_opening_is_read(folder: Path) -> None:
    (item,) = opening(folder).items()
    assert seen(item.prompt.parts) == ["Finish it.  One evening ", 1, 2, " He looked in."]
    assert (item.id, item.task) == ("1502046", "Multimodal Brainstorming")
    assert item.truth["asked"] == ["text", "image", "text", "image"]  # two texts in a row are one


def test_opening_refuses(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"test_data\.jsonl:1: expected an entry of OpenING, got KeyError"):
        opening(folder, {"total_uid": "1"})
    with pytest.raises(ValueError, match=r"test_data\.jsonl:1: total_uid: expected digits"):
        opening(folder, OPENING | {"total_uid": "../1"})
    missing = [{"input": [{"text": "<BEGIN> x", "image": "./images/q1.png"}]}, OPENING["conversations"][1]]
    with pytest.raises(ValueError, match="expected a <image> for each of 1 images, got 0"):
        opening(folder, OPENING | {"conversations": missing})


def test_opening_compares_the_structure(folder: Path) -> None:
    benchmark = opening(folder)
    answers = [answer(benchmark, 0, "a", shade_of(9), "b", shade_of(9)), answer(benchmark, 0, "a", shade_of(9))]
    verdicts = benchmark.judge(answers)
    assert [verdict.score for verdict in verdicts] == [1.0, 1.0]  # the judge alone decides
    measures = benchmark.measures(rows_of(answers, verdicts))
    assert measures["structure as the human answer's"] == 0.5
    assert measures["completeness (0 to 10)"] == 10
    assert len(benchmark.aspects) == 7


# ---- ISG-Bench

ISG_ENTRY = {
    "id": "0000", "Category": "Prediction",
    "Query": [{"type": "text", "content": "What comes next?"}, {"type": "image", "content": "images/q1.png"}],
    "Golden": [
        {"type": "text", "content": "Soap."}, {"type": "image", "content": "images/g1.png"},
        {"type": "image", "content": "images/g2.png"},
    ],
    "predict": {
        "structure": {"Query": ["<query_text1>", "<query_img1>"], "Answer": ["<gen_text1>", "<gen_img1>", "<gen_img2>"]},
        "block_qa": {"questions": [
            {"subject": "<gen_text1>", "object": "<query_img1>", "relation": "is", "Question": "Does <gen_text1> fit it?"},
            {"subject": "<gen_img1>", "object": "<gen_img2>", "relation": "is", "Question": "Is one after the other?"},
            {"subject": "<gen_img1>", "relation": "is", "Question": "Half a question?"},
        ]},
        "image_qa": {"questions": [
            {"image": "<gen_img1>", "Question": "Are there hands?", "id": 0, "Preliminary": []},
            {"image": "<gen_img1>", "Question": "Are the hands wet?", "id": 1, "Preliminary": [0]},
            {"image": "<gen_img2>", "Question": "Is there water?", "id": 2, "Preliminary": []},
            {"image": "<gen_img2>", "Question": "Is the water clear?", "id": 3, "Preliminary": [1, 2]},
        ]},
    },
}  # fmt: skip


def isg(folder: Path, *entries: dict[str, Any]) -> ISG:
    file = folder / "ISG-Bench.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries or [ISG_ENTRY]))
    return ISG(file, **AT)


def test_isg_is_read(folder: Path) -> None:
    (item,) = isg(folder).items()
    assert seen(item.prompt.parts) == ["What comes next?", 1]
    assert item.task == "temporal prediction"
    assert item.truth["asked"] == ["text", "image", "image"]
    assert [pair["blocks"] for pair in item.truth["pairs"]] == [
        ["<gen_text1>", "<query_img1>"],
        ["<gen_img1>", "<gen_img2>"],
    ]
    assert [entry["turn"] for entry in item.truth["pictures"]] == [0, 1, 0, 2]
    json.dumps(item.truth)


def test_isg_refuses(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"ISG-Bench\.jsonl:1: Category: expected one of"):
        isg(folder, ISG_ENTRY | {"Category": "Cooking"})
    with pytest.raises(ValueError, match=r"ISG-Bench\.jsonl:1: expected an entry of ISG-Bench, got KeyError"):
        isg(folder, {"Category": "Prediction"})
    later = {"image_qa": [{"image": "<gen_img1>", "Question": "?", "id": 0, "Preliminary": [1]}]}
    with pytest.raises(ValueError, match=r"build on earlier ones, got \[1\]"):
        isg(folder, ISG_ENTRY | {"predict": later})


def perfect(benchmark: ISG) -> Answer:
    return answer(benchmark, 0, "So", "ap.", shade_of(7), shade_of(8))


def test_isg_perfect(folder: Path, judge: type[FakeJudge]) -> None:
    benchmark = isg(folder)
    answers = [perfect(benchmark)]
    verdicts = benchmark.judge(answers)
    assert (verdicts[0].score, verdicts[0].reason) == (1.0, "")
    measures = benchmark.measures(rows_of(answers, verdicts))
    assert measures["structure"] == 1
    assert measures["blocks (1 to 10)"] == 10
    assert measures["images"] == 1
    assert measures["coherence (1 to 10)"] == 10
    assert list(measures)[-1] == UNREAD
    whole, blocks, *rounds = judge.calls
    assert len(whole) == 5
    assert seen(blocks[0].parts) == [
        "First piece:",
        "Soap.",
        "Second piece:",
        1,
        "Question: Does the first piece fit it?",
    ]
    assert (blocks[1].low, blocks[1].high) == (1, 10)
    assert [[seen(question.parts) for question in some] for some in rounds] == [
        [[7, "Question: Are there hands?"], [8, "Question: Is there water?"]],
        [[7, "Question: Are the hands wet?"]],
        [[8, "Question: Is the water clear?"]],
    ]
    assert rounds[0][0].high == 1


def test_isg_asks_nothing_that_builds_on_a_no(
    folder: Path, judge: type[FakeJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(question: Question) -> Opinion:
        return Opinion(question.low if "hands?" in str(seen(question.parts)[-1]) else question.high, "so")

    monkeypatch.setattr(judge, "rule", staticmethod(rule))
    benchmark = isg(folder)
    (verdict,) = benchmark.judge([perfect(benchmark)])
    assert verdict.fields["images"] == 1 / 4  # of four, "Is there water?" alone
    assert verdict.fields["asked_judge"] == 5 + 2 + 2
    assert verdict.fields["unread"] == 0


def test_isg_with_a_wrong_structure_gets_the_least_of_blocks_and_images(folder: Path, judge: type[FakeJudge]) -> None:
    benchmark = isg(folder)
    answers = [answer(benchmark, 0, "Soap.", shade_of(7)), answer(benchmark, 0, shade_of(7), "Soap.", shade_of(8))]
    for verdict in benchmark.judge(answers):
        assert not verdict.fields["structure_right"]
        assert (verdict.fields["blocks"], verdict.fields["images"]) == (1.0, 0.0)
        assert verdict.score == 1.0  # the whole is judged by itself
    assert sum(map(len, judge.calls)) == 10
    assert kinds(answers[1].parts) == ["image", "text", "image"]


def test_isg_unread_opinions_count_least_everywhere(
    folder: Path, judge: type[FakeJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "rule", staticmethod(lambda question: Opinion(None, "unparsable: x")))
    benchmark = isg(folder)
    answers = [perfect(benchmark)]
    verdicts = benchmark.judge(answers)
    assert verdicts[0].score == 0
    assert (verdicts[0].fields["blocks"], verdicts[0].fields["images"]) == (1.0, 0.0)
    assert benchmark.measures(rows_of(answers, verdicts))[UNREAD] == 1


def test_isg_without_questions_has_no_such_measures(folder: Path) -> None:
    benchmark = isg(folder, {key: value for key, value in ISG_ENTRY.items() if key != "predict"})
    answers = [perfect(benchmark)]
    measures = benchmark.measures(rows_of(answers, benchmark.judge(answers)))
    assert "images" not in measures
    assert "blocks (1 to 10)" not in measures
    assert len(benchmark.spec()["judge"]["wordings"]) == 7


def test_what_the_judge_said_is_kept_beside_the_results(folder: Path) -> None:
    (folder / "bench.json").write_text(json.dumps(BENCH))
    words = [
        "--data",
        folder / "bench.json",
        "--base-url",
        AT["base_url"],
        "--judge-model",
        "m",
        "--without-text",
        "[]",
    ]
    command = [str(word) for word in words]
    for options, expected in (
        (["--out", "results"], Path("results/judge_cache.jsonl")),
        (["--out", "results", "--cache", "shared.jsonl"], Path("shared.jsonl")),
    ):
        benchmark, _ = parse("interleavedbench-aspects", [*command, *options])
        assert isinstance(benchmark, InterleavedBench)
        assert benchmark._judge.cache == expected  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="cache: expected a file for all that the judge says"):
        parse("interleavedbench-aspects", command)
