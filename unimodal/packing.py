"""From documents to one packed sequence: segments of many documents end to end, no padding.

Letters: S tokens of the pack, P places of expert order, A axes of position ids, B images of one size, H, W pixels, M text
targets, T learned image tokens.

Two orders matter. *Sequence order* is the order of reading; visibility is defined on it. *Expert order* is the one the
backbone computes in: kinds of tokens grouped by the expert that reads them, so that every projection is one matrix product
on a contiguous slice. Each expert's slice is filled up to a multiple of `BUCKET` places and is never empty: shapes recur, so
that compiled code and the matrix libraries meet few of them. `inverse[i]` is the place of the token at sequence position i;
what fills up is zero, sees nothing, is seen by nobody and is never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from unimodal.attention import SegmentTable
from unimodal.backbone import Experts, PositionScheme
from unimodal.backbone.positions import Placed
from unimodal.documents import Document
from unimodal.images import fit_image
from unimodal.sequence_rules import SequenceRules
from unimodal.stored import StoredImage, check_stored
from unimodal.text import TextTokenizer
from unimodal.vision import VisionEncoder
from unimodal_generators.base import Block, ImageGenerator, TokenKind, TokenLayout
from unimodal_generators.masked_text import HIDDEN, MaskedText
from unimodal_tokenizers.base import Grid, ImageTokens

LOSSES = ("text", "image", "router")
"""Whose targets are counted."""
BUCKET = 64  # places of expert slices come in multiples of this
Lanes = tuple[tuple[int, ...], ...]
"""Where lanes of the data stream stand: of each the next number to be read, and the earlier ones that are in no pack yet."""


FILLING = "(filling)"
"""Kind of a pack that is gone through for the sake of other ranks, and not counted."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind. Text has ids and says which are targets; images have a block and an index.

    Text with a block is a learned copy: its targets are hidden, and so is what has the id HIDDEN.
    """

    kind: TokenKind
    positions: Int[np.ndarray, "n A"]
    ids: tuple[int, ...] = ()
    targets: tuple[bool, ...] = ()
    block: Block | None = None
    image: int = -1

    @property
    def length(self) -> int:
        """Tokens of the run."""
        return len(self.positions)


Pixels = UInt8[np.ndarray, "_ _ 3"]
"""An image of a document as its file holds it, RGB."""


@dataclass(frozen=True)
class SequencedDocument:
    """One document as segments, and the images they refer to."""

    segments: tuple[Segment, ...]
    images: tuple[Pixels | StoredImage, ...]
    kind: str = ""
    number: int = -1  # in the stream of training documents

    @property
    def length(self) -> int:
        """Tokens of the document."""
        return sum(segment.length for segment in self.segments)


@dataclass(frozen=True)
class Run:
    """A stretch of a prompt: text ids with a mark on those that every guidance branch keeps, or one image."""

    ids: tuple[int, ...] = ()
    structural: tuple[bool, ...] = ()
    image: UInt8[np.ndarray, "_ _ 3"] | None = None
    instead: tuple[int, ...] = ()  # read where the text begins, by branches that drop it

    @property
    def without_text(self) -> tuple[int, ...]:
        """The ids that a branch without text reads."""
        begin = next((i for i, kept in enumerate(self.structural) if not kept), 1)
        rest = zip(self.ids[begin:], self.structural[begin:], strict=True)
        return (*self.ids[:begin], *self.instead, *(i for i, kept in rest if kept))


@dataclass
class Sequencer:
    """Lays documents out as segments. Host side: runs in loader workers, touches no weights."""

    text: TextTokenizer
    layout: TokenLayout
    generator: ImageGenerator
    scheme: PositionScheme
    rules: SequenceRules
    vision: VisionEncoder | None = None

    def document(self, document: Document, key: Sequence[int], *, train: bool = True) -> SequencedDocument:
        """Segments of a training document. Every random choice is a function of `key` and the part's number."""
        draft = _Draft(self, key)
        # Never a last 0: numpy seeds (a, b) and (a, b, 0) alike, and `key` itself is what the source draws from.
        dropping = np.random.default_rng((*key, 1))
        dropped = train and dropping.random() < self.rules.drop_text
        blind = train and dropping.random() < self.rules.drop_images
        images: list[Pixels | StoredImage] = []
        parts = document.parts
        draft.add_text([self.text.special.bos], learn=False)
        for number, part in enumerate(parts, start=1):
            if part.is_text:
                if not dropped:
                    draft.add_text(self.text.encode(part.text), part.learn)
                continue
            if isinstance(part, StoredImage):
                check_stored([part.size], self.rules)
            image = self._ended(part if isinstance(part, StoredImage) else self.fit(part.image))
            size, grid = self.measure(image)
            draft.add_text([self.text.special.boi, *self.size(*size)], learn=part.learn and not dropped)
            if blind and not part.learn:
                draft.add_text([self.text.special.eoi], learn=False)
                continue
            images.append(image)
            ends = part.learn and number == len(parts) and not self.rules.learn_end
            rng = np.random.default_rng((*key, 2, number))
            draft.add_image(len(images) - 1, size, grid, rng, learn=part.learn, ends=ends)
            if ends:
                return SequencedDocument(draft.finish(), tuple(images), document.kind)
            draft.add_text([self.text.special.eoi], learn=False)
        draft.add_text([self.text.special.eos], learn=bool(parts) and parts[-1].learn and not dropped)
        return SequencedDocument(draft.finish(), tuple(images), document.kind)

    def _ended(self, image: Pixels | StoredImage) -> Pixels | StoredImage:
        """Of a generator whose images end where they want to, an image's tokens up to there."""
        if self.generator.ends is None:
            return image
        if not isinstance(image, StoredImage):
            raise ValueError("generator.stops: true needs images stored as tokens (`unimodal tokenize`), got pixels")
        return StoredImage(image.tokens.until(self.generator.ends), image.size, image.learn, image.role)

    def fit(self, image: Image.Image) -> UInt8[np.ndarray, "_ _ 3"]:
        """Pixels of an image in a size that the rules allow."""
        native = self.rules.native
        return fit_image(image, self.rules.image_sizes if native is None else [native.size(image.height, image.width)])

    def measure(self, image: Pixels | StoredImage) -> tuple[tuple[int, int], Grid]:
        """(height, width) of an image in pixels, and the grid of its tokens."""
        if isinstance(image, StoredImage):
            return image.size, image.tokens.grids[0]
        height, width, _ = image.shape
        return (height, width), self.layout.grid(height, width)

    def size(self, height: int, width: int) -> tuple[int, ...]:
        """Ids of a size as it is written; none where the rules write none.

        Width x height, and a newline, so that no size is how another one begins.
        """
        return tuple(self.text.encode(f"{width}x{height}\n")) if self.rules.write_size else ()

    def prompt(self, document: Document) -> list[Run]:
        """Runs of a document that is to be continued."""
        runs: list[Run] = []
        ids, structural = [self.text.special.bos], [True]
        for part in document.parts:
            if isinstance(part.content, str):
                new = self.text.encode(part.content)
                ids, structural = ids + new, structural + [False] * len(new)
            else:
                pixels = self.fit(part.content)
                begin = self.text.special.boi, *self.size(*pixels.shape[:2])
                runs.append(Run((*ids, *begin), (*structural, *[True] * len(begin))))
                runs.append(Run(image=pixels))
                ids, structural = [self.text.special.eoi], [True]
        return [*runs, Run(tuple(ids), tuple(structural))]

    def context_blocks(self, height: int, width: int, *, drawn: bool, grid: Grid | None = None) -> list[Block]:
        """Blocks in which an image of so many pixels is context, in their order: one a form (see `SequenceRules.context`).

        Args:
            height: of the image.
            width: likewise.
            drawn: whether learned tokens come before them.
            grid: of its tokens; None: the layout's.
        """
        clean, features = self.rules.context != "understanding", self.rules.context != "clean"
        if drawn and not self.generator.repeats:
            clean, features = False, self.rules.context == "both"
        blocks = self.generator.plan_context(grid or self.layout.grid(height, width)) if clean else []
        if features:
            assert self.vision is not None
            grid = self.vision.grid(height, width)
            both_ways = not self.rules.causal_features
            blocks = [*blocks, Block(grid, TokenKind.UNDERSTANDING, bidirectional=both_ways, private=False)]
        return blocks


