"""Captions with the scenes they describe: the six kinds of GenEval's prompts, and whole scenes.

A caption is drawn first and its scene made to fit, so it is true; what it leaves open is random; nothing unnamed is there.
"""

from __future__ import annotations

from itertools import permutations
from typing import Literal, get_args

import numpy as np

from unimodal.data.shapes.render import COLOURS, SHAPES
from unimodal.data.shapes.words import NUMBERS, PREFIXES, a, counted, in_order, joined, listed, phrase
from unimodal.data.shapes.world import RELATIONS, Scene, Split, arrange, clear_relation, draw_colours, pick

CaptionTask = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr", "scene"]
CAPTION_TASKS: tuple[CaptionTask, ...] = get_args(CaptionTask)
_SAYS_ALL: tuple[CaptionTask, ...] = ("colors", "color_attr", "position", "scene")


def some_shapes(rng: np.random.Generator, number: int) -> list[str]:
    """So many different shapes."""
    return [SHAPES[int(i)] for i in rng.choice(len(SHAPES), size=number, replace=False)]


def captioned(task: CaptionTask, split: Split, size: int, rng: np.random.Generator) -> tuple[str, Scene]:
    """A caption of one kind, and a scene of `size` pixels that it describes."""
    made = {
        "single_object": _single, "two_object": _two, "counting": _counting, "colors": _colours, "position": _position,
        "color_attr": _attributes, "scene": _scene,
    }[task]  # fmt: skip
    text, scene = made(split, size, rng)
    return pick(rng, PREFIXES) + text, scene


def described(split: Split, size: int, rng: np.random.Generator) -> tuple[str, Scene]:
    """A caption that names every colour, and its scene: what is asked of a model that reads."""
    task = pick(rng, _SAYS_ALL)
    if task == "position":
        text, scene = _position(split, size, rng, coloured=True)
        return pick(rng, PREFIXES) + text, scene
    return captioned(task, split, size, rng)


def random_scene(split: Split, size: int, rng: np.random.Generator, most: int | None = None) -> Scene:
    """A scene of 1 to 4 things, or 6 from 64 pixels on; half of the scenes repeat shapes and colours more than chance would.

    Args:
        split: that the scene suits.
        size: of the canvas.
        rng: of the draws.
        most: things at most, where fewer are wanted.
    """
    limit = min(4 if size < 64 else 6, most or 6)
    number = int(rng.integers(1, limit + 1))
    choice = SHAPES if rng.random() < 0.5 else some_shapes(rng, 2)
    shapes = [pick(rng, choice) for _ in range(number)]
    return arrange(list(zip(shapes, draw_colours(shapes, split, rng), strict=True)), size, rng)[0]


def _single(split: Split, size: int, rng: np.random.Generator) -> tuple[str, Scene]:
    shape = pick(rng, SHAPES)
    return a(shape), _only([shape], draw_colours([shape], split, rng), size, rng)


def _two(split: Split, size: int, rng: np.random.Generator) -> tuple[str, Scene]:
    shapes = some_shapes(rng, 2)
    return joined([a(shape) for shape in shapes]), _only(shapes, draw_colours(shapes, split, rng), size, rng)


def _counting(split: Split, size: int, rng: np.random.Generator) -> tuple[str, Scene]:
    shape, number, same = pick(rng, SHAPES), int(rng.integers(2, 5)), bool(rng.integers(2))
    shapes = [shape] * number
    colours = draw_colours(shapes, split, rng, same=same)
    colour = colours[0] if same and rng.integers(2) else None
    return counted(number, phrase(shape, colour)), _only(shapes, colours, size, rng)


def _colours(split: Split, size: int, rng: np.random.Generator) -> tuple[str, Scene]:
    shape = pick(rng, SHAPES)
    colours = draw_colours([shape], split, rng)
    return a(phrase(shape, colours[0])), _only([shape], colours, size, rng)


def _position(split: Split, size: int, rng: np.random.Generator, coloured: bool | None = None) -> tuple[str, Scene]:
    shapes, relation = some_shapes(rng, 2), pick(rng, RELATIONS)
    colours = draw_colours(shapes, split, rng)
    named = bool(rng.integers(2)) if coloured is None else coloured
    first, second = (a(phrase(shapes[i], colours[i] if named else None)) for i in range(2))
    scene, _ = arrange(list(zip(shapes, colours, strict=True)), size, rng, [(0, relation, 1)])
    return f"{first} {relation} {second}", scene


def _attributes(split: Split, size: int, rng: np.random.Generator) -> tuple[str, Scene]:
    shapes = some_shapes(rng, 2)
    colours = draw_colours(shapes, split, rng, distinct=True)
    text = joined([a(phrase(shape, colour)) for shape, colour in zip(shapes, colours, strict=True)])
    return text, _only(shapes, colours, size, rng)


def _scene(split: Split, size: int, rng: np.random.Generator) -> tuple[str, Scene]:
    scene = random_scene(split, size, rng)
    number, wording = len(scene.things), int(rng.integers(3))
    if wording == 1 and number > 1:
        return f"{NUMBERS[number]} objects: {listed(scene)}", scene
    return (wording == 2 and _placed(scene)) or listed(scene), scene


def _placed(scene: Scene) -> str | None:
    """The scene with one clear relation said, where all things differ and one holds."""
    things = in_order(scene)
    if len({thing.kind for thing in things}) < len(things):
        return None
    for first, second in permutations(things, 2):
        relation = clear_relation(first, second)
        if relation is not None:
            rest = [a(phrase(*thing.kind)) for thing in things if thing not in (first, second)]
            text = f"{a(phrase(*first.kind))} {relation} {a(phrase(*second.kind))}"
            return f"{text}, with {joined(rest)}" if rest else text
    return None


def _only(shapes: list[str], colours: list[str], size: int, rng: np.random.Generator) -> Scene:
    return arrange(list(zip(shapes, colours, strict=True)), size, rng)[0]


def vocabulary() -> list[str]:
    """Every colour with every shape, one and several: words that a sample of texts might miss."""
    nouns = [phrase(shape, colour) for shape in SHAPES for colour in (None, *COLOURS)]
    return [a(noun) for noun in nouns] + [counted(number, noun) for noun in nouns for number in (2, 3, 4)]
