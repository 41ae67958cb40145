"""GenEval's decisions: from what a detector found in an image, and the colours of some of it, to right or wrong and why.

D. Ghosh, H. Hajishirzi, L. Schmidt, GenEval: an object-focused framework for evaluating text-to-image alignment,
NeurIPS 2023 (arXiv 2310.11513); where paper and published script differ, the script's behaviour is kept, down to the words
of its reasons. Nothing here knows a detector: the rules serve any source of `Detection`s.

Numbers are compared in float32, as the script does (a score stored as 0.3 in float32 is not above the threshold 0.3).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unimodal.metrics.detection import Detection

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six tasks, in the official file's and every table's order."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""Colours that prompts name and the classifier chooses from, in the order that reasons list them."""
RELATIONS = ("left of", "right of", "above", "below")

_COUNTING = "counting"
_STILL = 1e-3  # pixels between centres, after shrinking, below which there is no relation
_ALONG = 0.5  # share of the distance that has to lie along an axis


@dataclass(frozen=True)
class Thresholds:
    """The official settings.

    Attributes:
        score: detections must be more certain than this.
        counting: the same for tag "counting".
        most: detections kept a class.
        overlap: of two detections of a class, IoU from which the less certain one is dropped; 1 never drops.
        position: share of both objects' sizes by which the distance of their centres is shrunk.
    """

    score: float = 0.3
    counting: float = 0.9
    most: int = 16
    overlap: float = 1.0
    position: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what no threshold can be."""
        for name in ("score", "counting", "overlap", "position"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"thresholds: {name}: expected 0 to 1, got {getattr(self, name)}")
        if self.most < 1:
            raise ValueError(f"thresholds: most: expected at least 1, got {self.most}")

    def least(self, tag: str) -> float:
        """What scores of this task's detections must exceed."""
        return self.counting if tag == _COUNTING else self.score


@dataclass(frozen=True)
class Clause:
    """Objects that must be there, or must not.

    Attributes:
        label: class of the objects.
        count: how many.
        colour: theirs, where one is asked.
        relation: where they are, seen from the objects of an earlier clause; one of `RELATIONS`.
        target: number of that clause.
    """

    label: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Record:
    """One line of a prompt file.

    Attributes:
        tag: task.
        prompt: what is drawn.
        include: all of these must hold.
        exclude: none of these may: `count` objects or more.
    """

    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @classmethod
    def from_json(cls, record: Mapping[str, Any], where: str = "record") -> Record:
        """Read the official form.

        Args:
            record: `tag`, `prompt`, `include` and perhaps `exclude`; other keys are left alone.
            where: what errors call it.

        Raises:
            ValueError: a key is missing or no such thing, or a position refers to no earlier clause.
        """
        for key in ("tag", "prompt"):
            if not isinstance(record.get(key), str) or not record[key]:
                raise ValueError(f"{where}: {key}: expected text, got {record.get(key)!r}")
        include = _clauses(record.get("include", []), f"{where}: include", ("color", "position"))
        if not include:
            raise ValueError(f"{where}: include: expected at least one clause, got none")
        exclude = _clauses(record.get("exclude", []), f"{where}: exclude", ())
        return cls(record["tag"], record["prompt"], include, exclude)

    @property
    def has_colours(self) -> bool:
        """Whether any colour is asked."""
        return any(clause.colour is not None for clause in self.include)


