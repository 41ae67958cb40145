"""Distances between images as a frozen network sees them: what a reconstruction is trained on, and is scored by.

Letters: B images, H height, W width (pixels); l a layer of the network, C its channels, h, w its grid.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal.files import read_state
from unimodal.metrics.features import file_record, load_strictly

SMALLEST = {"alex": 31, "vgg": 16, "squeeze": 17}
"""Pixels that an image's sides need, so that something is left of it at the last layer."""


class Frozen(nn.Module):
    """A network at rest: it moves with its owner to a device, and is no part of its weights, checkpoints and averages."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = (network.requires_grad_(False).eval(),)  # a tuple: modules inside it are not registered

    @property
    def network(self) -> nn.Module:
        """What is held."""
        return self._held[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)


class Perceptual(nn.Module, ABC):
    """A distance of images that has a gradient: 0 where both are the same."""

    @abstractmethod
    def forward(self, images: Float[Tensor, "B 3 H W"], others: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """How far each image, in [-1, 1], lies from the other."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What the distance depends on: network, weights and their SHA-256, layers."""


class LPIPS(Perceptual):
    """Learned perceptual similarity (arXiv 1801.03924, eq. 1), torchmetrics' port, version 0.1 of the linear heads.

    The heads come with torchmetrics; the network's weights, torchvision's of ImageNet, come from a file.
    """

    def __init__(self, weights: Path, network: Literal["alex", "vgg", "squeeze"] = "vgg") -> None:
        """Args:

        weights: file of torchvision's AlexNet, VGG-16 or SqueezeNet 1.1: .safetensors, or .pth as torchvision has it.
        network: which of them; scores of different networks do not compare.
        """
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS  # the public metric would download the weights

        net = _LPIPS(net=network, pnet_rand=True)
        _load_torchvision(net.net, read_state(Path(weights)), Path(weights))
        self._record = {"name": "lpips", "network": network, "version": "0.1", **file_record(Path(weights))}
        self._smallest = SMALLEST[network]
        self.frozen = Frozen(net)

    def forward(self, images: Float[Tensor, "B 3 H W"], others: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """How far each image, in [-1, 1], lies from the other.

        Raises:
            ValueError: images too small for the network.
        """
        if min(images.shape[-2:]) < self._smallest:
            found = " x ".join(map(str, images.shape[-2:]))
            raise ValueError(f"LPIPS: expected images of at least {self._smallest} pixels a side, got {found}")
        return self.frozen.network(images, others).flatten()

    def spec(self) -> dict[str, Any]:
        """Network, heads and weights."""
        return dict(self._record)


class TimmDistance(Perceptual):
    """sum_l 1 / (h w) sum_hw |f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)||^2: LPIPS with any network of timm and no heads.

    (arXiv 1801.03924, eq. 1, every channel weighing 1.)
    """

    def __init__(
        self, network: str, weights: Path, layers: Sequence[int] = (-1,), options: Mapping[str, Any] | None = None
    ) -> None:
        """Args:

        network: name in timm, without a tag of weights: nothing is downloaded.
        weights: its file, with timm's names: .safetensors, or .pth.
        layers: whose features are compared, numbered as timm's `feature_info`; -1 the last.
        options: of the network, as `timm.create_model` takes them: patch_size, img_size ...
        """
        super().__init__()
        self.frozen = Frozen(TimmFeatures(network, Path(weights), layers, options))
        self._record = {"name": "timm", "network": network, "layers": list(layers), **file_record(Path(weights))}

    def forward(self, images: Float[Tensor, "B 3 H W"], others: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """How far each image, in [-1, 1], lies from the other."""
        pairs = zip(self.frozen.network(images), self.frozen.network(others), strict=True)
        return torch.stack([unit_distance(f, g) for f, g in pairs]).sum(0)

    def spec(self) -> dict[str, Any]:
        """Network, layers and weights."""
        return dict(self._record)


def unit_distance(f: Float[Tensor, "B C h w"], g: Float[Tensor, "B C h w"]) -> Float[Tensor, " B"]:
    """|f / |f| - g / |g||^2 over channels, averaged over the grid (arXiv 1801.03924, eq. 1, w_l = 1)."""
    return (F.normalize(f, dim=1) - F.normalize(g, dim=1)).square().sum(1).mean((1, 2))


class TimmFeatures(nn.Module):
    """Features of some layers of a network of timm, each as a map `(B, C, h, w)`."""

    pixel_mean: Float[Tensor, "3 1 1"]
    pixel_std: Float[Tensor, "3 1 1"]

    def __init__(
        self, name: str, weights: Path, layers: Sequence[int], options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        import timm  # here: it takes seconds

        if not timm.is_model(name):
            raise ValueError(f"network: expected a name in timm, without a tag, got {name}")
        vit = name in timm.list_models(module="vision_transformer")
        options = ({"dynamic_img_size": True} if vit else {}) | dict(options or {})
        network = timm.create_model(name, pretrained=False, num_classes=0, **options)
        if not hasattr(network, "forward_intermediates"):
            raise ValueError(f"network: expected one whose layers timm can show, got {name}")
        own = network.state_dict()
        state = read_state(weights)
        head = {key for key in state if key not in own and key.startswith(("head.", "fc.", "classifier."))}
        load_strictly(network, {key: value for key, value in state.items() if key not in head}, weights)
        depth = len(network.feature_info)
        if not layers or any(not -depth <= layer < depth for layer in layers):
            raise ValueError(f"layers: expected some of {-depth} to {depth - 1} of {name}, got {list(layers)}")
        self.network, self.layers = network, sorted({layer % depth for layer in layers})
        self.channels = [network.feature_info[layer]["num_chs"] for layer in self.layers]
        of = network.pretrained_cfg
        self.register_buffer("pixel_mean", torch.tensor(of["mean"])[:, None, None], persistent=False)  # (3, 1, 1)
        self.register_buffer("pixel_std", torch.tensor(of["std"])[:, None, None], persistent=False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Features of images in [-1, 1], normalised as the network was trained with.

        Raises:
            ValueError: a vision transformer's patch does not divide the image.
        """
        embed = getattr(self.network, "patch_embed", None)
        for side, patch in zip(images.shape[-2:], getattr(embed, "patch_size", (1, 1)), strict=True):
            if side % patch:
                raise ValueError(f"image size: expected multiples of the network's patch {patch}, got {side} pixels")
        pixels = ((images + 1) / 2 - self.pixel_mean) / self.pixel_std
        return self.network.forward_intermediates(pixels, indices=self.layers, intermediates_only=True)


def _load_torchvision(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Weights under torchvision's `features.3.weight` into slices, which keep the numbers of the layers."""
    # slice2.3.weight and slices.1.3.weight are both 3.weight there
    places = {re.sub(r"^slice(s\.)?\d+\.", "", name): name for name in network.state_dict()}
    given = {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}
    load_strictly(network, {places.get(name, name): value for name, value in given.items()}, path)
