"""Which shapes an image shows, by exact templates: nothing here is learned, and nothing knows the scene.

1. Every pixel goes to the nearest colour of the palette, and pixels of one colour that touch form a piece.
2. Every shape is laid over a piece at every size and place that could be; pixels of other colours are not held against it
   (something may stand in front). The best few fits are kept (`fit.py`).
3. The fits of all pieces are drawn together, what covers what being read off the pixels, and the ones whose picture is
   nearest to the image win. On a rendered scene that picture is the image. Where much is left, the image is sharpened and
   read again: if the picture of that scene, blurred, is nearer, the image was blurred.
4. The score of a thing falls with what is left: the squared difference of coverage over the thing's area, the distance of
   its colour from the palette's, and the share of it that nothing shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy import ndimage

from unimodal.data.shapes.fit import Layer, Piece, fits, layer
from unimodal.data.shapes.render import BACKGROUND, COLOURS, PALETTE, coverage, paint, visible, window
from unimodal.data.shapes.world import CANVAS, SMALLEST, Scene, Thing
from unimodal.metrics.detection import Detection

_PALETTE = np.stack(list(PALETTE.values()))  # (11, 3)
_NORMS = np.square(_PALETTE).sum(axis=1)  # (11,)
_NAMES = tuple(COLOURS)
_NEIGHBOURS = np.ones((3, 3), int)
_LEAST_PIXELS = 9
_MOST_PIECES = 24
_ROUNDING = 0.5  # values of 255
_SWEEPS = 3
_SAME = 6.0  # values of 255 between two colours that are one
_BLURS = (0.6, 1.0)  # standard deviations in pixels that an image is tried with
_ROUNDS = 8
_CLEARLY = 0.5  # share of the error that a blurred scene may leave, to be believed
_REST = 0.01  # share of the image's difference from the background that may stay unexplained
_WRONG_AREA, _WRONG_COLOUR = 0.3, 60.0  # at which a score is 1/e: share of the area, distance in values of 255


@dataclass(frozen=True, eq=False)
class _Seen:
    """An image and what was read off it pixel by pixel.

    Attributes:
        pixels: (N, N, 3) float32, 0..255.
        labels: (N, N) number of the nearest colour; the last is the background.
        noise: of the background, standard deviation of a value.
        palette: values (3,) of the background and of the colours that are there, as the image has them.
        layers: for every colour that is there, the coverage that pixels show.
    """

    pixels: np.ndarray
    labels: np.ndarray
    noise: float
    palette: dict[str, np.ndarray]
    layers: dict[str, Layer]


def recognise(image: Image.Image, threshold: float = 0.1) -> list[Detection]:
    """The things in an image, the surest first.

    Boxes are those of the whole things, covered parts included; masks hold what is seen of them.

    Args:
        image: of 32 to 256 pixels a side; any mode.
        threshold: least score.

    Raises:
        ValueError: an image of another size.
    """
    width, height = image.size
    if not (CANVAS[0] <= min(width, height) and max(width, height) <= CANVAS[1]):
        raise ValueError(f"image: expected sides of {CANVAS[0]} to {CANVAS[1]} pixels, got {width}x{height}")
    side = max(width, height)
    pixels = np.empty((side, side, 3), np.float32)
    pixels[:] = BACKGROUND
    pixels[:height, :width] = np.asarray(image.convert("RGB"))
    seen, scene = _explained(pixels)
    covers = _covers(scene)
    detections = [_detection(i, scene, covers, seen, (height, width)) for i in range(len(scene.things))]
    return sorted((d for d in detections if d.score >= threshold), key=lambda d: -d.score)


def _explained(pixels: np.ndarray) -> tuple[_Seen, Scene]:
    """What is seen and the scene that explains it; where noise does not explain the rest, also as a blurred scene."""
    seen = _read(pixels)
    scene = _together(_fits(seen), seen)
    error = _blurred_error(scene, seen, pixels, 0.0)
    apart = pixels - seen.palette["background"]
    enough = _REST * float(np.vdot(apart, apart)) + pixels.size * (_ROUNDING**2 + (1.2 * seen.noise) ** 2)
    for blur in _BLURS:
        if error <= enough:
            break
        other = _read(_sharpened(pixels, blur))
        other_scene = _together(_fits(other), other)
        other_error = _blurred_error(other_scene, other, pixels, blur)
        if other_error < _CLEARLY * error:
            seen, scene, error = other, other_scene, other_error
    return seen, scene


def _fits(seen: _Seen) -> list[list[Thing]]:
    return [found for piece in _pieces(seen) if (found := fits(seen.layers[piece.colour], piece))]


def _sharpened(pixels: np.ndarray, blur: float) -> np.ndarray:
    """Pixels whose blurred picture is the image: van Cittert's iteration, kept inside 0..255."""
    sharp = pixels
    for _ in range(_ROUNDS):
        sharp = np.clip(sharp + pixels - ndimage.gaussian_filter(sharp, (blur, blur, 0)), 0, 255)
    return sharp


