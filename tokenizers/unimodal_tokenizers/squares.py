"""Squares of pixels as channels, and a linear map beside the networks: cheap at full resolution, and a good beginning.

Letters: B images, H height, W width (pixels); h, w the token grid; p side of a square that the networks see as one place,
s the tokenizer's stride, D channels of a latent.
"""

import math
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Keeps = Literal["vectors", "directions", "levels"]
"""What of a latent its quantizer keeps: the vector, its direction alone, or each channel's level."""
_LOG_VARIANCE = -6.0
"""Of a posterior at the start: its deviation is a twentieth of the prior's."""
_CONSTANT = 4.0
"""Beside which waves are small: of a smaller one, what is left of them when lengths are lost is not linear in them."""
_BRIGHTNESS = 0.9
"""Deviation of a square's brightness times sqrt(3)."""


class Squares(nn.Module):
    """What stands around an encoder E and a decoder G of images: z = E(fold x) + A x, x = unfold G(z) + S z.

    Nothing is computed at a resolution finer than p pixels, where convolutions cost most and say least. A and S map the
    s x s pixels of a token to its channels and back. They are the shortcut between space and channels of DC-AE (arXiv
    2410.10733), but with weights: these begin as the lowest frequencies, and the networks as nothing beside
    them, so that training begins near what principal components reach.
    """

    def __init__(self, side: int, stride: int, dim: int, keeps: Keeps = "vectors", slices: int = 1) -> None:
        """Args:

        side: p of a square, pixels.
        stride: of the tokenizer, s.
        dim: channels D.
        keeps: what becomes of z on its way (`Quantizer.keeps`). Where only directions are kept, the last channel begins
            as a large constant, beside which the others lose nothing with the length; where each channel is rounded by
            itself, all begin with deviations of one order.
        slices: of the channels, each kept by itself (`Quantizer.slices`); waves are dealt to them.
        """
        super().__init__()
        self.side = side
        self.analysis = nn.Conv2d(3, dim, stride, stride)
        self.synthesis = nn.ConvTranspose2d(dim, 3, stride, stride)
        constant = torch.zeros(dim, dtype=torch.bool)
        if keeps == "directions":
            constant[dim // slices - 1 :: dim // slices] = True
        basis, deviations = lowest_frequencies(stride, int((~constant).sum()))
        dealt = _dealt(len(basis), slices)
        basis, deviations = basis[dealt], deviations[dealt]
        unit = (deviations if keeps == "levels" else torch.ones_like(deviations))[:, None, None, None]
        length = _CONSTANT if keeps == "directions" else 1.0  # about that of a latent whose length is lost
        with torch.no_grad():
            for linear in (self.analysis, self.synthesis):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
            # Averages: of a grey image the first is its value times sqrt(3), where its unit is 1.
            self.analysis.weight[~constant] = basis / (stride * unit)
            self.synthesis.weight[~constant] = basis * (stride * unit * length)
            self.analysis.bias[constant] = _CONSTANT  # type: ignore[index]

    @staticmethod
    def silence(*last: nn.Conv2d) -> None:
        """Last convolutions that say nothing at the start."""
        for layer in last:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @staticmethod
    def silence_posterior(last: nn.Conv2d) -> None:
        """The same of an encoder that gives D means and D log variances."""
        Squares.silence(last)
        nn.init.constant_(last.bias[len(last.bias) // 2 :], _LOG_VARIANCE)  # type: ignore[index,arg-type]

    def fold(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C _ _"]:
        """Pixels of a square as C = 3 p^2 channels."""
        return F.pixel_unshuffle(images, self.side)

    def unfold(self, folded: Float[Tensor, "B C _ _"]) -> Float[Tensor, "B 3 H W"]:
        """The inverse of `fold`."""
        return F.pixel_shuffle(folded, self.side)


def lowest_frequencies(side: int, count: int) -> tuple[Float[Tensor, "D 3 s s"], Float[Tensor, " D"]]:
    """Orthonormal waves over side x side pixels and three colours, those first that weigh most in photographs.

    They are the cosines of JPEG times brightness and two differences of colours. The variance is taken as falling with the
    square of the frequency and as 15 and 5 % of that of brightness for the differences, which orders the first sixteen as
    photographs do (fast waves have less than that). Its root comes with each wave, for averages of images in [-1, 1]. Behind
    the 3 s^2 that there are come zeros.
    """
    k = torch.arange(side)
    cosines = torch.cos(math.pi * (k + 0.5) * k[:, None] / side)  # (frequency, place)
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    cosines, colours = F.normalize(cosines), F.normalize(colours)
    waves = torch.einsum("a c, u y, v x -> a u v c y x", colours, cosines, cosines)
    variance = torch.tensor([1.0, 0.15, 0.05])[:, None, None] / (1 + 10 * (k[:, None].square() + k.square()))
    ordered, order = variance.flatten().sort(descending=True, stable=True)
    basis = rearrange(waves, "a u v c y x -> (a u v) c y x")[order[:count]]
    missing = max(0, count - len(basis))
    basis = torch.cat([basis, basis.new_zeros(missing, 3, side, side)])
    return basis, F.pad(_BRIGHTNESS * ordered[:count].sqrt(), (0, missing), value=1.0)


def _dealt(count: int, slices: int) -> list[int]:
    """Which wave each channel has: dealt to the slices in turn, forth and back, so that none has all that weigh most."""
    places: list[list[int]] = [[] for _ in range(slices)]
    for wave in range(count):
        turn, place = divmod(wave, slices)
        places[place if turn % 2 == 0 else slices - 1 - place].append(wave)
    return [wave for part in places for wave in part]


def check_space_to_depth(side: int) -> None:
    """Refuse squares without pixels."""
    if side < 1:
        raise ValueError(f"space_to_depth: expected a side of at least 1 pixel, got {side}")
