"""What image features are: a preparation of each image in a loader's worker, a network, and a record of both.

Letters: B images, H W their pixels, D the width of the features, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor, nn

from unimodal.files import file_sha256

Preparation = Callable[[Image.Image], Tensor]
"""An image as a tensor (3, H, W) that the network takes; small and picklable, because workers hold it."""


def as_drawn(image: Image.Image) -> UInt8[Tensor, "3 H W"]:
    """The pixels as they are, 0..255: what is resized on the device is prepared so."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def centre_square(image: Image.Image) -> Image.Image:
    """The largest square in the middle; an odd remainder stays at the right or below."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


class ImageFeatures(nn.Module, ABC):
    """Features of images, and exactly how they are made.

    Attributes:
        name: in results; says network, and layer where there are several.
        width: D.
        preparation: what a worker does with each image.
        published: names that measures of these features go by: "frechet" -> "fid". A measure that is not here is named
            after the features, so that it is taken for no other.
    """

    name: str
    width: int
    preparation: Preparation
    published: Mapping[str, str]

    def __init__(
        self, name: str, width: int, preparation: Preparation, published: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self.name, self.width, self.preparation, self.published = name, width, preparation, dict(published or {})

    def prepare(self, image: Image.Image) -> Shaped[Tensor, "3 H W"]:
        """One image as the network takes it."""
        return self.preparation(image)

    @abstractmethod
    def forward(self, pixels: Shaped[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Features of prepared images."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What the features depend on: weights and their SHA-256, resize, antialias, quantisation, dtype."""

    def of_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Features of images on a device, each prepared as a worker would."""
        if self.preparation is not as_drawn:
            arrays = images.permute(0, 2, 3, 1).cpu().numpy()
            prepared = torch.stack([self.prepare(Image.fromarray(array)) for array in arrays])
            return self(prepared.to(images.device))
        return self(images)

    def measure(self, kind: str) -> str:
        """What a measure of these features is called."""
        return self.published.get(kind, f"{kind}_{self.name}")

    def train(self, mode: bool = True) -> ImageFeatures:
        """Never: features are those of a network at rest."""
        return super().train(False)


class LogitFeatures(ImageFeatures):
    """Features of a classifier, from which its logits follow."""

    @abstractmethod
    def logits(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        """Logits of the C classes, as the Inception score takes them."""


class TextImageFeatures(ImageFeatures):
    """Features of a network that embeds texts in the same space."""

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Embeddings of texts."""


class PixelFeatures(ImageFeatures):
    """The pixels of the shrunk image, 0..1: for digits, shapes, tests and demos. No measure of them is a FID.

    Args:
        size: side in pixels after shrinking by area averages; the width is 3 size^2.
    """

    def __init__(self, size: int = 8) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {size}")
        super().__init__(f"pixels{3 * size * size}", 3 * size * size, Shrink(size))
        self.size = size

    def forward(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Row by row, channel by channel."""
        return pixels.flatten(1).float() / 255

    def spec(self) -> dict[str, Any]:
        """The size."""
        return {"name": self.name, "resize": f"PIL box to {self.size}x{self.size}", "quantised": "8 bit, rounded"}


class Shrink:
    """Area averages of the image in `size` x `size` boxes, 8 bit.

    Args:
        size: side in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 H W"]:
        """Shrunk, whatever its shape was."""
        return as_drawn(image.convert("RGB").resize((self.size, self.size), Image.Resampling.BOX))


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Give a network its weights; ValueError in one line where names or shapes differ."""
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    # Written before batch norm counted its batches, and of no use at rest.
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    found = {name: tuple(value.shape) for name, value in state.items()}
    missing = sorted(expected.keys() - found.keys() - counters)
    more = sorted(found.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if missing or more or other:
        words = [_some("lacks", missing), _some("also has", more), _some("has another shape of", other)]
        raise ValueError(f"weights: {path} does not fit {type(network).__name__}: it {', '.join(filter(None, words))}")
    network.load_state_dict(dict(state), strict=False)


def _some(what: str, names: Sequence[str]) -> str:
    return f"{what} {names[0]}{f' and {len(names) - 1} others' if len(names) > 1 else ''}" if names else ""


def file_record(path: Path) -> dict[str, str]:
    """Name and SHA-256 of a file of weights."""
    return {"file": path.name, "sha256": file_sha256(path)}
