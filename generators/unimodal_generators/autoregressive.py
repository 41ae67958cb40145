"""Next-token prediction of discrete image tokens: Janus (arXiv 2410.13848), LlamaGen (2406.06525), Chameleon (2405.09818).

Several codebooks: RQ-Transformer (arXiv 2203.01941), VILA-U (arXiv 2409.04429). Several tokens a position: Token-Shuffle
(arXiv 2504.17789). Row ends: Emu3 (arXiv 2409.18869).

Letters: R documents of a session, T tokens of all images, S positions of their blocks, n tokens of one image, s tokens of
one position, Q codebooks, V entries of one, C width, G guidance branches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

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
    in_rows,
)
from unimodal_generators.choice import ChoiceSettings, choose
from unimodal_generators.code_heads import CodeHeads, ParallelHeads, SharedHeads
from unimodal_generators.depth import Depth, DepthTransformer
from unimodal_generators.discrete import code_mlp
from unimodal_generators.shuffle import TokenShuffle, windows
from unimodal_tokenizers.base import Grid, ImageTokenizer, ImageTokens, TokenLayout


class Autoregressive(ImageGenerator):
    """Learns the next token's id or ids; an image is a causal block, and its own context.

    Args:
        layout: of the image tokenizer; of one codebook or several.
        width: of the backbone.
        inputs: what is read of an id: a learned row ("ids"), or its code vector through an MLP ("codes", as Janus does).
            The rows of several codebooks are added up.
        token_noise: share of a learned image's ids that are replaced by random ones where they are read, never where
            they are predicted; small data sets are learned by heart without it.
        vocabulary: "own" gives image ids an embedding and a head beside the text's (Janus); "shared" makes them
            rows of the model's vocabulary, learned by one softmax over words and image ids (Chameleon, Liquid).
        depth: a small transformer that predicts a token's codes one after another (RQ-Transformer, VILA-U); None predicts
            them all at once, by a head each.
        shuffle: side of the squares of tokens that are one position of the backbone (Token-Shuffle, arXiv 2504.17789),
            whose tokens are predicted at once.
        end_of_row: whether a learned token follows each row (Emu3, arXiv 2409.18869). The grammar of an image places it, so
            it is read and never predicted.
        stops: whether an image ends with the tokenizer's end id and takes no places behind it, rather than as many as the
            longest may have. It is trained on images stored as tokens, whose ends are known before they are packed.
        sampling: defaults of the sampler.
    """

    reads = "previous"
    accepts: ClassVar = ("discrete", "sequence")
    settings: ClassVar = ChoiceSettings
    repeats = False
    inpaints = True
    head: CodeHeads

    def __init__(
        self,
        layout: TokenLayout,
        width: int,
        inputs: Literal["ids", "codes"] = "ids",
        token_noise: float = 0.0,
        vocabulary: Literal["own", "shared"] = "own",
        depth: Depth | None = None,
        shuffle: int = 1,
        end_of_row: bool = False,
        stops: bool = False,
        sampling: ChoiceSettings = ChoiceSettings(),
    ) -> None:
        super().__init__()
        self.check(layout)
        if not 0 <= token_noise < 1:
            raise ValueError(f"token_noise: expected a share from 0 to below 1, got {token_noise}")
        if shuffle < 1:
            raise ValueError(f"generator.shuffle: expected at least 1 (no shuffle), got {shuffle}")
        if layout.kind == "sequence" and (shuffle > 1 or end_of_row):
            name, value = ("shuffle", shuffle) if shuffle > 1 else ("end_of_row", "true")
            raise ValueError(
                f"generator.{name}: expected none with tokens of a sequence, which has no rows, got {value}"
            )
        if vocabulary == "shared" and (inputs == "codes" or depth is not None):
            raise ValueError("generator.vocabulary: shared rows need inputs: ids and no depth, got another")
        self.layout, self.token_noise, self.stops, self.sampling = layout, token_noise, stops, sampling
        self.codebooks = list(layout.codebooks)
        self.embedding: nn.Embedding | nn.Sequential | None = None
        if vocabulary == "shared":
            self.image_ids = sum(self.codebooks)
        else:
            books, dim = self.codebooks, layout.dim
            self.embedding = nn.Embedding(sum(books), width) if inputs == "ids" else code_mlp(dim, width)
            self.head = ParallelHeads(width, books) if depth is None else DepthTransformer(depth, width, books)
        if isinstance(self.embedding, nn.Embedding):
            nn.init.normal_(self.embedding.weight, std=0.02)
        self.side, self.shuffle = shuffle, TokenShuffle(width, shuffle) if shuffle > 1 else None
        self.row_end = nn.Parameter(0.02 * torch.randn(width)) if end_of_row else None

    def bind(self, tokenizer: ImageTokenizer, rows: Callable[[], ImageRows] | None = None) -> None:
        """The tokenizer's code vectors, and the model's vocabulary where it is shared."""
        super().bind(tokenizer, rows)
        if self.stops:
            if tokenizer.end is None:
                name = type(tokenizer).__name__
                raise ValueError(
                    f"generator.stops: expected false with a {name}, whose images have one length, got true"
                )
            self.ends = tokenizer.end
        if rows is not None:
            self.head = SharedHeads(rows, self.codebooks)

    def plan(self, grid: Grid, rng: np.random.Generator) -> list[Block]:
        """One causal block, its own context."""
        seed = int(rng.integers(2**63))
        return [replace(self._block(grid), seed=seed, n_targets=grid.length)]

    def plan_context(self, grid: Grid) -> list[Block]:
        """One causal block."""
        return [replace(self._block(grid), kind=TokenKind.CLEAN)]

    def _block(self, grid: Grid) -> Block:
        """Its grid is that of positions: squares of tokens, and a column of row ends."""
        h, w = grid.h, grid.w
        if h % self.side or w % self.side:
            raise ValueError(f"generator.shuffle: expected images of multiples of {self.side} tokens, got {h}x{w}")
        positions = Grid(h // self.side, w // self.side + (self.row_end is not None))
        return Block(positions, TokenKind.LEARNED, bidirectional=False, private=False)

    def corrupt(self, tokens: ImageTokens, blocks: Sequence[Block]) -> Corrupted:
        """The ids, to be read (some of them replaced) and to be predicted."""
        ids = tokens.values
        images = zip(ids.split(tokens.lengths), blocks, strict=True)
        read = torch.cat([ids[:0], *(self._noised(image, block) for image, block in images)])
        return Corrupted(read, torch.ones(len(tokens), device=ids.device), tokens.grids, ids)

    def _noised(self, ids: Int[Tensor, "n *Q"], block: Block) -> Int[Tensor, "n *Q"]:
        if not self.token_noise:
            return ids
        rng = torch.Generator().manual_seed(block.seed)
        replaced = torch.rand(ids.shape, generator=rng) < self.token_noise
        random = [torch.randint(entries, ids.shape[:1], generator=rng) for entries in self.codebooks]
        return torch.where(replaced.to(ids.device), torch.stack(random, dim=1).view(ids.shape).to(ids.device), ids)

    def context(self, tokens: ImageTokens) -> Corrupted:
        """The ids, to be read."""
        return Corrupted(tokens.values, torch.ones(len(tokens), device=tokens.values.device), tokens.grids)

    def embed(self, corrupted: Corrupted) -> Embeddings:
        """A vector a position."""
        ids = self._codes(corrupted.inputs)
        x = self._merged(ids if self.shuffle is None else ids[self._windows(corrupted.grids).to(ids.device)])
        if self.row_end is None:
            return Embeddings(x)
        index = self._line(corrupted.grids).to(x.device)  # (S,): -1 is the last row of all
        return Embeddings(torch.cat([x, self.row_end[None].to(x.dtype)])[index])

    def _merged(self, ids: Int[Tensor, "T Q"]) -> Float[Tensor, "_ C"]:
        """Vectors of positions from ids in the order of windows."""
        x = self._embedded(ids)
        return x if self.shuffle is None else self.shuffle.merge(x)

    def _embedded(self, ids: Int[Tensor, "T Q"]) -> Float[Tensor, "T C"]:
        if isinstance(self.embedding, nn.Sequential):
            codes = self.lookup(ids[:, 0] if len(self.codebooks) == 1 else ids)
            return self.embedding(codes.to(next(self.parameters()).dtype))
        if self.embedding is not None:
            table, scale = self.embedding.weight, 1.0
        else:
            assert self.rows is not None
            table, _, scale = self.rows()
        found = [F.embedding(i, rows) for i, rows in zip(ids.unbind(1), table.split(self.codebooks), strict=True)]
        x = sum(found[1:], found[0])
        return x if scale == 1.0 else x * scale

    def loss(self, hidden: Float[Tensor, "S C"], embeddings: Embeddings, corrupted: Corrupted) -> LossBreakdown:
        """Cross-entropy of each token's ids given everything before its position."""
        assert corrupted.targets is not None
        ids = self._codes(corrupted.targets)
        if self.row_end is not None:  # what stands before a row's end predicts nothing
            tokens = (self._line(corrupted.grids) >= 0).nonzero()[:, 0]
            hidden = hidden[tokens.to(hidden.device)]
        if self.shuffle is not None:
            hidden = self.shuffle.part(hidden).flatten(0, 1)  # (S, n, C) -> (T, C)
            ids = ids[self._windows(corrupted.grids).to(ids.device)]
        return {"image": LossTerm(self.head.loss(hidden, ids), len(ids))}

    def sample(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: SamplingSettings,
        rngs: Sequence[torch.Generator],
        known: Known | None = None,
    ) -> Iterator[ImageTokens]:
        """One position a document and step, a preview a row; an image has exactly its tokens. Grids of one call are equal.

        Given ids are put where they are known; what comes before them does not see them.
        """
        self.check_sampling(settings, grids)
        assert isinstance(settings, ChoiceSettings)
        if len(set(grids)) != 1:
            raise ValueError(f"sampling: autoregressive images of one call need one size, got {sorted(set(grids))}")
        if self.ends is not None:
            if known is not None:
                raise ValueError("known: expected none of an image that ends where it wants to")
            yield self._until_the_end(session, grids, settings, rngs, self.ends)
            return
        order, block, r = windows(grids[0], self.side), self._block(grids[0]), len(grids)
        given = None
        if known is not None:
            values = self._codes(known.tokens.values).unflatten(0, (r, -1))[:, order.to(known.tokens.values.device)]
            given = values, known.mask.view(r, -1)[:, order.to(known.mask.device)]  # (R, n, Q), (R, n)
        hidden, n, step = session.last, len(order), self.side**2  # (G, R, C)
        drawn: list[Int[Tensor, "R s Q"]] = []
        line = self._line(grids[:1]).tolist()
        for at, first in enumerate(line):
            if first < 0:  # the end of a row went with the position before it
                continue
            ends = at + 1 < len(line) and line[at + 1] < 0
            squares = None if given is None else [x[:, first * step : (first + 1) * step] for x in given]
            progress = first * step / n
            states = hidden[: settings.active(progress)]
            drawn.append(self._draw(states, settings, progress, rngs, squares))
            x = self._merged(drawn[-1].flatten(0, 1))[:, None]  # (R, 1, C)
            if ends:
                assert self.row_end is not None
                x = torch.cat([x, self.row_end.to(x.dtype).expand_as(x)], dim=1)
            hidden = session.append(Embeddings(x.flatten(0, 1)), [block.piece(at, x.shape[1])] * r)
            hidden = hidden.unflatten(1, (r, -1))[:, :, -1]  # (G, R * 1 or 2, C) -> (G, R, C)
            m = len(drawn) * step
            if m % (grids[0].w * self.side) == 0:
                ids = torch.cat(drawn, dim=1)[:, order[:m].argsort().to(hidden.device)]  # (R, m, Q), row-major
                yield in_rows(ids if len(self.codebooks) > 1 else ids[..., 0], grids[0], known)

    def _until_the_end(
        self,
        session: DecodingSession,
        grids: Sequence[Grid],
        settings: ChoiceSettings,
        rngs: Sequence[torch.Generator],
        end: int,
    ) -> ImageTokens:
        """One token a step of every document whose image goes on; each has the places up to its `end`, or all of them."""
        n, hidden = grids[0].length, session.last  # (G, R, C)
        ids: list[list[int]] = [[] for _ in grids]
        going = list(range(len(grids)))
        for i in range(n):
            drawn = self._draw(hidden[: settings.active(i / n)], settings, i / n, [rngs[d] for d in going], None)
            values = drawn[:, 0, 0].tolist()  # (R', 1, 1)
            for d, value in zip(going, values, strict=True):
                ids[d].append(value)
            # Its last token says how long an image was: what follows is placed behind that.
            grid = [Grid(1, i + 1) if value == end else Grid(1, n) for value in values]
            x = self._merged(drawn.flatten(0, 1))  # (R', C)
            hidden = session.rows(going).append(Embeddings(x), [self._block(g).piece(i, 1) for g in grid])
            on = [r for r, value in enumerate(values) if value != end]
            going, hidden = [going[r] for r in on], hidden[:, on]
            if not going:
                break
        found = torch.tensor([value for one in ids for value in one], device=hidden.device)
        return ImageTokens(found, tuple(Grid(1, len(one)) for one in ids))

    def _draw(
        self,
        hidden: Float[Tensor, "G R C"],
        settings: ChoiceSettings,
        progress: float,
        rngs: Sequence[torch.Generator],
        given: Sequence[Tensor] | None,
    ) -> Int[Tensor, "R s Q"]:
        """Ids of the tokens of one position of every document; the codes of a token one after another."""
        parted = hidden[:, :, None] if self.shuffle is None else self.shuffle.part(hidden)  # (G, R, s, C)
        tokens = []
        for j, state in enumerate(parted.unbind(2)):
            codes = torch.empty(state.shape[1], 0, dtype=torch.long, device=state.device)  # (R, q)
            for q in range(len(self.codebooks)):
                scores = self.head.logits(state, codes.expand(len(state), -1, -1))
                logits = settings.guide(scores, progress)  # (R, V)
                code = choose(logits, rngs, settings.temperature, settings.top_k, settings.top_p)
                if given is not None:
                    code = torch.where(given[1][:, j].to(code.device), given[0][:, j, q].to(code.device), code)
                codes = torch.cat([codes, code[:, None]], dim=1)
            tokens.append(codes)
        return torch.stack(tokens, dim=1)

    def _codes(self, ids: Int[Tensor, "T *Q"]) -> Int[Tensor, "T Q"]:
        """Ids with an axis of codebooks, which those of a single one lack."""
        return ids[:, None] if len(self.codebooks) == 1 else ids

    def _windows(self, grids: Sequence[Grid]) -> Int[Tensor, " T"]:
        """Of tokens in the order of windows, where they are in images end to end."""
        return _end_to_end([(windows(grid, self.side), grid.length) for grid in grids])

    def _line(self, grids: Sequence[Grid]) -> Int[Tensor, " S"]:
        """Of each position of a block, which square of images end to end it is; -1 at a row's end."""
        squares = [Grid(grid.h // self.side, grid.w // self.side) for grid in grids]
        numbers = [torch.arange(square.length).view(square.h, square.w) for square in squares]
        padded = numbers if self.row_end is None else [F.pad(n, (0, 1), value=-1) for n in numbers]
        return _end_to_end([(n.flatten(), square.length) for n, square in zip(padded, squares)])


def _end_to_end(images: Sequence[tuple[Int[Tensor, " _"], int]]) -> Int[Tensor, " _"]:
    """Indices within each image, as indices into all of them; -1 stays."""
    parts, first = [torch.zeros(0, dtype=torch.long)], 0
    for index, length in images:
        parts.append(torch.where(index < 0, index, index + first))
        first += length
    return torch.cat(parts)
