"""Masked prediction of discrete image tokens: some ids are hidden, and all hidden ones are predicted at once.

MaskGIT (arXiv 2202.04200), Show-o (arXiv 2408.12528), UniDisc (arXiv 2503.20853), MMaDA (arXiv 2505.15809).

Letters: N images, T ids of all of them, n of one of them, k hidden ones of it, M hidden ones of all, V entries of the
codebook, C width, R documents of a session, G guidance branches, K steps; r from 0 (all hidden) to 1 (none).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
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
from unimodal_generators.choice import ChoiceSettings, choose, gumbel
from unimodal_generators.discrete import Discrete
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout

Schedule = Callable[[float], float]

SCHEDULES: dict[str, Schedule] = {
    "cosine": lambda r: math.cos(math.pi / 2 * r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cubic": lambda r: 1 - r**3,
    "root": lambda r: 1 - math.sqrt(r),
}
"""gamma(r), the share of ids that are hidden at r: from 1 down to 0 (MaskGIT, section 3.3)."""


@dataclass(frozen=True)
class MaskedSettings(ChoiceSettings):
    """How hidden ids are drawn, and which of them stay.

    Args:
        steps: network evaluations, exactly; at most one an id of the image.
        temperature: 0 takes the likeliest ids, those the model is surest of first: nothing is random.
        top_k: 0 is all.
        top_p: 1 is all.
        choice_temperature: of the Gumbel noise on the log-probabilities that say which ids stay; it falls linearly to 0.
    """

    steps: int = 8
    choice_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps: expected 1 or more, got {self.steps}")
        if not 0 <= self.choice_temperature < math.inf:
            raise ValueError(f"choice_temperature: expected 0 (no noise) or more, got {self.choice_temperature}")


class Masked(Discrete):
    """Learns the hidden ids of a block that sees all of itself; samples by keeping the surest of what it predicts.

    The network is not told how many ids are hidden: it sees that (Show-o, section 3).

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        inputs: what is read of an id: a learned row ("ids"), or its code vector through an MLP ("codes").
        schedule: how many ids are hidden, in training at r drawn uniformly, in sampling step by step: a name of `SCHEDULES`.
        weighting: "hidden" counts every hidden id alike (MaskGIT, eq. 1; Show-o, eq. 3); "bound" divides each by the share
            hidden in its image and counts all ids, which with the linear schedule bounds the negative log-likelihood of
            an id (UniDisc, MMaDA: 1 / t).
        sampling: defaults of the sampler.
    """

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
    ) -> None:
        super().__init__(layout, width, inputs)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule}")
        self.schedule, self.weighting, self.sampling = SCHEDULES[schedule], weighting, sampling
        self.hidden = nn.Parameter(0.02 * torch.randn(width))  # read in place of a hidden id

    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """One private block: ceil(gamma(r) n) ids of it are hidden (MaskGIT, section 3.1); its time is the share shown."""
        n = grid.length
        k = max(1, math.ceil(self.schedule(rng.random()) * n))
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

    def sample(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None = None,
    ) -> Iterator[ImageTokens]:
        """Draw all hidden ids, keep the surest, hide the rest again, K times (MaskGIT, section 3.2).

        A preview a step: what is kept, and what was drawn for the rest. Given ids are kept from the start.
        """
        if not isinstance(settings, MaskedSettings):
            raise ValueError(f"sampling: expected MaskedSettings, got {type(settings).__name__}")
        lengths, device, steps = [grid.length for grid in grids], self.hidden.device, settings.steps
        if steps > min(lengths):
            raise ValueError(f"steps: expected at most one an id ({min(lengths)}), got {steps}")
        masked = torch.ones(sum(lengths), dtype=torch.bool) if known is None else ~known.mask.cpu()  # (T,)
        left = [remaining(self.schedule, int(m.sum()), steps) for m in masked.split(lengths)]  # a list an image
        masked = masked.to(device)
        ids = torch.full_like(masked, self.entries, dtype=torch.long)
        if known is not None:
            ids = torch.where(masked, ids, known.tokens.values.to(device))
        blocks = [self._block(grid) for grid in grids]
        drawing = [rng for rng, n in zip(rngs, lengths, strict=True) for _ in range(n)]  # of each id
        for i in range(steps):
            corrupted = Corrupted(ids, self.hidden.new_zeros(len(grids)), tuple(grids))
            hidden = session.peek(self.embed(corrupted), blocks, settings.active(i / steps))  # (G, T, C)
            logits = settings.guide(self.logits(self._read(hidden, session, lengths)))  # (T, V)
            drawn = choose(logits, drawing, settings.temperature, settings.top_k, settings.top_p)
            sure = confidence(logits, drawn)
            heat = settings.choice_temperature * (1 - (i + 1) / steps) if settings.temperature else 0.0
            if heat:
                noise = [gumbel([rng], n)[0] for rng, n in zip(rngs, lengths, strict=True)]
                sure = sure + heat * torch.cat(noise).to(device)
            drawn = torch.where(masked, drawn, ids)
            yield ImageTokens(drawn, tuple(grids))
            masked = least(sure.masked_fill(~masked, torch.inf), lengths, [counts[i] for counts in left])
            ids = drawn.masked_fill(masked, self.entries)

    def _read(
        self, hidden: Float[Tensor, "G T C"], session: DecodingSession, lengths: Sequence[int]
    ) -> Float[Tensor, "G T C"]:
        """The hidden states that predict each id."""
        return hidden


class ParallelNext(Masked):
    """Parallel prediction for a model that has learned the next id with `Autoregressive`: one codebook of its own, no depth,
    shuffle or row ends. Its weights fit; `hidden` is new, so they are loaded with `strict=False`, not by a recipe's `init`.

    As Emu3.5's discrete diffusion adaptation (arXiv 2510.26583): hidden copies see all of themselves and all that was
    before, clean ones stay causal; an id goes on being read from the position before its own, as that model learned.
    """

    reads: Literal["own", "previous"] = "previous"

    def plan_context(self, grid: Grid) -> list[Block]:
        """One causal block."""
        return [replace(block, bidirectional=False) for block in super().plan_context(grid)]

    def _read(
        self, hidden: Float[Tensor, "G T C"], session: DecodingSession, lengths: Sequence[int]
    ) -> Float[Tensor, "G T C"]:
        before = session.last[: len(hidden)].split(1, dim=1)  # R of (G, 1, C)
        images = hidden.split(list(lengths), dim=1)
        return torch.cat([x for last, own in zip(before, images, strict=True) for x in (last, own[:, :-1])], dim=1)


def remaining(schedule: Schedule, hidden: int, steps: int) -> list[int]:
    """How many of `hidden` ids are still hidden after each step: floor(gamma(i / K) hidden), and 0 at the end.

    Every step shows one at least and leaves one for each that follows, while there are so many.
    """
    counts, left = [], hidden
    for i in range(1, steps + 1):
        left = max(min(math.floor(schedule(i / steps) * hidden), left - 1), min(left, steps - i))
        counts.append(left)
    return counts


def confidence(logits: Float[Tensor, "T V"], ids: Int[Tensor, " T"]) -> Float[Tensor, " T"]:
    """log p(id), in float64."""
    return logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]


def least(scores: Float[Tensor, " T"], lengths: Sequence[int], counts: Sequence[int]) -> Bool[Tensor, " T"]:
    """Which tokens are among the so many lowest of their image; of equal ones, the first."""
    chosen = []
    for one, count in zip(scores.split(list(lengths)), counts, strict=True):
        lowest = one.argsort(stable=True)[:count]
        chosen.append(torch.zeros_like(one, dtype=torch.bool).index_fill(0, lowest, True))
    return torch.cat(chosen)
