"""Text that is learned masked, block by block, beside images that are (UniDisc, arXiv 2503.20853; MMaDA, arXiv 2505.15809).

Blocks of a text follow each other as in semi-autoregressive sampling (LLaDA, arXiv 2502.09992, appendix B.4; block
diffusion, arXiv 2503.09573): each sees the ids before it, none of them hidden, and all of itself. One block as long as the
longest text is the published whole answer.

Letters: B ids of a block, n of them known, k hidden ones, R documents of a session, T = R * B, V entries, C width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unimodal_generators.base import Block, DecodingSession, Embeddings, Grid, SamplingSettings, TokenKind
from unimodal_generators.unmasking import MaskedSettings, hidden_count, masked_settings, schedule_named, unmask

HIDDEN = -1  # stands for a text id that is hidden
Read = Callable[[Int[Tensor, " T"]], Float[Tensor, "T C"]]


class MaskedBlock(NamedTuple):
    """One learned block of text."""

    ids: tuple[int, ...]  # B, HIDDEN where nobody knows what follows
    targets: tuple[bool, ...]  # which are hidden and learned
    block: Block


class MaskedText(nn.Module):
    """Learns the hidden ids of blocks of text that see all of themselves; writes a block by keeping the surest first.

    A learned text is cut into blocks. Each is read twice: as a private copy with ids hidden, which are learned, then as it
    is, which is what the next block sees. Every copy has the full length, or its length would tell where a text ends: behind
    the id that ends a text (the document's end, or an image's begin) the same id follows until the block is full, learned
    like all others; behind a text that ends otherwise everything is hidden and nothing learned.

    Args:
        width: of the backbone.
        block: ids of a block.
        schedule: how many ids are hidden, in training at r drawn uniformly for each block, in sampling step by step: a name
            of `SCHEDULES`; "linear" hides every share alike (UniDisc, MMaDA).
        weighting: "hidden" counts every hidden id alike; "bound" divides each by the share hidden in its block and counts
            all ids, which with the linear schedule bounds the negative log-likelihood of a block (LLaDA, MMaDA).
    """

    def __init__(
        self, width: int, block: int, schedule: str = "linear", weighting: Literal["hidden", "bound"] = "hidden"
    ) -> None:
        super().__init__()
        if block < 1:
            raise ValueError(f"generator.text.block: expected 1 id or more, got {block}")
        self.block, self.schedule, self.weighting = block, schedule_named(schedule), weighting
        self.hidden = nn.Parameter(0.02 * torch.randn(width))  # read in place of a hidden id

    def plan(self, ids: Sequence[int], ends: Sequence[int], rng: np.random.Generator) -> MaskedBlock:
        """Up to B ids as a full block, ceil(gamma(r) n) of the known ones hidden. Host side.

        Args:
            ids: of the text, at least one.
            ends: those that a text can end with; they come last.
            rng: of this block alone.
        """
        known = [*ids, *[ids[-1]] * (self.block - len(ids))] if ids[-1] in ends else list(ids)
        n = len(known)
        k = hidden_count(self.schedule, rng.random(), n)
        targets = np.zeros(self.block, dtype=bool)
        targets[rng.permutation(n)[:k]] = True
        block = replace(self._block(), time=1 - k / n, n_targets=k if self.weighting == "hidden" else n)
        return MaskedBlock((*known, *[HIDDEN] * (self.block - n)), tuple(targets.tolist()), block)

    def _block(self) -> Block:
        return Block(Grid(1, self.block), TokenKind.TEXT, bidirectional=True, private=True)

    def vectors(self, ids: Int[Tensor, " T"], embedding: Read) -> Float[Tensor, "T C"]:
        """What the backbone reads of each id; one and the same of all that are hidden."""
        shown = embedding(ids.clamp_min(0))
        return torch.where((ids == HIDDEN)[:, None], self.hidden.to(shown.dtype), shown)

    def write(
        self,
        session: DecodingSession,
        read: Read,
        score: Callable[[Float[Tensor, "T C"]], Float[Tensor, "T V"]],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
    ) -> Int[Tensor, "R B"]:
        """The next block of each document, drawn in `text_steps` network evaluations; the session stays as it is.

        Args:
            session: the documents, read up to where the block begins.
            read: vectors of ids, HIDDEN among them.
            score: scores of what follows, minus infinity where an id may not come.
            settings: of `Masked`; their temperature is the text's here.
            rngs: one a document: a block depends on its own alone.
        """
        settings = masked_settings(settings)

        def scores(ids: Int[Tensor, " T"], step: int) -> Float[Tensor, "T V"]:
            return score(self._peek(session, read, ids))

        lengths, settings = [self.block] * len(rngs), replace(settings, steps=self.steps(settings))
        ids = torch.full((sum(lengths),), HIDDEN, device=self.hidden.device)
        every = torch.ones(len(ids), dtype=torch.bool)
        *_, drawn = unmask(scores, ids, every, lengths, self.schedule, settings, rngs, HIDDEN)
        return drawn.view(-1, self.block)  # (T,) -> (R, B)

    def steps(self, settings: MaskedSettings) -> int:
        """Network evaluations a block; refuses more than it has ids."""
        steps = self.block if settings.text_steps is None else settings.text_steps
        if steps > self.block:
            raise ValueError(f"text_steps: expected at most one an id of a block ({self.block}), got {steps}")
        return steps

    def follow(
        self, session: DecodingSession, read: Read, texts: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "n C"]]:
        """States that predict the n ids (at most B) of a given block of each document: each from those before it alone.

        By the chain rule their probabilities multiply to that of the block, as if it was written from left to right.
        """
        states = []
        for j in range(max(map(len, texts))):
            rows = [[*ids[:j], *[HIDDEN] * (self.block - len(ids[:j]))] for ids in texts]
            ids = torch.tensor(rows, device=self.hidden.device).flatten()  # (R, B) -> (T,)
            states.append(self._peek(session, read, ids).view(len(texts), self.block, -1)[:, j])  # (T, C) -> (R, C)
        return [one[: len(ids)] for one, ids in zip(torch.stack(states, 1), texts, strict=True)]

    def _peek(self, session: DecodingSession, read: Read, ids: Int[Tensor, " T"]) -> Float[Tensor, "T C"]:
        """Hidden states of one block a document, of the branch that sees everything: text is not guided."""
        blocks = [self._block()] * (len(ids) // self.block)
        return session.peek(Embeddings(read(ids)), blocks, branches=1)[0]
