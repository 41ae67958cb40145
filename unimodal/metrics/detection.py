"""What a detector, or a recogniser of drawn scenes, says of one object."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Detection:
    """One object in an image.

    Attributes:
        label: class name.
        box: x1, y1, x2, y2 in pixels of the image; x to the right, y downwards; x2 and y2 are outside.
        score: confidence, 0..1.
        mask: (H, W) bool, the object's pixels; None where nobody needs it.
        colour: colour name, where whoever found the object knows it.
    """

    label: str
    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None
    colour: str | None = None
