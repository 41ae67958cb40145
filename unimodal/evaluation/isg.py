"""ISG-Bench: structure exactly, the file's own questions on blocks and images, and the whole answer by aspects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unimodal.documents import Document, JsonLine, Part, read_json_lines
from unimodal.evaluation.benchmark import Answer, Item, Row, Verdict
from unimodal.evaluation.interleaved import kinds, means, structure_cause, structure_fields
from unimodal.evaluation.judge import Opinion, Question
from unimodal.evaluation.judged import UNREAD, Aspect, JudgedSet
from unimodal.metrics.interleaved import structure_match

_GROUPS = {
    "style": ("Art Style Transfer", "Scene Attribute Transfer", "Photo Variation", "Portrait Variation"),
    "progressive": ("Animation Images", "Animation Text-Image", "Attribute Transfer"),
    "3D scene": ("3D_object", "multi-Perspective Scene Generation"),
    "decomposition": ("Realistic Object Detection", "Imaginary Object Detection"),
    "image-text complementation": ("HowTo", "Scientific"),
    "temporal prediction": ("Prediction", "painting"),
    "visual story telling": ("visual storytelling text-image", "visual storytelling image", "visual storytelling text"),
    "VQA": ("Object_VQA", "Historical"),
}
_TASKS = {kind: group for group, some in _GROUPS.items() for kind in some}
"""The file's categories -> the eight that its authors report."""
_BLOCK = (
    "You are shown two pieces of a document, each a text or an image, and a question on how they belong together. The least "
    "score means that the answer to the question is no, the greatest that it is yes without reserve."
)
_PICTURE = "You are shown an image and a question on it. Score 1 if the answer is yes, 0 if it is no or cannot be seen."


class ISG(JudgedSet):
    """ISG-Bench's prompts, structures and questions, our wording and judge.

    The score is the mean of five aspects of the whole answer (1 to 10), judged without the human answer. Measures add what
    its authors report: the share of exact structures, which no judge decides; blocks, the mean score (1 to 10) of questions
    on pairs of blocks; images, the share of questions answered with yes, where one that builds on another is asked only if
    that was. Where the structure is wrong, blocks count 1 and images 0. Texts in a row are one text.

    Args:
        data: ISG-Bench.jsonl.
        base_url: address of the judge, up to and with the version, such as http://localhost:8000/v1.
        judge_model: name that the endpoint knows the judge by.
        key_variable: environment variable that holds the API key; "" for an endpoint without one.
        cache: file of all the judge said, so that scoring goes on where it stopped; default: judge_cache.jsonl in --out.
        folder: what the file's image paths are relative to; default: the file's own folder.
        max_tokens: most text tokens of an answer.
        max_images: most images of an answer.
    """

    name = "isg-aspects"
    low, high = 1, 10
    aspects = (
        Aspect("coherence", "how well texts and images together tell one story or carry one message"),
        Aspect("content accuracy", "how right the texts are in fact and the images in what they show"),
        Aspect("relevance and responsiveness", "how well the answer does what was asked"),
        Aspect("visual-textual alignment", "how well the images match the texts that go with them"),
        Aspect("creativity and originality", "how new and imaginative texts and images are"),
    )

    def read(self) -> Iterator[Item]:
        """JSONL with Query and Golden as lists of blocks, and questions under `predict`."""
        for number, line in enumerate(read_json_lines(self.data)):
            try:
                yield self._entry(number, line)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{line.where}: expected an entry of ISG-Bench, got {type(error).__name__} {error}"
                ) from None

    def _entry(self, number: int, line: JsonLine) -> Item:
        record: Any = line.record
        if record["Category"] not in _TASKS:
            raise ValueError(f"{line.where}: Category: expected one of {', '.join(_TASKS)}, got {record['Category']!r}")
        blocks = [(block["type"], block["content"]) for block in record["Query"]]
        prompt = [self._image(c, line.where) if kind == "image" else Part(c, learn=False) for kind, c in blocks]
        golden = [block["type"] for block in record["Golden"]]
        asked = [kind for i, kind in enumerate(golden) if kind == "image" or golden[i - 1 : i] != ["text"]]
        predicted = record.get("predict", {})
        pairs = [
            {"blocks": [q["subject"], q["object"]], "question": q["Question"]}
            for q in predicted.get("block_qa", {}).get("questions", [])
            if {"subject", "object", "Question"} <= q.keys()  # the file has some without; its script leaves them out
        ]
        truth = {"id": record["id"], "asked": asked, "pairs": pairs, "pictures": _pictures(predicted, line.where)}
        return Item(f"{number:05d}", _TASKS[record["Category"]], Document(tuple(prompt), "interleaved"), truth)

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """The whole, then blocks and images where the structure is right."""
        whole = super().judge(answers)
        asked = [answer.item.truth["asked"] for answer in answers]
        matches = [structure_match(order, kinds(answer.parts)) for order, answer in zip(asked, answers, strict=True)]
        named = [_named(answer) if match.exact else {} for answer, match in zip(answers, matches, strict=True)]
        pairs, pictures = self._ask_pairs(answers, named), self._ask_pictures(answers, named)
        verdicts = []
        for i, (verdict, match) in enumerate(zip(whole, matches, strict=True)):
            made = kinds(answers[i].parts)
            opinions = [*pairs[i], *pictures[i].values()]
            fields = {
                **verdict.fields, **structure_fields(match, made),
                "blocks": _mean([opinion.score or self.low for opinion in pairs[i]], self.low),
                "images": _mean([opinion.score or 0 for opinion in pictures[i].values()], 0),
                "asked_judge": verdict.fields["asked_judge"] + sum(o is not _NOT_ASKED for o in opinions),
                "unread": verdict.fields["unread"] + sum(o.score is None for o in opinions),
            }  # fmt: skip
            if not answers[i].item.truth["pairs"]:
                fields["blocks"] = None
            if not answers[i].item.truth["pictures"]:
                fields["images"] = None
            causes = [structure_cause(match, asked[i], made), verdict.reason] if verdict.score < 1 else []
            verdicts.append(Verdict(verdict.score, "; ".join(filter(None, causes)), fields))
        return verdicts

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """The four levels; unread answers of the judge last."""
        names = {"structure_right": "structure", "blocks": "blocks (1 to 10)", "images": "images"}
        found = super().measures(rows)
        unread = {UNREAD: found.pop(UNREAD)} if UNREAD in found else {}
        return found | means(rows, names) | unread

    def spec(self) -> dict[str, Any]:
        """The judge is also told how to answer the file's questions."""
        wordings = [*(aspect.instructions for aspect in self.aspects), _BLOCK, _PICTURE]
        return {**super().spec(), "judge": self._judge.spec(wordings)}

    def _ask_pairs(self, answers: Sequence[Answer], named: Sequence[Mapping[str, Part]]) -> list[list[Opinion]]:
        """Opinions on pairs of blocks, an answer each; pairs with a block that is not there are left out."""
        asked: list[tuple[int, Question]] = []
        for i, (answer, blocks) in enumerate(zip(answers, named, strict=True)):
            for pair in answer.item.truth["pairs"]:
                first, second = (blocks.get(name) for name in pair["blocks"])
                if first is not None and second is not None:
                    shown = (_label("First piece:"), first, _label("Second piece:"), second)
                    question = pair["question"]
                    for name, word in zip(pair["blocks"], ("the first piece", "the second piece"), strict=True):
                        question = question.replace(name, word)
                    asked.append((i, Question(_BLOCK, (*shown, _label(f"Question: {question}")), self.low, self.high)))
        found: list[list[Opinion]] = [[] for _ in answers]
        for (i, _), opinion in zip(asked, self._judge.ask([question for _, question in asked]), strict=True):
            found[i].append(opinion)
        return found

    def _ask_pictures(self, answers: Sequence[Answer], named: Sequence[Mapping[str, Part]]) -> list[dict[int, Opinion]]:
        """Opinions on images by number of the question, an answer each; in rounds, as questions build on each other."""
        entries = [
            answer.item.truth["pictures"] if blocks else [] for answer, blocks in zip(answers, named, strict=True)
        ]
        found: list[dict[int, Opinion]] = [{} for _ in answers]
        for turn in range(1 + max((entry["turn"] for some in entries for entry in some), default=-1)):
            asked: list[tuple[int, int, Question]] = []
            for i, entry in ((i, entry) for i, some in enumerate(entries) for entry in some if entry["turn"] == turn):
                image = named[i].get(entry["image"])
                if image is None or any(found[i][need].score != 1 for need in entry["needs"]):
                    found[i][entry["id"]] = _NOT_ASKED
                else:
                    parts = (image, _label(f"Question: {entry['question']}"))
                    asked.append((i, entry["id"], Question(_PICTURE, parts, 0, 1)))
            for (i, number, _), opinion in zip(asked, self._judge.ask([q for *_, q in asked]), strict=True):
                found[i][number] = opinion
        return found