def _blurred_error(scene: Scene, seen: _Seen, pixels: np.ndarray, blur: float) -> float:
    """Squared difference of an image and the scene's picture, blurred."""
    picture = paint(scene.things, (0, 0, scene.size, scene.size), seen.palette)
    difference = (ndimage.gaussian_filter(picture, (blur, blur, 0)) if blur else picture) - pixels
    return float(np.vdot(difference, difference))


# ---- pieces


def _read(pixels: np.ndarray) -> _Seen:
    """The nearest palette colour of every pixel, the noise of the background, and its colour."""
    distance = _NORMS - 2 * (pixels.reshape(-1, 3) @ _PALETTE.T)  # squared, less the pixel's own norm
    labels = distance.argmin(axis=1).reshape(pixels.shape[:2])
    background = pixels[labels == len(_NAMES)]
    apart = np.square(background - np.array(BACKGROUND, np.float32)).sum(axis=1)
    noise = float(np.sqrt(np.median(apart) / 2.37)) if len(apart) else 0.0  # 2.37: median of chi^2 in three dimensions
    seen = _Seen(pixels, labels, noise, {}, {})
    _match(seen, "background", labels == len(_NAMES))
    return seen


def _match(seen: _Seen, name: str, own: np.ndarray) -> None:
    """Note the colour that the inside of `own` has; the palette's where there is no inside, or no difference in earnest."""
    inside = ndimage.binary_erosion(own, _NEIGHBOURS)
    values = PALETTE[name]
    if inside.any():
        found = np.median(seen.pixels[inside], axis=0)
        if np.linalg.norm(found - values) > _SAME + 2 * seen.noise:
            values = found
    seen.palette[name] = values


