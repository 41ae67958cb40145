"""Next-scale prediction: all ids of a scale at once, given the coarser ones (VAR, arXiv 2404.02905; VARGPT, 2501.12327).

Letters: R documents of a session, N images, B of them of one size, T tokens of all images and scales, n tokens of one image;
S scales, D channels of a code, V entries of the codebook, C width, G guidance branches.

An image is a block a scale, each seen by itself and by what comes later::

    bos a seven boi [1] [2 2 2 2] [3 3 3 3 3 3 3 3 3] [C C C C C C C C C] eoi eos      [ ] one bidirectional block

What is read at scale k is what the scales before it say together, at the size of k; nothing yet at the first. So the ids of
the last scale are never read while the image is learned, and what follows reads the finished image once more (C): what all
scales say together, on the finest grid. Images that are given are read in this form alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unimodal_generators.base import (
    Block,
    Corrupted,
    DecodingSession,
    Embeddings,
    ImageGenerator,
    ImageRows,
    Known,
    LossBreakdown,
    LossTerm,
    SamplingSettings,
    TokenKind,
)
from unimodal_generators.choice import ChoiceSettings, choose
from unimodal_generators.code_heads import ParallelHeads
from unimodal_tokenizers.base import Grid, ImageTokenizer, ImageTokens, MultiscaleTokenizer, TokenLayout, precise


class NextScale(ImageGenerator):
    """Learns the ids of every scale given the coarser ones: p(r_1 ... r_S) = prod_k p(r_k | r_1 ... r_(k-1)) (VAR, eq. 6).

    Args:
        layout: of the image tokenizer.
        width: of the backbone.
        token_noise: share of a learned image's ids that are replaced by random ones where finer scales read them, never
            where they are predicted: a sampler's mistakes are no surprise then (as Infinity's
            bitwise self-correction, arXiv 2412.04431, whose finer scales are also taught to undo them; these are not).
        sampling: defaults of the sampler.
    """

    reads = "own"
    accepts: ClassVar = ("multiscale",)
    settings: ClassVar = ChoiceSettings
    repeats = True

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        token_noise: float = 0.0,
        sampling: ChoiceSettings = ChoiceSettings(),
    ) -> None:
        super().__init__()
        self.check(layout)
        if not 0 <= token_noise < 1:
            raise ValueError(f"token_noise: expected a share from 0 to below 1, got {token_noise}")
        self.layout, self.token_noise, self.sampling = layout, token_noise, sampling
        self.code_in = nn.Linear(layout.dim, width)
        self.scale = nn.Embedding(len(layout.scales) + 1, width)  # the first starts an image, the last ends it
        self.head = ParallelHeads(width, layout.codebooks)
        nn.init.normal_(self.code_in.weight, std=1.0)  # entries about 1, which added positions do not drown

    def bind(self, tokenizer: ImageTokenizer, rows: Callable[[], ImageRows] | None = None) -> None:
        """Keeps how the tokenizer's scales add up."""
        super().bind(tokenizer, rows)
        if not isinstance(tokenizer, MultiscaleTokenizer):
            raise ValueError(f"tokenizer: NextScale needs a MultiscaleTokenizer, got {type(tokenizer).__name__}")
        self.accumulate = tokenizer.accumulate

    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """One bidirectional block a scale, which later ones see."""
        return [
            Block(
                grid, TokenKind.LEARNED, bidirectional=True, private=False, seed=int(rng.integers(2**63)),
                n_targets=count, offset=offset, count=count,
            )
            for offset, count in zip(_offsets(grid), grid.lengths, strict=True)
        ]  # fmt: skip

    def plan_context(self, grid: Grid) -> list[Block]:
        """One bidirectional block on the finest grid."""
        return [Block(Grid(grid.h, grid.w), TokenKind.CLEAN, bidirectional=True, private=False)]

    def corrupt(self, tokens: ImageTokens, blocks: Sequence[Block]) -> Corrupted:
        """What each scale reads of the coarser ones (some of their ids replaced), and all ids to be predicted."""
        ids = tokens.values
        pieces = ids.split([block.length for block in blocks])
        read = torch.cat([ids[:0], *(self._read(piece, block) for piece, block in zip(pieces, blocks, strict=True))])
        inputs = self._by_grid(ImageTokens(read, tokens.grids), self.inputs)
        return Corrupted(inputs, torch.ones(len(tokens), device=ids.device), tokens.grids, ids)

    def _read(self, ids: Int[Tensor, " n"], block: Block) -> Int[Tensor, " n"]:
        if not self.token_noise:
            return ids
        rng = torch.Generator().manual_seed(block.seed)
        replaced = torch.rand(len(ids), generator=rng) < self.token_noise
        random = torch.randint(self.layout.codebooks[0], (len(ids),), generator=rng)
        return torch.where(replaced.to(ids.device), random.to(ids.device), ids)

    def inputs(self, ids: Int[Tensor, "B n"], grid: Grid) -> Float[Tensor, "B n D"]:
        """Of every scale, what the coarser ones say together at its size; zero at the first (VAR, algorithm 2, figure 4)."""
        says = self.accumulate(ids, grid)
        start = says[0].new_zeros(len(ids), grid.lengths[0], self.layout.dim)
        return torch.cat([start, *(resized(f, size) for f, size in zip(says, grid.sizes[1:], strict=False))], dim=1)

    def context(self, tokens: ImageTokens) -> Corrupted:
        """What all scales say together, on the finest grid."""

        def finished(ids: Int[Tensor, "B n"], grid: Grid) -> Float[Tensor, "B hw D"]:
            return resized(self.accumulate(ids, grid)[-1], (grid.h, grid.w))

        grids = tuple(Grid(grid.h, grid.w) for grid in tokens.grids)
        time = torch.ones(len(tokens), device=tokens.values.device)
        return Corrupted(self._by_grid(tokens, finished), time, grids)

    def _by_grid(
        self, tokens: ImageTokens, function: Callable[[Int[Tensor, "B n"], Grid], Float[Tensor, "B m D"]]
    ) -> Float[Tensor, "T D"]:
        """`function` of the ids of all images of one grid at a time, put back in the images' order."""
        parts = [self.code_in.weight.new_zeros(0, self.layout.dim)] * (len(tokens) + 1)  # one for no images
        for grid in dict.fromkeys(tokens.grids):
            members = [i for i, other in enumerate(tokens.grids) if other == grid]
            ids = tokens.select(members).values.unflatten(0, (len(members), -1))
            for i, part in zip(members, function(ids, grid), strict=True):
                parts[i] = part
        return torch.cat(parts)

    def embed(self, corrupted: Corrupted) -> Embeddings:
        """What is read, and which scale reads it."""
        finished, rows = len(self.layout.scales), [torch.zeros(0, dtype=torch.long)]
        for grid in corrupted.grids:
            held = [k for k, count in enumerate(grid.lengths) for _ in range(count)]
            rows.append(torch.tensor(held) if grid.scales else torch.full((grid.length,), finished))
        return self._embed(corrupted.inputs, torch.cat(rows))

    def _embed(self, inputs: Float[Tensor, "T D"], rows: Int[Tensor, " T"]) -> Embeddings:
        scale = self.scale(rows.to(inputs.device, non_blocking=True))
        return Embeddings(self.code_in(inputs.to(self.code_in.weight.dtype)) + scale)

    def logits(self, hidden: Float[Tensor, "*rest C"]) -> Float[Tensor, "*rest V"]:
        """Scores over the codebook, in fp32 or better."""
        return precise(self.head(hidden))

    def loss(self, hidden: Float[Tensor, "T C"], embeddings: Embeddings, corrupted: Corrupted) -> LossBreakdown:
        """Cross-entropy of each id given all coarser scales; ids of one scale do not see each other."""
        assert corrupted.targets is not None
        total = self.head.loss(hidden, corrupted.targets[:, None])
        return {"image": LossTerm(total, len(corrupted.targets))}

    def sample(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None = None,
    ) -> Iterator[ImageTokens]:
        """All ids of one scale a step. Previews are the coarser images, which decode by themselves.

        Grids of one call are equal.
        """
        self.check_sampling(settings, grids)
        assert isinstance(settings, ChoiceSettings)
        self.check_known(known)
        if len(set(grids)) != 1:
            raise ValueError(f"sampling: next-scale images of one call need one size, got {sorted(set(grids))}")
        grid, documents = grids[0], len(grids)
        block = Block(grid, TokenKind.LEARNED, bidirectional=True, private=False)
        ids = torch.zeros(documents, 0, dtype=torch.long, device=session.last.device)  # (R, n)
        read = self.code_in.weight.new_zeros(documents, grid.lengths[0], self.layout.dim)  # (R, n_k, D)
        for k, (offset, count) in enumerate(zip(_offsets(grid), grid.lengths, strict=True)):
            if k:
                read = resized(self.accumulate(ids, grid.first(k))[-1], grid.sizes[k])
            embedded = self._embed(read.flatten(0, 1), torch.full((documents * count,), k))
            hidden = session.append(embedded, [block.piece(offset, count)] * documents)  # (G, R n_k, C)
            progress = k / len(grid.lengths)
            logits = settings.guide(self.logits(hidden)[: settings.active(progress)], progress)  # (R n_k, V)
            each = [rng for rng in rngs for _ in range(count)]
            drawn = choose(logits, each, settings.temperature, settings.top_k, settings.top_p)
            ids = torch.cat([ids, drawn.unflatten(0, (documents, -1))], dim=1)
            yield ImageTokens(ids.flatten(), (grid.first(k + 1),) * documents)


def resized(f: Float[Tensor, "B D h w"], size: tuple[int, int]) -> Float[Tensor, "B m D"]:
    """The next scale's input: means over the areas of its cells, row-major (VAR, algorithm 2)."""
    return F.interpolate(f, size, mode="area").flatten(2).transpose(1, 2)


def _offsets(grid: Grid) -> list[int]:
    """First token of each scale."""
    return [sum(grid.lengths[:k]) for k in range(len(grid.lengths))]
