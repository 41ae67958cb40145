"""The few words that scenes are described in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from unimodal.data.shapes.render import SHAPES
from unimodal.data.shapes.world import Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
PREFIXES = ("", "a photo of ", "a picture of ")
"""What a caption may begin with; GenEval's prompts have the second."""


def phrase(shape: str, colour: str | None = None) -> str:
    """Noun without an article: "red circle"."""
    return shape if colour is None else f"{colour} {shape}"


def a(noun: str) -> str:
    """With the indefinite article: "an orange circle"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    """Noun for several: "red crosses"."""
    return f"{noun}es" if noun.endswith("cross") else f"{noun}s"


def counted(number: int, noun: str) -> str:
    """Number and noun, both in words: "one circle", "two red circles"."""
    return f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}"


def several(number: int, noun: str) -> str:
    """The same, one with its article: "a circle", "two red circles"."""
    return a(noun) if number == 1 else counted(number, noun)


def joined(items: Sequence[str]) -> str:
    """Items as a list: "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def in_order(scene: Scene) -> list[Thing]:
    """Things as they are read: by the middle of their boxes, left to right, then from above."""
    return sorted(scene.things, key=lambda thing: (2 * thing.x + thing.size, 2 * thing.y + thing.size))


def listed(scene: Scene) -> str:
    """Everything in the scene: "a red circle and two blue squares"."""
    numbers = Counter(thing.kind for thing in in_order(scene))  # in order of first appearance
    return joined([several(n, phrase(*kind)) for kind, n in numbers.items()])


def census(scene: Scene) -> str:
    """How many things of every shape, the most frequent first: "three circles and one square"."""
    numbers = Counter(thing.shape for thing in scene.things)
    order = sorted(numbers, key=lambda shape: (-numbers[shape], SHAPES.index(shape)))
    return joined([counted(numbers[shape], shape) for shape in order])