def _pieces(seen: _Seen) -> list[Piece]:
    """Touching pixels of one colour, the largest first; lines a pixel wide, as edges leave them, are none."""
    pieces = []
    counts = np.bincount(seen.labels.ravel(), minlength=len(_PALETTE))
    for number, colour in enumerate(_NAMES):
        if counts[number] < _LEAST_PIXELS:
            continue
        own = seen.labels == number
        parts, _ = ndimage.label(own, structure=_NEIGHBOURS)
        core = parts * _core(own)
        sizes, cores = np.bincount(parts.ravel()), np.bincount(core.ravel())
        kept = [i for i in range(1, len(cores)) if sizes[i] >= _LEAST_PIXELS and cores[i] >= _LEAST_PIXELS // 2]
        if not kept:
            continue
        _match(seen, colour, own)
        seen.layers[colour] = layer(seen.pixels, own, seen.palette[colour], seen.palette["background"], seen.noise)
        nearest = _spread(parts, kept) if len(kept) > 1 else None
        boxes = ndimage.find_objects(core)
        for i in kept:
            rows, columns = boxes[i - 1]
            box = (columns.start, rows.start, columns.stop, rows.stop)
            pieces.append(Piece(colour, box, int(sizes[i]), None if nearest is None else nearest == i))
    return sorted(pieces, key=lambda piece: -piece.area)[:_MOST_PIECES]


def _core(own: np.ndarray) -> np.ndarray:
    """Pixels (N, N) that belong to a square of 2 x 2 of them."""
    square = own[:-1, :-1] & own[1:, :-1] & own[:-1, 1:] & own[1:, 1:]
    core = np.zeros_like(own)
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            core[rows, columns] |= square
    return core


def _spread(parts: np.ndarray, kept: list[int]) -> np.ndarray:
    """Number of the nearest kept piece (N, N)."""
    there = np.isin(parts, kept)
    places = ndimage.distance_transform_edt(~there, return_distances=False, return_indices=True)
    return np.asarray(parts[tuple(places)])


# ---- all pieces together


@dataclass(frozen=True)
class _Guess:
    """Things from back to front, the fits that each was chosen from, and the squared error of their picture."""

    things: tuple[Thing, ...]
    fits: tuple[tuple[Thing, ...], ...]
    error: float


def _together(found: list[list[Thing]], seen: _Seen) -> Scene:
    """The scene of one fit a piece whose picture is nearest to the image: better ones are taken until none is left."""
    side = len(seen.pixels)
    whole = (0, 0, side, side)
    order = _order([fits[0] for fits in found], seen)
    things = tuple(found[i][0] for i in order)
    guess = _Guess(things, tuple(tuple(found[i]) for i in order), _error(things, seen, whole))
    exact = side * side * 3 * _ROUNDING**2
    for _ in range(_SWEEPS):
        before = guess.error
        if before > exact:
            guess = _reordered(guess, seen)
        if guess.error > exact:
            guess = _refitted(guess, seen)
        if guess.error <= exact or guess.error >= before:
            break
    return Scene(guess.things, side)


def _reordered(guess: _Guess, seen: _Seen) -> _Guess:
    """The guess with two overlapping things changing places wherever that is better."""
    for i in range(len(guess.things)):
        for j in range(i):
            if _overlap(guess.things[i], guess.things[j]) is not None:
                order = list(range(len(guess.things)))
                order[i], order[j] = j, i
                box = _around_both(guess.things[i], guess.things[j])
                things, fits = tuple(guess.things[k] for k in order), tuple(guess.fits[k] for k in order)
                guess = _better(guess, _Guess(things, fits, 0.0), box, seen)
    return guess


def _refitted(guess: _Guess, seen: _Seen) -> _Guess:
    """The guess with every thing replaced by another of its fits, or a neighbour of it, wherever that is better."""
    side = len(seen.pixels)
    for i in range(len(guess.things)):
        nearby = _around(guess.things[i], side)
        for thing in (*guess.fits[i], *(new for new in nearby if new not in guess.fits[i])):
            things = (*guess.things[:i], thing, *guess.things[i + 1 :])
            box = _around_both(guess.things[i], thing)
            guess = _better(guess, replace(guess, things=things), box, seen)
    return guess


def _better(guess: _Guess, other: _Guess, box: tuple[int, int, int, int], seen: _Seen) -> _Guess:
    """The one with the smaller error, of two that differ inside `box` only."""
    gain = _error(guess.things, seen, box) - _error(other.things, seen, box)
    return replace(other, error=guess.error - gain) if gain > 1e-3 * max(1.0, guess.error) else guess


def _error(things: tuple[Thing, ...], seen: _Seen, box: tuple[int, int, int, int]) -> float:
    x1, y1, x2, y2 = box
    difference = paint(things, box, seen.palette) - seen.pixels[y1:y2, x1:x2]
    return float(np.vdot(difference, difference))


def _around_both(a: Thing, b: Thing) -> tuple[int, int, int, int]:
    return min(a.x, b.x), min(a.y, b.y), max(a.x + a.size, b.x + b.size), max(a.y + a.size, b.y + b.size)


def _around(thing: Thing, side: int) -> list[Thing]:
    """The same shape a pixel larger, smaller, or elsewhere, inside the canvas."""
    steps = [(s, x, y) for s in (-1, 0, 1) for x in (-1, 0, 1) for y in (-1, 0, 1) if (s, x, y) != (0, 0, 0)]
    moved = [replace(thing, size=thing.size + s, x=thing.x + x, y=thing.y + y) for s, x, y in steps]
    return [
        new
        for new in moved
        if new.size >= SMALLEST - 2 and min(new.x, new.y) >= 0 and max(new.x, new.y) + new.size <= side
    ]


def _order(things: list[Thing], seen: _Seen) -> list[int]:
    """Numbers from back to front: where two overlap, the one whose colour is seen there is in front."""
    waits: dict[int, set[int]] = {i: set() for i in range(len(things))}  # those that must be drawn before
    for i in range(len(things)):
        for j in range(i):
            front = _front(things[i], things[j], seen)
            if front is not None:
                waits[i if front else j].add(j if front else i)
    ordered: list[int] = []
    while waits:
        ready = min(waits, key=lambda i: (len(waits[i]), i))  # in a circle the one that waits for fewest
        del waits[ready]
        for others in waits.values():
            others.discard(ready)
        ordered.append(ready)
    return ordered


def _front(a: Thing, b: Thing, seen: _Seen) -> bool | None:
    """Whether `a` hides `b`; None where they do not overlap."""
    shared = _overlap(a, b)
    if shared is None:
        return None
    x1, y1, x2, y2 = shared
    both = _part(a, x1, x2, y1, y2) * _part(b, x1, x2, y1, y2)
    there = seen.pixels[y1:y2, x1:x2]
    error_a, error_b = (np.square(there - seen.palette[t.colour]).sum(axis=2) for t in (a, b))
    evidence = float((both * (error_b - error_a)).sum())
    return None if evidence == 0 else evidence > 0


def _overlap(a: Thing, b: Thing) -> tuple[int, int, int, int] | None:
    """What two boxes share."""
    x1, x2 = max(a.x, b.x), min(a.x + a.size, b.x + b.size)
    y1, y2 = max(a.y, b.y), min(a.y + a.size, b.y + b.size)
    return None if x1 >= x2 or y1 >= y2 else (x1, y1, x2, y2)


def _part(thing: Thing, x1: int, x2: int, y1: int, y2: int) -> np.ndarray:
    return coverage(thing.shape, thing.size)[y1 - thing.y : y2 - thing.y, x1 - thing.x : x2 - thing.x]


# ---- scores


def _covers(scene: Scene) -> np.ndarray:
    """What each thing still covers (things, N, N)."""
    covers = np.zeros((len(scene.things), scene.size, scene.size), np.float32)
    for cover, thing, left in zip(covers, scene.things, visible(scene), strict=True):
        cover[window(thing)] = left
    return covers


def _detection(number: int, scene: Scene, covers: np.ndarray, seen: _Seen, shape: tuple[int, int]) -> Detection:
    """One thing with its score."""
    thing, cover = scene.things[number], covers[number]
    others = covers.sum(axis=0) - cover > 0.02
    score = _score(thing, cover, others, seen)
    return Detection(thing.shape, thing.box, score, (cover >= 0.5)[: shape[0], : shape[1]], thing.colour)


def _score(thing: Thing, cover: np.ndarray, others: np.ndarray, seen: _Seen) -> float:
    """exp(-(wrong area / 0.3)^2 - (wrong colour / 60)^2); 0 where nothing of the thing is seen."""
    near = 2
    place = tuple(slice(max(0, s.start - near), s.stop + near) for s in window(thing))
    area = float(cover.sum())
    if area < 1:
        return 0.0
    wrong = float((np.square(cover[place] - seen.layers[thing.colour].shown[place]) * ~others[place]).sum())
    inner = cover > 0.9
    if not inner.any():
        inner = cover >= cover.max()
    off = float(np.linalg.norm(seen.pixels[inner].mean(axis=0) - PALETTE[thing.colour]))
    hidden = max(0.0, 0.5 - area / float(coverage(thing.shape, thing.size).sum()))
    return float(np.exp(-((wrong / area / _WRONG_AREA) ** 2) - (off / _WRONG_COLOUR) ** 2 - (hidden / 0.2) ** 2))
