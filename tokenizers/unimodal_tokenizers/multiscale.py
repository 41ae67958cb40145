"""Quantizing what is left over, scale by scale (VAR).

Letters: B images; h, w the finest token grid, P = B h w encoder outputs; S scales, N tokens of one image over all scales;
T tokens of all images, D channels of a code. f the encoder's output, f_hat what the codes say of it,
r what is left; sg[.] stops the gradient.

Codes have any length, since what is left shrinks from one scale to the next, and learn by gradient.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal_tokenizers.base import Grid, MultiscaleTokenizer
from unimodal_tokenizers.grid import CodebookTokenizer
from unimodal_tokenizers.quantizers.base import Quantized, precise, squared_distance, straight_through
from unimodal_tokenizers.quantizers.vector import EuclideanQuantizer


class MultiscaleVQ(CodebookTokenizer, MultiscaleTokenizer):
    """An image as ids of one codebook on several grids, coarse to fine (VAR, arXiv 2404.02905, algorithms 1 and 2).

    Each scale quantizes what the coarser ones left of f, at its own size. A code is said on the finest grid: enlarged,
    then convolved lightly (phi). The codebook sees one batch a scale, and dead entries become what is left at one of them.
    """

    def __init__(
        self,
        codebook: int,
        dim: int,
        channels: Sequence[int],
        blocks: int,
        scales: Sequence[int],
        groups: int = 8,
        attention: bool = False,
        revive_after: int = 50,
        space_to_depth: int = 1,
    ) -> None:
        """Args:

        codebook: entries K, shared by all scales.
        dim: channels D of a code.
        channels: width of the networks at each resolution, fine to coarse; the stride is
            space_to_depth * 2 ** (len(channels) - 1) pixels.
        blocks: residual blocks of the encoder at each resolution (the decoder has one more).
        scales: rows (and columns) of each scale of a square image, rising. The last stands for the whole token grid: an
            image of another size or shape has the same shares of its own.
        groups: groups of the group norms; must divide every width.
        attention: whether the middle of both networks attends over the whole image.
        revive_after: training batches without a token after which an entry of the codebook is replaced.
        space_to_depth: side in pixels of the squares that the networks see as one place; above 1 a linear map stands
            beside them (`Squares`).
        """
        if not scales or scales[0] < 1 or any(a >= b for a, b in itertools.pairwise(scales)):
            raise ValueError(f"scales: expected rising numbers of rows, at least one, from 1 up, got {list(scales)}")
        super().__init__((codebook,), dim, channels, blocks, groups, attention, scales, space_to_depth)
        self.quantizer = EuclideanQuantizer(codebook, dim, revive_after * len(scales))
        self.weights = self.quantizer.weights
        self.phi = nn.ModuleList(Phi(dim) for _ in scales)

    def quantize(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Quantized:
        """Both terms of the loss are means over scales of |f - f_hat_k|^2, f_hat_k after k scales (VAR, eq. 5, of k = S)."""
        with torch.autocast(vectors.device.type, enabled=False):
            f = precise(vectors)
            ids, sums = self._residual(_maps(f.detach(), grid), grid, lambda z: self.quantizer.assign(z)[0])
            says = [_vectors(f_hat) for f_hat in sums]
            return Quantized(
                quantized=straight_through(f, says[-1]),
                ids=ids.flatten(),
                counts=torch.bincount(ids.flatten(), minlength=self.quantizer.entries),
                terms={
                    "codebook": torch.stack([squared_distance(f.detach(), x) for x in says]).mean(),
                    "commitment": torch.stack([squared_distance(f, x.detach()) for x in says]).mean(),
                },
            )

    def vectors_to_ids(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Int64[Tensor, "B N"]:
        """The ids of every scale, coarse to fine."""
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            f = precise(vectors)
            return self._residual(_maps(f, grid), grid, self.quantizer.vectors_to_ids)[0]

    def ids_to_vectors(self, ids: Shaped[Tensor, "B N"], grid: Grid) -> Float[Tensor, "P D"]:
        """What the scales of `grid` say together."""
        return _vectors(self.accumulate(ids, grid)[-1])

    def accumulate(self, tokens: Shaped[Tensor, "B N"], grid: Grid) -> list[Float[Tensor, "B D {grid.h} {grid.w}"]]:
        """f_hat after 1, 2, ... scales of `grid` (VAR, algorithm 2).

        Raises:
            ValueError: ids that are no integers or lie outside the codebook, or a grid of other scales.
        """
        own = self.layout.grid(*self.layout.size(grid))
        if not grid.scales or grid.scales != own.scales[: len(grid.scales)]:
            raise ValueError(f"tokens: expected the first scales of {own}, got {grid}")
        sums: list[Tensor] = []
        with torch.autocast(tokens.device.type, enabled=False):
            for k, ids in enumerate(tokens.split(grid.lengths, dim=1)):
                says = self._say(self.quantizer.ids_to_vectors(ids.flatten()), k, grid)
                sums.append(sums[-1] + says if sums else says)
        return sums

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Ids `(T,)` of any scale to their codes `(T, D)`; `accumulate` says what they mean together.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook.
        """
        return self.quantizer.ids_to_vectors(tokens)

    def _residual(
        self,
        f: Float[Tensor, "B D h w"],
        grid: Grid,
        assign: Callable[[Float[Tensor, "T_k D"]], Int64[Tensor, " T_k"]],
    ) -> tuple[Int64[Tensor, "B N"], list[Float[Tensor, "B D h w"]]]:
        """Ids of all scales, and f_hat after each (VAR, algorithm 1); `assign` finds the codes."""
        ids: list[Tensor] = []
        sums: list[Tensor] = []
        for k, size in enumerate(grid.sizes):
            r = f - sums[-1].detach() if sums else f
            z = _vectors(F.interpolate(r, size, mode="area"))
            chosen = assign(z)
            says = self._say(F.embedding(chosen, self.quantizer.codes.to(z.dtype)), k, grid)
            sums.append(sums[-1] + says if sums else says)
            ids.append(chosen.unflatten(0, (len(f), -1)))  # (B, N_k)
        return torch.cat(ids, dim=1), sums

    def _say(self, codes: Float[Tensor, "T_k D"], k: int, grid: Grid) -> Float[Tensor, "B D h w"]:
        """phi_k(enlarge(codes)): what the codes of scale k say on the finest grid."""
        rows, columns = grid.sizes[k]
        x = rearrange(codes, "(B r c) D -> B D r c", r=rows, c=columns)
        if (rows, columns) != (grid.h, grid.w):
            x = F.interpolate(x, (grid.h, grid.w), mode="bicubic")
        return self.phi[k](x)


class Phi(nn.Conv2d):
    """x + conv(x), which starts as x: a code says itself at first, and learns what it says of its neighbours."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1)
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """In the precision of x."""
        return input + super().forward(input.to(self.weight.dtype)).to(input.dtype)


def _maps(vectors: Float[Tensor, "P D"], grid: Grid) -> Float[Tensor, "B D h w"]:
    return rearrange(vectors, "(B h w) D -> B D h w", h=grid.h, w=grid.w)


def _vectors(maps: Float[Tensor, "B D h w"]) -> Float[Tensor, "P D"]:
    return rearrange(maps, "B D h w -> (B h w) D")
