"""Between vectors of image tokens and the backbone: a linear layer, or a shallow network over each image's own grid.

What a token holds of its surroundings is then known before the backbone, and what the backbone need not carry goes round it
(skips). Nothing is seen of other images, so packing and batching change nothing.

Letters: N images, T tokens of all of them, D channels of a token, C width of the backbone, K channels of skips; B images of
one grid of h x w tokens, p x p squares a token is cut into, W channels inside.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from unimodal_tokenizers.base import Grid, TokenLayout

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class PatchCoder(nn.Module, ABC):
    """Token vectors to what the backbone reads, and its hidden states back to vectors."""

    @abstractmethod
    def encode(
        self, x: Float[Tensor, "T D"], time: Float[Tensor, "N C"], grids: Sequence[Grid]
    ) -> tuple[Float[Tensor, "T C"], Float[Tensor, "T K"]]:
        """What the backbone reads, and the skips (K may be 0); `time` is an embedding of each image's time."""

    @abstractmethod
    def decode(
        self,
        hidden: Float[Tensor, "T C"],
        skips: Float[Tensor, "T K"],
        time: Float[Tensor, "N C"],
        grids: Sequence[Grid],
    ) -> Float[Tensor, "T D"]:
        """Vectors of hidden states, zeros while nothing was learned."""


class LinearCoder(PatchCoder):
    """One layer in, one out (Transfusion's and BAGEL's)."""

    def __init__(self, layout: TokenLayout, width: int) -> None:
        super().__init__()
        self.patch_in = nn.Linear(layout.dim, width)
        self.patch_out = zeroed(nn.Linear(width, layout.dim))

    def encode(
        self, x: Float[Tensor, "T D"], time: Float[Tensor, "N C"], grids: Sequence[Grid]
    ) -> tuple[Float[Tensor, "T C"], Float[Tensor, "T 0"]]:
        """A linear map of each token; nothing is skipped."""
        return self.patch_in(x), x[:, :0]

    def decode(
        self,
        hidden: Float[Tensor, "T C"],
        skips: Float[Tensor, "T K"],
        time: Float[Tensor, "N C"],
        grids: Sequence[Grid],
    ) -> Float[Tensor, "T D"]:
        """A linear map of each token."""
        return self.patch_out(hidden)


class UNetCoder(PatchCoder):
    """The outermost level of a U-Net: residual blocks on squares finer than a token (Transfusion).

    As there, norms are plain layer norms (of channels); time is added inside the blocks (DDPM). Each block on
    the way down is remembered for its counterpart on the way up.

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        patch: p, squares a token is cut into along each axis: the patch side of the tokenizer, or a divisor of it.
        channels: inside.
        depth: residual blocks each way.
    """

    def __init__(self, layout: TokenLayout, width: int, patch: int, channels: int, depth: int = 2) -> None:
        super().__init__()
        if patch < 1 or layout.dim % patch**2:
            raise ValueError(
                f"coder.patch: expected p with p x p dividing a token's {layout.dim} channels, got {patch}"
            )
        fine = layout.dim // patch**2
        self.patch, self.channels, self.depth = patch, channels, depth
        self.first = nn.Conv2d(fine, channels, 3, padding=1)
        self.downward = nn.ModuleList(_Residual(channels, channels, width) for _ in range(depth))
        self.down = nn.Conv2d(channels, width, patch, stride=patch)
        self.up = nn.ConvTranspose2d(width, channels, patch, stride=patch)
        self.upward = nn.ModuleList(_Residual(2 * channels, channels, width) for _ in range(depth))
        self.last = nn.Sequential(_ChannelNorm(channels), nn.SiLU(), zeroed(nn.Conv2d(channels, fine, 3, padding=1)))

    def encode(
        self, x: Float[Tensor, "T D"], time: Float[Tensor, "N C"], grids: Sequence[Grid]
    ) -> tuple[Float[Tensor, "T C"], Float[Tensor, "T K"]]:
        """The way down; K = depth p p W."""

        def run(x: Tensor, time: Tensor) -> Tensor:  # (B, D, h, w)
            y, skips = self.first(_finer(x, self.patch)), []
            for block in self.downward:
                y = block(y, time)  # (B, W, h p, w p)
                skips.append(_coarser(y, self.patch))
            return torch.cat([self.down(y), *skips], 1)

        out = on_grids(run, grids, x, time)
        width = self.down.out_channels
        return out[:, :width], out[:, width:]

    def decode(
        self,
        hidden: Float[Tensor, "T C"],
        skips: Float[Tensor, "T K"],
        time: Float[Tensor, "N C"],
        grids: Sequence[Grid],
    ) -> Float[Tensor, "T D"]:
        """The way up."""
        width = hidden.shape[1]

        def run(x: Tensor, time: Tensor) -> Tensor:  # (B, C + K, h, w)
            y, skips = self.up(x[:, :width]), x[:, width:].chunk(self.depth, 1)
            for block, skip in zip(self.upward, reversed(skips), strict=True):
                y = block(torch.cat([y, _finer(skip, self.patch)], 1), time)  # (B, W, h p, w p)
            return _coarser(self.last(y), self.patch)

        return on_grids(run, grids, torch.cat([hidden, skips.to(hidden.dtype)], 1), time)


