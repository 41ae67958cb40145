"""Questions with one true answer, and enumerations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from unimodal.data.shapes.captions import random_scene
from unimodal.data.shapes.render import SHAPES
from unimodal.data.shapes.words import NUMBERS, a, phrase, plural
from unimodal.data.shapes.world import (
    HELD_OUT,
    OPPOSITE,
    PAIRS,
    RELATIONS,
    Relation,
    Scene,
    Split,
    Thing,
    clear_relation,
    pick,
)


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        text: "is there a red circle?"
        answer: " yes", with the space that follows the question.
        about: what is asked: exists, count, colour, shape, relation or where.
    """

    text: str
    answer: str
    about: str


def asked(split: Split, size: int, rng: np.random.Generator) -> tuple[Scene, Question]:
    """A random scene and a question about it; what a scene gives no question for is not asked."""
    scene = random_scene(split, size, rng)
    makers: Sequence[Callable[[Scene, Split, np.random.Generator], Question | None]]
    makers = (_exists, _count, _colour, _shape, _relation, _where)
    for i in rng.permutation(len(makers)):
        question = makers[int(i)](scene, split, rng)
        if question is not None:
            return scene, question
    raise ValueError("scene: expected at least one thing to ask about")  # _exists always answers


def _exists(scene: Scene, split: Split, rng: np.random.Generator) -> Question | None:
    """Yes and no equally often; half of the noes are about a shape and a colour that are there, but apart, if any are."""
    there = {thing.kind for thing in scene.things}
    if rng.integers(2):
        shape, colour = pick(rng, scene.things).kind
        noun = pick(rng, (phrase(shape, colour), shape, phrase("object", colour)))
        return Question(f"is there {a(noun)}?", " yes", "exists")
    if rng.integers(2):
        missing = [shape for shape in SHAPES if shape not in {kind[0] for kind in there}]
        return Question(f"is there {a(pick(rng, missing))}?", " no", "exists")
    apart = [(s, c) for s, c in _crossed(scene) if split == "test" or (s, c) not in HELD_OUT]
    others = [pair for pair in PAIRS if pair not in there and (split == "test" or pair not in HELD_OUT)]
    return Question(f"is there {a(phrase(*pick(rng, apart or others)))}?", " no", "exists")


def _crossed(scene: Scene) -> list[tuple[str, str]]:
    there = {thing.kind for thing in scene.things}
    shapes, colours = {shape for shape, _ in there}, {colour for _, colour in there}
    return [pair for pair in PAIRS if pair not in there and pair[0] in shapes and pair[1] in colours]


def _count(scene: Scene, split: Split, rng: np.random.Generator) -> Question:
    by_shape = Counter(thing.shape for thing in scene.things)
    way = int(rng.integers(4))
    if way == 0:
        return Question("how many objects are there?", f" {NUMBERS[len(scene.things)]}", "count")
    if way == 1:
        colour = pick(rng, scene.things).colour
        number = sum(thing.colour == colour for thing in scene.things)
        return Question(f"how many {colour} objects are there?", f" {NUMBERS[number]}", "count")
    shape = pick(rng, SHAPES) if rng.random() < 0.15 else pick(rng, scene.things).shape
    return Question(f"how many {plural(shape)} are there?", f" {NUMBERS[by_shape[shape]]}", "count")


def _colour(scene: Scene, split: Split, rng: np.random.Generator) -> Question | None:
    shapes = Counter(thing.shape for thing in scene.things)
    single = [thing for thing in scene.things if shapes[thing.shape] == 1]
    if not single:
        return None
    thing = pick(rng, single)
    return Question(f"what colour is the {thing.shape}?", f" {thing.colour}", "colour")


def _shape(scene: Scene, split: Split, rng: np.random.Generator) -> Question | None:
    colours = Counter(thing.colour for thing in scene.things)
    single = [thing for thing in scene.things if colours[thing.colour] == 1]
    if not single:
        return None
    thing = pick(rng, single)
    return Question(f"what shape is the {thing.colour} object?", f" {thing.shape}", "shape")


def names(scene: Scene) -> dict[Thing, list[str]]:
    """Names that mean one thing only: "the circle", "the red circle"; things without any are left out."""
    shapes = Counter(thing.shape for thing in scene.things)
    kinds = Counter(thing.kind for thing in scene.things)
    found = {}
    for thing in scene.things:
        if kinds[thing.kind] == 1:
            found[thing] = [f"the {phrase(*thing.kind)}"]
            if shapes[thing.shape] == 1:
                found[thing].append(f"the {thing.shape}")
    return found


def _clear_pair(scene: Scene, rng: np.random.Generator) -> tuple[str, Relation, str] | None:
    called = names(scene)
    pairs = list(permutations(called, 2))
    for i in rng.permutation(len(pairs)):
        first, second = pairs[int(i)]
        relation = clear_relation(first, second)
        if relation is not None:
            return pick(rng, called[first]), relation, pick(rng, called[second])
    return None


def _relation(scene: Scene, split: Split, rng: np.random.Generator) -> Question | None:
    found = _clear_pair(scene, rng)
    if found is None:
        return None
    first, relation, second = found
    if rng.integers(2):
        return Question(f"is {first} {relation} {second}?", " yes", "relation")
    wrong = OPPOSITE[relation] if rng.integers(2) else pick(rng, [r for r in RELATIONS if r != relation])
    return Question(f"is {first} {wrong} {second}?", " no", "relation")


def _where(scene: Scene, split: Split, rng: np.random.Generator) -> Question | None:
    found = _clear_pair(scene, rng)
    if found is None:
        return None
    first, relation, second = found
    return Question(f"where is {first} seen from {second}?", f" {relation.removesuffix(' of')}", "where")