class _Draft:
    """Segments of a document under construction: where the next position id is, and the text not yet closed."""

    def __init__(self, sequencer: Sequencer, key: Sequence[int]) -> None:
        self.sequencer, self.key = sequencer, key
        self.segments: list[Segment] = []
        self.next = 0
        self.ids: list[int] = []
        self.targets: list[bool] = []

    def add_text(self, ids: Sequence[int], learn: bool) -> None:
        self.ids += ids
        self.targets += [learn] * len(ids)

    def close_text(self) -> None:
        masked = self.sequencer.generator.text
        if masked is None:
            self._text(self.ids, self.targets)
        else:
            for learn, run in groupby(zip(self.ids, self.targets, strict=True), key=itemgetter(1)):
                ids = [i for i, _ in run]
                if learn:
                    self._masked(masked, ids)
                else:
                    self._text(ids, [False] * len(ids))
        self.ids, self.targets = [], []

    def _text(self, ids: Sequence[int], targets: Sequence[bool]) -> None:
        if ids:
            placed = self.sequencer.scheme.text(self.next, len(ids))
            self.segments.append(Segment(TokenKind.TEXT, placed.ids, tuple(ids), tuple(targets)))
            self.next = placed.following

    def _masked(self, masked: MaskedText, ids: Sequence[int]) -> None:
        """Blocks of one learned text, each hidden and then, unless the document ends, as it is."""
        special = self.sequencer.text.special
        for at in range(0, len(ids), masked.block):
            own = ids[at : at + masked.block]
            rng = np.random.default_rng((*self.key, 3, len(self.segments) + 1))
            hidden = masked.plan(own, (special.eos, special.boi), rng)
            placed = place_block(self.sequencer.scheme, self.next, hidden.block)
            self.segments.append(Segment(TokenKind.TEXT, placed.ids, hidden.ids, hidden.targets, hidden.block))
            if own[-1] != special.eos:
                self._text(own, [False] * len(own))

    def add_image(
        self, number: int, size: tuple[int, int], grid: Grid, rng: np.random.Generator, *, learn: bool, ends: bool
    ) -> None:
        self.close_text()
        sequencer = self.sequencer
        blocks = sequencer.generator.plan(grid, rng) if learn else []
        if not ends:
            blocks = blocks + sequencer.context_blocks(*size, drawn=learn, grid=grid)
        for block in blocks:
            placed = place_block(sequencer.scheme, self.next, block)
            self.segments.append(Segment(block.kind, placed.ids, block=block, image=number))
            if block.complete and not block.private:  # what others see keeps its ids to itself; so does a session
                self.next = placed.following

    def finish(self) -> tuple[Segment, ...]:
        self.close_text()
        return tuple(self.segments)


