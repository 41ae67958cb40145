"""Open-ended sets of interleaved documents, judged aspect by aspect by a model behind an OpenAI-compatible endpoint.

The aspects and their scales are those that each set's authors published; the wording that the judge reads is ours, and so
may the judge be. The scores therefore have names of their own and compare with each other only, and only under one judge.

- InterleavedBench: M. Liu et al., EMNLP 2024, arXiv 2406.14643. Five aspects, 0 to 5.
- OpenING: P. Zhou et al., CVPR 2025, arXiv 2411.18499. Seven criteria, 0 to 10 (its arena of pairs is not here).
- ISG-Bench: D. Chen et al., ICLR 2025, arXiv 2411.17188. Structure exactly, questions on blocks and images, the whole.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from unimodal.documents import Document, Part, read_json_lines
from unimodal.evaluation.benchmark import Answer, Benchmark, Item, Row, Verdict
from unimodal.evaluation.interleaved import kinds, means, structure_cause, structure_fields
from unimodal.evaluation.judge import Endpoint, OpenAIJudge, Opinion, Question
from unimodal.evaluation.lazy_images import image_at
from unimodal.files import contained_path
from unimodal.metrics.interleaved import structure_match

if TYPE_CHECKING:
    from unimodal.decoding_settings import DecodingSettings
    from unimodal_generators.base import SamplingSettings

UNREAD = "judge answers unread"
_MARK = "<image>"
_TASK = (
    "You assess a document of texts and images that a model made. You are shown what it was asked, then what it answered. "
    "Judge one aspect alone, whatever you think of the others: {aspect}. The least score means that the answer fails in "
    "this aspect altogether, the greatest that nothing is left to wish for."
)


@dataclass(frozen=True)
class Aspect:
    """One thing that a judge gives a score for.

    Attributes:
        name: as published, in lower case.
        wording: what the judge is told it means.
        of_text: whether it needs a text; left out for tasks whose answers are images alone.
    """

    name: str
    wording: str
    of_text: bool = False

    @property
    def instructions(self) -> str:
        """All that the judge is told before the document."""
        return _TASK.format(aspect=f"{self.name}, that is, {self.wording}")


class JudgedSet(Benchmark):
    """What the sets share: a file of prompts, aspects, and a judge that is reached before anything is generated.

    An answer's score is the mean of its aspects on a scale of 0 to 1. Where the judge's answer could not be read, the aspect
    counts as the least score, the row says so, and a measure counts how often that happened. An answer with nothing in it
    gets the least score without being judged.

    Args:
        data: the set's own file.
        base_url: address of the judge, up to and with the version, such as http://localhost:8000/v1.
        judge_model: name that the endpoint knows the judge by.
        key_variable: environment variable that holds the API key; "" for an endpoint without one.
        cache: file of all the judge said, so that scoring goes on where it stopped; default: judge_cache.jsonl in --out.
        folder: what the file's image paths are relative to; default: the file's own folder.
        max_tokens: most text tokens of an answer.
        max_images: most images of an answer.
    """

    aspects: ClassVar[tuple[Aspect, ...]]
    low: ClassVar[int] = 0
    high: ClassVar[int]

    def __init__(
        self,
        data: Path,
        base_url: str,
        judge_model: str,
        key_variable: str = "OPENAI_API_KEY",
        cache: Path | None = None,
        folder: Path | None = None,
        max_tokens: int = 1024,
        max_images: int = 10,
    ) -> None:
        if max_tokens < 1 or max_images < 1:
            raise ValueError(f"max_tokens and max_images: expected 1 or more, got {max_tokens} and {max_images}")
        if not data.is_file():
            raise ValueError(f"data: expected a file, got {data}, which is missing")
        if cache is None:
            raise ValueError("cache: expected a file for all that the judge says (or --out, a folder for it), got none")
        self.data, self.folder = data, folder or data.parent
        self.max_tokens, self.max_images = max_tokens, max_images
        self._judge = OpenAIJudge(Endpoint(base_url, judge_model, key_variable), cache)
        self._items = list(self.read())
        if not self._items:
            raise ValueError(f"data: expected at least one entry, got none in {data}")

    @abstractmethod
    def read(self) -> Iterator[Item]:
        """The items of the set's file."""

    def items(self) -> Sequence[Item]:
        """An entry of the file each, in its order."""
        return self._items

    def settings(self, image: SamplingSettings | None) -> DecodingSettings:
        """Text that may begin images."""
        from unimodal.decoding_settings import DecodingSettings

        return DecodingSettings("text", max_tokens=self.max_tokens, max_images=self.max_images, image=image)

    def aspects_of(self, item: Item) -> tuple[Aspect, ...]:
        """What is judged of an answer to this item."""
        return self.aspects

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """All aspects of all answers are asked at once."""
        aspects = [self.aspects_of(answer.item) if kinds(answer.parts) else () for answer in answers]
        asked = [(answer, aspect) for answer, some in zip(answers, aspects, strict=True) for aspect in some]
        opinions = iter(self._judge.ask([self._question(answer, aspect) for answer, aspect in asked]))
        found = [{aspect.name: next(opinions) for aspect in some} for some in aspects]
        return [self._verdict(answer, opinion) for answer, opinion in zip(answers, found, strict=True)]

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Mean of every aspect on its own scale, and the share of the judge's answers that could not be read."""
        names = {aspect.name: f"{aspect.name} ({self.low} to {self.high})" for aspect in self.aspects}
        flat = [{name: self.low if score is None else score for name, score in row["aspects"].items()} for row in rows]
        asked = sum(row["asked_judge"] for row in rows)
        unread = {UNREAD: sum(row["unread"] for row in rows) / asked} if asked else {}
        return means(flat, names) | unread

    def spec(self) -> dict[str, Any]:
        """The judge with its version, the aspects and the hash of their wordings."""
        wordings = [aspect.instructions for aspect in self.aspects]
        return {"judge": self._judge.spec(wordings), "aspects": [aspect.name for aspect in self.aspects]}

    def _question(self, answer: Answer, aspect: Aspect) -> Question:
        given, made = Part("What was asked:", learn=False), Part("What was answered:", learn=False)
        parts = (given, *answer.item.prompt.parts, made, *answer.parts)
        return Question(aspect.instructions, parts, self.low, self.high)

    def _verdict(self, answer: Answer, found: Mapping[str, Opinion]) -> Verdict:
        """Mean of the aspects; `found` is empty where there was nothing to judge."""
        scores = {name: opinion.score for name, opinion in found.items()}
        scores = scores or {aspect.name: self.low for aspect in self.aspects_of(answer.item)}
        counted = [self.low if score is None else score for score in scores.values()]
        value = (sum(counted) / len(counted) - self.low) / (self.high - self.low)
        causes = [f"{n}: {o.reason}" for n, o in found.items() if o.score is None or o.score < self.high]
        reason = "; ".join(causes) if found else "an empty answer"
        unread = sum(opinion.score is None for opinion in found.values())
        fields = {"aspects": scores, "asked_judge": len(found), "unread": unread, "made": kinds(answer.parts)}
        return Verdict(value, reason if value < 1 else "", fields)

    def _image(self, name: object, where: str) -> Part:
        return image_at(contained_path(name, self.folder, where), where)

    def _marked(self, text: str, images: Sequence[object], where: str) -> Iterator[Part]:
        """The text with an image in place of every mark."""
        pieces = text.split(_MARK)
        if len(pieces) - 1 != len(images):
            raise ValueError(f"{where}: expected a {_mark_word(len(images))}, got {len(pieces) - 1} in {text[:60]!r}")
        for piece, image in zip(pieces, [*images, None], strict=True):
            if piece.strip():
                yield Part(piece, learn=False)
            if image is not None:
                yield self._image(image, where)


