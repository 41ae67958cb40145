"""Pixel patches as continuous tokens: nothing is learned and nothing is lost.

Letters: B images, H height, W width (pixels); h, w the token grid, N = h w; p the patch side (p_h = p_w = p);
D = 3 p p channels of a token; T tokens of all images end to end.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor

from unimodal_tokenizers.base import Grid, ImageTokenizer, TokenLayout


class PatchTokenizer(ImageTokenizer):
    """Cuts an image into p x p patches and lays each out as a vector (ViT, arXiv 2010.11929, section 3.1).

    The vector's order is (row in the patch, column in the patch, channel); patches are row-major over the image.
    Decoding gives the very same pixels back.
    """

    def __init__(self, patch: int) -> None:
        """Args:

        patch: side of a patch in pixels; it is the tokenizer's stride.
        """
        super().__init__()
        if patch < 1:
            raise ValueError(f"patch: expected a side of at least 1 pixel, got {patch}")
        self.patch = patch
        self.layout = TokenLayout(kind="continuous", dim=3 * patch * patch, stride=patch)

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Float[Tensor, "B N D"]:
        """Images `(B, 3, H, W)` to patch vectors `(B, N, 3 p p)`, in the images' own range and dtype.

        Raises:
            ValueError: the patch does not divide the image's height and width.
        """
        self.layout.grid(*images.shape[-2:])
        p = self.patch
        return rearrange(images, "B c (h p_h) (w p_w) -> B (h w) (p_h p_w c)", p_h=p, p_w=p)  # (B, N, D)

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rng: torch.Generator | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """The exact inverse of `encode_batch`: `(B, N, 3 p p)` to `(B, 3, h p, w p)`.

        Raises:
            ValueError: the tokens are not h w vectors of 3 p p channels an image.
        """
        expected = (grid.length, self.layout.dim)
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(f"tokens: expected (N, D) = {expected} an image, got {tuple(tokens.shape[1:])}")
        p = self.patch
        return rearrange(
            tokens, "B (h w) (p_h p_w c) -> B c (h p_h) (w p_w)", h=grid.h, w=grid.w, p_h=p, p_w=p
        )  # (B, 3, H, W)

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Continuous tokens `(T, 3 p p)` are their own vectors."""
        if tokens.dim() != 2 or tokens.shape[-1] != self.layout.dim:
            raise ValueError(f"tokens: expected vectors (T, {self.layout.dim}), got shape {tuple(tokens.shape)}")
        return tokens
