"""Official files of understanding benchmarks, read as they are distributed, with every damage named by file and place.

Images are not opened here: a benchmark has tens of thousands. That they are there is checked at once.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from unimodal.documents import read_json_lines
from unimodal.evaluation.lazy_images import LazyImage, image_base64, image_file, image_path
from unimodal.metrics.vqa import MME_COGNITION, MME_PERCEPTION, rotations

_ENDINGS = (".jpg", ".jpeg", ".png")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# ---- records


@dataclass(frozen=True)
class Question:
    """One thing asked about an image.

    Attributes:
        id: unique in its file, safe in a path.
        task: group that it counts in.
        image: what it is about.
        text: the question, as the file has it; nothing for captions.
        answers: what is right: one answer, or one an annotator.
    """

    id: str
    task: str
    image: LazyImage
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceQuestion:
    """One multiple choice question, with its options in one order or in several.

    Attributes:
        id: unique in its file.
        task: group that it counts in.
        image: what it is about.
        text: the question.
        hint: what is to be known besides, or nothing.
        options: the options in each order that is asked.
        answers: the letter of the right option in each order.
    """

    id: str
    task: str
    image: LazyImage
    text: str
    hint: str
    options: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A JSON object and where it stands, for messages."""

    record: Mapping[str, Any]
    where: str

    def text(self, key: str) -> str:
        """A string that is not empty."""
        value = self.record.get(key)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where}: {key}: expected text, got {_brief(value)}")
        return value

    def name(self, key: str) -> str:
        """A string or whole number, as a string that is safe in a path."""
        value = self.record.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value):
            raise ValueError(f"{self.where}: {key}: expected a name or number, got {_brief(value)}")
        return safe_name(str(value))

    def number(self, key: str) -> int:
        """A whole number."""
        value = self.record.get(key)
        if type(value) is not int:
            raise ValueError(f"{self.where}: {key}: expected a whole number, got {_brief(value)}")
        return value

    def entries(self, key: str) -> list[_Entry]:
        """A list of objects that is not empty."""
        value = self.record.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
            raise ValueError(f"{self.where}: {key}: expected a list of objects, got {_brief(value)}")
        return [_Entry(each, f"{self.where}: {key}[{i}]") for i, each in enumerate(value)]

    def one_of(self, key: str, words: Sequence[str]) -> str:
        """One of some words."""
        value = self.record.get(key)
        if value not in words:
            raise ValueError(f"{self.where}: {key}: expected one of {', '.join(words)}, got {_brief(value)}")
        return str(value)


def safe_name(text: str) -> str:
    """The text with what a file name should not hold as underscores."""
    return re.sub(r"[^\w.-]", "_", text).lstrip(".") or "_"


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSON file, got {'a folder' if path.is_dir() else 'no such file'}")
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8, got other bytes") from None
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(f"{path}:{line}: expected JSON, got {' '.join(str(error).split())[:100]}") from None


def _read_object(path: Path) -> _Entry:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {_brief(value)}")
    return _Entry(value, str(path))


def check_unique(ids: Sequence[str], path: Path) -> None:
    """Refuse two records of one name, and none at all."""
    if not ids:
        raise ValueError(f"{path}: expected at least one question, got none")
    seen = set()
    for each in ids:
        if each in seen:
            raise ValueError(f"{path}: expected every question once, got {each} twice")
        seen.add(each)


# ---- the benchmarks' files


def read_vqav2(questions: Path, annotations: Path, image_folder: Path) -> list[Question]:
    """VQAv2: v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json; task: type of answer."""
    told = {entry.number("question_id"): entry for entry in _read_object(annotations).entries("annotations")}
    asked = _read_object(questions)
    folder = asked.text("data_subtype")  # "val2014", which file names of COCO 2014 hold
    found = []
    for entry in asked.entries("questions"):
        number = entry.number("question_id")
        if number not in told:
            raise ValueError(f"{entry.where}: question_id: expected one of {annotations}, got {number}")
        image = image_file(image_folder, f"COCO_{folder}_{entry.number('image_id'):012d}.jpg", entry.where)
        answers = told[number].entries("answers")
        if len(answers) != 10:
            raise ValueError(f"{told[number].where}: answers: expected 10 annotators, got {len(answers)}")
        for answer in answers:
            if not isinstance(answer.record.get("answer"), str):
                raise ValueError(f"{answer.where}: answer: expected text, got {_brief(answer.record.get('answer'))}")
        humans = tuple(answer.record["answer"] for answer in answers)
        task = told[number].text("answer_type")
        found.append(Question(str(number), task, image, entry.text("question"), humans))
    check_unique([question.id for question in found], questions)
    return found


