"""Scenes as pixels: coverage of every shape at every size, laid over each other from back to front.

One rule for edges: the coverage of a pixel is the share of an 8 x 8 grid of points inside it that lies in the shape, and
values are mixed as they are stored (no gamma). Positions and sizes are whole pixels, so the coverage of a shape depends on
its size alone and is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from unimodal.data.shapes.world import Scene, Thing

BACKGROUND = (192, 192, 192)
"""The one background, light grey."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 20, 30), "orange": (255, 135, 0), "yellow": (255, 240, 20), "green": (20, 150, 50),
    "blue": (30, 60, 225), "purple": (125, 25, 160), "pink": (255, 110, 200), "brown": (115, 65, 20),
    "black": (0, 0, 0), "white": (255, 255, 255),
}  # fmt: skip
"""The ten colours of GenEval, 0..255; any two of them and the background are more than 100 apart."""
PALETTE = {name: np.array(values, np.float32) for name, values in (*COLOURS.items(), ("background", BACKGROUND))}
"""The same as arrays (3,), with the background."""
_POINTS = 8  # a side, in every pixel


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x**2 + y**2 <= 1


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.5**2)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.ones(np.broadcast_shapes(x.shape, y.shape), bool)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(x) <= (y + 1) / 2


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(x) + np.abs(y) <= 1


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.abs(x) <= 1 / 3) | (np.abs(y) <= 1 / 3)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Two half discs above the line y = -0.4, and below it a parabola that comes to a point.
    above = ((np.abs(x) - 0.5) / 0.5) ** 2 + ((y + 0.4) / 0.6) ** 2 <= 1
    below = np.abs(x) <= np.sqrt(np.clip((1 - y) / 1.4, 0, 1)) * np.clip((1 - y) / 1.4, 0, 1) ** 0.25
    return np.where(y < -0.4, above, below)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.5)
    corners = np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)  # (10, 2)
    low, high = corners.min(axis=0), corners.max(axis=0)
    return _inside((corners - low) / (high - low) * 2 - 1, x, y)  # stretched to fill its box, as the others do


def _inside(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a polygon (corners (N, 2)): a ray to the right crosses its edges an odd number of times."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside


_MEMBERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "diamond": _diamond, "cross": _cross, "ring": _ring,
    "star": _star, "heart": _heart,
}  # fmt: skip
SHAPES = tuple(_MEMBERS)
"""Names of the shapes; each touches all four sides of its box."""


@lru_cache(maxsize=4096)
def coverage(shape: str, size: int) -> np.ndarray:
    """Share of every pixel (size, size) float32 that `shape` covers, read-only."""
    if shape not in _MEMBERS:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
    n = size * _POINTS
    points = (np.arange(n) + 0.5) / n * 2 - 1  # -1..1 over the box
    inside = _MEMBERS[shape](points[None, :], points[:, None])
    share = inside.reshape(size, _POINTS, size, _POINTS).mean(axis=(1, 3), dtype=np.float32)
    share.flags.writeable = False
    return share


def window(thing: Thing) -> tuple[slice, slice]:
    """Rows and columns of a thing's box."""
    return slice(thing.y, thing.y + thing.size), slice(thing.x, thing.x + thing.size)


def visible(scene: Scene) -> list[np.ndarray]:
    """What each thing still covers (its size, its size), 0..1, behind those in front of it; in the scene's order."""
    free = np.ones((scene.size, scene.size), np.float32)
    left = []
    for thing in reversed(scene.things):
        cover, place = coverage(thing.shape, thing.size), window(thing)
        left.append(cover * free[place])
        free[place] *= 1 - cover
    return left[::-1]


def paint(
    things: Sequence[Thing], box: tuple[int, int, int, int], palette: Mapping[str, np.ndarray] = PALETTE
) -> np.ndarray:
    """Values (height, width, 3) float32 of a part of a scene, 0..255 and not rounded.

    Args:
        things: from back to front.
        box: x1, y1, x2, y2 of the part.
        palette: values (3,) of every colour and of the background.
    """
    x1, y1, x2, y2 = box
    canvas = np.empty((y2 - y1, x2 - x1, 3), np.float32)
    canvas[:] = palette["background"]
    for thing in things:
        left, top = max(x1, thing.x), max(y1, thing.y)
        right, bottom = min(x2, thing.x + thing.size), min(y2, thing.y + thing.size)
        if left < right and top < bottom:
            cover = coverage(thing.shape, thing.size)
            cover = cover[top - thing.y : bottom - thing.y, left - thing.x : right - thing.x, None]
            area = canvas[top - y1 : bottom - y1, left - x1 : right - x1]
            area += cover * (palette[thing.colour] - area)
    return canvas


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of its size."""
    return Image.fromarray(np.rint(paint(scene.things, (0, 0, scene.size, scene.size))).astype(np.uint8))
