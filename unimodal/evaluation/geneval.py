"""GenEval: are the asked objects in the image, as many, in the asked colours and places? With the official detector.

The prompt file is the official `evaluation_metadata.jsonl` (djghosh13/geneval, MIT licence), or one of the same form. Images
lie in the official layout, result files can be read by the official summary and the other way round.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from unimodal.documents import Document, Part, read_json_lines
from unimodal.evaluation import clip_colours
from unimodal.evaluation.benchmark import Answer, Benchmark, Item, Row, Verdict
from unimodal.evaluation.clip_colours import ClipColours, check_clip, load_clip
from unimodal.evaluation.geneval_golden import ColourNamer, Detector, check
from unimodal.evaluation.mask2former import LABELS, Mask2FormerDetector, is_official, read_metadata
from unimodal.evaluation.published import GENEVAL, Published
from unimodal.files import file_sha256
from unimodal.metrics.detection import Detection
from unimodal.metrics.geneval import (
    COLOURS,
    TASKS,
    Decision,
    Judged,
    Record,
    Thresholds,
    Totals,
    colours_needed,
    decide,
    keep,
    totals,
)

OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
"""Of the official evaluation_metadata.jsonl, 85,209 bytes."""
PROMPTS = dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))
"""How many prompts each task has."""
COLUMNS = dict(zip(TASKS, ("SO", "TO", "CT", "CL", "POS", "ATTR"), strict=True))
"""What tables call the tasks."""


class GenEval(Benchmark):
    """GenEval (arXiv 2310.11513): 553 prompts in six tasks, four images each; the headline is the mean of the six.

    Args:
        metadata: evaluation_metadata.jsonl of djghosh13/geneval, or another file of that form.
        detector: folder that `unimodal import mask2former` wrote; not needed to generate.
        clip: OpenAI's CLIP ViT-L/14 for colours: openai, or the file ViT-L-14.pt.
        samples: images a prompt.
        prompts: original is the official file by its hash; rewritten has the same tasks in other words; other has any.
        golden: whether known images are scored first, and stop everything when they come out wrong.
        device: where detector and classifier run: auto, cpu, cuda ...
    """

    name = "geneval"
    draws = True
    any_weights = False

    def __init__(
        self,
        metadata: Path,
        detector: Path | None = None,
        clip: str = "openai",
        samples: int = 4,
        prompts: Literal["original", "rewritten", "other"] = "original",
        golden: bool = True,
        device: str = "auto",
    ) -> None:
        if samples < 1:
            raise ValueError(f"--samples: expected at least 1, got {samples}")
        self.samples, self.prompts, self.device, self.golden = samples, prompts, device, golden
        if prompts != "original":  # rewritten prompts score higher: never in one table with the official ones
            self.name = f"{self.name}-{prompts}-prompts"
        if not golden:
            self.name = f"{self.name}-unchecked"
        self.thresholds = Thresholds()
        self._items = read_prompts(metadata)
        self._sha256 = file_sha256(metadata)
        check_prompts(self._items, self._sha256, prompts)
        self._detector_folder, self._clip_weights = detector, clip
        self._checked = False
        check_clip(clip)
        official = detector is None or is_official(read_metadata(detector))
        if not self.any_weights and not official:
            raise ValueError(
                f"--detector: {detector}: expected one of the published checkpoints, which GenEval's numbers are made "
                "with, got another by its hash; scores of it have the name geneval-other-detector"
            )
        if not self.any_weights and not clip_colours.is_official(clip):
            raise ValueError(
                f"--clip: {clip}: expected OpenAI's weights, by name ({', '.join(clip_colours.HUB)}) or as the file "
                "ViT-L-14.pt, got others; scores of them have the name geneval-other-detector"
            )

    def items(self) -> Sequence[Item]:
        """The prompts in the file's order."""
        return self._items

    @cached_property
    def detector(self) -> Detector:
        """Read when the first image is scored."""
        self.prepare()
        assert self._detector_folder is not None
        return Mask2FormerDetector(self._detector_folder, self.device)

    @cached_property
    def colours(self) -> ColourNamer:
        """Read when the first image is scored."""
        return ClipColours(load_clip(self._clip_weights), self.device)

    def prepare(self) -> None:
        """ValueError where images could be made and not be scored."""
        if self._detector_folder is None:
            raise ValueError("--detector: expected the folder that `unimodal import mask2former` wrote, got none")

    def self_test(self) -> None:
        """Score known images; ValueError when they come out wrong (`geneval_golden` says what is expected, and why)."""
        reference = None
        if isinstance(self.detector, Mask2FormerDetector) and self.detector.device.type != "cpu":
            folder = self.detector.folder
            reference = lambda: Mask2FormerDetector(folder, "cpu")  # noqa: E731
        check(self.detector, self.colours, reference)
        self._checked = True

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Detect in all images, then name the colours of all objects in one go, then decide."""
        if self.golden and not self._checked:
            self.self_test()
        images = [_image(answer) for answer in answers]
        records = [Record.from_json(answer.item.truth, answer.item.id) for answer in answers]
        least = [self.thresholds.least(record.tag) for record in records]
        found = self.detector.detect(images, least, [record.has_colours for record in records])
        kept = [_in_order(keep(some, record, self.thresholds)) for some, record in zip(found, records, strict=True)]
        needed = [
            (image, detection)
            for image, record, some in zip(images, records, kept, strict=True)
            for detection in colours_needed(record, some)
        ]
        names = self.colours.names(needed)
        colours = {detection: name for (_, detection), name in zip(needed, names, strict=True)}
        return [
            _verdict(answer, decide(record, some, colours.__getitem__, self.thresholds), some, colours)
            for answer, record, some in zip(answers, records, kept, strict=True)
        ]

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Shares that the official summary prints beside the headline."""
        total = totals(Judged(row["task"], row["id"], bool(row["correct"])) for row in rows)
        return {"correct images": total.correct_images, "prompts with a correct image": total.correct_prompts}

    def spec(self) -> dict[str, Any]:
        """Prompts, thresholds, detector and colour classifier."""
        return {
            "prompts": self.prompts,
            "metadata_sha256": self._sha256,
            "thresholds": asdict(self.thresholds),
            "detector": self.detector.spec(),
            "colours": self.colours.spec(),
            "self_test": "passed" if self._checked else "skipped",
        }


