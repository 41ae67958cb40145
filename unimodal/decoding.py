"""Decoding: documents that go on where they stop, many at once, text and images in turn.

Letters: R documents, V rows of the vocabulary, n tokens of one image, H, W pixels.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from unimodal.decoding_settings import DecodingSettings, Inpaint, Piece, check_one_each, checked_seeds
from unimodal.documents import GENERATED, Document, Part
from unimodal.model import UnifiedModel
from unimodal.packing import Run, to_tensor
from unimodal.session import Session
from unimodal_generators.base import Block, Branch, Embeddings, Grid, ImageTokens, Known, SamplingSettings, TokenKind
from unimodal_generators.choice import choose
from unimodal_generators.unmasking import masked_settings


@dataclass
class _Row:
    """A document being continued."""

    rng: torch.Generator
    sampling: SamplingSettings  # of its images
    inpaint: Inpaint | None = None  # of the image that comes first
    parts: list[Part] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # of the text being written
    told: int = 0  # characters of it that were streamed
    tokens: int = 0
    images: int = 0
    grid: Grid | None = None  # of the image that is due
    state: Literal["text", "image", "done"] = "text"


class _Decoder:
    """The loop: text token by token, until every document waits for an image or is done; then those images together."""

    def __init__(
        self, model: UnifiedModel, runs: list[list[Run]], settings: DecodingSettings, seeds: Sequence[int],
        streaming: Literal["no", "yes", "previews"] = "no",
    ) -> None:  # fmt: skip
        self.model, self.settings, self.special = model, settings, model.text.special
        self.streaming = streaming
        # Guidance of images is nothing where none is given: the branch without them is the whole one again.
        asked = settings.image or model.generator.sampling
        unled = asked.override(image_guidance=1.0)
        own = [asked if any(run.image is not None for run in prompt) else unled for prompt in runs]
        self.image = asked if asked in own else unled
        sizes = model.sequence.image_sizes if model.sequence.write_size else model.sequence.image_sizes[:1]
        sizes = sizes if settings.size is None else [settings.size]
        self.sizes = {model.sequencer.size(*size): model.tokenizer.layout.grid(*size) for size in sizes}  # as written
        self.room = max(len(ids) + self._drawn(grid) for ids, grid in self.sizes.items())  # an image's, at most
        if settings.max_images or model.generator.text is not None:  # these say how text is written, too
            model.generator.check_sampling(self.image, list(self.sizes.values()))
        self.branches = self.image.branches if settings.max_images else (Branch(),)  # text is not guided
        never = [*self.model.text.unused(sum(map(len, model.backbone.tables))), self.special.bos, self.special.eoi]
        self.never = torch.tensor(never, device=model.backbone.embedding.weight.device)
        self.capacity = model.sequence.context_length
        prompts = [self._tokens(run, self.branches) for run in runs]
        for i, (tokens, run) in enumerate(zip(prompts, runs, strict=True)):
            if tokens > self.capacity:
                led = sum(len(r.instead) for r in run) if tokens > self._tokens(run, (Branch(),)) else 0
                why = f", with {led} of negative in the place of its text" if led else ""
                raise ValueError(
                    f"prompt {i}: it has {tokens} tokens{why}, more than this recipe's sequence.context_length "
                    f"{self.capacity}"
                )
        wanted = max(prompts) + settings.max_tokens + settings.max_images * (self.room + 2)
        ahead = 0 if model.generator.text is None else model.generator.text.block  # looked at beyond what is kept
        self.session = Session.start(model, len(runs), self.branches, min(self.capacity, wanted) + ahead)
        self.rows = [_Row(torch.Generator().manual_seed(seed), one) for seed, one in zip(seeds, own, strict=True)]
        self._prefill(runs)

    def _tokens(self, runs: Sequence[Run], branches: Sequence[Branch]) -> int:
        """Of a prompt, in the branch that reads most of it; images that may end early are encoded if it matters."""
        pictures = [run.image for run in runs if run.image is not None]
        text = max(sum(len(run.ids if branch.text else run.without_text) for run in runs) for branch in branches)

        def count(tokens: ImageTokens | None) -> int:
            return text + sum(block.length for blocks in self._forms(pictures, tokens, drawn=False) for block in blocks)

        most = count(None)
        return count(self._ending(pictures)) if most > self.capacity else most

    def _drawn(self, grid: Grid) -> int:
        """Tokens a drawn image needs at most: what stays of drawing it, and more that is peeked at or read again."""
        model = self.model
        learned = model.generator.plan(grid, np.random.default_rng(0))  # lengths do not depend on what is drawn
        forms = model.sequencer.context_blocks(*model.tokenizer.layout.size(grid), drawn=True)
        peeked = max((block.length for block in learned if block.private), default=0)
        kept = sum(block.length for block in learned if not block.private)
        return kept + max(peeked, sum(block.length for block in forms))

    def _prefill(self, runs: list[list[Run]]) -> None:
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
        pixels = self._pixels(pictures)
        tokens = self._ending(pictures) if drawn is None else drawn
        for blocks in zip(*self._forms(pictures, tokens, drawn is not None), strict=True):
            if blocks[0].kind == TokenKind.UNDERSTANDING:
                yield Embeddings(model.understand(pixels)), list(blocks)
            else:
                read = model.tokenizer.encode_each(pixels) if tokens is None else tokens
                yield generator.embed(generator.context(read)), list(blocks)

    def _forms(self, pictures: Sequence[np.ndarray], tokens: ImageTokens | None, drawn: bool) -> list[list[Block]]:
        """The blocks in which each is context; of so many tokens, where they are given."""
        grids = [None] * len(pictures) if tokens is None else tokens.grids
        blocks = self.model.sequencer.context_blocks
        return [blocks(*p.shape[:2], drawn=drawn, grid=grid) for p, grid in zip(pictures, grids, strict=True)]

    def _pixels(self, pictures: Sequence[np.ndarray]) -> list[Float[Tensor, "3 _ _"]]:
        return [to_tensor([picture])[0].to(self.model.backbone.embedding.weight) for picture in pictures]

    def _ending(self, pictures: Sequence[np.ndarray]) -> ImageTokens | None:
        """Tokens of given images where they say how many places an image takes; None where its size does."""
        ends = self.model.generator.ends
        if ends is None or not pictures:
            return None
        return self.model.tokenizer.encode_each(self._pixels(pictures)).until(ends)

    def run(self) -> Iterator[Piece]:
        """Write behind each prompt; pieces come where something listens."""
        if self.settings.start == "image":
            yield from self._begin_images(list(range(len(self.rows))))
        while any(row.state != "done" for row in self.rows):
            while texts := [i for i, row in enumerate(self.rows) if row.state == "text"]:
                yield from self._step_text(texts)
            if images := [i for i, row in enumerate(self.rows) if row.state == "image"]:
                yield from self._draw(images)

    def _step_text(self, texts: list[int]) -> Iterator[Piece]:
        for i in [i for i in texts if not self._may_write(i)]:
            yield from self._finish(i)
        texts = [i for i in texts if self.rows[i].state == "text"]
        if not texts:
            return
        said: dict[int, tuple[int, ...]] = {}
        drawing = []
        for i, ids in zip(texts, self._write(texts), strict=True):
            said[i] = yield from self._say(i, ids)
            if len(said[i]) < len(ids) and ids[len(said[i])] == self.special.boi and self.rows[i].state == "text":
                drawing.append(i)
        going = [i for i in texts if said[i] and self.rows[i].state == "text"]
        if going:
            self.session.rows(going).append_text([Run(said[i], (False,) * len(said[i])) for i in going])
        if drawing:
            yield from self._begin_images(drawing)

    def _say(self, i: int, ids: list[int]) -> Generator[Piece, None, tuple[int, ...]]:
        """Take ids for further text of a document while it goes on, up to where an image begins; those taken."""
        row = self.rows[i]
        for n, token in enumerate(ids):
            if token == self.special.eos or not self._may_write(i, n):
                yield from self._finish(i)
                return tuple(ids[:n])
            if token == self.special.boi:
                return tuple(ids[:n])
            row.ids.append(token)
            row.tokens += 1
            text = self.model.text.decode(row.ids) if self.settings.stop else ""
            if any(stop in text for stop in self.settings.stop):
                yield from self._finish(i)
                return tuple(ids[: n + 1])
            yield from self._tell(i)
        return tuple(ids)

    def _write(self, texts: list[int]) -> list[list[int]]:
        """What comes next of each row's text: an id, or a block of them where text is learned masked."""
        view, backbone, masked = self.session.rows(texts), self.model.backbone, self.model.generator.text
        s, rngs = self.settings, [self.rows[i].rng for i in texts]
        if masked is None:
            logits = self._allowed(backbone.logits(view.last[0]), [(i, 0) for i in texts])  # (R, V)
            return [[token] for token in choose(logits, rngs, s.temperature, s.top_k, s.top_p).tolist()]
        places = [(i, n) for i in texts for n in range(masked.block)]
        settings = masked_settings(self.image).override(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
        written = masked.write(
            view, self.model.read_text, lambda hidden: self._allowed(backbone.logits(hidden), places), settings, rngs
        )
        return written.tolist()

    def _allowed(self, logits: Float[Tensor, "n V"], places: Sequence[tuple[int, int]]) -> Float[Tensor, "n V"]:
        """Scores without what must not come; of which row each is, and so many ids ahead."""
        logits = logits.index_fill(1, self.never, -torch.inf)
        for r, (i, n) in enumerate(places):
            if not self._may_draw(i, n):
                logits[r, self.special.boi] = -torch.inf
        return logits

    def _text(self, i: int) -> str:
        """The text being written, up to where it stops."""
        text = self.model.text.decode(self.rows[i].ids)
        return text[: min((at for stop in self.settings.stop if (at := text.find(stop)) >= 0), default=len(text))]

    def _tell(self, i: int, whole: bool = False) -> Iterator[Piece]:
        """Text that came since the last piece, but for what may still become another: half a letter, half a stop."""
        if self.streaming == "no":
            return
        text, row = self._text(i), self.rows[i]
        if not whole:
            text = text.rstrip("\ufffd")
            begun = [n for stop in self.settings.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
            text = text[: len(text) - max(begun, default=0)]
        if len(text) > row.told:
            yield Piece(i, text[row.told :])
            row.told = len(text)

    def _may_write(self, i: int, ahead: int = 0) -> bool:
        return self.rows[i].tokens < self.settings.max_tokens and self.session.length(i) + ahead < self.capacity

    def _may_draw(self, i: int, ahead: int = 0) -> bool:
        fits = self.session.length(i) + ahead + self.room + 2 <= self.capacity
        return self.rows[i].images < self.settings.max_images and fits

    def _begin_images(self, rows: list[int]) -> Iterator[Piece]:
        for i in rows:
            if not self._may_draw(i):
                raise ValueError(
                    f"prompt {i}: {self.session.length(i)} tokens and an image of {self.room} are more than "
                    f"this recipe's sequence.context_length {self.capacity}"
                )
            yield from self._close_text(i)
            self.rows[i].state = "image"
        self.session.rows(rows).append_text([Run((self.special.boi,), (True,))] * len(rows))
        self._write_sizes(rows)

    def _write_sizes(self, rows: list[int]) -> None:
        """Each document writes until that is one of the sizes; a token that only one size has is not asked for."""
        written: dict[int, tuple[int, ...]] = dict.fromkeys(rows, ())
        while writing := [i for i in rows if written[i] not in self.sizes]:
            logits = self.model.backbone.logits(self.session.rows(writing).last[0])  # (R, V)
            for row, i in zip(logits, writing, strict=True):
                ways = {s[len(written[i])] for s in self.sizes if s[: len(written[i])] == written[i]}
                (token,) = ways if len(ways) == 1 else self._choose_among(row[None], sorted(ways), self.rows[i].rng)
                written[i] += (token,)
            self.session.rows(writing).append_text([Run(written[i][-1:], (True,)) for i in writing])
        for i in rows:
            self.rows[i].grid = self.sizes[written[i]]

    def _choose_among(self, logits: Float[Tensor, "1 V"], ways: list[int], rng: torch.Generator) -> list[int]:
        s = self.settings
        return [ways[i] for i in choose(logits[:, ways], [rng], s.temperature, s.top_k, s.top_p).tolist()]

    def _draw(self, images: list[int]) -> Iterator[Piece]:
        """The images that are due, of one size with the first, and drawn as that is."""
        grid, sampling = self.rows[images[0]].grid, self.rows[images[0]].sampling
        assert grid is not None
        images = [i for i in images if (self.rows[i].grid, self.rows[i].sampling) == (grid, sampling)]
        generator, view = self.model.generator, self.session.rows(images)
        rngs, newest = [self.rows[i].rng for i in images], None
        for tokens in generator.sample(view, [grid] * len(images), sampling, rngs, self._known(images, grid)):
            if newest is not None and self.streaming == "previews":
                for i, pixels in zip(images, self.model.tokenizer.decode_each(newest), strict=True):
                    yield Piece(i, preview=to_image(pixels))
            newest = tokens
        assert newest is not None  # every sampler yields the image
        for i, pixels in zip(images, self.model.tokenizer.decode_each(newest, rngs), strict=True):
            row, image = self.rows[i], to_image(pixels)
            row.parts.append(Part(image, role=GENERATED))
            row.images += 1
            row.state = "text" if self._may_write(i) else "done"
            if self.streaming != "no":
                yield Piece(i, image=image)
        going = [r for r, i in enumerate(images) if self.rows[i].state == "text"]
        if going:
            rows = [images[r] for r in going]
            pictures = [np.asarray(self.rows[i].parts[-1].content) for i in rows]  # as whoever reads on sees them
            for embedded, blocks in self._context(pictures, newest.select(going)):
                self.session.rows(rows).append(embedded, blocks)
            self.session.rows(rows).append_text([Run((self.special.eoi,), (True,))] * len(rows))

    def _known(self, images: Sequence[int], grid: Grid) -> Known | None:
        """Tokens that are given of the images about to be drawn; None where all is to be drawn."""
        inpainted = [self.rows[i].inpaint if self.rows[i].images == 0 else None for i in images]
        if not any(inpainted):
            return None
        weight = self.model.backbone.embedding.weight
        height, width = self.model.tokenizer.layout.size(grid)
        masks, pixels = [], []
        for i, inpaint in zip(images, inpainted, strict=True):
            if inpaint is None:
                masks.append(torch.zeros(grid.length, dtype=torch.bool))
                pixels.append(weight.new_zeros(3, height, width))
                continue
            if inpaint.image.size != (width, height):
                w, h = inpaint.image.size
                raise ValueError(f"prompt {i}: inpaint: expected an image of {width}x{height} pixels, got {w}x{h}")
            masks.append(inpaint.given(grid))
            pixels.append(to_tensor([inpaint.shown()])[0].to(weight))
        return Known(self.model.tokenizer.encode_each(pixels), torch.cat(masks))

    def give(self, inpaint: Sequence[Inpaint | None]) -> None:
        """What is given of each document's first image; refused at once where it could not be kept."""
        for row, one in zip(self.rows, inpaint, strict=True):
            row.inpaint = one
        if any(inpaint):
            if not self.model.generator.inpaints:
                name = type(self.model.generator).__name__
                raise ValueError(f"inpaint: {name} cannot keep what is given of an image, expected none")
            if self.model.tokenizer.layout.kind == "sequence":
                name = type(self.model.tokenizer).__name__
                raise ValueError(f"inpaint: tokens of a {name} lie at no place of the image, expected none")
            if len(self.sizes) > 1:
                raise ValueError(
                    "size: expected one beside inpaint, where the model may choose among several, got none"
                )
            (grid,) = self.sizes.values()
            self._known(range(len(self.rows)), grid)  # refuses images of another size

    def _close_text(self, i: int) -> Iterator[Piece]:
        row = self.rows[i]
        yield from self._tell(i, whole=True)
        if text := self._text(i):
            row.parts.append(Part(text, role=GENERATED))
        row.ids, row.told = [], 0

    def _finish(self, i: int) -> Iterator[Piece]:
        yield from self._close_text(i)
        self.rows[i].state = "done"


def to_image(pixels: Float[Tensor, "3 H W"]) -> Image.Image:
    """float in [-1, 1] -> RGB picture."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return transforms.to_pil_image(scaled.cpu())


def decode(
    model: UnifiedModel,
    documents: Sequence[Document],
    settings: DecodingSettings,
    seeds: Sequence[int],
    inpaint: Sequence[Inpaint | None] | None = None,
) -> list[Document]:
    """Continue documents, all at once. Each draws from its own seed, so its result does not depend on its neighbours.

    Args:
        model: it is in evaluation mode meanwhile.
        documents: what is there.
        settings: how they go on.
        seeds: one a document.
        inpaint: what is given of the first image that each document draws.

    Raises:
        ValueError: an argument outside its values, or a document over the recipe's context.
    """
    decoder = _decoder(model, documents, settings, seeds, inpaint, "no")
    if decoder is None:
        return []
    for _ in _stepwise(decoder):
        pass
    return [Document((*d.parts, *row.parts), d.kind) for d, row in zip(documents, decoder.rows, strict=True)]


def stream(
    model: UnifiedModel,
    documents: Sequence[Document],
    settings: DecodingSettings,
    seeds: Sequence[int],
    inpaint: Sequence[Inpaint | None] | None = None,
    previews: bool = False,
) -> Iterator[Piece]:
    """`decode` as it happens: text in pieces, images when they are done.

    Joined by document, the pieces that are no previews are what `decode` returns behind the prompts. Between two pieces the
    model is left as it was found. Where the tokenizer's decoder draws, previews begin from one noise and the image from the
    document's own: they may differ in what tokens leave open.

    Args:
        model: as of `decode`.
        documents: likewise.
        settings: likewise.
        seeds: likewise.
        inpaint: likewise.
        previews: whether images also come while they are drawn, after every step that their generator shows.
    """
    decoder = _decoder(model, documents, settings, seeds, inpaint, "previews" if previews else "yes")
    if decoder is not None:
        yield from _stepwise(decoder)


def _decoder(
    model: UnifiedModel,
    documents: Sequence[Document],
    settings: DecodingSettings,
    seeds: Sequence[int],
    inpaint: Sequence[Inpaint | None] | None,
    streaming: Literal["no", "yes", "previews"],
) -> _Decoder | None:
    """The loop with its prompts read; None for no documents."""
    seeds = checked_seeds(seeds)
    check_one_each(len(documents), seeds, inpaint)
    if settings.size is not None and tuple(settings.size) not in {tuple(s) for s in model.sequence.image_sizes}:
        allowed = ", ".join(f"{w}x{h}" for h, w in model.sequence.image_sizes)
        raise ValueError(f"size: this recipe draws {allowed}, got {settings.size[1]}x{settings.size[0]}")
    if settings.max_images:
        check_guidance(model, settings.image or model.generator.sampling, settings.negative)
    if not documents:
        return None
    with _inference(model):
        runs = [model.sequencer.prompt(document) for document in documents]
        if settings.negative:
            runs = [_with_negative(prompt, tuple(model.text.encode(settings.negative))) for prompt in runs]
        decoder = _Decoder(model, runs, settings, seeds, streaming)
        if inpaint is not None:
            decoder.give(inpaint)
    return decoder


def _stepwise(decoder: _Decoder) -> Iterator[Piece]:
    """The loop's pieces; whoever reads them is not inside its modes."""
    pieces = decoder.run()
    while True:
        with _inference(decoder.model):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


@contextmanager
def _inference(model: UnifiedModel) -> Iterator[None]:
    """Evaluation mode, no gradients, products in the weights' type; afterwards as before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.backbone.as_weights_are():
            yield
    finally:
        model.train(training)


def _with_negative(runs: Sequence[Run], ids: tuple[int, ...]) -> list[Run]:
    """A prompt in which these ids stand instead of the text, where that begins; behind the first token if there is none."""
    at = next((i for i, run in enumerate(runs) if not all(run.structural)), 0)
    return [replace(run, instead=ids) if i == at else run for i, run in enumerate(runs)]


def check_guidance(model: UnifiedModel, image: SamplingSettings, negative: str = "") -> None:
    """A condition that was never dropped in training has no model without it.

    Where words are read instead of the text, no branch lacks text.
    """
    if negative and not any(not b.text for b in image.branches):
        raise ValueError(f"negative: expected none where guidance is 1, which compares with nothing, got {negative!r}")
    for name, key, dropped, share in (
        ("guidance", "drop_text", any(not b.text for b in image.branches), model.sequence.drop_text),
        ("image_guidance", "drop_images", any(not b.images for b in image.branches), model.sequence.drop_images),
    ):
        if dropped and share == 0 and not (negative and key == "drop_text"):
            what, scale = key.removeprefix("drop_"), getattr(image, name)
            raise ValueError(f"{name}: this recipe never dropped {what} in training (sequence.{key}), got {scale}")


@torch.no_grad()
def read_prompts(model: UnifiedModel, documents: Sequence[Document], room: int = 0) -> Session:
    """A session that has read `documents` and holds up to `room` tokens more of each.

    Raises:
        ValueError: a document with its room is longer than the recipe's context.
    """
    runs = [model.sequencer.prompt(document) for document in documents]
    settings = DecodingSettings(max_tokens=room, max_images=0)
    decoder = _Decoder(model, runs, settings, [0] * len(documents))
    for i in range(len(documents)):
        if (tokens := decoder.session.length(i) + room) > decoder.capacity:
            raise ValueError(
                f"prompt {i}: it has {tokens - room} tokens and needs room for {room} more, which is over this recipe's "
                f"sequence.context_length {decoder.capacity}"
            )
    return decoder.session
