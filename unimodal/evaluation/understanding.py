"""Questions about images, scored without a judge: VQAv2, GQA, POPE, MME, SEED-Bench, MMBench, captions.

Files are the official ones (`readers.py`), formulas those of `unimodal.metrics`. What is asked is worded by an option:
models differ in the wording they were trained on, and it is part of the fingerprint.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from unimodal.documents import GENERATED, Part
from unimodal.evaluation.benchmark import Answer, Item, Row, Verdict
from unimodal.evaluation.questions import (
    Questions,
    answer_texts,
    asked,
    check_wording,
    image_prompt,
    worded,
    wrong_answer,
)
from unimodal.evaluation.readers import (
    ChoiceQuestion,
    Question,
    read_captions,
    read_gqa,
    read_mmbench,
    read_mme,
    read_pope,
    read_seed_bench,
    read_vqav2,
)
from unimodal.metrics.vqa import (
    MMEScores,
    choice_letter,
    gqa_correct,
    mme_answer,
    mme_scores,
    mme_totals,
    pope_answer,
    states_yes_or_no,
    vqa_accuracy,
    yes_no_scores,
)

if TYPE_CHECKING:
    from unimodal.decoding_settings import DecodingSettings
    from unimodal.metrics.captions import CaptionScorer
    from unimodal.model import UnifiedModel
    from unimodal_generators.base import SamplingSettings

SHORT = "{question}\nAnswer the question using a single word or phrase."
LETTER = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
LIKELIHOOD = "Question: {question}\nAnswer:"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# ---- short answers


class VQAv2(Questions):
    """VQA accuracy of short answers, by the official formula; a task a type of answer."""

    name = "vqav2"
    overall: ClassVar[Literal["tasks", "items"]] = "items"

    def __init__(self, questions: Path, annotations: Path, image_folder: Path, wording: str = SHORT) -> None:
        """Name the files.

        Args:
            questions: v2_OpenEnded_mscoco_val2014_questions.json.
            annotations: v2_mscoco_val2014_annotations.json.
            image_folder: COCO's val2014.
            wording: what is asked behind the image, with {question} in it.
        """
        self.files, self.image_folder = (questions, annotations), image_folder
        self.wording = check_wording(wording, "question")

    def read(self) -> list[Item]:
        """An item a question."""
        return [_short_item(q, self.wording) for q in read_vqav2(self.files[0], self.files[1], self.image_folder)]

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """VQA accuracy of each."""
        verdicts = []
        for answer in answers:
            (said,), humans = answer_texts(answer), answer.item.truth["answers"]
            score = vqa_accuracy(said, humans)
            told = ", ".join(f"{text} ({n})" for text, n in Counter(humans).most_common())
            verdicts.append(Verdict(score, "" if score == 1 else f"said {said!r}; annotators: {told}"))
        return verdicts

    def spec(self) -> dict[str, Any]:
        """Files, wording and formula."""
        formula = "leave one annotator out, official normalisation unless all annotators agree to the letter"
        return {**super().spec(), "wording": self.wording, "formula": formula}


class GQA(Questions):
    """Exact match of short answers; tasks: open and binary questions."""

    name = "gqa"
    overall: ClassVar[Literal["tasks", "items"]] = "items"

    def __init__(self, questions: Path, image_folder: Path, wording: str = SHORT) -> None:
        """Name the files.

        Args:
            questions: testdev_balanced_questions.json.
            image_folder: GQA's images.
            wording: what is asked behind the image, with {question} in it.
        """
        self.files, self.image_folder = (questions,), image_folder
        self.wording = check_wording(wording, "question")

    def read(self) -> list[Item]:
        """An item a question."""
        return [_short_item(question, self.wording) for question in read_gqa(self.files[0], self.image_folder)]

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """1 where the answer is the true one, letter by letter."""
        verdicts = []
        for answer in answers:
            (said,), (right,) = answer_texts(answer), answer.item.truth["answers"]
            correct = gqa_correct(said, right)
            verdicts.append(Verdict(float(correct), "" if correct else wrong_answer(said, right)))
        return verdicts

    def spec(self) -> dict[str, Any]:
        """Files, wording and formula."""
        formula = "exact match, lowercase, without a final period"
        return {**super().spec(), "wording": self.wording, "formula": formula}


def _short_item(question: Question, wording: str) -> Item:
    prompt = image_prompt(question.image, worded(wording, question=question.text))
    truth = {"answers": list(question.answers)}
    return Item(question.id, question.task, prompt, truth, cluster=question.image.digest)


# ---- yes and no


class POPE(Questions):
    """Are there objects that are not in the image? A task a file; F1 and its relatives for each."""

    name = "pope"

    def __init__(self, questions: list[Path], image_folder: Path, wording: str = SHORT) -> None:
        """Name the files.

        Args:
            questions: coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json, or some of them.
            image_folder: COCO's val2014.
            wording: what is asked behind the image, with {question} in it.
        """
        self.files, self.image_folder = tuple(questions), image_folder
        self.wording = check_wording(wording, "question")

    def read(self) -> list[Item]:
        """An item a question."""
        return [_short_item(question, self.wording) for question in read_pope(self.files, self.image_folder)]

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """1 where yes or no, as the official program reads it, is right."""
        verdicts = []
        for answer in answers:
            (text,), (right,) = answer_texts(answer), answer.item.truth["answers"]
            said = pope_answer(text)
            fields = {"said": said, "right": right, "unclear": not states_yes_or_no(text)}
            verdicts.append(Verdict(float(said == right), "" if said == right else wrong_answer(text, right), fields))
        return verdicts

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Accuracy, precision, recall, F1 and share of yes a file; and answers that say neither yes nor no."""
        found: dict[str, float] = {}
        for task in dict.fromkeys(item.task for item in self._items):
            mine = [row for row in rows if row["task"] == task]
            if mine:
                scores = yes_no_scores([row["said"] for row in mine], [row["right"] for row in mine])
                found |= {f"{task} {name}": value for name, value in vars(scores).items()}
        return found | {"unclear": sum(row["unclear"] for row in rows) / len(rows)}

    def spec(self) -> dict[str, Any]:
        """Files, wording and how answers are read."""
        reading = "POPE's evaluate.py: no where the first sentence has the word No, no or not, else yes"
        return {**super().spec(), "wording": self.wording, "reading": reading}


