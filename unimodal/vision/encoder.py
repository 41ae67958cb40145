"""A vision network of timm whose features the backbone reads, and the connector between the two.

LLaVA (arXiv 2304.08485), Janus (arXiv 2410.13848), BAGEL (arXiv 2505.14683).

Letters: B images, H, W their pixels, h, w the grid of their features, D channels of a feature, C width of the backbone,
T features of all images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal.files import read_state
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout

HUB = "hub"
"""Given as weights, has timm download its own: `hub`, or `hub:TAG` for one of several."""

CLASSIFIER = ("head.", "fc_norm.")  # parts of a network that features never pass
RESERVED = (  # what `timm.create_model` takes beside the network's own settings
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn",
    "checkpoint_path", "cache_dir", "num_classes", "global_pool", "features_only", "scriptable",
)  # fmt: skip


class VisionEncoder(nn.Module):
    """Features of the last layer of a vision transformer or convnet of timm, one a patch; class tokens are left out.

    It never drops anything and its batch norms keep their statistics: a document does not depend on its neighbours. Random
    weights unless `load` is called.

    Args:
        name: timm's name of the architecture, without a tag of weights.
        settings: of the architecture, as `timm.create_model` takes them (`img_size`, `dynamic_img_size`, `depth` ...).
        size: (height, width) in pixels that images are resized to before they are read; None leaves them as they are.
        connector: from features to the backbone's width: one matrix, or two with a GELU between (LLaVA-1.5, 2310.03744).

    Raises:
        ValueError: an unknown name, or settings that timm does not take.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        settings: dict[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        connector: Literal["linear", "mlp"] = "mlp",
    ) -> None:
        super().__init__()
        import timm  # here: it takes a second, which models without an encoder need not wait for

        if "." in name or not timm.is_model(name):
            raise ValueError(f"vision.name: expected an architecture of timm without a tag of weights, got {name}")
        self.name, self.settings, self.size, self.kind = name, dict(settings or {}), size, connector
        for key in RESERVED:
            if key in self.settings:
                raise ValueError(f"vision.settings: expected the network's own, got {key}")
        self.network: Any = self._build(name)  # timm says of no network what it has
        info = self.network.feature_info[-1]
        self.layout = TokenLayout("continuous", dim=self.network.num_features, stride=info["reduction"])
        for key, values in zip(("mean", "std"), self._scale(self.network), strict=True):
            self.register_buffer(key, values)
        if size is not None:
            self.grid(*size)

    def _build(self, name: str, **pretrained: Any) -> Any:
        import timm

        try:
            # Without pooling, so that nothing is built which only a classifier would read.
            network = timm.create_model(name, num_classes=0, global_pool="", **pretrained, **self.settings)
        except (TypeError, AssertionError) as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"vision.settings: expected what {name} takes, got {self.settings} ({line})") from error
        for key, parameter in network.named_parameters():
            parameter.requires_grad_(not key.startswith(CLASSIFIER))
        return network.eval()

    @staticmethod
    def _scale(network: Any) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
        """Mean and deviation, of pixels from 0 to 1, that the network's weights were trained with."""
        mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        return mean, std

    def load(self, source: str) -> None:
        """Weights from a file in timm's format, or `hub` (`hub:TAG`) to have timm download its own.

        Position embeddings and patches are resized as timm does it.

        Raises:
            ValueError: the file is missing or damaged, or does not fit the architecture.
        """
        hub, _, tag = source.partition(":")
        try:
            if hub == HUB:
                network = self._build(f"{self.name}.{tag}" if tag else self.name, pretrained=True)
                for own, given in zip((self.mean, self.std), self._scale(network), strict=True):
                    own.copy_(given)
            else:
                state = read_state(Path(source))
                network = self._build(self.name, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
        except (RuntimeError, KeyError) as error:  # how timm and torch say that weights do not fit
            reason = " ".join(str(error).split())
            raise ValueError(f"weights: {source} does not fit {self.name}: {reason[:300]}") from error
        self.network.load_state_dict(network.state_dict())

    def connect(self, width: int) -> nn.Module:
        """A connector from features to vectors of the backbone's `width`.

        Its entries are about 1 at the start, for features of that size: added position embeddings do not drown them.
        """
        first, second = nn.Linear(self.layout.dim, width), nn.Linear(width, width)
        nn.init.normal_(first.weight, std=self.layout.dim**-0.5)
        nn.init.normal_(second.weight, std=1.5 * width**-0.5)  # a GELU leaves 0.43 of the variance
        return first if self.kind == "linear" else nn.Sequential(first, nn.GELU(), second)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """The network stays in evaluation mode; whether it learns is a matter of its gradients."""
        super().train(mode)
        self.network.eval()
        return self

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the features of an image of `height` x `width` pixels.

        Raises:
            ValueError: the size is no multiple of the network's stride, or not the one size that it reads.
        """
        height, width = self.size or (height, width)
        embed = getattr(self.network, "patch_embed", None)
        only = embed.img_size if embed is not None and getattr(embed, "strict_img_size", False) else (height, width)
        if tuple(only) != (height, width):
            raise ValueError(
                f"vision.size: {self.name} reads images of {'x'.join(map(str, only))} pixels alone (or "
                f"settings.dynamic_img_size), got {height}x{width}"
            )
        return self.layout.grid(height, width)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> ImageTokens:
        """Features of images of one size, from -1 to 1."""
        grid = self.grid(*images.shape[-2:])
        images = images.to(self.mean.dtype)
        if self.size is not None and images.shape[-2:] != torch.Size(self.size):
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        x = self.network.forward_features(((images + 1) / 2 - self.mean) / self.std)
        if x.ndim == 3:
            x = x[:, getattr(self.network, "num_prefix_tokens", 0) :]  # (B, h w, D)
        elif x.shape[1:] == (self.layout.dim, grid.h, grid.w):
            x = x.flatten(2).mT  # (B, D, h, w) -> (B, h w, D)
        elif x.shape[1:] == (grid.h, grid.w, self.layout.dim):
            x = x.flatten(1, 2)
        if x.shape[1:] != (grid.length, self.layout.dim):
            expected = f"{grid.length} features of {self.layout.dim} channels an image"
            raise ValueError(f"vision: expected {expected} of {self.name}, got shape {list(x.shape)}")
        return ImageTokens(x.flatten(0, 1), (grid,) * len(images))

    def encode_each(self, images: Sequence[Float[Tensor, "3 _ _"]]) -> ImageTokens:
        """Features of images of any sizes, equal sizes together."""
        sizes = [tuple(image.shape) for image in images]
        found: dict[int, ImageTokens] = {}
        for size in dict.fromkeys(sizes):
            members = [i for i, s in enumerate(sizes) if s == size]
            found |= zip(members, self(torch.stack([images[i] for i in members])).split())
        return ImageTokens.cat([found[i] for i in range(len(images))])
