"""The convolutional encoder and decoder of VQGAN (arXiv 2012.09841), with any number of blocks at each resolution.

Modules have the names that its weights are published under, so that a state dict fits as it is.

Letters: B images, C channels, H height, W width, N = H W places.
"""

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Twice a norm, an activation and a convolution; a matrix beside them where the width changes."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Float[Tensor, "B _ H W"]) -> Float[Tensor, "B _ H W"]:
        """x + f(x)."""
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class SpatialAttention(nn.Module):
    """Every place attends to all places, with one head."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """x + softmax(q k / sqrt(C)) v."""
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "B C H W -> B 1 (H W) C") for f in (self.q, self.k, self.v))  # (B, 1, N, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(y, "B 1 (H W) C -> B C H W", H=x.shape[-2]))


class Middle(nn.Module):
    """What happens at the coarsest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, groups)
        self.attn_1 = SpatialAttention(width, groups)
        self.block_2 = ResidualBlock(width, width, groups)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Block, attention, block."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """A convolution of stride 2; a row and a column of zeros are added below and to the right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C _ _"]:
        """Half the height and width."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every place four times, and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C _ _"]:
        """Twice the height and width."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and what leads to the next."""

    def __init__(self, width: int, out: int, blocks: int, groups: int, **resample: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(width if i == 0 else out, out, groups) for i in range(blocks))
        for name, module in resample.items():
            self.add_module(name, module)
        self.resample = tuple(resample)

    def forward(self, x: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B _ _ _"]:
        """All of it in turn."""
        for block in self.block:
            x = block(x)
        for name in self.resample:
            x = self.get_submodule(name)(x)
        return x


class ConvEncoder(nn.Module):
    """Images to a grid of vectors, one for each square of 2 ** (levels - 1) pixels on a side."""

    def __init__(self, dim: int, widths: Sequence[int], blocks: Sequence[int], groups: int) -> None:
        """Args:

        dim: channels of what comes out.
        widths: channels at each resolution, fine to coarse.
        blocks: residual blocks at each.
        groups: groups of the group norms.
        """
        super().__init__()
        check_levels(widths, blocks, groups)
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, out in enumerate(widths):
            last = i == len(widths) - 1
            resample = {} if last else {"downsample": Downsample(out)}
            self.down.append(Level(widths[max(i - 1, 0)], out, blocks[i], groups, **resample))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], dim, 3, padding=1)

    def forward(self, images: Float[Tensor, "B 3 _ _"]) -> Float[Tensor, "B _ _ _"]:
        """The vectors."""
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class ConvDecoder(nn.Module):
    """A grid of vectors to images."""

    def __init__(self, dim: int, widths: Sequence[int], blocks: Sequence[int], groups: int) -> None:
        """Args:

        dim: channels of what comes in.
        widths: channels at each resolution, fine to coarse.
        blocks: residual blocks at each.
        groups: groups of the group norms.
        """
        super().__init__()
        check_levels(widths, blocks, groups)
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, out in enumerate(widths):
            resample = {} if i == 0 else {"upsample": Upsample(out)}
            self.up.append(Level(widths[min(i + 1, len(widths) - 1)], out, blocks[i], groups, **resample))
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, vectors: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B 3 _ _"]:
        """The images."""
        x = self.mid(self.conv_in(vectors))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def check_levels(widths: Sequence[int], blocks: Sequence[int], groups: int) -> None:
    """Refuse widths that the norms cannot group, and counts of blocks that are not one a resolution."""
    if not widths or any(width < 1 or width % groups for width in widths):
        raise ValueError(f"widths: expected multiples of groups = {groups}, at least one, got {list(widths)}")
    if len(blocks) != len(widths) or min(blocks) < 1:
        raise ValueError(f"blocks: expected at least 1 for each of {len(widths)} resolutions, got {list(blocks)}")
