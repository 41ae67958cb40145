"""Pixel patches as continuous tokens: nothing is learned and nothing is lost.

Letters: B images, H height, W width (pixels); h, w the token grid, N = h w; p the patch side (p_h = p_w = p);
c colours, D = c p p channels of a token; T tokens of all images end to end.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor

from unimodal_tokenizers.base import Grid, ImageTokenizer, TokenLayout


class PatchTokenizer(ImageTokenizer):
    """Cuts an image into p x p patches and lays each out as a vector (ViT, arXiv 2010.11929).

    The vector's order is (row in the patch, column in the patch, channel); patches are row-major over the image.
    Decoding gives the very same pixels back; with one colour, those of a grey image.
    """

    def __init__(self, patch: int, colours: Literal[1, 3] = 3) -> None:
        """Args:

        patch: side of a patch in pixels; it is the tokenizer's stride.
        colours: 3, or 1 for data that is grey: the mean of red, green and blue, so that nothing is learned thrice.
        """
        super().__init__()
        if colours not in (1, 3):
            raise ValueError(f"colours: expected 1 (grey) or 3, got {colours}")
        if patch < 1:
            raise ValueError(f"patch: expected a side of at least 1 pixel, got {patch}")
        self.patch, self.colours = patch, colours
        self.layout = TokenLayout(kind="continuous", dim=colours * patch * patch, stride=patch)

    def encode_batch(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator | None = None
    ) -> Float[Tensor, "B N D"]:
        """Images `(B, 3, H, W)` to patch vectors `(B, N, c p p)`, in the images' own range and dtype.

        Raises:
            ValueError: the patch does not divide the image's height and width.
        """
        self.layout.grid(*images.shape[-2:])
        p = self.patch
        if self.colours == 1:
            images = images.mean(1, keepdim=True)  # (B, 1, H, W)
        return rearrange(images, "B c (h p_h) (w p_w) -> B (h w) (p_h p_w c)", p_h=p, p_w=p)  # (B, N, D)

    def decode_batch(
        self, tokens: Shaped[Tensor, "B N *channels"], grid: Grid, rngs: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """The exact inverse of `encode_batch`: `(B, N, c p p)` to `(B, 3, h p, w p)`.

        Raises:
            ValueError: the tokens are not h w vectors of c p p channels an image.
        """
        expected = (grid.length, self.layout.dim)
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(f"tokens: expected (N, D) = {expected} an image, got {tuple(tokens.shape[1:])}")
        p = self.patch
        images = rearrange(
            tokens, "B (h w) (p_h p_w c) -> B c (h p_h) (w p_w)", h=grid.h, w=grid.w, p_h=p, p_w=p
        )  # (B, c, H, W)
        return images.expand(-1, 3, -1, -1)  # (B, 3, H, W)

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Continuous tokens `(T, c p p)` are their own vectors."""
        if tokens.dim() != 2 or tokens.shape[-1] != self.layout.dim:
            raise ValueError(f"tokens: expected vectors (T, {self.layout.dim}), got shape {tuple(tokens.shape)}")
        return tokens
