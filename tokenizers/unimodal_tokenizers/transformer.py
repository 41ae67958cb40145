"""What tokenizers made of transformers share: patches in and out, layers, a mask.

Letters: B images, H height, W width (pixels); h, w the grid of patches, P = h w of them, p the side of one; N tokens beside
the patches; L of both together; C width, D channels of a token.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal_tokenizers.base import Grid


class Transformer(nn.Module):
    """Layers of a vision transformer and the norm behind them (ViT, arXiv 2010.11929)."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        """Args:

        width: channels C; a multiple of 4 (places) and of the heads.
        depth: layers; 0 leaves the norm.
        heads: of attention.
        """
        super().__init__()
        # Here, not above: timm takes seconds to import, and whoever trains on pixels never needs it.
        from timm.models.vision_transformer import Block

        if width < 4 or width % 4 or heads < 1 or width % heads:
            raise ValueError(f"width: expected a multiple of 4 and of heads = {heads}, got {width}")
        if depth < 0:
            raise ValueError(f"depth: expected at least 0 layers, got {depth}")
        self.heads = heads
        self.layers = nn.ModuleList(Block(width, heads, init_values=None) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def extra_repr(self) -> str:
        """What no weight shows."""
        return f"heads={self.heads}"

    def forward(self, x: Float[Tensor, "B L C"], mask: Bool[Tensor, "*B1 L L"] | None = None) -> Float[Tensor, "B L C"]:
        """Args:

        x: what is read, places included.
        mask: true where a row sees a column, of all images or `(B, 1, L, L)`; None: everything sees everything.
        """
        for layer in self.layers:
            x = layer(x, attn_mask=mask)
        return self.norm(x)


def causal_queries(patches: int, queries: int, device: torch.device | None = None) -> Bool[Tensor, "L L"]:
    """Patches see patches; a query sees all patches, the queries before it, and itself.

    Of two patches and three queries, each row what one of them sees:

        1 1 0 0 0
        1 1 0 0 0
        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1
    """
    mask = torch.ones(patches + queries, patches + queries, dtype=torch.bool, device=device).tril()
    mask[:patches, :patches] = True
    return mask


def places(grid: Grid, like: Float[Tensor, "*_ C"]) -> Float[Tensor, "P C"]:
    """Sine-cosine of row and column (MAE, arXiv 2111.06377), row-major, in the type and place of `like`."""
    from timm.layers import build_sincos2d_pos_embed

    return build_sincos2d_pos_embed([grid.h, grid.w], dim=like.shape[-1], device=like.device).to(like.dtype)


def spread(x: Float[Tensor, "B N C"], grid: Grid, cells: Grid) -> Float[Tensor, "B P C"]:
    """Of each of `cells`, the token of its place; of tokens in a row, which have none, that of its share of the row.

    What a transformer draws from tokens begins with these: bare, it takes long to find out that they differ.
    """
    if grid.h == 1:
        return F.interpolate(x.mT, cells.length, mode="nearest").mT
    return F.interpolate(x.mT.unflatten(2, (grid.h, grid.w)), (cells.h, cells.w), mode="nearest").flatten(2).mT


def images_to_patches(images: Float[Tensor, "B 3 H W"], p: int) -> Float[Tensor, "B P 3*{p}*{p}"]:
    """Squares of p x p pixels as vectors, row-major."""
    return rearrange(images, "B c (h p) (w q) -> B (h w) (p q c)", p=p, q=p)


def patches_to_images(patches: Float[Tensor, "B P _"], grid: Grid, p: int) -> Float[Tensor, "B 3 H W"]:
    """The inverse of `images_to_patches`."""
    return rearrange(patches, "B (h w) (p q c) -> B c (h p) (w q)", h=grid.h, w=grid.w, p=p, q=p)
