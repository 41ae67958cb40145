"""Benchmarks of understanding: what is asked, how answers are judged, and the way through the harness."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pycocoevalcap.cider.cider import Cider

from unimodal.documents import GENERATED, Document, Part
from unimodal.evaluation import likelihood, questions, understanding
from unimodal.evaluation.answers import AnswerFolder
from unimodal.evaluation.benchmark import Answer, Benchmark, Item
from unimodal.evaluation.harness import generate, report, score
from unimodal.evaluation.likelihood import log_likelihoods
from unimodal.evaluation.questions import asked
from unimodal.evaluation.registry import BENCHMARKS, benchmark_class
from unimodal.evaluation.understanding import GQA, MME, POPE, Captions, MMBench, SEEDBench, VQAv2
from unimodal.metrics.captions import tokenise
from unimodal.metrics.vqa import MME_COGNITION, MME_PERCEPTION
from unimodal.model import UnifiedModel


def draw(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, "PNG")
    return path


def answers(benchmark: Benchmark, *texts: Sequence[str]) -> list[Answer]:
    """One answer an item, of those texts."""
    parts = [tuple(Part(text, role=GENERATED) for text in each) for each in texts]
    return [Answer(item, 0, part) for item, part in zip(benchmark.items(), parts, strict=True)]


def rows(benchmark: Benchmark, *texts: Sequence[str]) -> list[dict[str, Any]]:
    given = answers(benchmark, *texts)
    return [
        {"id": a.item.id, "task": a.item.task, "score": v.score, "reason": v.reason, **v.fields}
        for a, v in zip(given, benchmark.judge(given), strict=True)
    ]


@pytest.fixture
def vqav2(tmp_path: Path) -> VQAv2:
    draw(tmp_path / "images" / "COCO_val2014_000000000001.jpg")
    told = {1: ("other", ["a cat"] * 3 + ["dog"] * 7), 2: ("number", ["2"] * 10)}
    (tmp_path / "q.json").write_text(
        json.dumps({
            "data_subtype": "val2014",
            "questions": [{"image_id": 1, "question": f"Question {n}?", "question_id": n} for n in told],
        })
    )  # fmt: skip
    (tmp_path / "a.json").write_text(
        json.dumps({
            "annotations": [
                {"question_id": n, "answer_type": kind, "answers": [{"answer": text} for text in texts]}
                for n, (kind, texts) in told.items()
            ]
        })
    )  # fmt: skip
    return VQAv2(tmp_path / "q.json", tmp_path / "a.json", tmp_path / "images")


def test_vqav2(vqav2: VQAv2) -> None:
    first, second = vqav2.items()
    assert [part.is_image for part in first.prompt.parts] == [True, False]
    assert first.prompt.text == "Question 1?\nAnswer the question using a single word or phrase."
    assert not any(part.learn for part in first.prompt.parts)
    assert (first.task, second.task) == ("other", "number")
    one, two = rows(vqav2, ["The Cat.\nQuestion: and?"], ["two"])
    assert one["score"] == pytest.approx(0.9)  # of the first line
    assert one["reason"] == "said 'The Cat.'; annotators: dog (7), a cat (3)"
    assert two["score"] == 0  # all annotators agree to the letter
    assert rows(vqav2, [""], ["2"])[1]["reason"] == ""
    spec = vqav2.spec()
    assert set(spec["files"]) == {"q.json", "a.json"}
    assert "leave one annotator out" in spec["formula"]


def test_the_fingerprint_knows_files_images_and_wording(vqav2: VQAv2, tmp_path: Path) -> None:
    before = vqav2.spec()
    again = VQAv2(tmp_path / "q.json", tmp_path / "a.json", tmp_path / "images")
    assert again.spec() == before
    draw(tmp_path / "images" / "COCO_val2014_000000000001.jpg").write_bytes(b"other")
    changed = VQAv2(tmp_path / "q.json", tmp_path / "a.json", tmp_path / "images", wording="{question}").spec()
    assert {key for key in before if changed[key] != before[key]} == {"images_sha256", "wording"}


def test_a_wording_without_its_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--wording: expected a text with \{question\} in it, got 'What'"):
        GQA(tmp_path, tmp_path, wording="What")
    with pytest.raises(ValueError, match=r"--wording: expected a text with \{options\} in it"):
        MMBench(tmp_path, wording="{question}")
    MMBench(tmp_path, by="likelihood", wording="{question}")


def test_fields_are_filled_in_once() -> None:
    assert questions.worded("{question} {options} {x}", question="{options}?", options="A. {question}") == (
        "{options}? A. {question} {x}"
    )


def test_gqa(tmp_path: Path) -> None:
    draw(tmp_path / "n1.jpg")
    record = {"imageId": "n1", "question": "Left?", "answer": "left", "types": {"structural": "query"}}
    (tmp_path / "q.json").write_text(json.dumps({"1": record}))
    benchmark = GQA(tmp_path / "q.json", tmp_path, wording="Q: {question}")
    assert benchmark.items()[0].prompt.text == "Q: Left?"
    assert [rows(benchmark, [text])[0]["score"] for text in ("Left.", "to the left")] == [1, 0]
    assert rows(benchmark, ["right"])[0]["reason"] == "said 'right', right is 'left'"


def pope(folder: Path) -> POPE:
    draw(folder / "x.jpg")
    for name, labels in (("random", ("yes", "yes", "no", "no")), ("popular", ("no", "yes"))):
        lines = [
            {"question_id": i, "image": "x.jpg", "text": "A dog?", "label": label} for i, label in enumerate(labels)
        ]
        (folder / f"{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return POPE([folder / "random.json", folder / "popular.json"], folder)


def test_pope(tmp_path: Path) -> None:
    benchmark = pope(tmp_path)
    found = rows(benchmark, ["Yes"], ["no"], ["Yes, it is."], ["no"], ["perhaps"], ["yes"])
    assert [row["score"] for row in found] == [1, 0, 0, 1, 0, 1]
    assert [row["unclear"] for row in found] == [False] * 4 + [True, False]
    measures = benchmark.measures(found)
    assert measures["random f1"] == 0.5
    assert (measures["random accuracy"], measures["random precision"], measures["random recall"]) == (0.5, 0.5, 0.5)
    assert measures["popular yes_ratio"] == 1  # "perhaps" is a yes, and counted
    assert measures["popular f1"] == pytest.approx(2 / 3)
    assert measures["unclear"] == pytest.approx(1 / 6)
    assert "random f1" not in benchmark.measures(found[4:])


def test_intervals_draw_images_and_not_questions(tmp_path: Path) -> None:
    """Three files ask the same six questions of each of twenty images; a model sees an image or does not."""
    for image in range(20):
        draw(tmp_path / "images" / f"{image}.jpg")
    line = '{"question_id": %d, "image": "%d.jpg", "text": "Is there a dog?", "label": "yes"}'
    files = [tmp_path / f"{name}.json" for name in ("random", "popular", "adversarial")]
    for file in files:
        file.write_text("\n".join(line % (n, n // 6) for n in range(120)))
    benchmark = POPE(files, tmp_path / "images")
    folder = AnswerFolder(tmp_path / "answers", draws=False, samples=1)
    for item in benchmark.items():
        number = int(item.id.split("-")[1])
        folder.write(item, 0, [Part("yes" if number % 12 < 6 else "no", role=GENERATED)])
    found = score(benchmark, benchmark.items(), folder)
    assert len({row["cluster"] for row in found}) == 20
    summaries = [
        report(benchmark, found_rows, tmp_path / "out", folder.root, {})
        for found_rows in (found, [{k: v for k, v in row.items() if k != "cluster"} for row in found])
    ]
    for numbers in ([s.overall for s in summaries], [s.measures["random accuracy"] for s in summaries]):
        (wide, narrow) = (number.interval[1] - number.interval[0] for number in numbers)
        assert wide > 2 * narrow, numbers
    lone = [s.tasks["popular"].score.interval for s in summaries]
    assert lone[0][1] - lone[0][0] == pytest.approx(2 * 1.96 * (0.25 / 20) ** 0.5, rel=0.15)
    always = [row | {"score": 1.0} for row in found]
    assert report(benchmark, always, tmp_path / "out", folder.root, {}).overall.interval[0] < 0.93  # 20 trials, not 120


def mme(folder: Path) -> MME:
    for task in (*MME_PERCEPTION, *MME_COGNITION):
        for number in range(2 if task == "OCR" else 1):
            draw(folder / task / f"{number}.png")
            (folder / task / f"{number}.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
    return MME(folder)


def test_mme(tmp_path: Path) -> None:
    """All right but for OCR: one image half right, of two."""
    benchmark = mme(tmp_path)
    items = benchmark.items()
    said = [["Yes", "No"]] * len(items)
    first = [item.task for item in items].index("OCR")
    said[first] = ["Yes.", "I cannot say"]
    found = rows(benchmark, *said)
    assert [row["score"] for row in found][first : first + 2] == [0.25, 1]  # (1/2 + 0) / 2
    assert found[first]["reason"] == "said 'I cannot say', right is 'no'"
    measures = benchmark.measures(found)
    assert measures["OCR score"] == 75 + 50  # three of four questions, one of two images
    assert measures["perception"] == 9 * 200 + 125
    assert measures["cognition"] == 800
    assert measures["unparsable"] == 1 / (2 * len(items))
    partly = [row for row in found if row["task"] != "OCR"]
    assert "perception" not in benchmark.measures(partly)
    assert benchmark.measures(partly)["cognition"] == 800


def test_each_question_of_an_item_is_asked_on_its_own(tmp_path: Path) -> None:
    item = mme(tmp_path).items()[0]
    assert [part.is_image for part in item.prompt.parts] == [True, False, False]
    assert [document.text for document in asked(item)] == ["Is it?", "Is it not?"]
    assert all(len(document.images) == 1 for document in asked(item))


def test_as_many_texts_as_questions(tmp_path: Path) -> None:
    benchmark = mme(tmp_path)
    given = Answer(benchmark.items()[0], 0, (Part("Yes", role=GENERATED),))
    with pytest.raises(ValueError, match=r"answer existence-0: expected 2 texts, one a question, got 1"):
        benchmark.judge([given])


def seed_bench(folder: Path, **settings: Any) -> SEEDBench:
    draw(folder / "x")
    options = {f"choice_{letter}": text for letter, text in zip("abcd", ("cat", "dog", "cow", "owl"), strict=True)}
    record = {
        "answer": "B", "data_id": "x", "data_type": "image", "question": "What?", "question_id": "1",
        "question_type_id": 1, **options,
    }  # fmt: skip
    (folder / "s.json").write_text(json.dumps({"questions": [record], "question_type": {"Scene": 1}}))
    return SEEDBench(folder / "s.json", folder, **settings)


def test_seed_bench_by_letter(tmp_path: Path) -> None:
    benchmark = seed_bench(tmp_path)
    (item,) = benchmark.items()
    assert item.prompt.text == (
        "What?\nA. cat\nB. dog\nC. cow\nD. owl\nAnswer with the option's letter from the given choices directly."
    )
    assert (item.task, item.choices) == ("Scene", ("cat", "dog", "cow", "owl"))
    assert [rows(benchmark, [text])[0]["score"] for text in ("B", "(B) dog", "A", "dog")] == [1, 1, 0, 0]
    (row,) = rows(benchmark, ["a dog"])
    assert row["reason"] == "said 'a dog', right is 'B', which states no letter"
    assert benchmark.measures([row]) == {"unparsable": 1.0}
    assert (benchmark.name, benchmark.spec()["by"]) == ("seed-bench", "letter")


def test_by_likelihood(make: Callable[..., UnifiedModel], tmp_path: Path) -> None:
    """The letter of the option that the model finds likeliest a token, options unseen; under another name."""
    model = make("flow")
    benchmark = seed_bench(tmp_path, by="likelihood")
    (item,) = benchmark.items()
    assert item.prompt.text == "Question: What?\nAnswer:"
    assert (benchmark.name, SEEDBench.name) == ("seed-bench-likelihood", "seed-bench")
    ((part,),) = benchmark.answer(model, [item], benchmark.settings(None), [0])
    (scores,) = log_likelihoods(model, [item.prompt], [[" cat", " dog", " cow", " owl"]])
    means = [score.mean for score in scores]
    assert part.text == "ABCD"[means.index(max(means))]
    assert benchmark.judge([Answer(item, 0, (part,))])[0].score == float(part.text == "B")


def test_likelihood_is_a_tokens_mean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A long option is not punished for its length."""
    benchmark = seed_bench(tmp_path, by="likelihood")
    found = [likelihood.Likelihood(-9.0, 9, False), *[likelihood.Likelihood(-4.0, 1, False)] * 3]
    monkeypatch.setattr(likelihood, "log_likelihoods", lambda *_: [found])
    ((part,),) = benchmark.answer(None, benchmark.items(), None, [0])  # type: ignore[arg-type]
    assert part.text == "A"


