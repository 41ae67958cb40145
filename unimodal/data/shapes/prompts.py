"""Prompts in the format of GenEval's metadata over the shapes world, and scenes that fulfil them exactly."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np

from unimodal.data.shapes.render import COLOURS, SHAPES
from unimodal.data.shapes.words import a, counted, joined, phrase
from unimodal.data.shapes.world import HELD_OUT, PAIRS, RELATIONS, Relation, Scene, Split, arrange, pick

PROMPT_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""In the order of the official file."""
Record = dict[str, Any]
"""tag, prompt, include, and for counting exclude, as in evaluation_metadata.jsonl."""


def prompts(split: Split, per_task: int = 100, seed: int = 0) -> list[Record]:
    """Prompts of the six tasks, task by task, no two of them equal.

    In `colors` every pair of the test split is held out, in `color_attr` at least one of the two; the training split has
    neither. The other tasks name no colour: their prompts are the same in both splits but for the order.

    Args:
        split: "train" or "test".
        per_task: prompts of each task, fewer where the world has fewer (8 single objects, 24 counts).
        seed: of the choice among all there are.

    Raises:
        ValueError: an unknown split or `per_task` < 1.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected train or test, got {split!r}")
    if per_task < 1:
        raise ValueError(f"per_task: expected 1 or more, got {per_task}")
    chosen = []
    for number, task in enumerate(PROMPT_TASKS):
        every = _every(task, split)
        rng = np.random.default_rng((seed, number, split == "test"))
        chosen += [every[int(i)] for i in rng.permutation(len(every))[:per_task]]
    return chosen


def _every(task: str, split: Split) -> list[Record]:
    """All prompts of a task, in a fixed order."""
    if task == "single_object":
        return [_record(task, a(shape), [_clause(shape)]) for shape in SHAPES]
    if task == "two_object":
        pairs = [(first, second) for first, second in permutations(SHAPES, 2) if first < second]
        return [_record(task, joined([a(s) for s in pair]), [_clause(s) for s in pair]) for pair in pairs]
    if task == "counting":
        return [_count(shape, number) for shape in SHAPES for number in (2, 3, 4)]
    if task == "colors":
        kinds = [pair for pair in PAIRS if (pair in HELD_OUT) == (split == "test")]
        return [_record(task, a(phrase(*kind)), [_clause(*kind)]) for kind in kinds]
    if task == "position":
        return [_position(x, r, y) for x, y in permutations(SHAPES, 2) for r in RELATIONS]
    both = [(x, y) for x, y in permutations(PAIRS, 2) if x[0] < y[0] and x[1] != y[1]]
    both = [pair for pair in both if any(kind in HELD_OUT for kind in pair) == (split == "test")]
    return [_record(task, joined([a(phrase(*k)) for k in pair]), [_clause(*k) for k in pair]) for pair in both]


def _clause(shape: str, colour: str | None = None, count: int = 1) -> Record:
    clause: Record = {"class": shape, "count": count}
    return clause if colour is None else {**clause, "color": colour}


def _record(task: str, text: str, include: list[Record], exclude: list[Record] | None = None) -> Record:
    record: Record = {"tag": task, "include": include}
    if exclude is not None:
        record["exclude"] = exclude
    return {**record, "prompt": f"a photo of {text}"}


def _count(shape: str, number: int) -> Record:
    more = _clause(shape, count=number + 1)
    return _record("counting", counted(number, shape), [_clause(shape, count=number)], [more])


def _position(placed: str, relation: Relation, reference: str) -> Record:
    include = [_clause(reference), {**_clause(placed), "position": [relation, 0]}]
    return _record("position", f"{a(placed)} {relation} {a(reference)}", include)


def render_prompt(record: Record, rng: np.random.Generator, size: int) -> Scene:
    """What a perfect renderer draws: exactly what the record includes, the rest (colours, sizes, places) at random.

    Raises:
        ValueError: a record that names other classes, or for which there is no room.
    """
    kinds: list[tuple[str, str]] = []
    where: list[tuple[int, Relation, int]] = []
    first: list[int] = []  # number of the first thing of each clause
    for clause in record["include"]:
        first.append(len(kinds))
        for _ in range(clause["count"]):
            if "position" in clause:
                relation, other = clause["position"]
                where.append((len(kinds), relation, first[other]))
            kinds.append((clause["class"], clause.get("color") or pick(rng, tuple(COLOURS))))
    return arrange(kinds, size, rng, where)[0]
