"""Decoding: documents that go on where they stop, many at once, text and images in turn.

Letters: R documents, G guidance branches (N = G * R cached sequences, branch by branch), T new tokens of all documents,
C width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from unimodal.attention import KVCache
from unimodal.backbone.positions import Placed
from unimodal.documents import GENERATED, Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import Run, place_block, to_tensor
from unimodal_generators.base import Block, Branch, Embeddings, Grid, ImageTokens, SamplingSettings, TokenKind
from unimodal_generators.choice import check_choice, choose


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
        """One image block a document; sees the cache, leaves no trace. `branches`: of the first so many; None is all."""
        return self._image(embeddings, blocks, keep=False, branches=range(branches or self.branches))

    def append_text(self, runs: Sequence[Run]) -> None:
        """One run of text ids a document. Branches without text get the structural ids only."""
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
            kept = [i for i, s in zip(run.ids, run.structural, strict=True) if s or branch.text]
            if kept:
                sequences.append(sequence)
                ids.append(kept)
        if not sequences:
            return None
        state, counts = self._state, [len(i) for i in ids]
        tokens = max(counts)
        padded = torch.tensor([i + [0] * (tokens - len(i)) for i in ids], device=state.last.device)  # (R, T)
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


@dataclass(frozen=True)
class DecodingSettings:
    """How documents go on.

    Args:
        start: whether the first thing to come is text (which may begin an image) or an image.
        max_tokens: most text tokens a document, over all its texts.
        max_images: most images a document.
        temperature: of the text; 0 takes the likeliest token.
        top_k: of the text; 0 is all.
        top_p: of the text; 1 is all.
        image: of the images; None takes the recipe's.
        size: (height, width) of drawn images; None takes the recipe's first.
    """

    start: Literal["text", "image"] = "text"
    max_tokens: int = 64
    max_images: int = 4
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    image: SamplingSettings | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 0 or self.max_images < 0:
            raise ValueError(
                f"max_tokens and max_images: expected 0 or more, got {self.max_tokens} and {self.max_images}"
            )
        if self.start == "image" and self.max_images == 0:
            raise ValueError("max_images: expected at least 1 to start with an image, got 0")
        check_choice(self.temperature, self.top_k, self.top_p)


@dataclass
class _Row:
    """A document being continued."""

    rng: torch.Generator
    parts: list[Part] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # of the text being written
    tokens: int = 0
    images: int = 0
    state: Literal["text", "image", "done"] = "text"


class _Decoder:
    """The loop: text token by token, until every document waits for an image or is done; then those images together."""

    def __init__(
        self, model: UnifiedModel, runs: list[list[Run]], settings: DecodingSettings, seeds: Sequence[int]
    ) -> None:
        self.model, self.settings, self.special = model, settings, model.text.special
        self.image = settings.image or model.generator.sampling
        height, width = settings.size or model.sequence.image_sizes[0]
        self.grid = model.tokenizer.layout.grid(height, width)
        self.lengths: dict[Grid, int] = {}
        branches = self.image.branches
        self.capacity = model.sequence.context_length
        prompt = max(self._tokens(run) for run in runs)
        wanted = prompt + settings.max_tokens + settings.max_images * (self._length(self.grid) + 2)
        self.session = Session.start(model, len(runs), branches, min(self.capacity, wanted))
        self.rows = [_Row(torch.Generator().manual_seed(seed)) for seed in seeds]
        self._prefill(runs)

    def _tokens(self, runs: Sequence[Run]) -> int:
        forms = self.model.sequencer.context_blocks
        images = [forms(*r.image.shape[:2], drawn=False) for r in runs if r.image is not None]
        return sum(len(r.ids) for r in runs) + sum(block.length for blocks in images for block in blocks)

    def _length(self, grid: Grid) -> int:
        """Room for a drawn image: its context, and what is there while it is drawn."""
        if grid not in self.lengths:
            model, stride = self.model, self.model.tokenizer.layout.stride
            learned = model.generator.plan(grid, np.random.default_rng(0))
            forms = model.sequencer.context_blocks(grid.h * stride, grid.w * stride, drawn=True)
            peeked = max([block.length for block in learned if block.private], default=0)
            kept = sum(block.length for block in learned if not block.private)
            self.lengths[grid] = kept + max(peeked, sum(block.length for block in forms))
        return self.lengths[grid]

    def _prefill(self, runs: list[list[Run]]) -> None:
        for i, run in enumerate(runs):
            if (tokens := self._tokens(run)) > self.capacity:
                raise ValueError(
                    f"prompt {i}: it has {tokens} tokens, more than this recipe's sequence.context_length {self.capacity}"
                )
        for step in range(max(len(r) for r in runs)):
            texts = [i for i, r in enumerate(runs) if step < len(r) and r[step].image is None]
            images = [i for i, r in enumerate(runs) if step < len(r) and r[step].image is not None]
            if texts:
                self.session.rows(texts).append_text([runs[i][step] for i in texts])
            if images:
                pictures = [p for i in images if (p := runs[i][step].image) is not None]
                for embedded, blocks in self._context(pictures):
                    self.session.rows(images).append_given(embedded, blocks)

    def _context(
        self, pictures: Sequence[np.ndarray], drawn: ImageTokens | None = None
    ) -> Iterator[tuple[Embeddings, list[Block]]]:
        """The forms in which one image a row is context, each of one block; `drawn` are the tokens of drawn ones."""
        model, generator = self.model, self.model.generator
        planned = [model.sequencer.context_blocks(*p.shape[:2], drawn=drawn is not None) for p in pictures]
        pixels = [to_tensor([p])[0].to(model.backbone.embedding.weight) for p in pictures]
        for blocks in zip(*planned, strict=True):
            if blocks[0].kind == TokenKind.UNDERSTANDING:
                yield Embeddings(model.understand(pixels)), list(blocks)
            else:
                tokens = model.tokenizer.encode_each(pixels) if drawn is None else drawn
                yield generator.embed(generator.context(tokens)), list(blocks)

    def run(self) -> list[list[Part]]:
        """Parts written behind each prompt."""
        if self.settings.start == "image":
            self._begin_images(range(len(self.rows)))
        while any(row.state != "done" for row in self.rows):
            while texts := [i for i, row in enumerate(self.rows) if row.state == "text"]:
                self._step_text(texts)
            if images := [i for i, row in enumerate(self.rows) if row.state == "image"]:
                self._draw(images)
        return [row.parts for row in self.rows]

    def _step_text(self, texts: list[int]) -> None:
        for i in [i for i in texts if not self._may_write(i)]:
            self._finish(i)
        texts = [i for i in texts if self.rows[i].state == "text"]
        if not texts:
            return
        logits = self.model.backbone.logits(self.session.rows(texts).last[0])  # (R, V)
        logits[:, self.model.text.unused(logits.shape[1])] = -torch.inf
        logits[:, [self.special.bos, self.special.eoi]] = -torch.inf
        for r, i in enumerate(texts):
            if not self._may_draw(i):
                logits[r, self.special.boi] = -torch.inf
        s = self.settings
        ids = choose(logits, [self.rows[i].rng for i in texts], s.temperature, s.top_k, s.top_p).tolist()
        going = []
        for i, token in zip(texts, ids, strict=True):
            if token == self.special.eos:
                self._finish(i)
            elif token == self.special.boi:
                self._begin_images([i])
            else:
                self.rows[i].ids.append(token)
                self.rows[i].tokens += 1
                going.append(i)
        if going:
            self.session.rows(going).append_text([Run((self.rows[i].ids[-1],), (False,)) for i in going])

    def _may_write(self, i: int) -> bool:
        return self.rows[i].tokens < self.settings.max_tokens and self.session.length(i) < self.capacity

    def _may_draw(self, i: int) -> bool:
        fits = self.session.length(i) + self._length(self.grid) + 2 <= self.capacity
        return self.rows[i].images < self.settings.max_images and fits

    def _begin_images(self, rows: Iterable[int]) -> None:
        rows = list(rows)
        for i in rows:
            if not self._may_draw(i):
                raise ValueError(
                    f"prompt {i}: {self.session.length(i)} tokens and an image of {self._length(self.grid)} are more than "
                    f"this recipe's sequence.context_length {self.capacity}"
                )
            self._close_text(i)
            self.rows[i].state = "image"
        self.session.rows(rows).append_text([Run((self.special.boi,), (True,))] * len(rows))

    def _draw(self, images: list[int]) -> None:
        generator, view = self.model.generator, self.session.rows(images)
        rngs = [self.rows[i].rng for i in images]
        *_, tokens = generator.sample(view, [self.grid] * len(images), self.image, rngs)
        for i, pixels in zip(images, self.model.tokenizer.decode_each(tokens), strict=True):
            self.rows[i].parts.append(Part(to_image(pixels), role=GENERATED))
            self.rows[i].images += 1
            self.rows[i].state = "text" if self._may_write(i) else "done"
        going = [r for r, i in enumerate(images) if self.rows[i].state == "text"]
        if going:
            rows = [images[r] for r in going]
            pictures = [np.asarray(self.rows[i].parts[-1].content) for i in rows]  # as whoever reads on sees them
            for embedded, blocks in self._context(pictures, tokens.select(going)):
                self.session.rows(rows).append(embedded, blocks)
            self.session.rows(rows).append_text([Run((self.special.eoi,), (True,))] * len(rows))

    def _close_text(self, i: int) -> None:
        row = self.rows[i]
        if row.ids:
            row.parts.append(Part(self.model.text.decode(row.ids), role=GENERATED))
            row.ids = []

    def _finish(self, i: int) -> None:
        self._close_text(i)
        self.rows[i].state = "done"


def to_image(pixels: Float[Tensor, "3 H W"]) -> Image.Image:
    """float in [-1, 1] -> RGB picture."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return transforms.to_pil_image(scaled.cpu())


