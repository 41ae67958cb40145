"""Benchmarks over the shapes world: everything about its scenes is known, so every verdict is exact and needs no weights."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.data.shapes import COLOURS, RELATIONS, SHAPES, Scene, Split, Thing, asked, edited, prompts, render
from unimodal.data.shapes.captions import described
from unimodal.data.shapes.recognise import recognise
from unimodal.data.shapes.words import NUMBERS, PREFIXES, plural
from unimodal.documents import Document, Part
from unimodal.evaluation.benchmark import Answer, Benchmark, Item, Row, Verdict
from unimodal.metrics.detection import Detection
from unimodal.metrics.geneval import Box, Judged, Record, Thresholds, decide, keep, relations, totals

if TYPE_CHECKING:
    from unimodal.decoding_settings import DecodingSettings
    from unimodal_generators.base import SamplingSettings

WORLD = 2
"""Raised whenever a scene, a wording or the recogniser changes what a score would be."""
THRESHOLDS = Thresholds(score=0.3, counting=0.3)
"""The recogniser's confidence is no detector's: one threshold serves counting as well."""
OVERLAP = 0.5
"""Least intersection over union of a thing with the box where it should be."""


class ShapesBenchmark(Benchmark):
    """What the benchmarks of this file share.

    Args:
        count: items.
        size: pixels of the scenes' sides; the recipe must draw and read that size.
        split: "test" scenes each hold a pair of shape and colour that training never shows.
        seed: of the scenes.
    """

    def __init__(self, count: int = 300, size: int = 32, split: Split = "test", seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least 1, got {count}")
        self.count, self.size, self.split, self.seed = count, Scene((), size).size, split, seed

    @cached_property
    def _items(self) -> list[Item]:
        return [self.item(i, np.random.default_rng((self.seed, i))) for i in range(self.count)]

    def items(self) -> Sequence[Item]:
        """All of them, made once."""
        return self._items

    def item(self, index: int, rng: np.random.Generator) -> Item:
        """One of them."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """The world and where its items come from."""
        return {"world": WORLD, "size": self.size, "split": self.split, "seed": self.seed}

    def _read(self, answer: Answer) -> list[Detection]:
        """What the recogniser sees in an answer's image."""
        image = answer.parts[0].image
        if image.size != (self.size, self.size):
            file = answer.files[0] if answer.files else answer.item.id
            raise ValueError(
                f"{file}: expected {self.size}x{self.size} pixels (--size), got {image.width}x{image.height}"
            )
        return recognise(image)

    def _drawn(self, image: SamplingSettings | None) -> DecodingSettings:
        from unimodal.decoding_settings import DecodingSettings

        return DecodingSettings("image", max_tokens=0, max_images=1, image=image, size=(self.size, self.size))


class GenEvalShapes(ShapesBenchmark):
    """GenEval's six tasks and rules over the shapes world, judged by its exact recogniser.

    Args:
        per_task: prompts of each task; the world has 8 single objects, 24 counts and 28 pairs.
        samples: images a prompt.
        size: pixels of the images' sides.
        split: "test" asks for colours of shapes that training never shows.
        seed: of the choice of prompts.
    """

    name = "geneval-shapes"
    draws = True

    def __init__(
        self, per_task: int = 50, samples: int = 4, size: int = 32, split: Split = "test", seed: int = 0
    ) -> None:
        super().__init__(1, size, split, seed)
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        self.per_task, self.samples = per_task, samples

    @cached_property
    def _items(self) -> list[Item]:
        records = prompts(self.split, self.per_task, self.seed)
        return [
            Item(f"{i:05d}", r["tag"], Document((Part(r["prompt"], learn=False),), "text_to_image"), r)
            for i, r in enumerate(records)
        ]

    def settings(self, image: SamplingSettings | None) -> DecodingSettings:
        """One image of the world's size."""
        return self._drawn(image)

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """GenEval's rules over what the recogniser sees, colours included."""
        return [self._judge(answer, self._read(answer)) for answer in answers]

    def _judge(self, answer: Answer, found: list[Detection]) -> Verdict:
        record = Record.from_json(answer.item.truth)
        decision = decide(record, keep(found, record, THRESHOLDS), lambda detection: str(detection.colour), THRESHOLDS)
        fields = {
            "tag": record.tag, "prompt": record.prompt, "correct": decision.correct, "boxes": boxes(found),
            "metadata": json.dumps(dict(answer.item.truth)),
        }  # fmt: skip
        return Verdict(float(decision.correct), decision.reason, fields)

    def measures(self, rows: Sequence[Row]) -> dict[str, float]:
        """Share of right images, and of prompts with any right image."""
        found = totals(Judged(row["tag"], row["id"], row["correct"]) for row in rows)
        return {"correct images": found.correct_images, "correct prompts": found.correct_prompts}

    def spec(self) -> dict[str, Any]:
        """The world, and that colours come from the recogniser."""
        return {
            **super().spec(),
            "per_task": self.per_task,
            "detector": "shapes recogniser",
            "threshold": THRESHOLDS.score,
        }