class GenEvalOtherDetector(GenEval):
    """GenEval's prompts and rules with weights of another Mask2Former or CLIP: its numbers are not GenEval's.

    Args:
        metadata: evaluation_metadata.jsonl of djghosh13/geneval, or another file of that form.
        detector: folder that `unimodal import mask2former` wrote; not needed to generate.
        clip: a CLIP with QuickGELU for colours: openai, hf-hub:owner/name, a file or a folder of weights.
        samples: images a prompt.
        prompts: original is the official file by its hash; rewritten has the same tasks in other words; other has any.
        golden: whether known images are scored first, and stop everything when they come out wrong.
        device: where detector and classifier run: auto, cpu, cuda ...
    """

    name = "geneval-other-detector"
    any_weights = True


def read_prompts(path: Path) -> list[Item]:
    """The items of a prompt file, named by their line from 00000.

    Raises:
        ValueError: the file is missing or empty, a line is no record, or names a class or colour that nothing can find.
    """
    if not path.is_file():
        raise ValueError(f"--metadata: expected a file of prompts, got {path}, which does not exist")
    items = []
    for number, line in enumerate(read_json_lines(path)):
        record = Record.from_json(line.record, line.where)
        for clause in (*record.include, *record.exclude):
            if clause.label not in LABELS:
                raise ValueError(f"{line.where}: class: expected one of the detector's 80, got {clause.label}")
            if clause.colour is not None and clause.colour not in COLOURS:
                raise ValueError(f"{line.where}: color: expected one of {', '.join(COLOURS)}, got {clause.colour}")
        prompt = Document((Part(record.prompt, learn=False),), "text_to_image")
        items.append(Item(f"{number:05d}", record.tag, prompt, line.record))
    if not items:
        raise ValueError(f"--metadata: {path}: expected a prompt a line, got none")
    return items


