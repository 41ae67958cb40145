"""The shape, size and place that explain one piece of colour best.

Letters: N side of the image, S side of a template, K shapes, P places.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from unimodal.data.shapes.render import SHAPES, coverage
from unimodal.data.shapes.world import SMALLEST, Thing

_OFF_LINE = 24.0  # values of 255 by which a pixel may miss the mixtures of a colour with the background, without noise
_HIDDEN_PRICE = 0.05  # of a covered pixel, against 1 for a wrong one: of two fits the one that hides less
_MOST_HIDDEN = 0.5
_THINNEST = 0.4  # least share of its box that a shape covers
_COARSE = 20  # pixels of a piece's side from which it is first looked at from afar
_KEPT = 3  # fits a shape
_MARGIN = (
    0.25  # share of the piece's area by which a fit may be worse than the best, and pixels that are always allowed
)
_LEAST_MARGIN = 8.0


@dataclass(frozen=True, eq=False)
class Layer:
    """What the image says of one colour.

    Attributes:
        shown: (N, N) float32, 0..1: the share of the colour in a mixture with the background.
        open: (N, N) float32: 1 where the pixel is such a mixture, 0 where another colour is in front.
    """

    shown: np.ndarray
    open: np.ndarray


@dataclass(frozen=True, eq=False)
class Piece:
    """Touching pixels of one colour.

    Attributes:
        colour: its name.
        box: x1, y1, x2, y2 of the pixels, thin lines left out.
        area: number of pixels.
        own: (N, N) pixels nearer to this piece than to another of its colour; None where there is no other.
    """

    colour: str
    box: tuple[int, int, int, int]
    area: int
    own: np.ndarray | None


def layer(pixels: np.ndarray, nearest: np.ndarray, colour: np.ndarray, background: np.ndarray, noise: float) -> Layer:
    """The layer of a colour.

    Args:
        pixels: (N, N, 3), 0..255.
        nearest: (N, N) whether the colour is the palette's nearest.
        colour: (3,).
        background: (3,).
        noise: standard deviation of a value.
    """
    line = colour - background
    apart = pixels - background
    shown = np.clip(apart @ (line / (line @ line)), 0, 1)
    off = apart - shown[:, :, None] * line
    open_ = (np.einsum("ijk,ijk->ij", off, off) <= (_OFF_LINE + 1.5 * noise) ** 2) | nearest
    return Layer(shown * open_, open_.astype(np.float32))


def fits(seen: Layer, piece: Piece) -> list[Thing]:
    """The best fits of a piece, the best first; a few of every shape that comes near it. Empty: none comes near."""
    shown = seen.shown if piece.own is None else seen.shown * piece.own
    x1, y1, x2, y2 = piece.box
    longest, factor = max(x2 - x1, y2 - y1), 1
    while longest > _COARSE * factor:
        factor *= 2
    both = np.stack((shown, seen.open))  # (2, N, N)
    found = _best(_search_all(_shrunk(both, factor), piece, factor), piece.area / factor**2)
    while factor > 1:
        factor //= 2
        found = _best(_finer(_shrunk(both, factor), found), piece.area / factor**2)
    return [Thing(f.shape, piece.colour, f.size, f.x, f.y) for f in found if f.size >= SMALLEST - 2]


class _Fit(NamedTuple):
    cost: float  # squared differences of coverage, less what an empty canvas would have
    shape: str
    size: int
    x: int
    y: int


def _shrunk(both: np.ndarray, factor: int) -> np.ndarray:
    """Means (2, N', N') over squares of pixels; what does not fill a square is left out."""
    if factor == 1:
        return both
    n = both.shape[1] // factor
    cut = both[:, : n * factor, : n * factor]
    return np.ascontiguousarray(cut.reshape(2, n, factor, n, factor).mean(axis=(2, 4)))


def _search_all(both: np.ndarray, piece: Piece, factor: int) -> list[_Fit]:
    """Every shape at every size and place that holds the piece, give or take a pixel."""
    x1, y1 = (v // factor for v in piece.box[:2])
    x2, y2 = (-(-v // factor) for v in piece.box[2:])
    longest, n = max(x2 - x1, y2 - y1), both.shape[1]
    border = both[1, max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2]
    # A piece that nothing touches shows all of its thing; else the thing may be larger by what is hidden.
    most = longest + 4
    if border.min() < 0.5:
        most = max(most, int(np.sqrt(piece.area / factor**2 / (_THINNEST * (1 - _MOST_HIDDEN)))) + 2)
    found: list[_Fit] = []
    for size in range(max(SMALLEST - 2 if factor == 1 else 5, longest - 1), min(n, most) + 1):
        xs = range(max(0, x2 - size - 1), min(n - size, x1 + 1) + 1)
        ys = range(max(0, y2 - size - 1), min(n - size, y1 + 1) + 1)
        found += _search(both, SHAPES, size, xs, ys)
    return found


def _finer(both: np.ndarray, found: list[_Fit]) -> list[_Fit]:
    """The fits at twice the resolution, each with its neighbourhood."""
    n = both.shape[1]
    wanted: dict[tuple[str, int], tuple[set[int], set[int]]] = {}
    for old in found:
        for size in range(2 * old.size - 2, min(n, 2 * old.size + 2) + 1):
            shift = (2 * old.size - size) // 2  # keeps the middle where it is
            for places, v in zip(wanted.setdefault((old.shape, size), (set(), set())), (old.x, old.y), strict=True):
                places.update(range(2 * v + shift - 2, 2 * v + shift + 4))
    fits: list[_Fit] = []
    for (shape, size), sides in wanted.items():
        xs, ys = (range(max(0, min(side)), min(n - size, max(side)) + 1) for side in sides)
        fits += _search(both, (shape,), size, xs, ys)
    return fits


def _search(both: np.ndarray, shapes: tuple[str, ...], size: int, xs: range, ys: range) -> list[_Fit]:
    """The best fits of each shape at one size and many places."""
    if not len(xs) or not len(ys):
        return []
    templates, squares, whole = _templates(shapes, size)
    plane, row, step = both.strides
    windows = as_strided(
        both[:, ys[0] :, xs[0] :], (2, len(ys), len(xs), size, size), (plane, row, step, row, step), writeable=False
    )
    target, weight = windows.reshape(2, -1, size * size)  # (P, S * S) each
    seen = weight @ squares  # (P, K)
    cost = (1 - _HIDDEN_PRICE) * seen + _HIDDEN_PRICE * whole - 2 * (target @ templates)
    cost[seen < (1 - _MOST_HIDDEN) * whole] = 0
    order = cost.argsort(axis=0)[:_KEPT]  # (3, K)
    return [
        _Fit(value, shapes[k], size, xs[p % len(xs)], ys[p // len(xs)])
        for places, values in zip(order.tolist(), np.take_along_axis(cost, order, 0).tolist(), strict=True)
        for k, (p, value) in enumerate(zip(places, values, strict=True))
        if value < 0
    ]


def _best(fits: Iterable[_Fit], area: float) -> list[_Fit]:
    """A few of every shape that are not much worse than the best, the best first."""
    ordered = sorted(fits)
    limit = ordered[0].cost + max(_MARGIN * area, _LEAST_MARGIN) if ordered else 0.0
    kept: list[_Fit] = []
    count = dict.fromkeys(SHAPES, 0)
    for fit in ordered:
        if fit.cost > limit:
            break
        if count[fit.shape] < _KEPT:
            count[fit.shape] += 1
            kept.append(fit)
    return kept


@lru_cache(maxsize=1024)
def _templates(shapes: tuple[str, ...], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage of shapes (S * S, K), its square, and the sum of the square (K,)."""
    stack = np.stack([coverage(shape, size).ravel() for shape in shapes], axis=1)
    squares = np.square(stack)
    return stack, squares, squares.sum(axis=0)
