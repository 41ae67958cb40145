"""Scenes and texts of the shapes world read again, slowly, for the tests of it."""

import itertools
import math
import re

from unimodal.data.shapes import COLOURS, SHAPES, Scene, Thing, coverage

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "zero": 0}
NOUN = re.compile(rf"({'|'.join(NUMBERS)}) (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})(?:e?s)?\b")


def holds(a: Thing, relation: str, b: Thing) -> bool:
    """GenEval's rule as evaluation.md states it, axis by axis on the corners of the boxes."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    offset = [(ax1 + ax2) / 2 - (bx1 + bx2) / 2, (ay1 + ay2) / 2 - (by1 + by2) / 2]
    margins = [0.1 * ((ax2 - ax1) + (bx2 - bx1)), 0.1 * ((ay2 - ay1) + (by2 - by1))]
    shrunk = [math.copysign(max(abs(o) - m, 0), o) for o, m in zip(offset, margins, strict=True)]
    if all(abs(v) < 1e-3 for v in shrunk):
        return False
    dx, dy = (v / math.hypot(*offset) for v in shrunk)
    return {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}[relation]


def share_seen(scene: Scene, thing: Thing) -> float:
    """Pixel by pixel: the share of a thing's coverage that nothing in front takes away."""
    total = seen = 0.0
    front = scene.things[scene.things.index(thing) + 1 :]
    for y, x in itertools.product(range(thing.size), repeat=2):
        cover = left = float(coverage(thing.shape, thing.size)[y, x])
        for other in front:
            oy, ox = y + thing.y - other.y, x + thing.x - other.x
            if 0 <= oy < other.size and 0 <= ox < other.size:
                left *= 1 - float(coverage(other.shape, other.size)[oy, ox])
        total, seen = total + cover, seen + left
    return seen / total


def check_rules(scene: Scene) -> None:
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        assert x2 - x1 == y2 - y1 >= 8
        assert min(x1, y1) >= 0
        assert max(x2, y2) <= scene.size
        assert share_seen(scene, thing) >= 0.6 - 1e-6
    for a, b in itertools.combinations(scene.things, 2):
        if a.colour == b.colour:
            ax1, ay1, ax2, ay2 = a.box
            bx1, by1, bx2, by2 = b.box
            assert max(ax1 - bx2, bx1 - ax2, ay1 - by2, by1 - ay2) >= 2


def told(text: str) -> list[tuple[int, str | None, str]]:
    """Number, colour and shape of everything a text names."""
    return [(NUMBERS[n], colour or None, shape) for n, colour, shape in NOUN.findall(text)]
