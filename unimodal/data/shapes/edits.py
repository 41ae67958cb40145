"""Instructions that change one thing of a scene, and scenes built up step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from unimodal.data.shapes.captions import random_scene, some_shapes
from unimodal.data.shapes.questions import names
from unimodal.data.shapes.render import COLOURS, SHAPES
from unimodal.data.shapes.words import a, phrase
from unimodal.data.shapes.world import (
    HELD_OUT,
    PAIRS,
    RELATIONS,
    Relation,
    Scene,
    Split,
    Thing,
    clearly,
    draw_colours,
    pick,
    place,
    relations,
    size_range,
    suits,
    valid,
)

EditOperation = Literal["recolour", "reshape", "remove", "add", "move"]
EDIT_OPERATIONS: tuple[EditOperation, ...] = get_args(EditOperation)
END = " done"
"""What follows the last image of a scene that is built up."""
_TRIES = 200


@dataclass(frozen=True)
class Edit:
    """A scene, what is said, and the scene that is wanted.

    Attributes:
        before: the scene that is given.
        text: " make the red circle blue".
        after: the same scene but for the one thing named.
        operation: which kind of change it is.
    """

    before: Scene
    text: str
    after: Scene
    operation: EditOperation


def edited(split: Split, size: int, rng: np.random.Generator) -> Edit:
    """A random edit; both its scenes obey the rules of scenes and suit the split.

    Raises:
        ValueError: a bounded number of tries found none.
    """
    for _ in range(_TRIES):
        operation = pick(rng, EDIT_OPERATIONS)
        before = random_scene(split, size, rng, most=3)
        made = _change(operation, before, split, rng)
        if made is None:
            continue
        text, after = made
        if valid(after) and suits(after, split):
            return Edit(before, text, after, operation)
    raise ValueError(f"size: found no edit of scenes of {size}x{size} pixels in {_TRIES} tries")


def _change(operation: EditOperation, scene: Scene, split: Split, rng: np.random.Generator) -> tuple[str, Scene] | None:
    called = names(scene)
    if not called:
        return None
    thing = pick(rng, list(called))
    name = pick(rng, called[thing])
    if operation == "recolour":
        colour = pick(rng, [c for c in COLOURS if c != thing.colour and _speakable(thing.shape, c, split)])
        return f" make {name} {colour}", scene.swapped(thing, replace(thing, colour=colour))
    if operation == "reshape":
        shape = pick(rng, [s for s in SHAPES if s != thing.shape and _speakable(s, thing.colour, split)])
        return f" turn {name} into {a(shape)}", scene.swapped(thing, replace(thing, shape=shape))
    if operation == "remove":
        return (f" remove {name}", scene.without(thing)) if len(scene.things) > 1 else None
    relation = pick(rng, RELATIONS)
    if operation == "add":
        kind = pick(rng, [pair for pair in PAIRS if _speakable(*pair, split)])
        sizes = size_range(scene.size, len(scene.things) + 1)
        bigger = place(scene, kind, sizes, rng, lambda new: clearly(new, relation, thing))
        return None if bigger is None else (f" add {a(phrase(*kind))} {relation} {name}", bigger)
    others = [other for other in called if other != thing]
    if not others:
        return None
    other = pick(rng, others)
    after = _moved(scene, thing, relation, other, rng)
    return None if after is None else (f" move {name} {relation} {pick(rng, called[other])}", after)


def _moved(scene: Scene, thing: Thing, relation: Relation, other: Thing, rng: np.random.Generator) -> Scene | None:
    """The thing elsewhere, as far in front as before, where a bounded number of tries finds a place."""
    if relation in relations(thing, other):
        return None  # it stands there already, if not clearly
    for _ in range(_TRIES):
        x, y = (int(v) for v in rng.integers(0, scene.size - thing.size + 1, size=2))
        moved = replace(thing, x=x, y=y)
        if clearly(moved, relation, other) and valid(scene.swapped(thing, moved)):
            return scene.swapped(thing, moved)
    return None


def _speakable(shape: str, colour: str, split: Split) -> bool:
    return split == "test" or (shape, colour) not in HELD_OUT


def built(split: Split, size: int, rng: np.random.Generator) -> tuple[list[str], list[Scene]]:
    """A scene of two or three things put in one after the other.

    Returns:
        Texts ("first a red circle", " then a blue square below it", ...), where "it" is the thing before; and the
        scene after each. "first" says that more will come: a caption alone asks for one image. `END` follows the last.

    Raises:
        ValueError: a bounded number of tries found no room.
    """
    number = int(rng.integers(2, 4))
    shapes = some_shapes(rng, number)
    first = draw_colours(shapes[:1], split, rng)  # a held-out pair comes first, so that every scene suits the split
    others = [pick(rng, [c for c in COLOURS if _speakable(shape, c, split)]) for shape in shapes[1:]]
    kinds = list(zip(shapes, first + others, strict=True))
    for _ in range(_TRIES):
        said: list[Relation] = [pick(rng, RELATIONS) for _ in kinds[1:]]
        scenes = _grown(Scene((), size), kinds, said, rng)
        if scenes is not None:
            texts = [f" then {a(phrase(*kind))} {r} it" for kind, r in zip(kinds[1:], said, strict=True)]
            return [f"first {a(phrase(*kinds[0]))}", *texts], scenes
    raise ValueError(f"size: found no room for {number} things on {size}x{size} pixels in {_TRIES} tries")


def _grown(
    scene: Scene, kinds: list[tuple[str, str]], said: list[Relation], rng: np.random.Generator
) -> list[Scene] | None:
    """The scene after every thing, each clearly where it is said to be, seen from the one before."""
    sizes = size_range(scene.size, len(kinds))
    scenes: list[Scene] = []
    for kind, relation in zip(kinds, (None, *said), strict=True):
        bigger = place(scene, kind, sizes, rng, _follows(scene, relation))
        if bigger is None:
            return None
        scene = bigger
        scenes.append(scene)
    return scenes


def _follows(scene: Scene, relation: Relation | None) -> Callable[[Thing], bool]:
    """Whether a thing clearly stands so to the one put in last; the first thing stands anywhere."""
    return lambda thing: relation is None or clearly(thing, relation, scene.things[-1])