class ShapesQuestions(ShapesBenchmark):
    """Questions about unseen scenes: existence, count, colour, shape, relation, where; the answer must be the very word."""

    name = "shapes-questions"

    def item(self, index: int, rng: np.random.Generator) -> Item:
        """A scene and a question."""
        scene, question = asked(self.split, self.size, rng)
        prompt = Document((Part(render(scene), learn=False), Part(question.text, learn=False)), "question")
        return Item(
            f"{index:05d}", question.about, prompt, {"question": question.text, "answer": question.answer.strip()}
        )

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Exact match, blanks and case aside."""
        verdicts = []
        for answer in answers:
            wanted, said = answer.item.truth["answer"], answer.text.strip().lower()
            verdicts.append(
                Verdict(1.0) if said == wanted else Verdict(0.0, f"expected {wanted}, said {said or 'nothing'}")
            )
        return verdicts


class ShapesCaptions(ShapesBenchmark):
    """Captions of unseen scenes: right when it names exactly the things that are there, and only relations that hold."""

    name = "shapes-captions"
    version = 2  # 1 took any number before "objects: "

    def item(self, index: int, rng: np.random.Generator) -> Item:
        """A scene."""
        _, scene = described(self.split, self.size, rng)
        prompt = Document((Part(render(scene), learn=False),), "image_to_text")
        number = len(scene.things)
        return Item(f"{index:05d}", f"{NUMBERS[number]} object{'s' * (number > 1)}", prompt, {"things": _things(scene)})

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Read by a grammar; what it cannot read is wrong."""
        return [self._judge(answer.text, answer.item.truth["things"]) for answer in answers]

    def _judge(self, text: str, things: Sequence[dict[str, Any]]) -> Verdict:
        read = read_caption(text)
        if read is None:
            return Verdict(0.0, "not a caption")
        there = Counter((thing["shape"], thing["colour"]) for thing in things)
        said, stated = read
        if said != there:
            return Verdict(0.0, f"there are {_listed(there)}")
        for first, relation, second in stated:
            a, b = (next(t for t in things if (t["shape"], t["colour"]) == kind) for kind in (first, second))
            if relation not in relations(_box(a), _box(b)):
                return Verdict(0.0, f"the {' '.join(first[::-1])} is not {relation} the {' '.join(second[::-1])}")
        return Verdict(1.0)


class ShapesEdits(ShapesBenchmark):
    """A scene and an instruction: the one thing changed as told, all others where and as they were."""

    name = "shapes-edits"
    draws = True

    def item(self, index: int, rng: np.random.Generator) -> Item:
        """A scene and an instruction."""
        edit = edited(self.split, self.size, rng)
        prompt = Document((Part(render(edit.before), learn=False), Part(edit.text, learn=False)), "edit")
        kept = [thing for thing in edit.after.things if thing in edit.before.things]
        new = [thing for thing in edit.after.things if thing not in edit.before.things]
        truth = {
            "instruction": edit.text.strip(), "before": _things(edit.before), "kept": [_thing(t) for t in kept],
            "new": [_thing(t) for t in new], "free": edit.operation in ("add", "move"),
        }  # fmt: skip
        return Item(f"{index:05d}", edit.operation, prompt, truth)

    def settings(self, image: SamplingSettings | None) -> DecodingSettings:
        """One image of the world's size."""
        return self._drawn(image)

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """By the recogniser."""
        return [self._judge(answer, self._read(answer)) for answer in answers]

    def _judge(self, answer: Answer, found: list[Detection]) -> Verdict:
        truth, left, causes = answer.item.truth, list(found), []
        for thing in truth["kept"]:
            seen = _take(left, thing, OVERLAP)
            if seen is None:
                causes.append(f"the {thing['colour']} {thing['shape']} did not stay")
        for thing in truth["new"]:
            # What is put in or moved may stand anywhere that the instruction allows.
            seen = _take(left, thing, 0.0 if truth["free"] else OVERLAP)
            if seen is None:
                causes.append(f"expected a {thing['colour']} {thing['shape']}")
            elif truth["free"] and not _as_told(truth["instruction"], seen.box, truth["before"]):
                causes.append("it does not stand where it should")
        causes += [f"a {d.colour} {d.label} too many" for d in left]
        return Verdict(float(not causes), "; ".join(causes), {"boxes": boxes(found)})