def place_block(scheme: PositionScheme, start: int, block: Block) -> Placed:
    """Ids of one block of an image that begins at id `start`, and the id that follows the image; of text, likewise."""
    if block.kind == TokenKind.TEXT:
        return scheme.text(start, block.length)
    prefix = scheme.text(start, block.prefix)
    image = scheme.image(prefix.following, block.grid)
    own = image.ids[block.offset : block.offset + block.length - block.prefix]
    return Placed(np.concatenate([prefix.ids, own]) if block.prefix else own, image.following)


def to_tensor(images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[Tensor, "B 3 H W"]:
    """Pixels of one size as the float32 in [-1, 1] that tokenizers read."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0  # (B, H, W, 3) -> (B, 3, H, W)


@dataclass(frozen=True)
class PackedSequence:
    """Many documents as one sequence, ready for the device. Index tensors count in expert order."""

    table: SegmentTable
    inverse: Int[Tensor, " S"]
    splits: tuple[int, ...]  # places of each expert
    tokens: tuple[int, ...]  # of those, how many a token has; they come first
    positions: Int[Tensor, "P A"]
    image_rows: Int[Tensor, " P"]  # learned images, then context images, counted from 1; 0: of no image
    text_ids: Int[Tensor, " n"]
    text_reads: Int[Tensor, " M"]  # whose hidden state predicts ...
    text_targets: Int[Tensor, " M"]  # ... this id
    text_weights: Float[Tensor, " M"] | None  # of each target; None: 1
    text_count: int  # of targets that the loss is divided by
    image_reads: Int[Tensor, " T"]  # whose hidden state each learned image token is read from
    stored: ImageTokens | None  # of images that come as tokens; numbered first, then ...
    images: tuple[Float[Tensor, "_ 3 _ _"], ...]  # one tensor a size; numbered through ...
    tokenized: int  # ... those first whose tokens are asked for: so many tensors
    learned_images: tuple[int, ...]  # numbers of the images that are learned
    learned_blocks: tuple[Block, ...]  # of all of them, one or several an image
    context_images: tuple[int, ...]
    context_blocks: tuple[Block, ...]
    understood_images: tuple[int, ...]  # image of each block of understanding features
    understood_blocks: tuple[Block, ...]
    kind: str  # of its documents, or "" when they differ
    step_counts: dict[str, int] = field(default_factory=dict)  # targets of the whole optimizer step, by loss
    position: Lanes = ()  # of this rank in the data stream, behind the whole step
    left_out: tuple[tuple[int, ...], ...] = ()  # what was known there of documents that are in no pack
    numbers: tuple[int, ...] = ()  # of its documents in the data stream
    kinds: dict[str, int] = field(default_factory=dict)  # tokens by kind of document

    @property
    def counts(self) -> dict[str, int]:
        """Targets of this pack, by loss."""
        image = sum(block.n_targets for block in self.learned_blocks)
        return dict(zip(LOSSES, (self.text_count, image, len(self)), strict=True))

    @property
    def documents(self) -> int:
        """How many documents are packed."""
        return len(self.table.document_lengths)

    @property
    def understood(self) -> list[Float[Tensor, "3 _ _"]]:
        """Images whose understanding features are asked for, one a block."""
        # Documents with stored images have no features, so that pixels are numbered from 0 wherever features are asked for.
        every = [image for group in self.images for image in group] if self.understood_images else []
        return [every[i] for i in self.understood_images]

    def __len__(self) -> int:
        return len(self.inverse)

    def announce(
        self, counts: dict[str, int], position: Lanes = (), left_out: tuple[tuple[int, ...], ...] = ()
    ) -> "PackedSequence":
        """The same pack, told the counts of its optimizer step and where the next one begins."""
        return replace(self, step_counts=counts, position=position, left_out=left_out)

    def to(self, device: torch.device | str, **_: object) -> "PackedSequence":
        """The same pack on another device."""
        names = ("inverse", "positions", "image_rows", "text_ids", "text_reads", "text_targets", "image_reads")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        if self.text_weights is not None:
            moved["text_weights"] = self.text_weights.to(device, non_blocking=True)
        stored = self.stored and ImageTokens(self.stored.values.to(device, non_blocking=True), self.stored.grids)
        images = tuple(i.to(device, non_blocking=True) for i in self.images)
        return replace(self, stored=stored, images=images, **moved)


def kind_order(experts: Experts) -> list[TokenKind]:
    """Kinds of tokens as expert order holds them."""
    return sorted(TokenKind, key=lambda kind: (experts.index(kind), kind))


def pack(
    documents: Sequence[SequencedDocument],
    experts: Experts,
    reads: str,
    bucket: int = BUCKET,
) -> PackedSequence:
    """Put documents end to end. `reads` is the generator's: "own" or "previous"."""
    segments = [(d, s) for d, document in enumerate(documents) for s in document.segments]
    if not segments:
        raise ValueError("documents: expected at least one to pack, got none")
    lengths = np.array([s.length for _, s in segments])
    table = SegmentTable(
        document=np.array([d for d, _ in segments]),
        length=lengths,
        bidirectional=np.array([s.block is not None and s.block.bidirectional for _, s in segments]),
        private=np.array([s.block is not None and s.block.private for _, s in segments]),
    )
    kinds = np.repeat([s.kind for _, s in segments], lengths)  # (S,)
    by_kind = {kind: np.flatnonzero(kinds == kind) for kind in TokenKind}  # sequence positions
    inverse = np.empty(len(kinds), dtype=np.int64)
    splits, tokens = _fill(by_kind, inverse, experts, bucket)

    def by_place(values: np.ndarray) -> Tensor:
        out = np.zeros((sum(splits), *values.shape[1:]), dtype=np.int64)
        out[inverse] = values
        return torch.from_numpy(out)

    learned = [i for i, (_, s) in enumerate(segments) if s.kind == TokenKind.LEARNED and s.block]
    context = [i for i, (_, s) in enumerate(segments) if s.kind == TokenKind.CLEAN and s.block]
    understood = [i for i, (_, s) in enumerate(segments) if s.kind == TokenKind.UNDERSTANDING and s.block]
    blocks = [s.block for _, s in segments]
    begins = [
        (b := blocks[i]) is not None and b.offset == 0 for i in learned + context
    ]  # else it goes on with an image
    rows = np.zeros(len(segments), dtype=np.int64)
    rows[learned + context] = np.cumsum(begins)
    spans = [np.arange(table.start[i] + b.prefix, table.start[i] + b.length) for i in learned if (b := blocks[i])]
    learned_at = np.concatenate([*spans, np.zeros(0, dtype=np.int64)]) - (reads == "previous")
    texts = [s for _, s in segments if s.kind == TokenKind.TEXT]
    target = np.array([t for s in texts for t in s.targets], dtype=bool)
    text_ids = np.array([i for s in texts for i in s.ids], dtype=np.int64)
    own = np.array([s.block is not None for s in texts for _ in s.ids], dtype=bool)
    text_at = (
        by_kind[TokenKind.TEXT][target] - ~own[target]
    )  # read from the one before, a hidden one from its own place
    counted = [s.block.n_targets if s.block else sum(s.targets) for s in texts]
    weights = np.array([n / sum(s.targets) for s, n in zip(texts, counted, strict=True) for t in s.targets if t])

    with_tokens = {(segments[i][0], segments[i][1].image) for i in learned + context}
    stored, images, tokenized, numbers = _gather_images(documents, with_tokens)

    def image_numbers(held: list[int]) -> tuple[int, ...]:
        """Of the images whose first block is among the segments `held`."""
        firsts = [i for i in held if (b := blocks[i]) is not None and b.offset == 0]
        return tuple(numbers[segments[i][0], segments[i][1].image] for i in firsts)

    shares: dict[str, int] = {}
    for document in documents:
        shares[document.kind] = shares.get(document.kind, 0) + document.length
    return PackedSequence(
        table=table,
        inverse=torch.from_numpy(inverse),
        splits=splits,
        tokens=tokens,
        positions=by_place(np.concatenate([s.positions for _, s in segments])),
        image_rows=by_place(np.repeat(rows, lengths)),
        text_ids=torch.from_numpy(np.where(own & target, HIDDEN, text_ids)),
        text_reads=torch.from_numpy(inverse[text_at]),
        text_targets=torch.from_numpy(text_ids[target]),
        text_weights=None if (weights == 1).all() else torch.from_numpy(weights).float(),
        text_count=sum(counted),
        image_reads=torch.from_numpy(inverse[learned_at]),
        stored=stored,
        images=images,
        tokenized=tokenized,
        learned_images=image_numbers(learned),
        learned_blocks=tuple(b for i in learned if (b := blocks[i])),
        context_images=image_numbers(context),
        context_blocks=tuple(b for i in context if (b := blocks[i])),
        understood_images=image_numbers(understood),
        understood_blocks=tuple(b for i in understood if (b := blocks[i])),
        kind=next(iter(shares)) if len(shares) == 1 else "",
        numbers=tuple(document.number for document in documents),
        kinds=shares,
    )


def _fill(
    by_kind: dict[TokenKind, Int[np.ndarray, " n"]], inverse: Int[np.ndarray, " S"], experts: Experts, bucket: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Write the place of every token into `inverse`; the places and the tokens of each expert."""
    base, splits, tokens = 0, [], []
    for expert in range(len(experts.names)):
        at = base
        for kind in kind_order(experts):
            if experts.index(kind) == expert:
                inverse[by_kind[kind]] = np.arange(at, at + len(by_kind[kind]))
                at += len(by_kind[kind])
        tokens.append(at - base)
        splits.append(max(1, -(-(at - base) // bucket)) * bucket)
        base += splits[-1]
    return tuple(splits), tuple(tokens)


def _gather_images(
    documents: Sequence[SequencedDocument], tokenized: set[tuple[int, int]]
) -> tuple[ImageTokens | None, tuple[Float[Tensor, "_ 3 _ _"], ...], int, dict[tuple[int, int], int]]:
    """Stored images, the others stacked by size, and the number of image i of document d under (d, i).

    Stored ones come first, then those in `tokenized`, in as many stacks as the third value says.
    """
    every = {(d, i): image for d, document in enumerate(documents) for i, image in enumerate(document.images)}
    parts = {name: image.tokens for name, image in every.items() if isinstance(image, StoredImage)}
    pixels = {name: image for name, image in every.items() if not isinstance(image, StoredImage)}
    sizes: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for name in sorted(pixels, key=lambda name: name not in tokenized):
        sizes.setdefault((name not in tokenized, *pixels[name].shape), []).append(name)
    stacks = tuple(to_tensor([pixels[name] for name in members]) for members in sizes.values())
    ordered = [*parts, *(member for members in sizes.values() for member in members)]
    stored = ImageTokens.cat(list(parts.values())) if parts else None
    return (
        stored,
        stacks,
        sum(not rest for rest, *_ in sizes),
        {member: number for number, member in enumerate(ordered)},
    )