def read_gqa(questions: Path, image_folder: Path) -> list[Question]:
    """GQA: testdev_balanced_questions.json; task: "open" where the structural type is query, else "binary"."""
    found = []
    for number, record in _read_object(questions).record.items():
        entry = _Entry(record if isinstance(record, dict) else {}, f"{questions}: {number}")
        types = entry.record.get("types")
        kind = types.get("structural") if isinstance(types, dict) else None
        if not isinstance(kind, str):
            raise ValueError(f"{entry.where}: types.structural: expected text, got {_brief(kind)}")
        image = image_file(image_folder, f"{entry.name('imageId')}.jpg", entry.where)
        task = "open" if kind == "query" else "binary"
        found.append(Question(safe_name(number), task, image, entry.text("question"), (entry.text("answer"),)))
    check_unique([question.id for question in found], questions)
    return found


def read_pope(questions: Sequence[Path], image_folder: Path) -> list[Question]:
    """POPE: coco_pope_random.json and its like, an object a line or one list; task: name of the file."""
    found = []
    for path in questions:
        if path.is_file() and path.read_bytes().lstrip()[:1] == b"[":
            entries = _Entry({"questions": _read_json(path)}, str(path)).entries("questions")
        else:
            entries = [_Entry(line.record, line.where) for line in read_json_lines(path)]
        if not entries:
            raise ValueError(f"{path}: expected at least one question, got none")
        for entry in entries:
            image = image_file(image_folder, entry.text("image"), entry.where)
            name = f"{safe_name(path.stem)}-{entry.name('question_id')}"
            answer = entry.one_of("label", ("yes", "no"))
            found.append(Question(name, path.stem, image, entry.text("text"), (answer,)))
    if not questions:
        raise ValueError("questions: expected at least one file, got none")
    check_unique([question.id for question in found], questions[-1])
    return found


@dataclass(frozen=True)
class MMEImage:
    """An image of MME and its two questions."""

    id: str
    task: str
    image: LazyImage
    questions: tuple[str, str]
    answers: tuple[str, str]


def read_mme(folder: Path) -> list[MMEImage]:
    """MME: a folder a subtask, with images/ and questions_answers_YN/ in it, or images and texts side by side.

    All 14 subtasks have to be there: totals of fewer would look like MME's.
    """
    missing = [name for name in (*MME_PERCEPTION, *MME_COGNITION) if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"{folder}: expected a folder for each subtask of MME, got none for {', '.join(missing)}")
    found = []
    for task in (*MME_PERCEPTION, *MME_COGNITION):
        texts = images = folder / task
        if (texts / "questions_answers_YN").is_dir():
            texts, images = texts / "questions_answers_YN", texts / "images"
        paths = sorted(texts.glob("*.txt"))
        if not paths:
            raise ValueError(f"{texts}: expected text files with questions, got none")
        found += [_mme_image(task, path, images) for path in paths]
    return found


def _mme_image(task: str, path: Path, images: Path) -> MMEImage:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8, got other bytes") from None
    if len(lines) != 2:
        raise ValueError(f"{path}: expected two questions, got {len(lines)} lines")
    questions, answers = [], []
    for number, line in enumerate(lines, start=1):
        question, tab, answer = line.rpartition("\t")
        answer = answer.strip().lower()
        if not tab or answer not in ("yes", "no") or not question.strip():
            raise ValueError(f"{path}:{number}: expected a question, a tab and Yes or No, got {_brief(line)}")
        questions.append(question.strip())
        answers.append(answer)
    name = next((n for end in _ENDINGS if (images / (n := f"{path.stem}{end}")).is_file()), f"{path.stem}.jpg")
    return MMEImage(
        f"{task}-{safe_name(path.stem)}", task, image_file(images, name, str(path)), (questions[0], questions[1]),
        (answers[0], answers[1]),
    )  # fmt: skip


def read_seed_bench(questions: Path, image_folder: Path) -> list[ChoiceQuestion]:
    """SEED-Bench.json: its questions about images; those about videos are left out. Task: type of question."""
    top = _read_object(questions)
    types = top.record.get("question_type")
    names = {number: name for name, number in types.items()} if isinstance(types, dict) else {}
    found = []
    for entry in top.entries("questions"):
        if entry.text("data_type") != "image":
            continue
        number = entry.number("question_type_id")
        options = tuple(entry.text(f"choice_{letter}") for letter in "abcd")
        image = image_file(image_folder, entry.text("data_id"), entry.where)
        answer = entry.one_of("answer", tuple("ABCD"))
        task = str(names.get(number, f"type {number}"))
        found.append(
            ChoiceQuestion(entry.name("question_id"), task, image, entry.text("question"), "", (options,), (answer,))
        )
    check_unique([question.id for question in found], questions)
    return found