def _mark_word(number: int) -> str:
    return f"{_MARK} for each of {number} images"


class InterleavedBench(JudgedSet):
    """InterleavedBench's prompts and five aspects (0 to 5), our wording and judge.

    Args:
        data: interleaved_bench.json.
        base_url: address of the judge, up to and with the version, such as http://localhost:8000/v1.
        judge_model: name that the endpoint knows the judge by.
        without_text: tasks of the file whose answers are images alone (its authors name image editing and subject-driven
            generation): they are judged without the aspects of text.
        key_variable: environment variable that holds the API key; "" for an endpoint without one.
        cache: file of all the judge said, so that scoring goes on where it stopped; default: judge_cache.jsonl in --out.
        folder: what the file's image paths are relative to, zipped_images unpacked; default: the file's own folder.
        max_tokens: most text tokens of an answer.
        max_images: most images of an answer.
    """

    name = "interleavedbench-aspects"
    high = 5
    aspects = (
        Aspect("text quality", "how clear, correct and fluent the texts are, without repetition", of_text=True),
        Aspect("perceptual quality", "how natural the images look, without distortions or artefacts"),
        Aspect("image coherence", "how well the images keep style, persons and things the same where they should"),
        Aspect("text-image coherence", "how well every image shows what the text around it says", of_text=True),
        Aspect("helpfulness", "how well the answer does what was asked and helps whoever asked"),
    )

    def __init__(
        self,
        data: Path,
        base_url: str,
        judge_model: str,
        without_text: list[str],
        key_variable: str = "OPENAI_API_KEY",
        cache: Path | None = None,
        folder: Path | None = None,
        max_tokens: int = 1024,
        max_images: int = 10,
    ) -> None:
        super().__init__(data, base_url, judge_model, key_variable, cache, folder, max_tokens, max_images)
        self.without_text = frozenset(without_text)
        tasks = sorted({item.task for item in self._items})
        for task in sorted(self.without_text - set(tasks)):
            raise ValueError(f"without_text: expected some of the file's tasks {', '.join(tasks)}, got {task}")

    def aspects_of(self, item: Item) -> tuple[Aspect, ...]:
        """All five, or the three that need no text."""
        return tuple(aspect for aspect in self.aspects if not (aspect.of_text and item.task in self.without_text))

    def spec(self) -> dict[str, Any]:
        """Also the tasks that are judged without text."""
        return {**super().spec(), "without_text": sorted(self.without_text)}

    def read(self) -> Iterator[Item]:
        """A JSON list; the first turn of `conversations` is the prompt, marks in it stand for the first of `image`."""
        for number, entry in enumerate(_json_list(self.data)):
            where = f"{self.data.name}[{number}]"
            try:
                text, images = entry["conversations"][0]["value"], entry.get("image") or []
                task, name = entry["task_name"], entry["id"]
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(f"{where}: expected id, task_name, image and conversations, got no {error}") from None
            parts = tuple(self._marked(text, images[: text.count(_MARK)], where))
            yield Item(f"{number:05d}", task, Document(parts, "interleaved"), {"id": name})


