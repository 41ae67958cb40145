"""Features of the Inception network that FID is defined by, with each of the resizes that published numbers were made with.

The network is torch-fidelity's port of inception-2015-12-05. Letters: B images, H W their pixels, D the width, C = 1008
classes.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from unimodal.files import read_state
from unimodal.metrics.features import (
    LogitFeatures,
    Preparation,
    as_drawn,
    centre_square,
    file_record,
    load_strictly,
)

SIDE = 299
HUB = "torch-fidelity"
"""Given as weights, has torch-fidelity download its own file."""

HUB_FILE = "weights-inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d"
"""First digits of the published file's SHA-256, which its name ends in."""


def is_published(sha256: str) -> bool:
    """Whether a file of this hash holds the weights that published numbers were made with."""
    return sha256.startswith(PUBLISHED_SHA256)


_STAGES = {
    "64": ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    "192": ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    "768": ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    "2048": ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}
LAYERS = {**{name: int(name) for name in _STAGES}, "logits_unbiased": 1008}
"""Layer -> width."""


class InceptionResize(ABC):
    """How an image becomes the 299 x 299 numbers that the network reads.

    Attributes:
        name: in options and records.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def preparation(self) -> Preparation:
        """What a worker does with an image."""

    @abstractmethod
    def numbers(self, pixels: Shaped[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 299 299"]:
        """What the first convolution takes, of prepared images."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Kernel, antialias, quantisation and range."""


class TensorFlowResize(InceptionResize):
    """TensorFlow 1's bilinear resize inside the graph, aliased and with its corner at the corner: ADM, torch-fidelity."""

    name = "tf1"

    @property
    def preparation(self) -> Preparation:
        """Nothing: the device resizes."""
        return as_drawn

    def numbers(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 299 299"]:
        """(x - 128) / 128 of the resized floats."""
        resized = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(SIDE, SIDE), align_corners=False)
        return (resized - 128) / 128

    def spec(self) -> dict[str, Any]:
        """TensorFlow 1's."""
        return {
            "resize": "tf1", "kernel": "bilinear", "antialias": False, "quantised": "no", "range": "(x - 128) / 128"
        }  # fmt: skip


