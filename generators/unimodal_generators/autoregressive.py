"""Next-token prediction of discrete image tokens: Janus (arXiv 2410.13848), LlamaGen (2406.06525), Chameleon (2405.09818).

Letters: R documents of a session, T tokens of all images, n of one of them, V entries of the codebook, C width,
G guidance branches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

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
)
from unimodal_generators.choice import choose
from unimodal_generators.discrete import Discrete
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout


@dataclass(frozen=True)
class AutoregressiveSettings(SamplingSettings):
    """How an image's ids are drawn."""

    temperature: float = 1.0  # 0: the likeliest id
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # 1: all


class Autoregressive(Discrete):
    """Learns the next id of one codebook, with an input and a head of its own beside the text's (Janus, section 3.2).

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        inputs: what is read of an id: a learned row ("ids"), or its code vector through an MLP ("codes", as Janus does).
        token_noise: share of a learned image's ids that are replaced by random ones where they are read, never where
            they are predicted; small data sets are learned by heart without it.
        sampling: defaults of the sampler.
    """

    reads = "previous"
    repeats = False
    inpaints = True

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        inputs: Literal["ids", "codes"] = "ids",
        token_noise: float = 0.0,
        sampling: AutoregressiveSettings = AutoregressiveSettings(),
    ) -> None:
        super().__init__(layout, width, inputs)
        if not 0 <= token_noise < 1:
            raise ValueError(f"token_noise: expected a share from 0 to below 1, got {token_noise}")
        self.token_noise, self.sampling = token_noise, sampling

    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """One causal block, its own context."""
        seed = int(rng.integers(2**63))
        return [Block(grid, TokenKind.LEARNED, bidirectional=False, private=False, seed=seed, n_targets=grid.length)]

    def plan_context(self, grid: Grid) -> list[Block]:
        """One causal block."""
        return [Block(grid, TokenKind.CLEAN, bidirectional=False, private=False)]

    def corrupt(self, tokens: ImageTokens, blocks: Sequence[Block]) -> Corrupted:
        """The ids, to be read (some of them replaced) and to be predicted."""
        ids = tokens.values
        read = torch.cat([ids[:0], *(self._read(i, b) for i, b in zip(ids.split(tokens.lengths), blocks, strict=True))])
        return Corrupted(read, torch.ones(len(tokens), device=ids.device), tokens.grids, ids)

    def _read(self, ids: Int[Tensor, " n"], block: Block) -> Int[Tensor, " n"]:
        if not self.token_noise:
            return ids
        rng = torch.Generator().manual_seed(block.seed)
        replaced = torch.rand(len(ids), generator=rng) < self.token_noise
        random = torch.randint(self.entries, (len(ids),), generator=rng)
        return torch.where(replaced.to(ids.device), random.to(ids.device), ids)

    def context(self, tokens: ImageTokens) -> Corrupted:
        """The ids, to be read."""
        return Corrupted(tokens.values, torch.ones(len(tokens), device=tokens.values.device), tokens.grids)

    def embed(self, corrupted: Corrupted) -> Embeddings:
        """A vector an id."""
        return Embeddings(self.vectors(corrupted.inputs))

    def loss(self, hidden: Float[Tensor, "T C"], embeddings: Embeddings, corrupted: Corrupted) -> LossBreakdown:
        """Cross-entropy of each id given everything before it."""
        assert corrupted.targets is not None
        return {"image": LossTerm(self.cross_entropy(hidden, corrupted.targets), len(corrupted.targets))}

    def sample(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None = None,
    ) -> Iterator[ImageTokens]:
        """One id a document and step; an image has exactly its tokens. Grids of one call are equal.

        Given ids are put where they are known; what comes before them does not see them.
        """
        if not isinstance(settings, AutoregressiveSettings):
            raise ValueError(f"sampling: expected AutoregressiveSettings, got {type(settings).__name__}")
        if len(set(grids)) != 1:
            raise ValueError(f"sampling: autoregressive images of one call need one size, got {sorted(set(grids))}")
        block = Block(grids[0], TokenKind.LEARNED, bidirectional=False, private=False)
        ids: list[Int[Tensor, " R"]] = []
        hidden, n = session.last, block.grid.length  # (G, R, C)
        given = None if known is None else (known.tokens.values.view(-1, n), known.mask.view(-1, n))  # (R, n) each
        for i in range(n):
            logits = settings.guide(self.logits(hidden)[: settings.active(i / n)])  # (R, V)
            drawn = choose(logits, rngs, settings.temperature, settings.top_k, settings.top_p)
            if given is not None:
                drawn = torch.where(given[1][:, i].to(drawn.device), given[0][:, i].to(drawn.device), drawn)
            ids.append(drawn)
            one = Corrupted(ids[-1], torch.ones(len(grids), device=hidden.device), (Grid(1, 1),) * len(grids))
            hidden = session.append(self.embed(one), [block.piece(i, 1)] * len(grids))
        yield ImageTokens(torch.stack(ids, dim=1).flatten(), tuple(grids))  # (R, n) -> (T,)
