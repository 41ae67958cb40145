"""Token diffusion over continuous tokens of 12 channels, for its tests and those of its head."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unimodal_generators import TokenDiffusion, TokenDiffusionSettings
from unimodal_generators.base import Block, Grid, ImageTokens
from unimodal_tokenizers.base import TokenLayout

LAYOUT = TokenLayout("continuous", dim=12, stride=2)
GRIDS = (Grid(4, 4), Grid(2, 4), Grid(1, 3))
ORDERS = ("raster", "random")
DDPM = TokenDiffusionSettings(head_steps=20, solver="ddpm")


def made(order: str = "random", **settings: Any) -> TokenDiffusion:
    torch.manual_seed(0)
    generator = TokenDiffusion(LAYOUT, 32, order=order, head_width=24, head_depth=2, multiply=3, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return generator


def tokens(grids: Sequence[Grid] = GRIDS) -> ImageTokens:
    rng = torch.Generator().manual_seed(1)
    return ImageTokens(torch.randn(sum(g.length for g in grids), 12, generator=rng), tuple(grids))


def planned(generator: TokenDiffusion, grids: Sequence[Grid] = GRIDS, seed: int = 0) -> list[Block]:
    return [generator.plan(grid, np.random.default_rng((seed, i)))[0] for i, grid in enumerate(grids)]
