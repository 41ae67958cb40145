"""How often the recogniser reads a scene right: rendered, noisy, blurred, off in colour; and how fast.

`python -m experiments.shapes.recogniser --out experiments/shapes/results/recogniser.json`
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image, ImageFilter

from unimodal.data.shapes import SHAPES_KINDS, Scene, ShapesSource, Split, Thing, coverage, recognise, render, visible
from unimodal.files import write_atomically
from unimodal.metrics.detection import Detection

Spoil = Callable[[Image.Image, np.random.Generator], Image.Image]

CERTAIN = 0.3
"""Least score of what counts as found, GenEval's threshold."""
SIZES = {32: 10_000, 48: 500, 64: 500, 128: 300, 256: 100}
"""Side of a scene in pixels -> scenes, all freshly drawn."""
SPOILT = 1000


def scenes(size: int, number: int, seed: int) -> Iterator[Scene]:
    """The last scene of documents of every kind, from both splits in turn."""
    sources = [ShapesSource(kind, split, size, number, seed) for kind in SHAPES_KINDS for split in get_args(Split)]
    for i in range(number):
        yield [s for s, _ in sources[i % len(sources)].draft(i, np.random.default_rng()) if isinstance(s, Scene)][-1]


def noise(sigma: float) -> Spoil:
    """Gaussian noise on every value, `sigma` of 255."""

    def spoil(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        values = np.asarray(image, np.float64)
        return Image.fromarray(np.clip(np.rint(values + rng.normal(0, sigma, values.shape)), 0, 255).astype(np.uint8))

    return spoil


def blur(radius: float) -> Spoil:
    """Pillow's Gaussian blur."""
    return lambda image, rng: image.filter(ImageFilter.GaussianBlur(radius))


def tint(sigma: float) -> Spoil:
    """One Gaussian offset a channel on the whole image, `sigma` of 255."""

    def spoil(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        values = np.asarray(image, np.float64) + rng.normal(0, sigma, 3)
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))

    return spoil


SPOILS: dict[str, Spoil] = {
    **{f"noise {sigma}": noise(sigma) for sigma in (5, 10, 20, 30, 40)},
    **{f"blur {radius}": blur(radius) for radius in (0.5, 0.7, 1.0, 1.25, 1.5)},
    **{f"tint {sigma}": tint(sigma) for sigma in (5, 10, 20)},
    "blur 0.7, noise 5": lambda image, rng: noise(5)(blur(0.7)(image, rng), rng),
}


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def is_right(scene: Scene, found: Sequence[Detection]) -> bool:
    """Whether as many things are found as there are, each with shape and colour, and its box.

    A box is right at an intersection over union of 0.9, or 0.6 where the thing is partly covered.
    """
    free = list(found)
    for thing, left in zip(scene.things, visible(scene), strict=True):
        covered = bool(left.sum() < 0.999 * coverage(thing.shape, thing.size).sum())
        match = next((d for d in free if _matches(d, thing, 0.6 if covered else 0.9)), None)
        if match is None:
            return False
        free.remove(match)
    return not free


def _matches(found: Detection, thing: Thing, least: float) -> bool:
    return (found.label, found.colour) == thing.kind and iou(found.box, thing.box) >= least


def measure(size: int, number: int, seed: int, spoil: Spoil | None = None) -> dict[str, Any]:
    """Scenes read right, the same without looking at boxes, the mean score, and scenes a second (processor time)."""
    right = named = extra = 0
    spent, scores = 0.0, []
    for i, scene in enumerate(scenes(size, number, seed)):
        image = render(scene)
        if spoil is not None:
            image = spoil(image, np.random.default_rng((seed, i)))
        start = time.process_time()
        found = [detection for detection in recognise(image) if detection.score > CERTAIN]
        spent += time.process_time() - start
        right += is_right(scene, found)
        named += sorted(t.kind for t in scene.things) == sorted((d.label, str(d.colour)) for d in found)
        extra += max(0, len(found) - len(scene.things))
        scores += [detection.score for detection in found]
    return {
        "size": size, "scenes": number, "right": right / number, "wrong_scenes": number - right, "names": named / number,
        "extra_things": extra, "mean_score": round(float(np.mean(scores)), 4) if scores else None,
        "scores_above_0.9": round(float(np.mean(np.array(scores) > 0.9)), 4) if scores else None,
        "scenes_per_second": round(number / spent, 1),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything, print it line by line, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=1, help="of the scenes")
    parser.add_argument("--share", type=float, default=1.0, help="share of the scenes, for a quick look")
    options = parser.parse_args(arguments)
    rows: dict[str, dict[str, Any]] = {}

    def note(name: str, size: int, number: int, spoil: Spoil | None) -> None:
        rows[name] = measure(size, max(1, round(number * options.share)), options.seed, spoil)
        print(name, json.dumps(rows[name]), flush=True)

    for size, number in SIZES.items():
        note(f"clean {size}", size, number, None)
    for name, spoil in SPOILS.items():
        note(name, 32, SPOILT, spoil)
    machine = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
    result = {"seed": options.seed, "share": options.share, "certain": CERTAIN, "machine": machine, "rows": rows}
    write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
