"""Things, scenes, and how scenes are drawn at random so that each can be read without doubt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal, TypeVar, get_args

import numpy as np
from scipy import ndimage

from unimodal.data.shapes.render import COLOURS, SHAPES, coverage, visible

Split = Literal["train", "test"]
Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above",
}  # fmt: skip
PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
"""Every shape in every colour."""

SMALLEST = 8
"""Pixels of the smallest thing's side."""
CANVAS = (32, 256)
"""Smallest and largest side of a scene."""
VISIBLE = 0.6
"""Least share of a thing's area that is not covered."""
GAP = 2
"""Pixels between the boxes of two things of one colour, across or down: they never look like one."""
_HELD_OUT_SHARE = 0.2
_TRIES, _RESTARTS = 40, 30
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Thing:
    """One object.

    Args:
        shape: one of SHAPES.
        colour: one of COLOURS.
        size: pixels of both sides of its box.
        x: left side of the box.
        y: upper side of the box.

    Raises:
        ValueError: an unknown shape or colour.
    """

    shape: str
    colour: str
    size: int
    x: int
    y: int

    def __post_init__(self) -> None:
        """Refuse what could not be drawn."""
        if self.shape not in SHAPES:
            raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {self.shape!r}")
        if self.colour not in COLOURS:
            raise ValueError(f"colour: expected one of {', '.join(COLOURS)}, got {self.colour!r}")

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2; the last two are outside. Covered parts are inside."""
        return float(self.x), float(self.y), float(self.x + self.size), float(self.y + self.size)

    @property
    def kind(self) -> tuple[str, str]:
        """Shape and colour."""
        return self.shape, self.colour


@dataclass(frozen=True)
class Scene:
    """Things on a square canvas.

    Args:
        things: from back to front.
        size: pixels of the canvas' sides.

    Raises:
        ValueError: a size outside CANVAS.
    """

    things: tuple[Thing, ...]
    size: int

    def __post_init__(self) -> None:
        """Refuse a canvas that no scene is made for."""
        if not CANVAS[0] <= self.size <= CANVAS[1]:
            raise ValueError(f"size: expected {CANVAS[0]} to {CANVAS[1]} pixels, got {self.size}")

    def with_thing(self, thing: Thing) -> Scene:
        """The same scene with one more in front."""
        return Scene((*self.things, thing), self.size)

    def without(self, thing: Thing) -> Scene:
        """The same scene less one."""
        return Scene(tuple(other for other in self.things if other != thing), self.size)

    def swapped(self, old: Thing, new: Thing) -> Scene:
        """The same scene with `new` where `old` was in the order."""
        return Scene(tuple(new if other == old else other for other in self.things), self.size)


# ---- rules


def held_out(shape: str, colour: str) -> bool:
    """Whether a shape in a colour is kept for the test split; a hash, the same for ever and everywhere.

    The salt was chosen so that every shape and every colour has one to four pairs held out.
    """
    digest = hashlib.sha256(f"shapes 29: {colour} {shape}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT_SHARE * 2**64


HELD_OUT = frozenset(pair for pair in PAIRS if held_out(*pair))
"""The pairs of the test split."""


def suits(scene: Scene, split: Split) -> bool:
    """Training scenes hold no held-out pair, test scenes at least one."""
    return any(thing.kind in HELD_OUT for thing in scene.things) == (split == "test")


def relations(a: Thing, b: Thing) -> frozenset[Relation]:
    """Where `a` is, seen from `b`, by GenEval's rule; none, one or two relations.

    The offset of the centres is shrunk on each axis by a tenth of the two boxes' sum of sides, and divided by the length of
    the offset before; a direction holds where its component is above 0.5. y points downwards.
    """
    # Not a call of `unimodal.metrics.geneval.relations`, which is the same rule in the script's float32 arrays and ten
    # times slower: this runs in every loader, for all pairs of every scene that is tried. A test compares the two.
    dx = a.x + a.size / 2 - b.x - b.size / 2
    dy = a.y + a.size / 2 - b.y - b.size / 2
    length = float(np.hypot(dx, dy))
    if length == 0:
        return frozenset()
    margin = 0.1 * (a.size + b.size)
    across, down = max(abs(dx) - margin, 0.0) / length, max(abs(dy) - margin, 0.0) / length
    found: set[Relation] = set()
    if across > 0.5:
        found.add("left of" if dx < 0 else "right of")
    if down > 0.5:
        found.add("above" if dy < 0 else "below")
    return frozenset(found)


def clearly(a: Thing, relation: Relation, b: Thing) -> bool:
    """Whether the relation holds, no other does, and the offset on its axis is twice that on the other."""
    if relations(a, b) != {relation}:
        return False
    dx, dy = abs(2 * a.x + a.size - 2 * b.x - b.size), abs(2 * a.y + a.size - 2 * b.y - b.size)
    return dx >= 2 * dy if relation in ("left of", "right of") else dy >= 2 * dx


def clear_relation(a: Thing, b: Thing) -> Relation | None:
    """The relation that clearly holds, if one does."""
    return next((relation for relation in RELATIONS if clearly(a, relation, b)), None)


def valid(scene: Scene) -> bool:
    """Whether everything lies inside, equal colours keep their gap, and each thing is one piece, seen well enough."""
    for thing in scene.things:
        if thing.size < SMALLEST or min(thing.x, thing.y) < 0 or max(thing.x, thing.y) + thing.size > scene.size:
            return False
    distances = [(a, b, _distance(a, b)) for a, b in combinations(scene.things, 2)]
    if any(a.colour == b.colour and distance < GAP for a, b, distance in distances):
        return False
    if all(distance >= 0 for *_, distance in distances):
        return True
    return all(_seen(thing, left) for thing, left in zip(scene.things, visible(scene), strict=True))


def _distance(a: Thing, b: Thing) -> int:
    """Pixels between two boxes on the axis where they are further apart; below 0 they overlap."""
    return max(a.x - b.x - b.size, b.x - a.x - a.size, a.y - b.y - b.size, b.y - a.y - a.size)


def _seen(thing: Thing, left: np.ndarray) -> bool:
    whole = float(coverage(thing.shape, thing.size).sum())
    seen = float(left.sum())
    if seen < VISIBLE * whole:
        return False
    if seen > 0.999 * whole:
        return True
    before = _pieces(coverage(thing.shape, thing.size))  # a small ring is thin: it has several parts of its own
    return all(1 <= now <= max(1, then) for now, then in zip(_pieces(left), before, strict=True))


def _pieces(cover: np.ndarray) -> tuple[int, int]:
    """Parts of a thing that hang together by the sides of pixels, and by two pixels side by side."""
    full = cover >= 0.6
    squares = full[:-1, :-1] & full[1:, :-1] & full[:-1, 1:] & full[1:, 1:]
    return int(ndimage.label(full)[1]), int(ndimage.label(squares)[1])


# ---- random scenes


def pick(rng: np.random.Generator, items: Sequence[_Item]) -> _Item:
    """One of `items`, each as likely."""
    return items[int(rng.integers(len(items)))]


def draw_colours(
    shapes: Sequence[str], split: Split, rng: np.random.Generator, distinct: bool = False, same: bool = False
) -> list[str]:
    """A colour for every shape, so that the scene suits the split.

    Args:
        shapes: shapes of the things.
        split: "train" never makes a held-out pair; "test" makes at least one.
        rng: of the draws.
        distinct: no colour twice.
        same: one colour for all; `shapes` are then all equal.
    """
    if same:
        return draw_colours(shapes[:1], split, rng) * len(shapes)
    key = int(rng.integers(len(shapes))) if split == "test" else -1
    order = sorted(range(len(shapes)), key=lambda i: i != key)  # the held-out pair first: it has the fewest colours
    chosen: dict[int, str] = {}
    for i in order:
        free = [
            c for c in COLOURS if not (distinct and c in chosen.values()) and _allowed(shapes[i], c, split, i == key)
        ]
        chosen[i] = pick(rng, free)
    return [chosen[i] for i in range(len(shapes))]


def _allowed(shape: str, colour: str, split: Split, key: bool) -> bool:
    if split == "train":
        return (shape, colour) not in HELD_OUT
    return not key or (shape, colour) in HELD_OUT


def size_range(canvas: int, things: int) -> tuple[int, int]:
    """Smallest and largest side of one of so many things."""
    share = {1: 0.625, 2: 0.5, 3: 0.4375, 4: 0.375}.get(things, 0.34)
    return max(SMALLEST, canvas // 8), int(canvas * share)


def place(
    scene: Scene,
    kind: tuple[str, str],
    sizes: tuple[int, int],
    rng: np.random.Generator,
    accept: Callable[[Thing], bool] = lambda thing: True,
) -> Scene | None:
    """The scene with one more thing in front, or None when a bounded number of tries found no place.

    Args:
        scene: what is there, unchanged.
        kind: shape and colour of the new thing.
        sizes: smallest and largest side; later tries draw smaller ones.
        rng: of the draws.
        accept: what else must hold of the new thing.
    """
    low, high = sizes
    for attempt in range(_TRIES):
        most = high - (high - low) * attempt // _TRIES
        size = int(rng.integers(low, most + 1))
        thing = Thing(*kind, size, *(int(v) for v in rng.integers(0, scene.size - size + 1, size=2)))
        if accept(thing):
            bigger = scene.with_thing(thing)
            if valid(bigger):
                return bigger
    return None


def arrange(
    kinds: Sequence[tuple[str, str]],
    size: int,
    rng: np.random.Generator,
    where: Iterable[tuple[int, Relation, int]] = (),
) -> tuple[Scene, list[Thing]]:
    """A random scene of the given things; in half of the scenes nothing touches, in the others things may overlap.

    Args:
        kinds: shape and colour of each.
        size: of the canvas.
        rng: of the draws; also of the order from back to front.
        where: (i, relation, j): the i-th thing clearly stands so to the j-th.

    Returns:
        The scene, and its things in the order of `kinds`.

    Raises:
        ValueError: a bounded number of tries found no place for all.
    """
    sizes, rules, apart = size_range(size, len(kinds)), tuple(where), bool(rng.integers(2))
    for restart in range(_RESTARTS):
        space = 1 if apart and 2 * restart < _RESTARTS else -1  # a crowd may have no room to stand apart
        scene = Scene((), size)
        placed: dict[int, Thing] = {}
        for i in (int(v) for v in rng.permutation(len(kinds))):
            due = [rule for rule in rules if i in rule and {rule[0], rule[2]} - {i} <= placed.keys()]
            accept = partial(_stands, i=i, placed=placed, due=due, space=space)
            bigger = place(scene, kinds[i], sizes, rng, accept)
            if bigger is None:
                break
            scene, placed[i] = bigger, bigger.things[-1]
        if len(placed) == len(kinds):
            return scene, [placed[i] for i in range(len(kinds))]
    raise ValueError(f"kinds: found no room for {len(kinds)} things on {size}x{size} pixels, {kinds}")


def _stands(thing: Thing, i: int, placed: dict[int, Thing], due: list[tuple[int, Relation, int]], space: int) -> bool:
    """Whether the i-th thing keeps its relations and so many pixels from those there are."""
    for a, relation, b in due:
        if not clearly(thing if a == i else placed[a], relation, thing if b == i else placed[b]):
            return False
    return space < 0 or all(_distance(thing, other) >= space for other in placed.values())