def boxes(found: Sequence[Detection]) -> list[dict[str, Any]]:
    """Detections as the gallery draws them."""
    return [{"label": d.label, "colour": d.colour, "box": list(d.box), "score": round(d.score, 3)} for d in found]


# ---- reading captions

_NAMES = "|".join(sorted({*SHAPES, *map(plural, SHAPES)}, key=len, reverse=True))  # "stars" before "star"
_NOUN = f"(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>{_NAMES})"
_ITEM = re.compile(f"(?P<number>an?|{'|'.join(NUMBERS[1:])}) {_NOUN}")
_SINGULAR = {plural(shape): shape for shape in SHAPES} | {shape: shape for shape in SHAPES}
_RELATION = re.compile(f" ({'|'.join(RELATIONS)}) ")
Kind = tuple[str, str]


def read_caption(text: str) -> tuple[Counter[Kind], list[tuple[Kind, str, Kind]]] | None:
    """The things a caption names, by shape and colour, and the relations it states; None when it is no caption.

    A number of all objects, where one stands first, must be theirs. Every colour must be named. "a red circle above a blue
    square, with a green star" has three things and one relation.
    """
    text = text.strip().rstrip(".")
    for prefix in PREFIXES[1:]:
        text = text.removeprefix(prefix)
    counted = re.match(rf"({'|'.join(NUMBERS)}) objects: ", text)
    if counted is not None:
        text = text[counted.end() :]
    pieces = re.split(r", with |, | and ", text)
    things: Counter[Kind] = Counter()
    stated = []
    for piece in pieces:
        said = _RELATION.split(piece)
        kinds = []
        for item in said[::2]:
            match = _ITEM.fullmatch(item)
            if match is None or match["colour"] is None:
                return None
            kind = (_SINGULAR[match["shape"]], match["colour"])
            number = 1 if match["number"] in ("a", "an") else NUMBERS.index(match["number"])
            things[kind] += number
            kinds.append(kind)
        if len(kinds) == 2:
            stated.append((kinds[0], said[1], kinds[1]))
        elif len(kinds) > 2:
            return None
    if counted is not None and NUMBERS.index(counted[1]) != things.total():
        return None
    return things, stated


# ---- things and boxes as JSON


def _things(scene: Scene) -> list[dict[str, Any]]:
    return [_thing(thing) for thing in scene.things]


def _thing(thing: Thing) -> dict[str, Any]:
    return {"shape": thing.shape, "colour": thing.colour, "box": list(thing.box)}


def _listed(kinds: Counter[Kind]) -> str:
    return ", ".join(f"{number} {colour} {shape}" for (shape, colour), number in kinds.items())


def _take(left: list[Detection], thing: dict[str, Any], overlap: float) -> Detection | None:
    """The detection of the same kind that lies best on the thing, taken from the list."""
    same = [d for d in left if (d.label, d.colour) == (thing["shape"], thing["colour"])]
    best = max(same, key=lambda d: iou(d.box, thing["box"]), default=None)
    if best is None or iou(best.box, thing["box"]) < overlap:
        return None
    left.remove(best)
    return best


def _as_told(instruction: str, box: Box, before: Sequence[dict[str, Any]]) -> bool:
    """Whether a box stands so to the thing that the instruction's end names: "... left of the red circle"."""
    match = re.search(rf"({'|'.join(RELATIONS)}) the (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})$", instruction)
    assert match is not None  # the world wrote it
    relation, colour, shape = match.groups()
    (other,) = [t for t in before if t["shape"] == shape and colour in (None, t["colour"])]
    return relation in relations(box, _box(other))


def _box(thing: dict[str, Any]) -> Box:
    x1, y1, x2, y2 = thing["box"]
    return x1, y1, x2, y2


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0..1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return shared / (sum(areas) - shared)
