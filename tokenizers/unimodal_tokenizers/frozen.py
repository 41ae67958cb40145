"""A vision transformer that never learns: what tokenizers take from it, or are compared with.

Letters: B images, H height, W width (pixels); N patches of one, E channels of a feature.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unimodal_tokenizers.base import Grid, TokenLayout


class FrozenEncoder(nn.Module):
    """Patch features of a vision transformer of timm. It begins as random weights: `load` gives it its own."""

    pixel_mean: Float[Tensor, "3 1 1"]
    pixel_std: Float[Tensor, "3 1 1"]

    def __init__(self, encoder: str, options: Mapping[str, Any] | None = None) -> None:
        """Args:

        encoder: name of a vision transformer in timm, without a tag of weights: nothing is downloaded.
        options: of it, as `timm.create_model` takes them: patch_size, embed_dim, depth ...
        """
        super().__init__()
        # Here, not above: timm takes seconds to import, and whoever trains on pixels never needs it.
        import timm

        if encoder not in timm.list_models(module="vision_transformer"):
            raise ValueError(f"encoder: expected a vision transformer's name in timm, without a tag, got {encoder}")
        self.name = encoder
        options = {"dynamic_img_size": True, **(options or {})}
        self.network = timm.create_model(encoder, pretrained=False, num_classes=0, **options)
        self.network.requires_grad_(False).eval()
        (p, q) = self.network.patch_embed.patch_size
        if p != q:
            raise ValueError(f"encoder: expected square patches, got {p} x {q}")
        self.layout = TokenLayout("continuous", dim=self.network.embed_dim, stride=p)
        of = self.network.pretrained_cfg  # what its pixels are normalised by
        self.register_buffer("pixel_mean", torch.tensor(of["mean"])[:, None, None], persistent=False)  # (3, 1, 1)
        self.register_buffer("pixel_std", torch.tensor(of["std"])[:, None, None], persistent=False)

    def load(self, path: Path) -> None:
        """Its weights, from a safetensors file with timm's names; a classification head is left out.

        Raises:
            ValueError: the file is missing or damaged, or does not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"encoder_weights: {path} is missing or no safetensors file ({error})") from error
        weights = {name: w for name, w in weights.items() if not name.startswith("head.")}
        own = self.network.state_dict()
        wrong = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"encoder_weights: {path} does not fit {self.name}: {', '.join(wrong[:5])}{more}")
        self.network.load_state_dict(weights)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """It stays in evaluation mode."""
        return super().train(False)

    def grid(self, height: int, width: int) -> Grid:
        """Patches of an image of `height` x `width` pixels."""
        return self.layout.grid(height, width)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N E"]:
        """What it says of each patch of images in [-1, 1]; class and register tokens are left out.

        Raises:
            ValueError: the patch does not divide the image's height and width.
        """
        self.grid(*images.shape[-2:])
        pixels = ((images + 1) / 2 - self.pixel_mean) / self.pixel_std
        return self.network.forward_features(pixels)[:, self.network.num_prefix_tokens :]
