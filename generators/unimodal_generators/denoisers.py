"""Networks beside the backbone that draw an image from conditions: a diffusion transformer of our own, and Sana's.

Letters: B images of one grid, n tokens of one, D channels of a token, W width of the denoiser, L layers of the backbone that
conditions come from, Q conditions of an image, K channels of a condition, H heads.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unimodal_tokenizers.base import Grid
from unimodal_tokenizers.diffusion import timestep_embedding


class Denoiser(nn.Module, ABC):
    """Velocities of noised images given conditions. t = 0 is noise, t = 1 is data."""

    condition_dim: int  # K
    ladder: bool  # whether it can read conditions of several layers

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B n D"], t: Float[Tensor, " B"], condition: Float[Tensor, "B L Q K"], grid: Grid
    ) -> Float[Tensor, "B n D"]:
        """dx/dt at x_t of images of one `grid`, row-major."""


class DiT(Denoiser):
    """A diffusion transformer (arXiv 2212.09748) that reads conditions by cross-attention (PixArt, arXiv 2310.00426).

    Conditions of several layers are read in their order, the first by the first blocks, the last by the last (a ladder:
    TBAC-UniImage, arXiv 2508.08098).

    Args:
        dim: channels of an image token.
        width: of its blocks.
        depth: how many.
        heads: of each attention.
        mlp_ratio: hidden width of a block's MLP, over `width`.
    """

    ladder = True

    def __init__(self, dim: int, width: int, depth: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise ValueError(f"denoiser.width: expected a multiple of 4 and of heads {heads}, got {width}")
        if depth < 1:
            raise ValueError(f"denoiser.depth: expected at least 1, got {depth}")
        self.width = self.condition_dim = width
        self.patch_in = nn.Linear(dim, width)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads, round(mlp_ratio * width)) for _ in range(depth))
        self.last = nn.Linear(width, 2 * width)
        self.velocity_out = nn.Linear(width, dim)
        for layer in (self.last, self.velocity_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "B n D"], t: Float[Tensor, " B"], condition: Float[Tensor, "B L Q K"], grid: Grid
    ) -> Float[Tensor, "B n D"]:
        """See `Denoiser`."""
        dtype = self.patch_in.weight.dtype
        c = F.silu(self.time_in(timestep_embedding(t).to(dtype)))  # (B, W)
        h = self.patch_in(x.to(dtype)) + grid_embedding(grid, self.width, x.device).to(dtype)  # (B, n, W)
        layers = condition.shape[1]
        for number, block in enumerate(self.blocks):
            h = block(h, c, condition[:, number * layers // len(self.blocks)])
        shift, scale = self.last(c)[:, None].chunk(2, dim=-1)
        return self.velocity_out(normed(h) * (1 + scale) + shift)


class DiTBlock(nn.Module):
    """Self-attention and MLP, scaled, shifted and gated by the time (adaLN-Zero), and cross-attention between them."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.cross = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)
        for layer in (self.modulation, self.cross.out):  # at the start a block changes nothing
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "B n W"], c: Float[Tensor, "B W"], condition: Float[Tensor, "B Q W"]
    ) -> Float[Tensor, "B n W"]:
        """Tokens to tokens."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(c)[:, None].chunk(6, dim=-1)  # (B, 1, W)
        h = normed(x) * (1 + scale) + shift
        x = x + gate * self.attention(h, h)
        x = x + self.cross(normed(x), condition)
        return x + gate_mlp * self.mlp(normed(x) * (1 + scale_mlp) + shift_mlp)


class Attention(nn.Module):
    """Every query sees every key."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B n W"], y: Float[Tensor, "B m W"]) -> Float[Tensor, "B n W"]:
        """x asks y."""
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q(x), *self.kv(y).chunk(2, dim=-1)))
        return self.out(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )  # (B, H, n, W/H) -> (B, n, W)


def normed(x: Float[Tensor, "*rest W"]) -> Float[Tensor, "*rest W"]:
    """Layer norm without weights, which a modulation or a projection has."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def grid_embedding(grid: Grid, width: int, device: torch.device) -> Float[Tensor, "n W"]:
    """Sines and cosines of the row, then of the column (MAE, arXiv 2111.06377)."""
    rows, columns = torch.meshgrid(
        torch.arange(grid.h, device=device), torch.arange(grid.w, device=device), indexing="ij"
    )
    return torch.cat([timestep_embedding(axis.flatten() / 1000, width // 2) for axis in (rows, columns)], dim=1)


class Sana(Denoiser):
    """Sana's transformer (arXiv 2410.10629) of diffusers, which MetaQuery and BLIP3o-NEXT draw with.

    It counts time from the data (1000 is noise) and gives noise - data: both are turned here.

    Args:
        dim: channels of an image token, one pixel of Sana's latents.
        settings: of `diffusers.SanaTransformer2DModel`, which has a patch size of 1; others than the channels.
    """

    ladder = False

    def __init__(self, dim: int, settings: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import SanaTransformer2DModel  # here: diffusers takes seconds to import

        self.network: Any = SanaTransformer2DModel(**{**settings, "in_channels": dim, "out_channels": dim})
        if self.network.config.patch_size != 1:
            raise ValueError(f"denoiser.settings: expected patch_size 1, got {self.network.config.patch_size}")
        self.condition_dim = self.network.config.caption_channels

    def forward(
        self, x: Float[Tensor, "B n D"], t: Float[Tensor, " B"], condition: Float[Tensor, "B L Q K"], grid: Grid
    ) -> Float[Tensor, "B n D"]:
        """See `Denoiser`."""
        dtype = self.network.proj_out.weight.dtype
        latents = x.to(dtype).mT.unflatten(2, (grid.h, grid.w))  # (B, n, D) -> (B, D, h, w)
        step = 1000 * (1 - t)  # in fp32, which the network embeds: of these bf16 tells a few hundred apart
        (out,) = self.network(latents, condition[:, -1].to(dtype), step, return_dict=False)
        return -out.flatten(2).mT