def mmbench(folder: Path, **settings: Any) -> MMBench:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    lines = [
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage",
        f"0\tWhat?\tLook.\tcat\tdog\tcow\t\tA\tobject\t{data}",
        f"1\tWhere?\t\there\tthere\t\t\tB\tplace\t{data}",
    ]
    (folder / "m.tsv").write_text("\n".join(lines) + "\n")
    return MMBench(folder / "m.tsv", **settings)


def test_circular_eval(tmp_path: Path) -> None:
    """Right is what is right in every rotation; a letter that is always said is not."""
    benchmark = mmbench(tmp_path)
    first, second = benchmark.items()
    texts = [part.text for part in first.prompt.parts if part.is_text]
    assert texts[0].startswith("Look.\nWhat?\nA. cat\nB. dog\nC. cow\nAnswer")
    assert texts[1].startswith("Look.\nWhat?\nA. dog\nB. cow\nC. cat\n")
    assert (len(texts), len(asked(second))) == (3, 2)
    assert first.truth == {"letters": ["A", "C", "B"]}
    perfect = rows(benchmark, ["A", "C", "B"], ["B", "A"])
    assert [row["score"] for row in perfect] == [1, 1]
    always = rows(benchmark, ["A", "A", "A"], ["B", "B"])
    assert [row["score"] for row in always] == [0, 0]
    assert benchmark.measures(always) == {"unparsable": 0, "first_order": 1}
    unread = rows(benchmark, ["A", "C", "hm"], ["B", "A"])
    assert [row["score"] for row in unread] == [0, 1]
    assert benchmark.measures(unread)["unparsable"] == pytest.approx((1 / 3 + 0) / 2)
    assert unread[0]["reason"] == "said 'hm', right is 'B', which states no letter"


