"""Masked prediction of discrete image tokens: some ids are hidden, and all hidden ones are predicted at once.

MaskGIT (arXiv 2202.04200), Show-o (arXiv 2408.12528), UniDisc (arXiv 2503.20853), MMaDA (arXiv 2505.15809).

Letters: N images, T ids of all of them, n of one of them, k hidden ones of it, M hidden ones of all, V entries of the
codebook, C width, R documents of a session, G guidance branches, K steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unimodal_generators.base import (
    Block,
    Corrupted,
    DecodingSession,
    Embeddings,
    Known,
    LossBreakdown,
    LossTerm,
    SamplingSettings,
    TokenKind,
    per_token,
)
from unimodal_generators.discrete import Discrete
from unimodal_generators.masked_text import MaskedText
from unimodal_generators.unmasking import MaskedSettings, hidden_count, schedule_named, unmask
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout


class Masked(Discrete):
    """Learns the hidden ids of a block that sees all of itself; samples by keeping the surest of what it predicts.

    The network is not told how many ids are hidden: it sees that (Show-o).

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        inputs: what is read of an id: a learned row ("ids"), or its code vector through an MLP ("codes").
        schedule: how many ids are hidden, in training at r drawn uniformly, in sampling step by step: a name of `SCHEDULES`.
        weighting: "hidden" counts every hidden id alike (MaskGIT, Show-o); "bound" divides each by the share
            hidden in its image and counts all ids, which with the linear schedule bounds the negative log-likelihood of
            an id (UniDisc, MMaDA: 1 / t).
        sampling: defaults of the sampler.
        text: how text is learned masked too (UniDisc, MMaDA); None learns it token by token (Show-o).
    """

    settings: ClassVar = MaskedSettings
    reads: Literal["own", "previous"] = "own"
    repeats = True
    inpaints = True

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        inputs: Literal["ids", "codes"] = "ids",
        schedule: str = "cosine",
        weighting: Literal["hidden", "bound"] = "hidden",
        sampling: MaskedSettings = MaskedSettings(),
        text: Callable[[int], MaskedText] | None = None,
    ) -> None:
        super().__init__(layout, width, inputs)
        self.schedule, self.weighting, self.sampling = schedule_named(schedule), weighting, sampling
        self.text = None if text is None else text(width)
        self.hidden = nn.Parameter(0.02 * torch.randn(width))  # read in place of a hidden id

    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """One private block: ceil(gamma(r) n) ids of it are hidden (MaskGIT, section 3.1); its time is the share shown."""
        n = grid.length
        k = hidden_count(self.schedule, rng.random(), n)
        seed, targets = int(rng.integers(2**63)), k if self.weighting == "hidden" else n
        return [replace(self._block(grid), time=1 - k / n, seed=seed, n_targets=targets)]

    def plan_context(self, grid: Grid) -> list[Block]:
        """One bidirectional block."""
        return [replace(self._block(grid), kind=TokenKind.CLEAN, private=False)]

    def _block(self, grid: Grid) -> Block:
        return Block(grid, TokenKind.LEARNED, bidirectional=True, private=True)

    def corrupt(self, tokens: ImageTokens, blocks: Sequence[Block]) -> Corrupted:
        """The ids, some of them hidden (`entries` stands for that), and those."""
        ids, start, chosen = tokens.values, 0, [torch.empty(0, dtype=torch.long)]
        for block in blocks:
            n, rng = block.grid.length, torch.Generator().manual_seed(block.seed)
            k = round((1 - block.time) * n)
            chosen.append(start + torch.randperm(n, generator=rng)[:k].sort().values)
            start += n
        where = torch.cat(chosen).to(ids.device)  # (M,): chosen on the host, which so knows how many they are
        time = torch.tensor([block.time for block in blocks], device=ids.device)  # (N,)
        return Corrupted(ids.index_fill(0, where, self.entries), time, tokens.grids, ids[where], where)

    def context(self, tokens: ImageTokens) -> Corrupted:
        """The ids, none of them hidden."""
        return Corrupted(tokens.values, torch.ones(len(tokens), device=tokens.values.device), tokens.grids)

    def embed(self, corrupted: Corrupted) -> Embeddings:
        """A vector an id; one and the same for all that are hidden."""
        ids = corrupted.inputs
        shown = self.vectors(ids.clamp(max=self.entries - 1))  # (T, C)
        return Embeddings(torch.where((ids == self.entries)[:, None], self.hidden.to(shown.dtype), shown))

    def loss(self, hidden: Float[Tensor, "T C"], embeddings: Embeddings, corrupted: Corrupted) -> LossBreakdown:
        """Cross-entropy of the hidden ids given the others."""
        where, targets = corrupted.where, corrupted.targets
        assert where is not None
        assert targets is not None
        if self.weighting == "hidden":
            return {"image": LossTerm(self.cross_entropy(hidden[where], targets), len(targets))}
        weights = 1 / (1 - per_token(corrupted.time, corrupted.grids)[where])  # (M,): n / k
        return {"image": LossTerm(self.cross_entropy(hidden[where], targets, weights), len(hidden))}

    def check_sampling(self, settings: SamplingSettings, grids: Sequence[Grid]) -> None:
        """Every step shows one id at least; text has steps where it is learned masked."""
        super().check_sampling(settings, grids)
        assert isinstance(settings, MaskedSettings)
        least = min(grid.length for grid in grids)
        if settings.steps > least:
            raise ValueError(f"steps: expected at most one an id ({least}), got {settings.steps}")
        if self.text is not None:
            self.text.steps(settings)
        elif settings.text_steps is not None:
            raise ValueError(
                f"text_steps: expected none, because this recipe's text is written id by id, got {settings.text_steps}"
            )

    def sample(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None = None,
    ) -> Iterator[ImageTokens]:
        """`unmask` with a peek a step; previews are what it yields. Given ids are kept from the start."""
        self.check_sampling(settings, grids)
        assert isinstance(settings, MaskedSettings)
        lengths, device = [grid.length for grid in grids], self.hidden.device
        masked = torch.ones(sum(lengths), dtype=torch.bool) if known is None else ~known.mask.cpu()  # (T,)
        ids = torch.full_like(masked, self.entries, dtype=torch.long, device=device)
        if known is not None:
            ids = torch.where(masked.to(device), ids, known.tokens.values.to(device))
        blocks = [self._block(grid) for grid in grids]

        def score(ids: Int[Tensor, " T"], step: int) -> Float[Tensor, "T V"]:
            corrupted = Corrupted(ids, self.hidden.new_zeros(len(grids)), tuple(grids))
            progress = step / settings.steps
            hidden = session.peek(self.embed(corrupted), blocks, settings.active(progress))  # (G, T, C)
            return settings.guide(self.logits(self._read(hidden, session, lengths)), progress)

        for drawn in unmask(score, ids, masked, lengths, self.schedule, settings, rngs, self.entries):
            yield ImageTokens(drawn, tuple(grids))

    def _read(
        self, hidden: Float[Tensor, "G T C"], session: DecodingSession, lengths: Sequence[int]
    ) -> Float[Tensor, "G T C"]:
        """The hidden states that predict each id."""
        return hidden


class ParallelNext(Masked):
    """Parallel prediction for a model that has learned the next id with `Autoregressive`: one codebook of its own, no depth,
    shuffle or row ends. Its weights fit, `hidden` alone is new: `init` may name its export.

    As Emu3.5's discrete diffusion adaptation (arXiv 2510.26583): hidden copies see all of themselves and all that was
    before, clean ones stay causal; an id goes on being read from the position before its own, as that model learned.
    """

    reads: Literal["own", "previous"] = "previous"
    new_weights: ClassVar = ("hidden",)

    def plan_context(self, grid: Grid) -> list[Block]:
        """One causal block."""
        return [replace(block, bidirectional=False) for block in super().plan_context(grid)]

    def _read(
        self, hidden: Float[Tensor, "G T C"], session: DecodingSession, lengths: Sequence[int]
    ) -> Float[Tensor, "G T C"]:
        before = session.last[: len(hidden)].split(1, dim=1)  # R of (G, 1, C)
        images = hidden.split(list(lengths), dim=1)
        return torch.cat([x for last, own in zip(before, images, strict=True) for x in (last, own[:, :-1])], dim=1)