class OpenING(JudgedSet):
    """OpenING's prompts and seven criteria (0 to 10), our wording and judge; structure besides.

    Args:
        data: test_data.jsonl or dev_data.jsonl.
        base_url: address of the judge, up to and with the version, such as http://localhost:8000/v1.
        judge_model: name that the endpoint knows the judge by.
        key_variable: environment variable that holds the API key; "" for an endpoint without one.
        cache: file of all the judge said, so that scoring goes on where it stopped; default: judge_cache.jsonl in --out.
        folder: what the file's image paths are relative to; default: the file's own folder.
        max_tokens: most text tokens of an answer.
        max_images: most images of an answer.
    """

    name = "opening-aspects"
    high = 10
    aspects = (
        Aspect("correctness", "how right the texts are in fact and logic and how plausible and faithful the images"),
        Aspect("image-text coherency", "how well images and texts say and show the same"),
        Aspect("multi-step consistency", "how well style, persons and things stay the same from step to step"),
        Aspect("content quality", "how clear and realistic the images and how correct the language is"),
        Aspect("human preference alignment", "how free of undesirable content it is, and how pleasing to people"),
        Aspect("completeness", "whether all steps that were asked are there, with nothing left out"),
        Aspect("content richness", "how varied the images and how detailed the texts are, without empty words"),
    )

    def read(self) -> Iterator[Item]:
        """JSONL; steps of a text and perhaps an image at its mark, the human answer's steps give the asked structure."""
        for line in read_json_lines(self.data):
            record, where = line.record, line.where
            try:
                asked, reference = record["conversations"][0]["input"], record["conversations"][1]["output"]  # type: ignore[index]
                task, name = str(record["meta_task_name"]), str(record["total_uid"])
                steps = [(step["text"].replace("<BEGIN>", ""), step["image"]) for step in asked]
                made = [part for step in reference for part in _step_kinds(step["text"], step["image"])]
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise ValueError(f"{where}: expected an entry of OpenING, got {type(error).__name__} {error}") from None
            parts = [part for text, image in steps for part in self._marked(text, [image] if image else [], where)]
            if not re.fullmatch(r"[0-9]+", name):
                raise ValueError(f"{where}: total_uid: expected digits, got {name!r}")
            kept = [kind for i, kind in enumerate(made) if kind == "image" or made[i - 1 : i] != ["text"]]
            yield Item(name, task, Document(tuple(parts), "interleaved"), {"id": name, "asked": kept})

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """The criteria; how the structure compares with the human answer's is in the row."""
        return [_with_structure(a, v) for a, v in zip(answers, super().judge(answers), strict=True)]

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Also the share of answers with the human answer's structure."""
        return super().measures(rows) | means(rows, {"structure_right": "structure as the human answer's"})


def _step_kinds(text: str, image: object) -> list[str]:
    """Order of a step's text and image, by the place of the mark."""
    if not image:
        return ["text"]
    before, _, behind = text.partition(_MARK)
    return ["text"] * bool(before.strip()) + ["image"] + ["text"] * bool(behind.strip())


def _with_structure(answer: Answer, verdict: Verdict) -> Verdict:
    asked, made = answer.item.truth["asked"], kinds(answer.parts)
    match = structure_match(asked, made)
    causes = [structure_cause(match, asked, made), verdict.reason] if verdict.score < 1 else []
    reason = "; ".join(filter(None, causes))
    return Verdict(verdict.score, reason, {**verdict.fields, **structure_fields(match, made)})


def _json_list(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"data: expected JSON in {path}, got {' '.join(str(error).split())[:100]}") from None
    if not isinstance(found, list):
        raise ValueError(f"data: expected a JSON list in {path}, got {type(found).__name__}")
    return found