@torch.no_grad()
def decode(
    model: UnifiedModel, documents: Sequence[Document], settings: DecodingSettings, seeds: Sequence[int]
) -> list[Document]:
    """Continue documents, all at once. Each draws from its own seed, so its result does not depend on its neighbours."""
    if len(seeds) != len(documents):
        raise ValueError(f"seeds: expected one a document ({len(documents)}), got {len(seeds)}")
    if settings.size is not None and tuple(settings.size) not in {tuple(s) for s in model.sequence.image_sizes}:
        allowed = ", ".join(f"{w}x{h}" for h, w in model.sequence.image_sizes)
        raise ValueError(f"size: this recipe draws {allowed}, got {settings.size[1]}x{settings.size[0]}")
    _check_guidance(model, settings.image or model.generator.sampling)
    if not documents:
        return []
    training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, enabled=False):
            runs = [model.sequencer.prompt(document) for document in documents]
            parts = _Decoder(model, runs, settings, seeds).run()
    finally:
        model.train(training)
    return [Document((*d.parts, *new), d.kind) for d, new in zip(documents, parts, strict=True)]


def _check_guidance(model: UnifiedModel, image: SamplingSettings) -> None:
    """A condition that was never dropped in training has no model without it."""
    rules = model.sequence
    for name, scale, key, share in (
        ("guidance", image.guidance, "drop_text", rules.drop_text),
        ("image_guidance", image.image_guidance, "drop_images", rules.drop_images),
    ):
        if scale != 1 and share == 0:
            what = key.removeprefix("drop_")
            raise ValueError(f"{name}: this recipe never dropped {what} in training (sequence.{key}), got {scale}")


@torch.no_grad()
def read_prompts(model: UnifiedModel, documents: Sequence[Document], room: int = 0) -> Session:
    """A session without guidance that has read `documents` and holds up to `room` tokens more of each.

    Raises:
        ValueError: a document with its room is longer than the recipe's context.
    """
    runs = [model.sequencer.prompt(document) for document in documents]
    unguided = model.generator.sampling.override(guidance=1.0, image_guidance=1.0)
    settings = DecodingSettings(max_tokens=room, max_images=0, image=unguided)
    decoder = _Decoder(model, runs, settings, [0] * len(documents))
    for i in range(len(documents)):
        if (tokens := decoder.session.length(i) + room) > decoder.capacity:
            raise ValueError(
                f"prompt {i}: it has {tokens - room} tokens and needs room for {room} more, which is over this recipe's "
                f"sequence.context_length {decoder.capacity}"
            )
    return decoder.session