def test_no_rotation_changes_likelihood(tmp_path: Path) -> None:
    assert [len(asked(item)) for item in mmbench(tmp_path, by="likelihood").items()] == [1, 1]


def captions(folder: Path, wording: str = "") -> Captions:
    texts = {1: ["a red dog runs", "A dog."], 2: ["two old boats at sea"], 3: ["a red cat sits"]}
    for n in texts:
        draw(folder / f"{n}.jpg")
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in texts],
        "annotations": [{"image_id": n, "caption": text} for n, each in texts.items() for text in each],
    }
    (folder / "c.json").write_text(json.dumps(content))
    return Captions(folder / "c.json", folder, wording=wording)


def test_captions(tmp_path: Path) -> None:
    """Judged in any portions, CIDEr is that of the whole set."""
    benchmark = captions(tmp_path)
    said = ["A red dog.", "boats at sea", "two old boats"]
    found = [row for i in range(3) for row in rows(benchmark, *[[text] for text in said])[i : i + 1]]
    gts = {item.id: [tokenise(text) for text in item.truth["captions"]] for item in benchmark.items()}
    cider, ciders = Cider().compute_score(gts, dict(zip(gts, ([tokenise(text)] for text in said), strict=True)))
    assert [row["score"] for row in found] == pytest.approx([value / 10 for value in ciders])
    measures = benchmark.measures([json.loads(json.dumps(row)) for row in found])
    assert measures["cider"] == pytest.approx(cider)
    assert list(measures) == ["cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"]
    assert "Java" in benchmark.spec()["tokenizer"]