class MME(Questions):
    """Yes or no, two questions an image; an item is an image, its score (accuracy + both right) / 2, a task a subtask."""

    name = "mme"

    def __init__(self, folder: Path, wording: str = "{question}") -> None:
        """Name the files.

        Args:
            folder: MME_Benchmark, which holds a folder for each of the 14 subtasks.
            wording: what is asked behind the image, with {question} in it; the files' questions ask for yes or no.
        """
        self.folder, self.wording = folder, check_wording(wording, "question")

    def read(self) -> list[Item]:
        """An item an image."""
        found = []
        for entry in read_mme(self.folder):
            prompt = image_prompt(entry.image, *(worded(self.wording, question=text) for text in entry.questions))
            found.append(Item(entry.id, entry.task, prompt, {"answers": list(entry.answers)}))
        return found

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Mean of the share of right answers and of whether both are."""
        verdicts = []
        for answer in answers:
            texts, truth = answer_texts(answer), answer.item.truth["answers"]
            said = [mme_answer(text) for text in texts]
            right = [a == b for a, b in zip(said, truth, strict=True)]
            wrong = [wrong_answer(t, b) for t, b, ok in zip(texts, truth, right, strict=True) if not ok]
            fields = {"right": right, "unparsable": said.count("other")}
            verdicts.append(Verdict(mme_scores([(right[0], right[1])]).score / 200, "\n".join(wrong), fields))
        return verdicts

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """`perception` (0..2000), `cognition` (0..800), the subtasks' scores (0..200), and the share of other answers."""
        subtasks: dict[str, MMEScores] = {}
        for task in dict.fromkeys(item.task for item in self._items):
            right = [(row["right"][0], row["right"][1]) for row in rows if row["task"] == task]
            if right:
                subtasks[task] = mme_scores(right)
        scores = {f"{task} score": value.score for task, value in subtasks.items()}
        return {
            **mme_totals(subtasks),
            **scores,
            "unparsable": sum(row["unparsable"] for row in rows) / (2 * len(rows)),
        }

    def spec(self) -> dict[str, Any]:
        """Wording and how answers are read."""
        reading = "MME's calculation.py: yes or no within the first four letters"
        return {**super().spec(), "wording": self.wording, "reading": reading}