def check_prompts(items: Sequence[Item], sha256: str, prompts: str) -> None:
    """ValueError where a prompt file is not what it is called."""
    if prompts == "original" and sha256 != OFFICIAL_SHA256:
        raise ValueError(
            f"--metadata: expected the official file, SHA-256 {OFFICIAL_SHA256}, got {sha256}; "
            "--prompts rewritten or other says that prompts differ"
        )
    if prompts == "original":
        return
    if sha256 == OFFICIAL_SHA256:
        raise ValueError(f"--prompts: expected original, which the official file holds, got {prompts}")
    counts = Counter(item.task for item in items)
    if prompts == "rewritten" and counts != Counter(PROMPTS):
        raise ValueError(f"--metadata: expected GenEval's tasks, {PROMPTS}, got {dict(counts)}")


def _image(answer: Answer) -> Image.Image:
    images = [part.image for part in answer.parts if part.is_image]
    if len(images) != 1:
        raise ValueError(f"answer {answer.item.id}: expected one image, got {len(images)}")
    return images[0]


def _in_order(kept: Mapping[str, tuple[Detection, ...]]) -> dict[str, tuple[Detection, ...]]:
    """Classes in COCO's order, as official result files list them."""
    return {label: kept[label] for label in LABELS if label in kept}


def _verdict(
    answer: Answer, decision: Decision, kept: Mapping[str, Sequence[Detection]], colours: Mapping[Detection, str]
) -> Verdict:
    """Score and reason, with the official seven fields (`reason` is the harness' own) and the boxes to draw."""
    boxes = [
        {"label": d.label, "box": list(d.box), "score": d.score, "colour": colours.get(d)}
        for some in kept.values()
        for d in some
    ]
    details = {label: [[*d.box, d.score] for d in some] for label, some in kept.items()}
    fields = {
        "filename": answer.files[0] if answer.files else "",
        "tag": answer.item.task,
        "prompt": answer.item.truth["prompt"],
        "correct": decision.correct,
        "metadata": json.dumps(dict(answer.item.truth)),
        "details": json.dumps(details),
        "boxes": boxes,
    }
    return Verdict(float(decision.correct), decision.reason, fields)


# --- official result files and tables


@dataclass(frozen=True)
class Result:
    """One line of an official result file.

    Attributes:
        filename: of the image.
        correct: the decision.
        reason: a line a cause.
        record: the prompt's record; `metadata` is the same as the file spells it.
        metadata: what images of one prompt share.
        details: class -> [x1, y1, x2, y2, score] of what was kept.
    """

    filename: str
    correct: bool
    reason: str
    record: Record
    metadata: str
    details: Mapping[str, list[list[float]]]


def read_results(path: Path) -> list[Result]:
    """An official result file, or the results.jsonl of `unimodal evaluate geneval`.

    Raises:
        ValueError: a line lacks one of the seven fields or spells it differently.
    """
    results = []
    for line in read_json_lines(path):
        row = line.record
        for key in ("filename", "tag", "prompt", "reason", "metadata", "details"):
            if not isinstance(row.get(key), str):
                raise ValueError(f"{line.where}: {key}: expected text, got {row.get(key)!r}")
        if not isinstance(row.get("correct"), bool):
            raise ValueError(f"{line.where}: correct: expected true or false, got {row.get('correct')!r}")
        try:
            metadata, details = json.loads(str(row["metadata"])), json.loads(str(row["details"]))
        except ValueError:
            raise ValueError(f"{line.where}: metadata and details: expected JSON in a text, got another text") from None
        if not isinstance(metadata, dict) or not isinstance(details, dict):
            raise ValueError(f"{line.where}: metadata and details: expected JSON objects, got something else")
        record = Record.from_json(metadata, line.where)
        results.append(
            Result(
                str(row["filename"]), row["correct"] is True, str(row["reason"]), record, str(row["metadata"]), details
            )
        )
    return results


