"""Continuous tokens predicted outright: Emu (arXiv 2307.05222), MetaMorph (2412.14164), Nexus-Gen (2504.21356).

Letters: R documents of a session, T tokens of all images, n tokens of one image, D channels of a token, C width,
G guidance branches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unimodal_generators.base import (
    Block,
    Corrupted,
    DecodingSession,
    DenoisingSettings,
    Embeddings,
    ImageGenerator,
    Known,
    LossBreakdown,
    LossTerm,
    SamplingSettings,
    TokenKind,
    in_rows,
)
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout, precise


@dataclass(frozen=True)
class RegressionSettings(DenoisingSettings):
    """Nothing is drawn: guidance is all there is to set."""


class Regression(ImageGenerator):
    """Learns each token's mean, and sampling gives that mean: one image a prompt, whatever the seed.

    What several images of one prompt do not share is averaged away, so this belongs to features that a decoder can bring
    back to detail (the tokenizer's part), not to pixels.

    In raster order (Emu, MetaMorph) an image is causal and its own context, and a token is predicted given those before
    it. In parallel (Nexus-Gen's prefilled autoregression) the network reads one learned vector at the place of every
    token, told apart by their positions, in training and in sampling alike: no error is read again. There the image is
    one bidirectional block; Nexus-Gen's is causal, as the language model it starts from.

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        order: one by one, or all at once.
        loss: squared error (Emu), or 1 - cosine (MetaMorph), which leaves the length open: predictions then get sqrt(D),
            that of features of unit variance.
        private: in parallel, whether only the image itself sees its queries; what follows then sees the tokens, entered
            as context, and otherwise the queries' hidden states (Nexus-Gen).
        sampling: defaults of the sampler.
    """

    accepts: ClassVar = ("continuous",)
    settings: ClassVar = RegressionSettings

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        order: Literal["raster", "parallel"] = "raster",
        loss: Literal["mse", "cosine"] = "mse",
        private: bool = False,
        sampling: RegressionSettings = RegressionSettings(),
    ) -> None:
        super().__init__()
        self.check(layout)
        if private and order == "raster":
            raise ValueError("private: expected false in raster order, which reads its own tokens, got true")
        self.layout, self.sampling, self.order, self.metric, self.private = layout, sampling, order, loss, private
        self.reads = "previous" if order == "raster" else "own"
        self.repeats, self.inpaints = private, order == "raster"
        self.token_in = nn.Linear(layout.dim, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, layout.dim))
        if order == "parallel":
            self.query = nn.Parameter(torch.randn(width) * 0.02)

    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """One block; nothing of it is random."""
        return [replace(self._block(grid), n_targets=grid.length)]

    def plan_context(self, grid: Grid) -> list[Block]:
        """One block that later tokens see."""
        return [replace(self._block(grid), kind=TokenKind.CLEAN, private=False)]

    def _block(self, grid: Grid) -> Block:
        return Block(grid, TokenKind.LEARNED, bidirectional=self.order == "parallel", private=self.private)

    def corrupt(self, tokens: ImageTokens, blocks: Sequence[Block]) -> Corrupted:
        """The tokens, to be predicted and, in raster order, to be read."""
        return replace(self.context(tokens), targets=tokens.values)

    def context(self, tokens: ImageTokens) -> Corrupted:
        """The tokens, to be read."""
        return Corrupted(tokens.values, tokens.values.new_ones(len(tokens)), tokens.grids)

    def embed(self, corrupted: Corrupted) -> Embeddings:
        """Linear tokens; queries in the place of those that are predicted in parallel."""
        if self.order == "parallel" and corrupted.targets is not None:
            return Embeddings(self.query.expand(len(corrupted.targets), -1))
        return Embeddings(self.token_in(corrupted.inputs.to(self.token_in.weight.dtype)))

    def predict(self, hidden: Float[Tensor, "*rest C"]) -> Float[Tensor, "*rest D"]:
        """Tokens of hidden states, in fp32 or better."""
        out = self.head(hidden)
        out = precise(out)
        return out if self.metric == "mse" else unit_variance(out)

    def loss(self, hidden: Float[Tensor, "T C"], embeddings: Embeddings, corrupted: Corrupted) -> LossBreakdown:
        """A sum over tokens of the mean squared error (Emu), or of 1 - cosine (MetaMorph)."""
        assert corrupted.targets is not None
        out, targets = self.predict(hidden), corrupted.targets
        if self.metric == "mse":
            error = F.mse_loss(out, targets, reduction="none").mean(-1)  # (T,)
        else:
            error = 1 - F.cosine_similarity(out, targets, dim=-1)
        return {"image": LossTerm(error.sum(), len(targets))}

    def check_sampling(self, settings: SamplingSettings, grids: Sequence[Grid]) -> None:
        """In parallel there is one step, and no part of it; a cosine has its length already."""
        super().check_sampling(settings, grids)
        assert isinstance(settings, RegressionSettings)
        if self.metric == "cosine" and (settings.renorm != "none" or settings.rescale):
            given = f"{settings.renorm} and {settings.rescale}"
            raise ValueError(
                f"renorm, rescale: a cosine's predictions keep their length, expected none and 0, got {given}"
            )
        for name, ends in (("interval", settings.interval), ("image_interval", settings.image_interval)):
            if self.order == "parallel" and ends not in (None, (0.0, 1.0)):
                raise ValueError(f"{name}: in parallel there is one step, expected 0.0 to 1.0, got {ends}")

    def guided(
        self, hidden: Float[Tensor, "G T C"], settings: RegressionSettings, lengths: Sequence[int], progress: float
    ) -> Float[Tensor, "T D"]:
        """Tokens of the hidden states of the active branches; of a cosine, guidance changes the direction alone."""
        out = settings.guide_images(self.predict(hidden), lengths, progress)
        return out if self.metric == "mse" else unit_variance(out)

    def sample(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None = None,
    ) -> Iterator[ImageTokens]:
        """Raster order appends one token a document and step, given ones where they are known; in parallel, one step.

        Previews: raster order shows every row.
        """
        self.check_sampling(settings, grids)
        assert isinstance(settings, RegressionSettings)
        self.check_known(known)
        if self.order == "raster":
            yield from self._one_by_one(session, grids, settings, known)
            return
        blocks, lengths = [self._block(grid) for grid in grids], [grid.length for grid in grids]
        queries = Embeddings(self.query.expand(sum(lengths), -1))
        if self.private:
            hidden = session.peek(queries, blocks, settings.active(0.0))
        else:  # what follows sees the queries
            hidden = session.append(queries, blocks)[: settings.active(0.0)]
        yield ImageTokens(self.guided(hidden, settings, lengths, 0.0), tuple(grids))

    def _one_by_one(
        self, session: DecodingSession, grids: Sequence[Grid], settings: RegressionSettings, known: Known | None
    ) -> Iterator[ImageTokens]:
        if len(set(grids)) != 1:
            raise ValueError(f"sampling: raster-order images of one call need one size, got {sorted(set(grids))}")
        block, n = self._block(grids[0]), grids[0].length
        given = None if known is None else (known.tokens.values.view(-1, n, self.layout.dim), known.mask.view(-1, n))
        drawn: list[Tensor] = []
        hidden = session.last  # (G, R, C)
        for i in range(n):
            token = self.guided(hidden[: settings.active(i / n)], settings, [1] * len(grids), i / n)  # (R, D)
            if given is not None:
                token = torch.where(given[1][:, i, None].to(token.device), given[0][:, i].to(token), token)
            drawn.append(token)
            one = Corrupted(token, token.new_ones(len(grids)), (Grid(1, 1),) * len(grids))
            hidden = session.append(self.embed(one), [block.piece(i, 1)] * len(grids))
            if len(drawn) % grids[0].w == 0:
                yield in_rows(torch.stack(drawn, dim=1), grids[0], known)


def unit_variance(x: Float[Tensor, "*rest D"]) -> Float[Tensor, "*rest D"]:
    """x of length sqrt(D)."""
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5