# ---- multiple choice


class MultipleChoice(Questions):
    """Options of which one is right, chosen by their likelihood or by a letter that is written."""

    overall: ClassVar[Literal["tasks", "items"]] = "items"

    def __init__(self, by: Literal["likelihood", "letter"], wording: str | None) -> None:
        if by == "likelihood":
            # Not comparable with what is written, so never under one name.
            self.name = f"{type(self).name}-likelihood"
        self.by = by
        default, fields = (LIKELIHOOD, ("question",)) if by == "likelihood" else (LETTER, ("question", "options"))
        self.wording = check_wording(wording or default, *fields)

    @abstractmethod
    def questions(self) -> list[ChoiceQuestion]:
        """The questions, from the files."""

    def read(self) -> list[Item]:
        """An item a question, in every order of its options where a letter is to be written."""
        return [self._item(question) for question in self.questions()]

    def _item(self, question: ChoiceQuestion) -> Item:
        text = f"{question.hint}\n{question.text}" if question.hint else question.text
        orders, letters = question.options, question.answers
        if self.by == "likelihood":  # options are not shown, so their order is nothing
            orders, letters = orders[:1], letters[:1]
        texts = [
            worded(
                self.wording,
                question=text,
                options="\n".join(f"{a}. {option}" for a, option in zip(LETTERS, order, strict=False)),
            )
            for order in orders
        ]
        prompt, truth = image_prompt(question.image, *texts), {"letters": list(letters)}
        return Item(question.id, question.task, prompt, truth, orders[0], question.image.digest)

    def answer(
        self, model: UnifiedModel, items: Sequence[Item], settings: DecodingSettings, seeds: Sequence[int]
    ) -> list[tuple[Part, ...]]:
        """What is written, or the letter of the option with the highest mean log-likelihood a token."""
        if self.by == "letter":
            return super().answer(model, items, settings, seeds)
        from unimodal.evaluation.likelihood import log_likelihoods

        documents = [document for item in items for document in asked(item)]
        scores = log_likelihoods(model, documents, [[f" {option}" for option in item.choices] for item in items])
        best = [max(range(len(row)), key=lambda i: row[i].mean) for row in scores]  # the first of equal ones
        return [(Part(LETTERS[i], role=GENERATED),) for i in best]

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """1 where the right letter is stated in every order; a letter that cannot be read is wrong."""
        verdicts = []
        for answer in answers:
            texts, right = answer_texts(answer), answer.item.truth["letters"]
            said = [choice_letter(text, len(answer.item.choices)) for text in texts]
            correct = [a == b for a, b in zip(said, right, strict=True)]
            wrong = [
                wrong_answer(text, letter) + (", which states no letter" if read is None else "")
                for text, letter, read, ok in zip(texts, right, said, correct, strict=True)
                if not ok
            ]
            fields = {"letters": said, "unparsable": said.count(None) / len(said), "first_order": correct[0]}
            verdicts.append(Verdict(float(all(correct)), "\n".join(wrong), fields))
        return verdicts

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Share of answers without a letter that can be read, and accuracy in the first order of the options alone."""
        found = {"unparsable": sum(row["unparsable"] for row in rows) / len(rows)}
        if any(len(row["letters"]) > 1 for row in rows):
            found["first_order"] = sum(row["first_order"] for row in rows) / len(rows)
        return found

    def spec(self) -> dict[str, Any]:
        """Files, wording and how an option is chosen."""
        rules = {
            "likelihood": "highest mean log-likelihood a token of a space and the option's text",
            "letter": "capital letter that is written, strictly read; none is wrong",
        }
        return {**super().spec(), "wording": self.wording, "by": self.by, "rule": rules[self.by]}


class SEEDBench(MultipleChoice):
    """SEED-Bench, its questions about images; a task a type of question."""

    name = "seed-bench"

    def __init__(
        self,
        questions: Path,
        image_folder: Path,
        by: Literal["likelihood", "letter"] = "letter",
        wording: str | None = None,
    ) -> None:
        """Name the files.

        Args:
            questions: SEED-Bench.json.
            image_folder: SEED-Bench-image.
            by: whether options are chosen by likelihood, or by a letter that is written.
            wording: what is asked behind the image, with {question} and, for letters, {options} in it.
        """
        super().__init__(by, wording)
        self.files, self.image_folder = (questions,), image_folder

    def questions(self) -> list[ChoiceQuestion]:
        """Those about images."""
        return read_seed_bench(self.files[0], self.image_folder)


class MMBench(MultipleChoice):
    """MMBench: right is what is right in every rotation of the options (CircularEval); a task a category."""

    name = "mmbench"

    def __init__(
        self, questions: Path, by: Literal["likelihood", "letter"] = "letter", wording: str | None = None
    ) -> None:
        """Name the file.

        Args:
            questions: mmbench_dev_en.tsv or its like, with answers; images are in it.
            by: whether options are chosen by likelihood (which no rotation changes), or by a letter that is written.
            wording: what is asked behind the image, with {question} and, for letters, {options} in it.
        """
        super().__init__(by, wording)
        self.files = (questions,)

    def questions(self) -> list[ChoiceQuestion]:
        """Every question in every order."""
        return read_mmbench(self.files[0])


# ---- captions


class Captions(Questions):
    """CIDEr, BLEU and ROUGE-L of one caption an image; an item's score is its CIDEr / 10, which lies in 0..1."""

    name = "captions"
    overall: ClassVar[Literal["tasks", "items"]] = "items"

    def __init__(self, annotations: Path, image_folder: Path, split: str = "test", wording: str = "") -> None:
        """Name the files.

        Args:
            annotations: captions_val2014.json of COCO, or a Karpathy split such as dataset_coco.json.
            image_folder: the images, or the folder that holds COCO's val2014.
            split: of a Karpathy file.
            wording: what is written behind the image before the caption; nothing: the image alone.
        """
        self.files, self.image_folder, self.split, self.wording = (annotations,), image_folder, split, wording

    def read(self) -> list[Item]:
        """An item an image."""
        texts = (self.wording,) if self.wording else ()
        return [
            Item(question.id, question.task, image_prompt(question.image, *texts), {"captions": list(question.answers)})
            for question in read_captions(self.files[0], self.image_folder, self.split)
        ]

    def settings(self, image: SamplingSettings | None) -> DecodingSettings:
        """A caption may be longer than a short answer."""
        from unimodal.decoding_settings import DecodingSettings

        return DecodingSettings("text", max_tokens=64, max_images=0)

    @cached_property
    def _scorer(self) -> CaptionScorer:
        from unimodal.metrics.captions import CaptionScorer

        return CaptionScorer({item.id: item.truth["captions"] for item in self._items})

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """CIDEr / 10 of each, words weighed by the references of all images."""
        from unimodal.metrics.captions import to_fields

        verdicts = []
        for answer in answers:
            (said,) = answer_texts(answer)
            score = self._scorer.score(answer.item.id, said)
            reason = "" if score.rouge_l == 1 else f"one of the references: {answer.item.truth['captions'][0]!r}"
            verdicts.append(Verdict(min(score.cider / 10, 1.0), reason, to_fields(score)))
        return verdicts

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """CIDEr (0..10), BLEU-1 to -4 and ROUGE-L (0..1)."""
        from unimodal.metrics.captions import caption_scores, from_fields

        return caption_scores(from_fields(row) for row in rows)

    def spec(self) -> dict[str, Any]:
        """Files, wording, tokenizer and scorers."""
        from importlib.metadata import version

        from unimodal.metrics.captions import TOKENIZER

        scorers = f"pycocoevalcap {version('pycocoevalcap')}, nltk {version('nltk')}"
        return {
            **super().spec(),
            "wording": self.wording,
            "split": self.split,
            "tokenizer": TOKENIZER,
            "scorers": scorers,
        }
