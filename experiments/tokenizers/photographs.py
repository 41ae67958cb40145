"""Real photographs that ship inside scikit-image and scikit-learn, cut into crops to train on and tiles to measure.

Letters: H, W height and width of a photograph, s side of a crop (pixels).
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from unimodal.data.images import ImageData, Pictures
from unimodal.data.source import Source
from unimodal.data.stream import Weighted

SIDE = 64
"""Pixels of a crop's and of a tile's side."""
CROPS = 4096
"""Crops that count as an epoch."""
TEST = ("astronaut", "coffee", "rocket")
"""Held out in turn."""


@cache
def photographs() -> dict[str, UInt8[np.ndarray, "H W 3"]]:
    """Nine colour photographs by name, read from the packages' own folders: nothing is downloaded."""
    import skimage
    import sklearn

    ours = Path(skimage.__file__).parent / "data"
    theirs = Path(sklearn.__file__).parent / "datasets" / "images"
    files = {name: ours / f"{name}.png" for name in ("astronaut", "chelsea", "coffee", "motorcycle_left", "ihc")}
    files |= {name: ours / f"{name}.jpg" for name in ("rocket", "hubble_deep_field")}
    files |= {name: theirs / f"{name}.jpg" for name in ("china", "flower")}
    found = {}
    for name, path in files.items():
        with Image.open(path) as image:
            found[name] = np.asarray(image.convert("RGB"))
    return found


def training(held_out: str) -> list[UInt8[np.ndarray, "H W 3"]]:
    """All photographs but one, in the order of their names."""
    return [pixels for name, pixels in sorted(photographs().items()) if name != held_out]


def tiles(pixels: UInt8[np.ndarray, "H W 3"], side: int = SIDE) -> UInt8[np.ndarray, "n side side 3"]:
    """Squares beside each other from the upper left; what is left at the other edges is left out."""
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    cut = pixels[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    return np.ascontiguousarray(cut.swapaxes(1, 2).reshape(-1, side, side, 3))


class Crops:
    """Crop i of a fixed set: drawn from every pixel of the photographs alike, mirrored or not, by i alone."""

    def __init__(self, photos: list[UInt8[np.ndarray, "H W 3"]], count: int) -> None:
        self.photos, self.count = photos, count
        areas = np.array([p.shape[0] * p.shape[1] for p in photos], float)
        self.share = areas / areas.sum()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Image.Image:
        rng = np.random.default_rng((17, index))
        photo = self.photos[int(rng.choice(len(self.photos), p=self.share))]
        y, x = (int(rng.integers(n - SIDE + 1)) for n in photo.shape[:2])
        crop = photo[y : y + SIDE, x : x + SIDE]
        return Image.fromarray(np.ascontiguousarray(crop[:, ::-1] if rng.integers(2) else crop))


class PhotographData(ImageData):
    """Crops of all photographs but one; the tiles of that one.

    Args:
        held_out: its name.
        batch_size: crops of a batch.
        seed: of their order.
    """

    def __init__(self, held_out: str, batch_size: int = 16, seed: int = 0) -> None:
        super().__init__((SIDE, SIDE), batch_size, seed)
        if held_out not in photographs():
            raise ValueError(f"held_out: expected one of {', '.join(sorted(photographs()))}, got {held_out}")
        self.held_out = held_out

    def training_sources(self) -> list[Weighted]:
        """Crops to train on."""
        return [Weighted(Pictures(CROPS, Crops(training(self.held_out), CROPS).__getitem__, self.seed), 1.0)]

    def validation_sources(self) -> list[Source]:
        """Tiles that no training sees."""
        pixels = tiles(photographs()[self.held_out])
        return [Pictures(len(pixels), lambda index: Image.fromarray(pixels[index]), self.seed)]


def held_out_tiles(name: str) -> list[UInt8[Tensor, "3 s s"]]:
    """Tiles of a photograph, 8 bit."""
    return [torch.from_numpy(one).permute(2, 0, 1).contiguous() for one in tiles(photographs()[name])]


def training_tiles(held_out: str) -> list[UInt8[Tensor, "3 s s"]]:
    """Tiles of all photographs that are trained on."""
    return [tile for name in sorted(photographs()) if name != held_out for tile in held_out_tiles(name)]
