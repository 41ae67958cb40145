"""Quantizing what is left over: scale by scale (VAR) or codebook by codebook (RQ-VAE).

Letters: B images; h, w the finest token grid, P = B h w encoder outputs; S scales, N tokens of one image over all scales;
T tokens of all images, Q codebooks a position, D channels of a code. f the encoder's output, f_hat what the codes say of it,
r what is left; sg[.] stops the gradient.

Both have codes of any length, learned by gradient like those of `vq.py`: what is left shrinks from one step to the next.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from unimodal_tokenizers.base import Grid, MultiscaleTokenizer
from unimodal_tokenizers.vq import (
    CodebookTokenizer,
    EuclideanQuantizer,
    Quantized,
    squared_distance,
    straight_through,
)


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
    ) -> None:
        """Args:

        codebook: entries K, shared by all scales.
        dim: channels D of a code.
        channels: width of the networks at each resolution, fine to coarse; the stride is 2 ** (len(channels) - 1) pixels.
        blocks: residual blocks of the encoder at each resolution (the decoder has one more).
        scales: rows (and columns) of each scale of a square image, rising. The last stands for the whole token grid: an
            image of another size or shape has the same shares of its own.
        groups: groups of the group norms; must divide every width.
        attention: whether the middle of both networks attends over the whole image.
        revive_after: training batches without a token after which an entry of the codebook is replaced.
        """
        if not scales or scales[0] < 1 or any(a >= b for a, b in itertools.pairwise(scales)):
            raise ValueError(f"scales: expected rising numbers of rows, at least one, from 1 up, got {list(scales)}")
        super().__init__((codebook,), dim, channels, blocks, groups, attention, scales)
        self.quantizer = EuclideanQuantizer(codebook, dim, revive_after * len(scales))
        self.phi = nn.ModuleList(Phi(dim) for _ in scales)

    def quantize(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Quantized:
        """Both terms of the loss are means over scales of |f - f_hat_k|^2 (VAR, eq. 5), f_hat_k after k scales."""
        with torch.autocast(vectors.device.type, enabled=False):
            f = self.quantizer.project(vectors)
            ids, sums = self._residual(_maps(f.detach(), grid), grid, lambda z: self.quantizer.assign(z)[0])
            says = [_vectors(f_hat) for f_hat in sums]
            return Quantized(
                quantized=straight_through(f, says[-1]),
                ids=ids.flatten(),
                codebook_loss=torch.stack([squared_distance(f.detach(), x) for x in says]).mean(),
                commitment=torch.stack([squared_distance(f, x.detach()) for x in says]).mean(),
                counts=torch.bincount(ids.flatten(), minlength=self.quantizer.entries),
            )

    def vectors_to_ids(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Int64[Tensor, "B N"]:
        """The ids of every scale, coarse to fine."""
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            f = self.quantizer.project(vectors)
            return self._residual(_maps(f, grid), grid, self.quantizer.vectors_to_ids)[0]

    def ids_to_vectors(self, ids: Shaped[Tensor, "B N"], grid: Grid) -> Float[Tensor, "P D"]:
        """What the scales of `grid` say together."""
        return _vectors(self.accumulate(ids, grid)[-1])

    def accumulate(self, tokens: Shaped[Tensor, "B N"], grid: Grid) -> list[Float[Tensor, "B D {grid.h} {grid.w}"]]:
        """f_hat after 1, 2, ... scales of `grid` (VAR, algorithm 2).

        Raises:
            ValueError: ids that are no integers or lie outside the codebook.
        """
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
        if tokens.dim() != 1:
            raise ValueError(f"tokens: expected ids (T,), got shape {tuple(tokens.shape)}")
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


class ResidualVQ(CodebookTokenizer):
    """An image as h x w positions of Q ids each, one of every codebook (RQ-VAE, arXiv 2203.01941, section 3.1; VILA-U)."""

    def __init__(
        self,
        codebook: int,
        codebooks: int,
        dim: int,
        channels: Sequence[int],
        blocks: int,
        groups: int = 8,
        attention: bool = False,
        revive_after: int = 50,
    ) -> None:
        """Args:

        codebook: entries K of each codebook.
        codebooks: how many, Q; each quantizes what those before it left.
        dim: channels D of a code.
        channels: width of the networks at each resolution, fine to coarse; the stride is 2 ** (len(channels) - 1) pixels.
        blocks: residual blocks of the encoder at each resolution (the decoder has one more).
        groups: groups of the group norms; must divide every width.
        attention: whether the middle of both networks attends over the whole image.
        revive_after: training batches without a token after which an entry of a codebook is replaced.
        """
        if codebooks < 2:
            raise ValueError(f"codebooks: expected at least 2 (VQTokenizer has one), got {codebooks}")
        super().__init__((codebook,) * codebooks, dim, channels, blocks, groups, attention)
        # Each draws its entries from other tokens: nothing is left of those that the codebook before has as entries.
        self.quantizers = nn.ModuleList(EuclideanQuantizer(codebook, dim, revive_after, q) for q in range(codebooks))

    def quantize(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Quantized:
        """r_q = r_(q-1) - e_q (RQ-VAE, eq. 4); commitment: sum over q of |f - sg[e_1 + ... + e_q]|^2 (eq. 7)."""
        with torch.autocast(vectors.device.type, enabled=False):
            f = r = self._quantizers[0].project(vectors)
            steps = []
            for quantizer in self._quantizers:
                steps.append(quantizer(r))
                r = r - quantizer.ids_to_vectors(steps[-1].ids).detach()  # the gradient of f stays in r
            return Quantized(
                quantized=straight_through(f, f - r),
                ids=torch.stack([step.ids for step in steps], dim=1),
                codebook_loss=torch.stack([step.codebook_loss for step in steps]).sum(),
                commitment=torch.stack([step.commitment for step in steps]).sum(),
                counts=torch.stack([step.counts for step in steps]),
            )

    def vectors_to_ids(self, vectors: Float[Tensor, "P D"], grid: Grid) -> Int64[Tensor, "B N Q"]:
        """Of every position, the id of each codebook."""
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            ids, r = [], self._quantizers[0].project(vectors)
            for quantizer in self._quantizers:
                ids.append(quantizer.vectors_to_ids(r))
                r = r - quantizer.ids_to_vectors(ids[-1])
            return torch.stack(ids, dim=1).unflatten(0, (-1, grid.length))  # (B, N, Q)

    def ids_to_vectors(self, ids: Shaped[Tensor, "B N Q"], grid: Grid) -> Float[Tensor, "P D"]:
        """Ids to the sums of their codes."""
        return self.lookup(ids.flatten(0, 1))

    def lookup(self, tokens: Shaped[Tensor, "T *channels"]) -> Float[Tensor, "T D"]:
        """Ids `(T, Q)` to the sums of their codes `(T, D)`; the first q codebooks alone say `(T, q)`.

        Raises:
            ValueError: ids that are no integers or lie outside the codebook.
        """
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= len(self.quantizers):
            expected = f"(T, {len(self.quantizers)})"
            raise ValueError(f"tokens: expected ids {expected}, got shape {tuple(tokens.shape)}")
        parts = [q.ids_to_vectors(ids) for q, ids in zip(self._quantizers, tokens.unbind(1), strict=False)]
        return torch.stack(parts).sum(0)

    @property
    def _quantizers(self) -> list[EuclideanQuantizer]:
        return [q for q in self.quantizers if isinstance(q, EuclideanQuantizer)]


def _maps(vectors: Float[Tensor, "P D"], grid: Grid) -> Float[Tensor, "B D h w"]:
    return rearrange(vectors, "(B h w) D -> B D h w", h=grid.h, w=grid.w)


def _vectors(maps: Float[Tensor, "B D h w"]) -> Float[Tensor, "P D"]:
    return rearrange(maps, "B D h w -> (B h w) D")
