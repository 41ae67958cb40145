"""Images whose verdicts are known: what GenEval's detector and colour classifier must say before their scores count.

They catch what has gone wrong silently elsewhere: confidences far too low on one kind of GPU (djghosh13/geneval issue 15),
swapped red and blue, damaged or mistaken weights. CLIP's activation is checked where its weights are loaded.

**None of these expectations was ever run on the real weights**: there were none where this was written. They are what any
detector of COCO's classes and any CLIP ViT-L/14 should satisfy by a wide margin, not frozen outputs:

- a portrait (Grace Hopper, public domain, part of matplotlib): one person above the counting threshold, and none of the
  other classes but a tie; the portrait beside its mirror image: two persons; grey: nothing above the counting threshold;
- discs in six plain colours: each is called by its colour;
- on a GPU, the portrait's objects and scores are those of the CPU within 0.02.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from matplotlib import cbook
from PIL import Image, ImageOps

from unimodal.metrics.detection import Detection
from unimodal.metrics.geneval import Thresholds

PLAIN = {
    "red": (220, 20, 20), "green": (20, 150, 40), "blue": (20, 50, 220), "yellow": (250, 230, 30), "black": (5, 5, 5),
    "white": (252, 252, 252),
}  # fmt: skip
"""Colours nobody calls otherwise, RGB."""
TOLERANCE = 0.02
"""Of a score between CPU and GPU."""
_SIDE = 224


@runtime_checkable
class Detector(Protocol):
    """Finds objects; `Mask2FormerDetector` is one."""

    def detect(
        self, images: Sequence[Image.Image], least: Sequence[float], masks: Sequence[bool]
    ) -> list[list[Detection]]:
        """What scores more than `least` in each image."""
        ...

    def spec(self) -> dict[str, Any]:
        """What its results depend on."""
        ...


@runtime_checkable
class ColourNamer(Protocol):
    """Names colours of objects; `ClipColours` is one."""

    def names(self, objects: Sequence[tuple[Image.Image, Detection]]) -> list[str]:
        """A colour an object."""
        ...

    def spec(self) -> dict[str, Any]:
        """What its results depend on."""
        ...


def portrait() -> Image.Image:
    """The portrait that matplotlib ships."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        return image.convert("RGB")


def beside_its_mirror(image: Image.Image) -> Image.Image:
    """Twice as wide."""
    pair = Image.new("RGB", (2 * image.width, image.height))
    pair.paste(image, (0, 0))
    pair.paste(ImageOps.mirror(image), (image.width, 0))
    return pair


def disc(colour: tuple[int, int, int]) -> tuple[Image.Image, Detection]:
    """A disc on a chequered ground that the mask must hide, and what a detector would say of it."""
    y, x = np.mgrid[:_SIDE, :_SIDE]
    inside = (x - _SIDE / 2) ** 2 + (y - _SIDE / 2) ** 2 < (0.4 * _SIDE) ** 2
    ground = np.where((((x // 16) + (y // 16)) % 2 == 0)[..., None], (200, 60, 180), (60, 200, 190))
    pixels = np.where(inside[..., None], colour, ground).astype(np.uint8)
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Image.fromarray(pixels), Detection("sports ball", box, 1.0, inside)


def check(detector: Detector, colours: ColourNamer, reference: Callable[[], Detector] | None = None) -> None:
    """Look at all of them.

    Args:
        detector: what scores will come from.
        colours: the same.
        reference: the same detector on a CPU, made when it is needed; None where `detector` is on one.

    Raises:
        ValueError: something came out wrong; says what.
    """
    wrong = [*_objects(detector), *_colours(colours)]
    if reference is not None:
        wrong += _differences(detector, reference())
    if wrong:
        raise ValueError(f"--self-test: known images came out wrong, so no score can be trusted: {'; '.join(wrong)}")


def _objects(detector: Detector) -> list[str]:
    certain = Thresholds().counting
    one = portrait()
    images = {"portrait": one, "two portraits": beside_its_mirror(one), "grey": Image.new("RGB", one.size, "#808080")}
    expected = {"portrait": 1, "two portraits": 2, "grey": 0}
    found = detector.detect(list(images.values()), [certain] * len(images), [False] * len(images))
    wrong = []
    for name, detections in zip(images, found, strict=True):
        counts = Counter(detection.label for detection in detections)
        others = sorted(set(counts) - {"person", "tie"}) if expected[name] else sorted(counts)
        if counts["person"] != expected[name] or others:
            said = ", ".join(f"{number} {label}" for label, number in sorted(counts.items())) or "nothing"
            wrong.append(f"{name}: expected {expected[name]} person, found {said}")
    return wrong


def _colours(colours: ColourNamer) -> list[str]:
    names = colours.names([disc(rgb) for rgb in PLAIN.values()])
    return [f"a {right} disc is called {name}" for right, name in zip(PLAIN, names, strict=True) if name != right]


def _differences(detector: Detector, reference: Detector) -> list[str]:
    least, image = Thresholds().score, portrait()
    ours, theirs = (
        sorted(((d.label, d.score) for d in one.detect([image], [least], [False])[0]), key=lambda pair: -pair[1])
        for one in (detector, reference)
    )
    near = [d for d in theirs if d[1] > least + TOLERANCE]  # those at the threshold may be on either side of it
    missing = [d for d in near if not any(d[0] == o[0] and abs(d[1] - o[1]) <= TOLERANCE for o in ours)]
    return [f"the CPU finds {label} at {score:.2f} in the portrait, this device does not" for label, score in missing]
