"""Official files of understanding benchmarks, whole and damaged."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unimodal.documents import Document, Part
from unimodal.evaluation import lazy_images
from unimodal.evaluation.readers import (
    check_unique,
    read_captions,
    read_gqa,
    read_mmbench,
    read_mme,
    read_pope,
    read_seed_bench,
    read_vqav2,
    safe_name,
)
from unimodal.metrics.vqa import MME_COGNITION, MME_PERCEPTION

Change = Callable[[Any], object]


def draw(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path, "JPEG" if path.suffix == ".jpg" else "PNG")
    return path


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def vqa_files(folder: Path, change: Change = lambda both: None) -> tuple[Path, Path, Path]:
    both: Any = {
        "questions": {
            "data_subtype": "val2014",
            "questions": [
                {"image_id": 42, "question": "What colour?", "question_id": 42000},
                {"image_id": 42, "question": "How many?", "question_id": 42001},
            ],
        },
        "annotations": {
            "annotations": [
                {
                    "question_id": number, "image_id": 42, "answer_type": kind, "question_type": "what",
                    "multiple_choice_answer": answer,
                    "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i in range(10)],
                }
                for number, kind, answer in ((42001, "number", "2"), (42000, "other", "red"))
            ]
        },
    }  # fmt: skip
    change(both)
    draw(folder / "images" / "COCO_val2014_000000000042.jpg")
    return (
        write(folder / "q.json", both["questions"]), write(folder / "a.json", both["annotations"]), folder / "images",
    )  # fmt: skip


def test_vqav2(tmp_path: Path) -> None:
    first, second = read_vqav2(*vqa_files(tmp_path))
    assert (first.id, first.task, first.text, first.answers) == ("42000", "other", "What colour?", ("red",) * 10)
    assert (second.id, second.task, second.answers) == ("42001", "number", ("2",) * 10)
    assert first.image.image.size == (6, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["questions"].pop("data_subtype"), r"q\.json: data_subtype: expected text, got None"),
        (lambda b: b["questions"].update(questions=[]), r"q\.json: questions: expected a list of objects, got \[\]"),
        (lambda b: b["questions"]["questions"][1].update(question_id="x"), r"questions\[1\]: question_id: .* got 'x'"),
        (
            lambda b: b["questions"]["questions"][1].update(image_id=7),
            r"questions\[1\]: expected the image .*0007\.jpg",
        ),
        (lambda b: b["questions"]["questions"][1].update(question=" "), r"questions\[1\]: question: expected text"),
        (lambda b: b["questions"]["questions"][1].update(question_id=42000), "42000 twice"),
        (lambda b: b["annotations"]["annotations"].pop(), r"questions\[0\]: question_id: .*a\.json, got 42000"),
        (lambda b: b["annotations"]["annotations"][0]["answers"].pop(), r"annotations\[0\]: .* 10 annotators, got 9"),
        (
            lambda b: b["annotations"]["annotations"][0]["answers"][3].pop("answer"),
            r"annotations\[0\]: answers\[3\]: answer: expected text, got None",
        ),
    ],
)
def test_damaged_vqav2(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_vqav2(*vqa_files(tmp_path, change))
    assert "\n" not in str(error.value)


def test_files_that_are_no_json(tmp_path: Path) -> None:
    questions, annotations, images = vqa_files(tmp_path)
    questions.write_text('{"questions": [\n{"a": }]}')
    with pytest.raises(ValueError, match=r"q\.json:2: expected JSON, got Expecting value"):
        read_vqav2(questions, annotations, images)
    questions.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"q\.json: expected UTF-8"):
        read_vqav2(questions, annotations, images)
    questions.write_text("[]")
    with pytest.raises(ValueError, match=r"q\.json: expected a JSON object, got \[\]"):
        read_vqav2(questions, annotations, images)
    with pytest.raises(ValueError, match=r"none\.json: expected a JSON file, got no such file"):
        read_vqav2(tmp_path / "none.json", annotations, images)


def gqa_record(**changes: object) -> dict[str, object]:
    record = {
        "imageId": "n1", "question": "Is it red?", "answer": "yes", "isBalanced": True,
        "types": {"structural": "verify", "semantic": "attr"},
    }  # fmt: skip
    return record | changes


def test_gqa(tmp_path: Path) -> None:
    draw(tmp_path / "n1.jpg")
    path = write(
        tmp_path / "q.json",
        {"201": gqa_record(), "202": gqa_record(types={"structural": "query"}, answer="red", question="What colour?")},
    )
    first, second = read_gqa(path, tmp_path)
    assert (first.id, first.task, first.text, first.answers) == ("201", "binary", "Is it red?", ("yes",))
    assert (second.id, second.task, second.answers) == ("202", "open", ("red",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected at least one question"),
        ({"201": gqa_record(types={})}, "201: types.structural: expected text, got None"),
        ({"201": gqa_record(imageId="n2")}, r"201: expected the image .*n2\.jpg, got no such file"),
        ({"201": gqa_record(answer=None)}, "201: answer: expected text, got None"),
        ({"201": 3}, "201: types.structural"),
    ],
)
def test_damaged_gqa(tmp_path: Path, content: object, message: str) -> None:
    draw(tmp_path / "n1.jpg")
    with pytest.raises(ValueError, match=message):
        read_gqa(write(tmp_path / "q.json", content), tmp_path)


POPE_LINE = {"question_id": 1, "image": "x.jpg", "text": "Is there a dog in the image?", "label": "no"}


def test_pope(tmp_path: Path) -> None:
    """One object a line, as for COCO, or one list, as for the other sources; equal numbers in two files."""
    draw(tmp_path / "x.jpg")
    lines = write(
        tmp_path / "coco_pope_random.json", "".join(json.dumps(POPE_LINE | {"question_id": i}) + "\n" for i in (1, 2))
    )
    whole = write(tmp_path / "coco_pope_popular.json", [POPE_LINE | {"label": "yes"}])
    found = read_pope([lines, whole], tmp_path)
    assert [question.id for question in found] == [
        "coco_pope_random-1", "coco_pope_random-2", "coco_pope_popular-1",
    ]  # fmt: skip
    assert [question.task for question in found] == ["coco_pope_random"] * 2 + ["coco_pope_popular"]
    assert [question.answers for question in found] == [("no",), ("no",), ("yes",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected at least one question"),
        ("[]", r"q\.json: questions: expected a list of objects, got \[\]"),
        (json.dumps(POPE_LINE) + "\n{", r"q\.json:2: expected one JSON object"),
        (json.dumps(POPE_LINE | {"label": "Maybe"}), r"q\.json:1: label: expected one of yes, no, got 'Maybe'"),
        (json.dumps(POPE_LINE | {"question_id": True}), r"q\.json:1: question_id: expected a name or number, got True"),
        (json.dumps(POPE_LINE) + "\n" + json.dumps(POPE_LINE), "q-1 twice"),
    ],
)
def test_damaged_pope(tmp_path: Path, content: str, message: str) -> None:
    draw(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=message):
        read_pope([write(tmp_path / "q.json", content)], tmp_path)


def mme_folder(root: Path) -> Path:
    """Every subtask with one image, in either layout."""
    for number, task in enumerate((*MME_PERCEPTION, *MME_COGNITION)):
        split = number % 2 == 0
        texts = root / task / ("questions_answers_YN" if split else "")
        texts.mkdir(parents=True)
        (texts / "0001.txt").write_text("Is it? Please answer yes or no.\tYes\nIs it not?\tNo\n\n")
        draw(root / task / ("images" if split else "") / ("0001.png" if split else "0001.jpg"))
    return root


def test_mme(tmp_path: Path) -> None:
    found = read_mme(mme_folder(tmp_path))
    assert [entry.task for entry in found] == [*MME_PERCEPTION, *MME_COGNITION]
    assert found[0].id == "existence-0001"
    assert found[0].questions == ("Is it? Please answer yes or no.", "Is it not?")
    assert found[0].answers == ("yes", "no")
    assert {entry.image.image.size for entry in found} == {(6, 4)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("count/0001.txt", "one\tYes\n", r"0001\.txt: expected two questions, got 1 lines"),
        ("count/0001.txt", "one\tYes\ntwo\tPerhaps\n", r"0001\.txt:2: expected a question, a tab and Yes or No"),
        ("count/0001.txt", "one Yes\ntwo\tNo\n", r"0001\.txt:1: expected a question, a tab"),
        ("count/0002.txt", "one\tYes\ntwo\tNo\n", r"0002\.txt: expected the image .*0002\.jpg, got no such file"),
    ],
)
def test_damaged_mme(tmp_path: Path, name: str, text: str, message: str) -> None:
    (mme_folder(tmp_path) / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mme(tmp_path)


def test_mme_without_a_subtask(tmp_path: Path) -> None:
    mme_folder(tmp_path)
    (tmp_path / "OCR").rename(tmp_path / "ocr_of_another")
    with pytest.raises(ValueError, match="expected a folder for each subtask of MME, got none for OCR"):
        read_mme(tmp_path)


def seed_file(folder: Path, **changes: object) -> Path:
    draw(folder / "1454426_2591111986")
    question = {
        "answer": "B", "choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four",
        "data_id": "1454426_2591111986", "data_type": "image", "question": "How many towels?", "question_id": "101669",
        "question_type_id": 5,
    }  # fmt: skip
    content = {
        "questions": [
            question | changes,
            question | {"data_type": "video", "question_id": "v1", "data_id": "clip.mp4"},
        ],
        "question_type": {"Instances Counting": 5},
    }
    return write(folder / "SEED-Bench.json", content)


def test_seed_bench(tmp_path: Path) -> None:
    """Videos are left out; images have no ending."""
    (question,) = read_seed_bench(seed_file(tmp_path), tmp_path)
    assert (question.id, question.task, question.text) == ("101669", "Instances Counting", "How many towels?")
    assert (question.options, question.answers) == ((("One", "Two", "Three", "Four"),), ("B",))
    assert question.image.image.size == (6, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "E"}, r"questions\[0\]: answer: expected one of A, B, C, D, got 'E'"),
        ({"choice_c": ""}, r"questions\[0\]: choice_c: expected text, got ''"),
        ({"data_id": "gone"}, r"questions\[0\]: expected the image .*gone, got no such file"),
        ({"data_type": "video"}, "expected at least one question"),
    ],
)
def test_damaged_seed_bench(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_seed_bench(seed_file(tmp_path, **changes), tmp_path)


COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split")


def in_base64(colour: str = "red") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def mmbench_row(**changes: object) -> dict[str, object]:
    row = {
        "index": 7, "question": "What is it?", "hint": "nan", "A": "cat", "B": "dog", "C": "cow", "D": "", "answer": "B",
        "category": "object", "image": in_base64(), "l2-category": "x", "split": "dev",
    }  # fmt: skip
    return row | changes


def mmbench_file(path: Path, *rows: dict[str, object], columns: tuple[str, ...] = COLUMNS) -> Path:
    lines = ["\t".join(columns), *("\t".join(str(row[name]) for name in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_mmbench_rotations_are_made(tmp_path: Path) -> None:
    (question,) = read_mmbench(mmbench_file(tmp_path / "m.tsv", mmbench_row(hint="Look.")))
    assert question.options == (("cat", "dog", "cow"), ("dog", "cow", "cat"), ("cow", "cat", "dog"))
    assert question.answers == ("B", "A", "C")
    assert all(
        order["ABC".index(letter)] == "dog" for order, letter in zip(question.options, question.answers, strict=True)
    )
    assert (question.id, question.task, question.hint) == ("7", "object", "Look.")
    assert question.image.image.getpixel((0, 0)) == (255, 0, 0)


def test_mmbench_rotations_of_the_file(tmp_path: Path) -> None:
    """Official tables hold the rotations, in any order of rows, and the image of them but once."""
    rotated = [
        mmbench_row(index=2_000_007, A="cow", B="cat", C="dog", answer="C", image=7),
        mmbench_row(index=7),
        mmbench_row(index=1_000_007, A="dog", B="cow", C="cat", answer="A", image=7),
        mmbench_row(index=8, C="", question="Other?", image=in_base64("blue")),
    ]
    first, second = read_mmbench(mmbench_file(tmp_path / "m.tsv", *rotated))
    assert first.options == (("cat", "dog", "cow"), ("dog", "cow", "cat"), ("cow", "cat", "dog"))
    assert first.answers == ("B", "A", "C")
    assert first.hint == ""
    assert first.image.image.getpixel((0, 0)) == (255, 0, 0)
    assert second.options == (("cat", "dog"), ("dog", "cat"))
    assert second.image.image.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected at least one question"),
        ([mmbench_row(index="x")], r"m\.tsv:2: index: expected a whole number, got 'x'"),
        ([mmbench_row(answer="D")], r"m\.tsv:2: answer: expected one of at least two options, A, B, C, got 'D'"),
        ([mmbench_row(B="")], r"m\.tsv:2: answer: expected one of at least two"),
        ([mmbench_row(category="")], r"m\.tsv:2: category: expected text"),
        ([mmbench_row(index=1_000_007)], r"m\.tsv:2: index: expected the question 7 as well"),
        ([mmbench_row(), mmbench_row(index=1_000_007)], r"m\.tsv:2: expected 3 rotations of question 7, got 2"),
    ],
)
def test_damaged_mmbench(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mmbench(mmbench_file(tmp_path / "m.tsv", *rows))


def test_mmbench_needs_its_columns(tmp_path: Path) -> None:
    for name, message in (("answer", "dev has it, test has not"), ("image", "expected a column image")):
        columns = tuple(column for column in COLUMNS if column != name)
        with pytest.raises(ValueError, match=message):
            read_mmbench(mmbench_file(tmp_path / "m.tsv", mmbench_row(), columns=columns))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("&&&&", "no base64"),
        (base64.b64encode(b"text").decode(), "a file of another kind"),
        (base64.b64encode(base64.b64decode(in_base64())[:45]).decode(), "truncated|broken"),
    ],
)
def test_an_image_that_is_none(tmp_path: Path, data: str, reason: str) -> None:
    (question,) = read_mmbench(mmbench_file(tmp_path / "m.tsv", mmbench_row(image=data)))
    with pytest.raises(ValueError, match=rf"m\.tsv:2: image: expected .*in base64, got .*({reason})"):
        _ = question.image.image


def test_coco_captions(tmp_path: Path) -> None:
    draw(tmp_path / "x.jpg")
    content = {
        "images": [{"id": 42, "file_name": "x.jpg"}],
        "annotations": [{"image_id": 42, "id": i, "caption": text} for i, text in enumerate(("a dog", "A cat."))],
    }
    (question,) = read_captions(write(tmp_path / "c.json", content), tmp_path, "test")
    assert (question.id, question.answers, question.text) == ("42", ("a dog", "A cat."), "")
    content["annotations"][0]["image_id"] = 43
    content["annotations"][1]["image_id"] = 43
    with pytest.raises(ValueError, match=r"images\[0\]: id: expected captions of image 42, got none"):
        read_captions(write(tmp_path / "c.json", content), tmp_path, "test")


def test_karpathy_split(tmp_path: Path) -> None:
    draw(tmp_path / "val2014" / "x.jpg")
    draw(tmp_path / "y.jpg")
    sentences = [{"raw": "a dog", "tokens": ["a", "dog"]}, {"raw": "two"}]
    content = {
        "dataset": "coco",
        "images": [
            {"filepath": "val2014", "filename": "x.jpg", "cocoid": 5, "split": "test", "sentences": sentences},
            {"filename": "y.jpg", "imgid": 6, "split": "test", "sentences": sentences[:1]},
            {"filename": "gone.jpg", "imgid": 7, "split": "train", "sentences": sentences},
        ],
    }
    path = write(tmp_path / "dataset_coco.json", content)
    first, second = read_captions(path, tmp_path, "test")
    assert (first.id, first.answers, second.id, second.answers) == ("5", ("a dog", "two"), "6", ("a dog",))
    with pytest.raises(ValueError, match="split: expected one of test, train, got val"):
        read_captions(path, tmp_path, "val")
    with pytest.raises(ValueError, match=r"images\[2\]: expected the image .*gone\.jpg"):
        read_captions(path, tmp_path, "train")


# ---- images that are not held


@pytest.mark.parametrize("name", ["../secret.jpg", "sub/../../secret.jpg", "/secret.jpg", "{root}/secret.jpg"])
def test_a_file_of_questions_cannot_choose_images_elsewhere(tmp_path: Path, name: str) -> None:
    """The image is there and would be read; each file in turn names it."""
    draw(tmp_path / "secret.jpg")
    folder = draw(tmp_path / "images" / "sub" / "x.jpg").parents[1]
    name = name.format(root=tmp_path)
    pope = {"question_id": 1, "image": name, "text": "Is there a dog?", "label": "yes"}
    coco = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a"}]}
    named = {"filename": name, "imgid": 1, "split": "test", "sentences": [{"raw": "a"}]}
    below = named | {"filename": Path(name).name, "filepath": str(Path(name).parent)}
    readings: list[Callable[[], object]] = [
        lambda: read_pope([write(tmp_path / "pope.json", json.dumps(pope))], folder),
        lambda: read_seed_bench(seed_file(tmp_path, data_id=name), folder),
        lambda: read_captions(write(tmp_path / "captions.json", coco), folder, "test"),
        lambda: read_captions(write(tmp_path / "named.json", {"images": [named]}), folder, "test"),
        lambda: read_captions(write(tmp_path / "below.json", {"images": [below]}), folder, "test"),
    ]
    for reading in readings:
        with pytest.raises(
            ValueError, match=r"json: ?.*expected the name of an image inside .*images, got '"
        ) as caught:
            reading()
        assert "\n" not in str(caught.value)


def test_a_folder_may_hold_its_users_links(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "x.jpg", "blue")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "y.jpg").symlink_to(tmp_path / "elsewhere" / "x.jpg")
    assert lazy_images.image_file(tmp_path / "images", "y.jpg", "here").image.size == (6, 4)


def test_an_image_is_read_when_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def load(path: Path) -> Image.Image:
        seen.append(path)
        return Image.new("RGB", (6, 4))

    monkeypatch.setattr(lazy_images, "_load", load)
    path = draw(tmp_path / "x.jpg")
    image = lazy_images.image_file(tmp_path, "x.jpg", "here")
    document = Document((image, Part("a", learn=False)))
    assert [part.is_image for part in document.parts] == [True, False]
    assert [part.is_text for part in document.parts] == [False, True]
    assert (image.learn, image.role, document.text) == (False, "", "a")
    assert seen == []
    assert image.image.size == document.images[0].size == (6, 4)
    assert seen == [path] * 2
    assert image == lazy_images.image_file(tmp_path, "x.jpg", "there")
    assert {image: 1}[lazy_images.image_file(tmp_path, "x.jpg", "there")] == 1
    assert image != lazy_images.image_file(draw(tmp_path / "y.jpg").parent, "y.jpg", "here")
    assert image != Part("x")
    assert repr(image) == f"LazyImage('x.jpg:{path.stat().st_size}')"


def test_a_lazy_image_cannot_change(tmp_path: Path) -> None:
    image = lazy_images.image_file(draw(tmp_path / "x.jpg").parent, "x.jpg", "here")
    with pytest.raises(AttributeError):
        image.learn = True  # type: ignore[misc]


def test_names() -> None:
    assert [safe_name(text) for text in ("a/b c", "..", "tt0048028", "é-1.x")] == ["a_b_c", "_", "tt0048028", "é-1.x"]
    with pytest.raises(ValueError, match="expected every question once, got a twice"):
        check_unique(["a", "b", "a"], Path("f"))