def result_totals(results: Sequence[Result]) -> Totals:
    """What the official summary prints of a result file; images of one prompt have one `metadata`."""
    return totals(Judged(result.record.tag, result.metadata, result.correct) for result in results)


def is_complete(total: Totals) -> bool:
    """Whether all 553 prompts are there with equally many images each, as far as counts can say."""
    if set(total.tasks) != set(PROMPTS) or total.prompts != sum(PROMPTS.values()):
        return False
    samples, rest = divmod(total.images, total.prompts)
    return rest == 0 and all(total.tasks[task].images == samples * number for task, number in PROMPTS.items())


@dataclass(frozen=True)
class Own:
    """Results of one's own for the table.

    Attributes:
        model: what the row is called.
        totals: of the result file.
        benchmark: as results call it: another detector, other prompts or no self-test are in the name. An official
            result file does not say; None.
    """

    model: str
    totals: Totals
    benchmark: str | None = None


def read_own(path: Path) -> Own:
    """A folder that `unimodal evaluate` wrote, or an official result file.

    Raises:
        ValueError: neither, or a folder of another benchmark.
    """
    if not path.is_dir():
        return Own(str(path), result_totals(read_results(path)))
    try:
        name = str(json.loads((path / "summary.json").read_text(encoding="utf-8"))["benchmark"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"results: {path}: expected a folder with summary.json of `unimodal evaluate`") from None
    if not name.startswith("geneval") or name.startswith("geneval-shapes"):
        raise ValueError(f"results: {path}: expected results of geneval, got {name}")
    return Own(str(path), result_totals(read_results(path / "results.jsonl")), name)


def official_table(own: Sequence[Own], published: Sequence[Published] = GENEVAL) -> str:
    """A Markdown table in the fixed order SO, TO, CT, CL, POS, ATTR, each by its tag; one's own rows first.

    Incomplete results are called PARTIAL and have no overall number. Rows of something else than GenEval itself say so.
    """
    lines = [
        f"| model | {' | '.join(COLUMNS.values())} | overall | prompts | source |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for row in own:
        total = row.totals
        scores = {task: f"{t.accuracy:.4f}" for task, t in total.tasks.items()}
        complete = is_complete(total)
        overall, source = (f"{total.overall:.5f}", "this run") if complete else ("-", f"PARTIAL, {total.images} images")
        lines.append(_line(row.model, scores, overall, _prompts(row.benchmark), f"{source}{_other(row.benchmark)}"))
    for entry in published:
        scores = {task: f"{value:g}" for task, value in entry.scores.items()}
        prompts = "rewritten" if entry.rewritten else "original"
        lines.append(_line(entry.model, scores, scores.get("overall", "-"), prompts, entry.source))
    return "\n".join(lines) + "\n"


def _prompts(benchmark: str | None) -> str:
    """Of one's own row: which prompts were drawn."""
    if benchmark is None:
        return "not said"
    return next((kind for kind in ("rewritten", "other") if f"-{kind}-prompts" in benchmark), "original")


def _other(benchmark: str | None) -> str:
    """What is not GenEval's in one's own row, beside its prompts."""
    notes = {GenEvalOtherDetector.name: "another detector or classifier", "-unchecked": "not self-tested"}
    return "".join(f", {note}" for mark, note in notes.items() if benchmark is not None and mark in benchmark)


def _line(model: str, scores: Mapping[str, str], overall: str, prompts: str, source: str) -> str:
    cells = [model, *(scores.get(task, "-") for task in COLUMNS), overall, prompts, source]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
