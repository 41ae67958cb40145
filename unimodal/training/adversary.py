"""The adversarial term of a tokenizer's training: networks that tell images from reconstructions, and its formulas.

Letters: B images, H height, W width (pixels), M verdicts on one image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unimodal.metrics.perceptual import Frozen, TimmFeatures

MOST = 1e4  # of the adaptive weight, where the adversarial gradient vanishes; as VQGAN was trained


class Discriminator(nn.Module, ABC):
    """A network that says of parts of an image how real they look: above 0 real, below 0 made.

    A verdict must depend on its image alone (no batch norm): batches are cut differently on one process and on two.
    """

    @abstractmethod
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B M"]:
        """Verdicts on images in [-1, 1]."""


class PatchDiscriminator(Discriminator):
    """Verdicts on overlapping patches, by strided convolutions (pix2pix, arXiv 1611.07004, section 3.2.2).

    Norms are over groups of channels of one image, where pix2pix has batch norm.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        """Args:

        width: channels after the first convolution, doubled by each further one up to eight times as many.
        layers: how often the resolution is halved; three see patches of 70 pixels, one sees 16.
        """
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width: expected a multiple of 8, got {width}")
        if layers < 1:
            raise ValueError(f"layers: expected at least 1, got {layers}")
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < layers else 1
            parts += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.network = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.smallest = 2**layers * 3  # pixels of a side, so that a verdict is left

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B M"]:
        """Verdicts on overlapping patches, row by row.

        Raises:
            ValueError: images too small for the halvings.
        """
        if min(images.shape[-2:]) < self.smallest:
            found = " x ".join(map(str, images.shape[-2:]))
            raise ValueError(f"discriminator.layers: expected images of {self.smallest} pixels a side, got {found}")
        return self.network(images).flatten(1)


class FeatureDiscriminator(Discriminator):
    """Verdicts by small heads on features of a frozen network such as DINO (StyleGAN-T, arXiv 2301.09515, section 3.2)."""

    def __init__(
        self,
        network: str,
        weights: Path,
        layers: Sequence[int] = (2, 5, 8, 11),
        width: int = 64,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Args:

        network: name in timm, without a tag of weights: nothing is downloaded.
        weights: its file, with timm's names: .safetensors, or .pth.
        layers: whose features have a head each, numbered as timm's `feature_info`.
        width: channels inside a head.
        options: of the network, as `timm.create_model` takes them.
        """
        super().__init__()
        features = TimmFeatures(network, Path(weights), layers, options)
        self.frozen = Frozen(features)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 1), nn.GroupNorm(1, width), nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 1),
            )
            for channels in features.channels
        )  # fmt: skip

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B M"]:
        """Verdicts of the first layer's head row by row, then the next one's."""
        maps = self.frozen.network(images)
        return torch.cat([head(f).flatten(1) for head, f in zip(self.heads, maps, strict=True)], dim=1)  # (B, M)


def hinge_discriminator(real: Float[Tensor, "B M"], made: Float[Tensor, "B M"]) -> Float[Tensor, ""]:
    """(mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))) / 2 (Geometric GAN, arXiv 1705.02894, eq. 6; halved as VQGAN's)."""
    return (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2


def hinge_generator(made: Float[Tensor, "B M"]) -> Float[Tensor, ""]:
    """-mean D(y) (Geometric GAN, arXiv 1705.02894, eq. 7)."""
    return -made.mean()


def adaptive_weight(error: Float[Tensor, "*shape"], adversarial: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """lambda = |grad L_rec| / (|grad L_GAN| + 1e-6), gradients at the decoder's last layer (VQGAN, 2012.09841, eq. 7)."""
    return (error.norm() / (adversarial.norm() + 1e-6)).clamp(0, MOST)


class Adversary(nn.Module):
    """A discriminator, and how much its verdicts count.

    The tokenizer's loss gets `weight` lambda times -mean D(y), with y the reconstruction; the discriminator learns, in the
    same optimizer step, to tell x from y (`hinge_discriminator`). Neither learns from the other's term.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        weight: float,
        start_step: int = 0,
        adaptive: bool = True,
        lr: float | None = None,
        betas: tuple[float, float] = (0.5, 0.9),
    ) -> None:
        """Args:

        discriminator: the network that learns against the tokenizer.
        weight: of the adversarial term.
        start_step: optimizer steps before either of them learns from it.
        adaptive: whether lambda is VQGAN's; else it is 1.
        lr: the discriminator's highest learning rate, on the tokenizer's schedule; None: the tokenizer's.
        betas: of the discriminator's AdamW.
        """
        super().__init__()
        if weight <= 0:
            raise ValueError(f"adversary.weight: expected a number above 0, got {weight}")
        if start_step < 0:
            raise ValueError(f"adversary.start_step: expected at least 0, got {start_step}")
        if lr is not None and lr <= 0:
            raise ValueError(f"adversary.lr: expected a number above 0, got {lr}")
        self.discriminator = discriminator
        self.weight, self.start_step, self.adaptive, self.lr, self.betas = weight, start_step, adaptive, lr, betas

    def of_generator(self, made: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """The reconstructions' term; the discriminator gets no gradient of it."""
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return hinge_generator(functional_call(self.discriminator, fixed, (made,)))

    def of_discriminator(self, real: Float[Tensor, "B 3 H W"], made: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """The discriminator's term; the reconstructions get no gradient of it."""
        return hinge_discriminator(self.discriminator(real), self.discriminator(made.detach()))

    def balance(
        self, error: Float[Tensor, ""], adversarial: Float[Tensor, ""], last_layer: nn.Parameter
    ) -> Float[Tensor, ""]:
        """lambda of a batch, the same on every process: of gradients that are averaged over all of them."""
        if not self.adaptive:
            return torch.ones((), device=error.device)
        gradients = [torch.autograd.grad(term, last_layer, retain_graph=True)[0] for term in (error, adversarial)]
        both = torch.stack(gradients).float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
            both /= torch.distributed.get_world_size()
        return adaptive_weight(both[0], both[1])

    def idle(self) -> Float[Tensor, ""]:
        """A zero that every weight takes part in: processes that wait for gradients get one for each."""
        return torch.stack([p.sum() for p in self.discriminator.parameters() if p.requires_grad]).sum() * 0.0
