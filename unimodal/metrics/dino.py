"""Features of DINOv2, whose Frechet distance is FD-DINOv2 (Stein et al., arXiv 2306.04675).

Letters: B images, H W their pixels, D the width, G the side of the weights' grid of positions, g of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float, UInt8
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal.files import read_state
from unimodal.metrics.features import ImageFeatures, as_drawn, file_record, load_strictly

SIDE, PATCH = 224, 14
MODEL = "vit_large_patch14_dinov2"
HUB = "lvd142m"
"""Given as weights, has timm download its own copy of them."""

_OFFSET = 0.1  # DINOv2's, added to the new side before positions are interpolated


class DinoFeatures(ImageFeatures):
    """The class token behind DINOv2's last norm, of images resized to 224 x 224.

    As EDM2's `calculate_metrics.py` has it: bicubic with antialias on floats, neither rounded nor clipped.

    Args:
        weights: file (DINOv2's own `dinov2_vitl14_pretrain.pth`, or timm's .safetensors), or `lvd142m`, which timm
            downloads.
        model: timm's name; FD-DINOv2 is that of `vit_large_patch14_dinov2` alone.

    Raises:
        ValueError: an unknown model, or a file that is missing or does not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path | str = HUB, model: str = MODEL) -> None:
        if not (timm.is_model(model) and model.endswith("_dinov2")):
            raise ValueError(f"model: expected a name of timm ending in _dinov2, such as {MODEL}, got {model}")
        published = {"frechet": "fd_dinov2", "kernel": "kd_dinov2"} if model == MODEL else None
        if str(weights) == HUB:
            network = timm.create_model(f"{model}.{HUB}", pretrained=True, num_classes=0)
            record = {"hub": f"{model}.{HUB}"}
        else:
            path = Path(weights)
            state = read_state(path)
            network = timm.create_model(model, num_classes=0)
            load_strictly(network, checkpoint_filter_fn(state, network), path)
            record = file_record(path)
        super().__init__(f"dinov2_{network.embed_dim}", network.embed_dim, as_drawn, published)
        self.model, self.weights = model, record
        positions = shrunk_positions(network.pos_embed.detach(), SIDE // PATCH)
        network.set_input_size((SIDE, SIDE))
        network.pos_embed = nn.Parameter(positions)
        self.network = network.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1), persistent=False)

    def forward(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Class tokens."""
        x = F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True) / 255
        return self.network((x - self.mean) / self.std)

    def spec(self) -> dict[str, Any]:
        """Model, weights, resize, dtype."""
        return {
            "name": self.name, "network": f"{self.model}, timm", "weights": self.weights, "layer": "class token",
            "resize": f"torch to {SIDE}", "kernel": "bicubic", "antialias": True, "quantised": "no",
            "range": "ImageNet mean and standard deviation",
            "dtype": str(self.network.pos_embed.dtype).removeprefix("torch."),
        }  # fmt: skip


def shrunk_positions(positions: Float[Tensor, "1 _ D"], side: int) -> Float[Tensor, "1 _ D"]:
    """Position embeddings of a class token and G x G patches for g x g patches, as DINOv2's own code makes them.

    Bicubic without antialias, at the scale (g + 0.1) / G. timm's way, with antialias, gives other features.
    """
    token, patches = positions[:, :1], positions[:, 1:]
    grid = round(patches.shape[1] ** 0.5)
    if grid == side:
        return positions
    square = patches.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    scale = (side + _OFFSET) / grid
    shrunk = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, shrunk.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