def _clean(image: Image.Image) -> Float[Tensor, "3 299 299"]:
    channels = np.asarray(image.convert("RGB"), dtype=np.float32)
    resized = [
        np.asarray(Image.fromarray(channels[:, :, c]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for c in range(3)
    ]
    return torch.from_numpy(np.stack(resized))


class CleanResize(InceptionResize):
    """Pillow's bicubic with antialias, a float channel at a time, neither rounded nor clipped: clean-fid."""

    name = "clean"

    @property
    def preparation(self) -> Preparation:
        """All of it."""
        return _clean

    def numbers(self, pixels: Float[Tensor, "B 3 299 299"]) -> Float[Tensor, "B 3 299 299"]:
        """(x - 128) / 128."""
        return (pixels - 128) / 128

    def spec(self) -> dict[str, Any]:
        """clean-fid's."""
        return {
            "resize": "clean", "kernel": "bicubic", "antialias": True, "quantised": "no", "range": "(x - 128) / 128"
        }  # fmt: skip


class TorchResize(InceptionResize):
    """torch's bilinear without antialias: pytorch-fid, whose range is (0, 255) to (-1, 1)."""

    name = "pytorch"

    @property
    def preparation(self) -> Preparation:
        """Nothing: the device resizes."""
        return as_drawn

    def numbers(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 299 299"]:
        """2 x / 255 - 1."""
        return 2 * F.interpolate(pixels.float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1

    def spec(self) -> dict[str, Any]:
        """pytorch-fid's."""
        return {
            "resize": "pytorch", "kernel": "bilinear", "antialias": False, "quantised": "no", "range": "2 x / 255 - 1"
        }  # fmt: skip


def _crop8(image: Image.Image) -> UInt8[Tensor, "3 299 299"]:
    return as_drawn(centre_square(image.convert("RGB")).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


class CroppedResize(InceptionResize):
    """Centre crop, Pillow's bicubic with antialias in 8 bit: boomb0om/text2image-benchmark, whose COCO file it is for."""

    name = "crop8"

    @property
    def preparation(self) -> Preparation:
        """All of it."""
        return _crop8

    def numbers(self, pixels: UInt8[Tensor, "B 3 299 299"]) -> Float[Tensor, "B 3 299 299"]:
        """2 x / 255 - 1."""
        return 2 * (pixels.float() / 255) - 1

    def spec(self) -> dict[str, Any]:
        """That benchmark's."""
        return {
            "resize": "crop8", "crop": "centre square", "kernel": "bicubic", "antialias": True, "quantised": "8 bit",
            "range": "2 x / 255 - 1",
        }  # fmt: skip


RESIZES: dict[str, type[InceptionResize]] = {
    kind.name: kind for kind in (TensorFlowResize, CleanResize, TorchResize, CroppedResize)
}
"""Resize by name."""


class InceptionFeatures(LogitFeatures):
    """A layer of Inception, averaged over its positions.

    Args:
        weights: file of the published weights (`pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, or torch-fidelity's
            `weights-inception-2015-12-05-6726825d.pth`), or `torch-fidelity`, which downloads the latter.
        resize: how images become 299 x 299.
        layer: one of `LAYERS`; only 2048 of the published weights makes a FID, told by the file's hash.

    Raises:
        ValueError: an unknown layer, or a file that is missing or does not fit.
    """

    network: Any

    def __init__(self, weights: Path | str = HUB, resize: InceptionResize | None = None, layer: str = "2048") -> None:
        if layer not in LAYERS:
            raise ValueError(f"layer: expected one of {', '.join(LAYERS)}, got {layer}")
        resize = resize or TensorFlowResize()
        published = {
            "frechet": "fid", "kernel": "kid", "precision": "precision", "recall": "recall", "density": "density",
            "coverage": "coverage", "inception_score": "inception_score",
        }  # fmt: skip
        network, record = _network(weights)
        known = layer == "2048" and is_published(record["sha256"])
        super().__init__(f"inception{layer}", LAYERS[layer], resize.preparation, published if known else None)
        self.layer, self.resize, self.network, self.weights = layer, resize, network, record

    def forward(self, pixels: Shaped[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Features of prepared images, in float32."""
        x = self.resize.numbers(pixels)
        for stage, blocks in _STAGES.items():
            for block in blocks:
                x = getattr(self.network, block)(x)
            if stage == self.layer:
                return x.mean((2, 3))
        return x.mean((2, 3)) @ self.network.fc.weight.T

    def logits(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B 1008"]:
        """Logits without bias, of the last pooled layer or of themselves."""
        if self.layer not in ("2048", "logits_unbiased"):
            raise ValueError(f"layer: expected 2048 or logits_unbiased for an Inception score, got {self.layer}")
        return features @ self.network.fc.weight.T if self.layer == "2048" else features

    def spec(self) -> dict[str, Any]:
        """Weights, layer, resize, dtype."""
        return {
            "name": self.name,
            "network": "inception-2015-12-05, torch-fidelity's port",
            "weights": self.weights,
            "published_weights": is_published(self.weights["sha256"]),
            "layer": self.layer,
            **self.resize.spec(),
            "dtype": str(self.network.fc.weight.dtype).removeprefix("torch."),
        }


def _network(weights: Path | str) -> tuple[Any, dict[str, str]]:
    """The network at rest, and the record of its file."""
    if str(weights) == HUB:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        path = Path(torch.hub.get_dir()) / "checkpoints" / HUB_FILE
    else:
        network, path = EmptyInception(), Path(weights)
        load_strictly(network, read_state(path), path)
    return network.requires_grad_(False).eval(), file_record(path)


class EmptyInception(FeatureExtractorInceptionV3):
    """The network before its weights come: the constructor of the original unpickles the file that it is given."""

    def __init__(self) -> None:
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads nothing where nothing is given."""
        return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None