def _clauses(value: Any, where: str, optional: Sequence[str]) -> tuple[Clause, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, got {value!r}")
    return tuple(_clause(clause, f"{where}[{number}]", number, optional) for number, clause in enumerate(value))


def _clause(value: Any, where: str, number: int, optional: Sequence[str]) -> Clause:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected an object, got {value!r}")
    unknown = [key for key in value if key not in ("class", "count", *optional)]
    if unknown:
        raise ValueError(f"{where}: expected {', '.join(('class', 'count', *optional))}, got {unknown[0]}")
    label, count, colour = value.get("class"), value.get("count"), value.get("color")
    if not isinstance(label, str) or not label:
        raise ValueError(f"{where}: class: expected text, got {label!r}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{where}: count: expected a whole number from 1, got {count!r}")
    if colour is not None and (not isinstance(colour, str) or not colour):
        raise ValueError(f"{where}: color: expected text, got {colour!r}")
    if "position" not in value:
        return Clause(label, count, colour)
    match value["position"]:
        case [str() as relation, int() as target] if relation in RELATIONS and 0 <= target < number:
            return Clause(label, count, colour, relation, target)
    raise ValueError(
        f"{where}: position: expected [one of {', '.join(RELATIONS)}; an earlier clause], got {value['position']!r}"
    )


Kept = Mapping[str, tuple[Detection, ...]]
"""Class -> detections that count, the most certain first; classes with none are left out."""


def keep(
    detections: Sequence[Detection], record: Record, thresholds: Thresholds = Thresholds()
) -> dict[str, tuple[Detection, ...]]:
    """The detections that count for a record, in the order in which their classes first appear.

    Of detections with equal scores the later one comes first.
    """
    least = np.float32(thresholds.least(record.tag))
    by_class: dict[str, list[Detection]] = {}
    for detection in detections:
        if np.float32(detection.score) > least:
            by_class.setdefault(detection.label, []).append(detection)
    kept = {}
    for label, found in by_class.items():
        ranked = sorted(found, key=lambda d: np.float32(d.score))[::-1][: thresholds.most]
        kept[label] = tuple(_apart(ranked, thresholds.overlap))
    return kept


def _apart(ranked: Sequence[Detection], overlap: float) -> list[Detection]:
    """Greedy suppression: whoever overlaps a more certain one too much is dropped."""
    if overlap >= 1:
        return list(ranked)
    apart: list[Detection] = []
    for detection in ranked:
        if all(intersection_over_union(other.box, detection.box) < overlap for other in apart):
            apart.append(detection)
    return apart


Box = tuple[float, float, float, float]


def intersection_over_union(a: Box, b: Box) -> float:
    """IoU of boxes whose last row and column are counted inside (the script's convention: x2 - x1 + 1 columns)."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    either = area(*a) + area(*b) - both
    return both / either if either else 0.0


def relations(a: Box, b: Box, position: float = Thresholds.position) -> tuple[str, ...]:
    """Where box a is, seen from box b: none, one or two of `RELATIONS`; y grows downwards.

    The offset of the centres is shrunk on each axis by `position` times the sum of both sizes. A relation holds where
    more than half of the distance of the centres (not shrunk) is left along its axis.
    """
    boxes = np.array([a, b], dtype=np.float32).reshape(2, 2, 2)  # box, corner, axis
    centres = boxes.mean(axis=1)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    shrunk = np.maximum(np.abs(offset) - np.float32(position) * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if (np.abs(shrunk) < _STILL).all():
        return ()
    x, y = (shrunk / np.linalg.norm(offset)).tolist()
    holds = (x < -_ALONG, x > _ALONG, y < -_ALONG, y > _ALONG)
    return tuple(relation for relation, true in zip(RELATIONS, holds, strict=True) if true)


def colours_needed(record: Record, kept: Kept) -> list[Detection]:
    """The objects whose colour decides: of every clause with a colour and enough objects, its `count` most certain."""
    needed: dict[Detection, None] = {}
    for clause in record.include:
        found = kept.get(clause.label, ())[: clause.count]
        if clause.colour is not None and len(found) == clause.count:
            needed.update(dict.fromkeys(found))
    return list(needed)


@dataclass(frozen=True)
class Decision:
    """Whether an image is right; `reason` has a line for each cause why it is not."""

    correct: bool
    reason: str


def decide(
    record: Record, kept: Kept, colour_of: Callable[[Detection], str], thresholds: Thresholds = Thresholds()
) -> Decision:
    """Judge one image.

    Args:
        record: what was asked.
        kept: what counts of what was found (`keep`).
        colour_of: colour name of a detection; asked for `colours_needed` only.
        thresholds: `position` matters here.
    """
    reasons: list[str] = []
    matched: list[tuple[Detection, ...] | None] = []
    for clause in record.include:
        found = kept.get(clause.label, ())[: clause.count]
        reason = _count_or_colour(clause, found, colour_of)
        if reason is None and clause.relation is not None:
            reason = _position(clause, found, matched[clause.target], thresholds.position)
        reasons += [] if reason is None else [reason]
        matched.append(found if reason is None else None)
    for clause in record.exclude:
        number = len(kept.get(clause.label, ()))
        if number >= clause.count:
            reasons.append(f"expected {clause.label}<{clause.count}, found {number}")
    return Decision(not reasons, "\n".join(reasons))


def _count_or_colour(clause: Clause, found: tuple[Detection, ...], colour_of: Callable[[Detection], str]) -> str | None:
    if len(found) < clause.count:
        return f"expected {clause.label}>={clause.count}, found {len(found)}"
    if clause.colour is None:
        return None
    colours = [colour_of(detection) for detection in found]
    right = colours.count(clause.colour)
    if right >= clause.count:
        return None
    order = [*(c for c in COLOURS if c in colours), *sorted(set(colours) - set(COLOURS))]
    counts = ", ".join(f"{colours.count(colour)} {colour}" for colour in order)
    return f"expected {clause.colour} {clause.label}>={clause.count}, found {right} {clause.colour}; and {counts}"


def _position(
    clause: Clause, found: tuple[Detection, ...], targets: tuple[Detection, ...] | None, position: float
) -> str | None:
    if targets is None:
        return f"no target for {clause.label} to be {clause.relation}"
    for detection in found:
        for target in targets:
            true = relations(detection.box, target.box, position)
            if clause.relation not in true:
                return f"expected {clause.label} {clause.relation} target, found {' and '.join(true)} target"
    return None


# --- totals


@dataclass(frozen=True)
class Judged:
    """One image's part in the totals; `prompt` is whatever the images of one prompt share."""

    tag: str
    prompt: Hashable
    correct: bool


@dataclass(frozen=True)
class TaskTotal:
    """Right images of a task."""

    correct: int
    images: int

    @property
    def accuracy(self) -> float:
        """Their share."""
        return self.correct / self.images


@dataclass(frozen=True)
class Totals:
    """What the official summary prints.

    Attributes:
        tasks: in the order of `TASKS`, others behind; by name, never by order of appearance.
        images: how many.
        prompts: how many.
        correct_images: share of images that are right.
        correct_prompts: share of prompts with any right image.
    """

    tasks: Mapping[str, TaskTotal]
    images: int
    prompts: int
    correct_images: float
    correct_prompts: float

    @property
    def overall(self) -> float:
        """GenEval's headline: the unweighted mean of the tasks' accuracies, not the share of right images."""
        return sum(task.accuracy for task in self.tasks.values()) / len(self.tasks)


def totals(judged: Iterable[Judged]) -> Totals:
    """Add up images, in any order.

    Raises:
        ValueError: there are none.
    """
    images: dict[str, list[bool]] = defaultdict(list)
    prompts: dict[Hashable, bool] = defaultdict(bool)
    for image in judged:
        images[image.tag].append(image.correct)
        prompts[image.prompt] |= image.correct
    if not images:
        raise ValueError("results: expected at least one image, got none")
    order = [*(task for task in TASKS if task in images), *sorted(set(images) - set(TASKS))]
    tasks = {tag: TaskTotal(sum(images[tag]), len(images[tag])) for tag in order}
    number = sum(task.images for task in tasks.values())
    right = sum(task.correct for task in tasks.values())
    return Totals(tasks, number, len(prompts), right / number, sum(prompts.values()) / len(prompts))