_NOT_ASKED = Opinion(0, "not asked")


def _pictures(predicted: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Questions on images; ValueError where one builds on a question that does not come before it."""
    questions = predicted.get("image_qa", [])
    questions = questions["questions"] if isinstance(questions, dict) else questions
    turns: dict[int, int] = {}  # by number of the question: in which round it can be asked
    found = []
    for q in questions:
        needs = list(q["Preliminary"])
        if not set(needs) <= turns.keys():
            raise ValueError(f"{where}: image_qa: expected questions to build on earlier ones, got {needs}")
        turns[q["id"]] = turn = 1 + max((turns[need] for need in needs), default=-1)
        found.append({"id": q["id"], "image": q["image"], "question": q["Question"], "needs": needs, "turn": turn})
    return found


def _named(answer: Answer) -> dict[str, Part]:
    """Blocks by the names that the file's questions use: <query_text1>, <gen_img2> ..."""
    found: dict[str, Part] = {}
    for side, parts in (("query", answer.item.prompt.parts), ("gen", _merged(answer.parts))):
        numbers = {"text": 0, "img": 0}
        for part in parts:
            kind = "img" if part.is_image else "text"
            numbers[kind] += 1
            found[f"<{side}_{kind}{numbers[kind]}>"] = part
    return found


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Parts as `kinds` counts them."""
    found: list[Part] = []
    for part in parts:
        if part.is_text and found and found[-1].is_text:
            found[-1] = Part(found[-1].text + part.text, learn=False)
        elif part.is_image or part.text.strip():
            found.append(part)
    return found


def _label(text: str) -> Part:
    return Part(text, learn=False)


def _mean(values: Sequence[int], none: int) -> float:
    return sum(values) / len(values) if values else float(none)
