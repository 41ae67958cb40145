"""Documents being decoded: what of them is cached, and where each goes on.

Letters: R documents, G guidance branches (N = G * R cached sequences, branch by branch), T new tokens of all documents,
C width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unimodal.attention import KVCache
from unimodal.backbone.positions import Placed
from unimodal.model import UnifiedModel
from unimodal.packing import Run, place_block
from unimodal_generators.base import Block, Branch, Embeddings, TokenKind


@dataclass
class _State:
    """What all views of a session share."""

    model: UnifiedModel
    branches: list[Branch]
    cache: KVCache
    next: list[int]  # position id that follows, a cached sequence
    last: Float[Tensor, "N C"]


class Session:
    """Documents being decoded, or a view of some of them."""

    def __init__(self, state: _State, documents: Sequence[int], total: int) -> None:
        self._state, self._documents, self._total = state, list(documents), total

    @classmethod
    def start(cls, model: UnifiedModel, documents: int, branches: Sequence[Branch], capacity: int) -> "Session":
        """An empty session for that many documents of up to `capacity` tokens."""
        config, weight = model.backbone.config, model.backbone.embedding.weight
        n = documents * len(branches)
        cache = KVCache(
            config.depth, n, capacity, config.kv_heads, config.head_size, device=weight.device, dtype=weight.dtype
        )
        last = weight.new_zeros(n, config.width)
        return cls(_State(model, list(branches), cache, [0] * n, last), range(documents), documents)

    def rows(self, indices: Sequence[int]) -> "Session":
        """A view of some of this view's documents."""
        return Session(self._state, [self._documents[i] for i in indices], self._total)

    @property
    def branches(self) -> int:
        """Conditions computed side by side."""
        return len(self._state.branches)

    @property
    def last(self) -> Float[Tensor, "G R C"]:
        """Hidden state at the last position of each document."""
        return self._state.last[self._sequences()].unflatten(0, (self.branches, -1))

    def length(self, document: int) -> int:
        """Tokens the fullest branch of a document holds."""
        d = self._documents[document]
        return max(self._state.cache.lengths[g * self._total + d] for g in range(self.branches))

    @contextmanager
    def trying(self) -> Iterator[None]:
        """What is appended inside is forgotten at the end."""
        state = self._state
        lengths, following, last = list(state.cache.lengths), list(state.next), state.last.clone()
        try:
            yield
        finally:
            state.cache.lengths[:], state.next, state.last = lengths, following, last

    def append(self, embeddings: Embeddings, blocks: Sequence[Block]) -> Float[Tensor, "G T C"]:
        """One image block a document; its tokens enter the cache for good."""
        return self._image(embeddings, blocks, keep=True, branches=range(self.branches))

    def append_given(self, embeddings: Embeddings, blocks: Sequence[Block]) -> None:
        """One image a document that the prompt gives: branches without images do not get it."""
        branches = [g for g, branch in enumerate(self._state.branches) if branch.images]
        self._image(embeddings, blocks, keep=True, branches=branches)

    def peek(
        self, embeddings: Embeddings, blocks: Sequence[Block], branches: int | None = None
    ) -> Float[Tensor, "G T C"]:
        """One block of an image (or of text) a document; sees the cache, leaves no trace.

        `branches`: of the first so many; None is all.
        """
        return self._image(embeddings, blocks, keep=False, branches=range(branches or self.branches))

    def append_text(self, runs: Sequence[Run]) -> None:
        """One run of text ids a document. Branches without text get the structural ids and what stands instead of text."""
        self._text(runs, keep=True)

    def peek_text(self, runs: Sequence[Run]) -> Float[Tensor, "N T C"] | None:
        """Hidden states of one run of text ids a document; sees the cache, leaves no trace.

        Shorter runs are filled up behind their end. Branches without text have no row; None when nothing is left.
        """
        return self._text(runs, keep=False)

    def _text(self, runs: Sequence[Run], keep: bool) -> Float[Tensor, "N T C"] | None:
        sequences, ids = [], []
        for sequence, run in zip(self._sequences(), list(runs) * self.branches, strict=True):
            branch = self._state.branches[sequence // self._total]
            if kept := run.ids if branch.text else run.without_text:
                sequences.append(sequence)
                ids.append(kept)
        if not sequences:
            return None
        state, counts = self._state, [len(i) for i in ids]
        tokens = max(counts)
        padded = torch.tensor([[*i, *[0] * (tokens - len(i))] for i in ids], device=state.last.device)  # (R, T)
        placed = [state.model.scheme.text(state.next[s], tokens) for s in sequences]
        x = state.model.backbone.embedding(padded)  # (R, T, C)
        hidden = self._forward(x, placed, sequences, counts, TokenKind.TEXT, bidirectional=False)
        if keep:
            self._keep(hidden, sequences, counts)
            for sequence, count in zip(sequences, counts, strict=True):
                state.next[sequence] += count
        return hidden

    def _image(
        self, embeddings: Embeddings, blocks: Sequence[Block], keep: bool, branches: Sequence[int]
    ) -> Float[Tensor, "G T C"]:
        state, copies = self._state, len(branches)
        sequences = [g * self._total + d for g in branches for d in self._documents]
        lengths = [block.length for block in blocks]
        x = state.model.place(embeddings.values, blocks).split(lengths)
        padded = torch.nn.utils.rnn.pad_sequence(x, batch_first=True)  # (R, T, C)
        padded = padded.repeat(copies, 1, 1)  # (N, T, C): branch by branch
        counts = lengths * copies
        placed = [
            place_block(state.model.scheme, state.next[s], block)
            for s, block in zip(sequences, list(blocks) * copies, strict=True)
        ]
        rows = None
        if embeddings.condition is not None:
            index = torch.arange(1, len(counts) + 1, device=padded.device).repeat_interleave(padded.shape[1])
            rows = embeddings.condition.repeat(copies, 1), index  # (N, C), (N*T,)
        block = blocks[0]
        hidden = self._forward(
            padded, placed, sequences, counts, block.kind, block.bidirectional, rows, state.model.layers
        )
        if keep:
            self._keep(hidden, sequences, counts)
            for sequence, p, block in zip(sequences, placed, list(blocks) * copies, strict=True):
                if block.complete:
                    state.next[sequence] = p.following
        by_branch = hidden[..., : state.model.image_channels].unflatten(0, (copies, -1))  # (G, R, T, C)
        return torch.cat([by_branch[:, r, :n] for r, n in enumerate(lengths)], dim=1)  # (G, T, C)

    def _forward(
        self,
        x: Float[Tensor, "R T C"],
        placed: Sequence[Placed],
        sequences: Sequence[int],
        counts: Sequence[int],
        kind: TokenKind,
        bidirectional: bool,
        rows: tuple[Tensor, Tensor] | None = None,
        layers: Sequence[int] = (-1,),
    ) -> Float[Tensor, "R T LC"]:
        backbone = self._state.model.backbone
        r, t, _ = x.shape
        ids = np.zeros((r, t, self._state.model.scheme.axes), dtype=np.int64)
        for row, p in zip(ids, placed, strict=True):
            row[: len(p.ids)] = p.ids
        positions = torch.from_numpy(ids).flatten(0, 1).to(x.device)  # (R*T, A)
        expert = backbone.config.experts.index(kind)
        splits = [0] * len(backbone.config.experts.names)
        splits[expert] = r * t
        by_expert = None if rows is None else (rows[0], [rows[1]] * len(splits))
        view = self._state.cache.view(sequences, counts, bidirectional)
        x = x.flatten(0, 1).to(backbone.embedding.weight.dtype)  # (R*T, C)
        return backbone(x, positions, splits, view, by_expert, layers=layers).unflatten(0, (r, t))

    def _keep(self, hidden: Float[Tensor, "R T LC"], sequences: Sequence[int], counts: Sequence[int]) -> None:
        state = self._state
        state.cache.advance(sequences, counts)
        hidden = hidden[..., -state.last.shape[-1] :]  # of the last layer
        if min(counts) == hidden.shape[1]:
            newest = hidden[:, -1]
        else:
            newest = hidden[torch.arange(len(counts)), torch.tensor(counts) - 1]
        if list(sequences) == list(range(len(state.last))):
            state.last = newest.to(state.last.dtype)
        else:
            state.last[torch.tensor(sequences)] = newest.to(state.last.dtype)

    def _sequences(self) -> list[int]:
        return [g * self._total + d for g in range(self.branches) for d in self._documents]