class ConvNeXtCoder(PatchCoder):
    """ConvNeXt blocks over the tokens, and one long skip (JanusFlow).

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        channels: inside; with fewer than a token has, some of its noise cannot be told.
        depth: blocks each way.
    """

    def __init__(self, layout: TokenLayout, width: int, channels: int, depth: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(layout.dim, channels, 1)
        self.inward = nn.ModuleList(_ConvNeXt(channels, width) for _ in range(depth))
        self.into = nn.Conv2d(channels, width, 1)
        self.back = nn.Sequential(_ChannelNorm(width), nn.Conv2d(width, channels, 1))
        self.join = nn.Conv2d(2 * channels, channels, 1)
        self.outward = nn.ModuleList(_ConvNeXt(channels, width) for _ in range(depth))
        self.last = zeroed(nn.Conv2d(channels, layout.dim, 1))  # no norm: noise has a length that must get through

    def encode(
        self, x: Float[Tensor, "T D"], time: Float[Tensor, "N C"], grids: Sequence[Grid]
    ) -> tuple[Float[Tensor, "T C"], Float[Tensor, "T K"]]:
        """Blocks, then a linear layer; the skip is between them, K = W."""

        def run(x: Tensor, time: Tensor) -> Tensor:  # (B, D, h, w)
            y = self.first(x)
            for block in self.inward:
                y = block(y, time)  # (B, W, h, w)
            return torch.cat([self.into(y), y], 1)

        out = on_grids(run, grids, x, time)
        width = self.into.out_channels
        return out[:, :width], out[:, width:]

    def decode(
        self,
        hidden: Float[Tensor, "T C"],
        skips: Float[Tensor, "T K"],
        time: Float[Tensor, "N C"],
        grids: Sequence[Grid],
    ) -> Float[Tensor, "T D"]:
        """A linear layer, joined with the skip, then blocks."""
        width = hidden.shape[1]

        def run(x: Tensor, time: Tensor) -> Tensor:  # (B, C + W, h, w)
            y = self.join(torch.cat([self.back(x[:, :width]), x[:, width:]], 1))
            for block in self.outward:
                y = block(y, time)  # (B, W, h, w)
            return self.last(y)

        return on_grids(run, grids, torch.cat([hidden, skips.to(hidden.dtype)], 1), time)


def on_grids(
    run: Callable[[Tensor, Tensor], Tensor], grids: Sequence[Grid], x: Float[Tensor, "T _"], time: Float[Tensor, "N C"]
) -> Float[Tensor, "T _"]:
    """`run(x (B, _, h, w), time (B, C))`, for images of one grid together; rows come and go in the tokens' order."""
    if not grids:  # run all the same, so that every weight has a gradient
        return run(x[:, :, None, None], time).flatten(1)  # (0, _, 1, 1) -> (0, _)
    pieces = x.split([grid.length for grid in grids])
    out: dict[int, Tensor] = {}
    for grid in dict.fromkeys(grids):
        members = [i for i, other in enumerate(grids) if other == grid]
        images = torch.stack([pieces[i] for i in members]).unflatten(1, (grid.h, grid.w))  # (B, h, w, _)
        done = run(images.permute(0, 3, 1, 2), time[members])
        out |= zip(members, done.flatten(2).transpose(1, 2))  # (n, _) each
    return torch.cat([out[i] for i in range(len(grids))])


def zeroed(layer: Layer) -> Layer:
    """The layer, giving zeros."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _finer(x: Float[Tensor, "B _ h w"], p: int) -> Float[Tensor, "B _ H W"]:
    return rearrange(x, "B (p q c) h w -> B c (h p) (w q)", p=p, q=p)  # a token is (row, column, channel)


def _coarser(x: Float[Tensor, "B _ H W"], p: int) -> Float[Tensor, "B _ h w"]:
    return rearrange(x, "B c (h p) (w q) -> B (p q c) h w", p=p, q=p)


class _ChannelNorm(nn.LayerNorm):
    """Over the channels of each square."""

    def forward(self, x: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K h w"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))) (DDPM)."""

    def __init__(self, channels: int, out: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _ChannelNorm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = _ChannelNorm(out), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(width, out)
        self.straight = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Float[Tensor, "B K h w"], time: Float[Tensor, "B C"]) -> Float[Tensor, "B M h w"]:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.straight(x) + self.conv2(F.silu(self.norm2(y)))


class _ConvNeXt(nn.Module):
    """Depthwise 7 x 7, norm, MLP (ConvNeXt, arXiv 2201.03545); time scales and shifts the norm's output."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = _ChannelNorm(channels)
        self.time = nn.Linear(width, 2 * channels)
        self.mlp = nn.Sequential(nn.Conv2d(channels, 4 * channels, 1), nn.GELU(), nn.Conv2d(4 * channels, channels, 1))

    def forward(self, x: Float[Tensor, "B W h w"], time: Float[Tensor, "B C"]) -> Float[Tensor, "B W h w"]:
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, 1)
        return x + self.mlp(self.norm(self.depthwise(x)) * (1 + scale) + shift)