def test_a_caption_follows_the_image_alone_or_a_wording(tmp_path: Path) -> None:
    assert [[part.is_image for part in d.parts] for d in asked(captions(tmp_path).items()[0])] == [[True]]
    assert asked(captions(tmp_path, "A photo of").items()[0])[0].text == "A photo of"


# ---- through the harness


def test_every_text_comes_back_as_it_was_written(
    make: Callable[..., UnifiedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of a real model, kept in files and scored from them; what is said to nothing is an empty text."""
    model = make("flow")
    benchmark = mmbench(tmp_path)
    items = list(benchmark.items())
    folder = AnswerFolder(tmp_path / "answers", benchmark.draws, benchmark.samples)
    assert generate(benchmark, items, folder, model, batch=1) == 2
    assert generate(benchmark, items, folder, model) == 0
    kept = [folder.read(item)[0] for item in items]
    direct = benchmark.answer(model, items, benchmark.settings(None), [0, 0])
    assert [[part.text for part in answer.parts] for answer in kept] == [[p.text for p in parts] for parts in direct]
    assert [len(answer.parts) for answer in kept] == [3, 2]
    found = score(benchmark, items, folder)
    summary = report(benchmark, found, tmp_path / "out", folder.root, {})
    assert summary.label == "complete"
    assert set(summary.measures) == {"unparsable", "first_order"}
    monkeypatch.setattr("unimodal.decoding.decode", lambda model, documents, settings, seeds: list(documents))
    assert [[p.text for p in parts] for parts in benchmark.answer(model, items, benchmark.settings(None), [0, 0])] == [
        ["", "", ""], ["", ""],
    ]  # fmt: skip


def test_questions_are_asked_together_and_answered_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One batch for all questions of all items, each with its item's seed."""
    benchmark = mme(tmp_path)
    calls: list[tuple[int, list[int]]] = []

    def decode(model: Any, documents: Sequence[Document], settings: Any, seeds: Sequence[int]) -> list[Document]:
        calls.append((len(documents), list(seeds)))
        return [document.extended([Part(f"{i}"), Part("!")]) for i, document in enumerate(documents)]

    monkeypatch.setattr("unimodal.decoding.decode", decode)
    given = benchmark.answer(None, benchmark.items()[:2], None, [7, 8])  # type: ignore[arg-type]
    assert calls == [(4, [7, 7, 8, 8])]
    assert [[part.text for part in parts] for parts in given] == [["0!", "1!"], ["2!", "3!"]]
    assert all(part.role == GENERATED for parts in given for part in parts)


def test_the_registry_finds_each_by_its_name() -> None:
    for cls in (VQAv2, GQA, POPE, MME, SEEDBench, MMBench, Captions):
        assert BENCHMARKS[cls.name][0] == f"{understanding.__name__}.{cls.__name__}"
        assert benchmark_class(cls.name) is cls


def test_items_are_the_same_at_every_call(tmp_path: Path) -> None:
    benchmark = pope(tmp_path)
    first: Sequence[Item] = benchmark.items()
    assert list(benchmark.items()) == list(first)
    assert len({item.id for item in first}) == 6