def read_mmbench(questions: Path) -> list[ChoiceQuestion]:
    """MMBench's table (dev: the answers of test are not public): images in base64, options A to D, some missing.

    Rows whose index is a multiple of a million more than another's ask the same with the options moved on by one; a
    table without such rows gets them here. Task: category.
    """
    groups: dict[int, list[_Row]] = {}
    images: dict[int, str] = {}
    for row in _mmbench_rows(questions):
        groups.setdefault(row.index % 1_000_000, []).append(row)
        images[row.index] = row.image
    found = []
    for index, group in groups.items():
        group = sorted(group, key=lambda row: row.index)
        first = group[0]
        if first.index != index:
            raise ValueError(f"{first.where}: index: expected the question {index} as well, got {first.index} alone")
        orders = tuple(row.options for row in group)
        answers = tuple(row.answer for row in group)
        if len(group) == 1:
            orders = tuple(rotations(first.options))
            letters = rotations(_LETTERS[: len(first.options)])
            answers = tuple(_LETTERS[order.index(first.answer)] for order in letters)
        elif len(group) != len(first.options):
            raise ValueError(
                f"{first.where}: expected {len(first.options)} rotations of question {index}, got {len(group)}"
            )
        # A rotated row may hold the index of the row that has the image.
        data = first.image
        if data.isdigit() and int(data) in images:
            data = images[int(data)]
        image = image_base64(data, first.where)
        found.append(ChoiceQuestion(str(index), first.task, image, first.text, first.hint, orders, answers))
    if not found:
        raise ValueError(f"{questions}: expected at least one question, got none")
    return found


@dataclass(frozen=True)
class _Row:
    """A line of MMBench's table."""

    index: int
    task: str
    text: str
    hint: str
    options: tuple[str, ...]
    answer: str
    image: str
    where: str


def _mmbench_rows(path: Path) -> Iterator[_Row]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a table (.tsv), got no such file")
    csv.field_size_limit(sys.maxsize)  # an image is one field
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        for column in ("index", "question", "A", "B", "image", "category"):
            if column not in (rows.fieldnames or ()):
                raise ValueError(f"{path}:1: expected a column {column}, got {', '.join(rows.fieldnames or ())[:100]}")
        if "answer" not in (rows.fieldnames or ()):
            raise ValueError(f"{path}:1: expected a column answer (dev has it, test has not), got none")
        for record in rows:
            yield _mmbench_row(record, f"{path}:{rows.line_num}")


def _mmbench_row(record: Mapping[str, str | None], where: str) -> _Row:
    def cell(name: str) -> str:
        value = (record.get(name) or "").strip()
        return "" if value == "nan" else value

    if not cell("index").isdigit():
        raise ValueError(f"{where}: index: expected a whole number, got {_brief(record.get('index'))}")
    options = []
    for letter in _LETTERS:
        if not cell(letter):
            break
        options.append(cell(letter))
    known = tuple(_LETTERS[: len(options)])
    if len(options) < 2 or cell("answer") not in known:
        raise ValueError(
            f"{where}: answer: expected one of at least two options, {', '.join(known)}, got {_brief(record.get('answer'))}"
        )
    for name in ("question", "image", "category"):
        if not cell(name):
            raise ValueError(f"{where}: {name}: expected text, got nothing")
    return _Row(
        int(cell("index")), cell("category"), cell("question"), cell("hint"), tuple(options), cell("answer"),
        cell("image"), where,
    )  # fmt: skip


def read_captions(annotations: Path, image_folder: Path, split: str, first: int | None = None) -> list[Question]:
    """captions_val2014.json of COCO, or a Karpathy split (dataset_coco.json, dataset_flickr30k.json).

    Args:
        annotations: the file.
        image_folder: its images; where a Karpathy file names a subfolder, that is looked into as well.
        split: of a Karpathy file; COCO's own have one.
        first: so many images, or as many as there are; None: all.
    """
    top = _read_object(annotations)
    images = _coco_captions(top, image_folder) if "annotations" in top.record else _karpathy(top, image_folder, split)
    found = list(islice(images, first))
    check_unique([question.id for question in found], annotations)
    return found


def _coco_captions(top: _Entry, image_folder: Path) -> Iterator[Question]:
    captions: dict[str, list[str]] = {}
    for entry in top.entries("annotations"):
        captions.setdefault(entry.name("image_id"), []).append(entry.text("caption"))
    for entry in top.entries("images"):
        name = entry.name("id")
        if name not in captions:
            raise ValueError(f"{entry.where}: id: expected captions of image {name}, got none")
        image = image_file(image_folder, entry.text("file_name"), entry.where)
        yield Question(name, "captions", image, "", tuple(captions[name]))


def _karpathy(top: _Entry, image_folder: Path, split: str) -> Iterator[Question]:
    splits = set()
    for entry in top.entries("images"):
        splits.add(entry.text("split"))
        if entry.record["split"] != split:
            continue
        file = entry.text("filename")
        nested = str(Path(str(entry.record.get("filepath", ""))) / file)
        lies = image_path(image_folder, nested, entry.where).is_file()
        image = image_file(image_folder, nested if lies else file, entry.where)
        captions = tuple(sentence.text("raw") for sentence in entry.entries("sentences"))
        name = entry.name("cocoid" if "cocoid" in entry.record else "imgid")
        yield Question(name, "captions", image, "", captions)
    if split not in splits:
        raise ValueError(f"{top.where}: split: expected one of {', '.join(sorted(splits))}, got {split}")
