"""The page of `unimodal data check`: numbers, and documents drawn as the model sees them. One file, nothing beside it.

Letters: S tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from unimodal.attention.visibility import dense_mask
from unimodal.backbone import Experts
from unimodal.data.check import Bar, Drawn, Findings, histograms, pixels
from unimodal.files import write_atomically
from unimodal.images import image_data_uri
from unimodal.model import UnifiedModel
from unimodal.packing import Segment, SequencedDocument, pack
from unimodal.text import TextTokenizer
from unimodal_generators.base import TokenKind

COLOURS = {
    TokenKind.TEXT: (62, 99, 141),
    TokenKind.UNDERSTANDING: (124, 92, 160),
    TokenKind.CLEAN: (58, 140, 100),
    TokenKind.LEARNED: (208, 122, 40),
}
"""Of each kind of token, wherever it is drawn."""
NAMES = {
    TokenKind.TEXT: "text",
    TokenKind.UNDERSTANDING: "understanding features",
    TokenKind.CLEAN: "clean image",
    TokenKind.LEARNED: "learned image",
}
MASK_SIDE = 1024
"""Most pixels of a drawn mask's side; a longer document is drawn smaller."""
_TOKENS = 600  # of a text, most that are written out
_THUMBNAIL = 160


@dataclass(frozen=True)
class Token:
    """A text token as it is shown."""

    text: str
    learned: bool
    special: bool


@dataclass(frozen=True)
class Piece:
    """A segment as it is shown."""

    kind: str
    colour: str
    length: int
    first: int
    tokens: tuple[Token, ...]
    more: int
    image: str
    facts: tuple[str, ...]


def write_page(path: Path, found: Sequence[Findings], model: UnifiedModel | None) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        found: of every source.
        model: of the recipe, with its text tokenizer; None: documents are drawn as they are.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("check.html").read_text(encoding="utf-8"))
    page = template.render(
        found=found,
        histograms=histograms,
        bars=_bars,
        legend=[(NAMES[kind], _css(kind)) for kind in TokenKind],
        kinds=_kinds,
        document=_parts,
        pieces=lambda drawn: _pieces(drawn.sequenced, model),
        mask=lambda drawn: _mask_uri(drawn.sequenced, model),
        context_length=None if model is None else model.sequence.context_length,
    )
    write_atomically(path, page.encode("utf-8"))


def mask_image(document: SequencedDocument, experts: Experts, reads: str) -> UInt8[np.ndarray, "_ _ 3"]:
    """Who sees whom: a row a query, a column a key, coloured by the key's kind; a frame of the tokens' kinds.

    The frame is a sixteenth of the document wide, at least a pixel, and a blank line lies between it and the mask.
    """
    table = pack([document], experts, reads).table
    visible = dense_mask(table.tokens(torch.device("cpu"))).numpy()  # (S, S)
    kinds = np.repeat([segment.kind for segment in document.segments], table.length)  # (S,)
    palette = np.array([COLOURS[kind] for kind in TokenKind], dtype=np.uint8)
    colour = palette[kinds]  # (S, 3)
    S, frame = len(kinds), max(1, len(kinds) // 16)
    drawn = np.full((S + frame + 1, S + frame + 1, 3), 255, dtype=np.uint8)
    drawn[frame + 1 :, frame + 1 :] = np.where(visible[:, :, None], colour[None], np.uint8(240))  # (S, S, 3)
    drawn[:frame, frame + 1 :] = colour
    drawn[frame + 1 :, :frame] = colour[:, None]
    return drawn


def _mask_uri(document: SequencedDocument, model: UnifiedModel | None) -> str:
    assert model is not None
    drawn = Image.fromarray(mask_image(document, model.backbone.config.experts, model.generator.reads))
    if drawn.width > MASK_SIDE:
        drawn = drawn.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BOX)
    return image_data_uri(drawn)


def _pieces(document: SequencedDocument, model: UnifiedModel | None) -> list[Piece]:
    assert model is not None  # documents are sequenced by one
    pieces, first = [], 0
    for segment in document.segments:
        tokens = _tokens(segment, model.text)
        pieces.append(
            Piece(
                NAMES[segment.kind], _css(segment.kind), segment.length, first, tokens[:_TOKENS],
                max(0, len(tokens) - _TOKENS),
                "" if segment.image < 0 else _picture(document, segment.image),
                _facts(segment, document),
            )
        )  # fmt: skip
        first += segment.length
    return pieces


def _picture(document: SequencedDocument, image: int) -> str:
    return image_data_uri(_thumbnail(Image.fromarray(pixels(document.images[image]))))


def _tokens(segment: Segment, text: TextTokenizer) -> tuple[Token, ...]:
    special = {number: name for name, number in vars(text.special).items()}
    return tuple(
        Token(special[i] if i in special else text.decode([i]), learned, i in special)
        for i, learned in zip(segment.ids, segment.targets, strict=True)
    )


def _facts(segment: Segment, document: SequencedDocument) -> tuple[str, ...]:
    block = segment.block
    if block is None or segment.image < 0:
        return (f"{sum(segment.targets)} learned",)
    height, width = pixels(document.images[segment.image]).shape[:2]
    facts = [f"{width} x {height} pixels", f"{block.grid.h} x {block.grid.w} tokens"]
    facts += ["sees itself whole" if block.bidirectional else "causal"]
    facts += ["seen by itself only"] if block.private else []
    facts += [f"t = {block.time:.2f}"] if segment.kind == TokenKind.LEARNED and block.time < 1 else []
    return (*facts, f"{block.n_targets} targets") if block.n_targets else tuple(facts)


def _parts(drawn: Drawn) -> list[tuple[bool, str, str]]:
    """(learned, text, image) of each part."""
    return [
        (part.learn, "", image_data_uri(_thumbnail(part.image)))
        if part.is_image
        else (part.learn, part.text[:2000], "")
        for part in drawn.document.parts
    ]


def _thumbnail(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((2 * _THUMBNAIL, 2 * _THUMBNAIL))
    return image


def _kinds(found: Findings) -> list[tuple[str, str, int, float]]:
    """(name, colour, tokens, percent) of each kind there is."""
    total = found.tokens.total()
    return [(NAMES[kind], _css(kind), n, 100 * n / total) for kind in TokenKind if (n := found.tokens[kind])]


def _bars(bars: Sequence[Bar]) -> Markup:
    """A histogram as SVG."""
    largest = max(max(bar.count for bar in bars), 1)
    rows = []
    for i, bar in enumerate(bars):
        length = 190 * bar.count / largest
        rows.append(
            Markup(
                '<text x="112" y="{y}" class="label">{label}</text><rect x="120" y="{top}" width="{length:.1f}" height="13"'
                ' rx="2"/><text x="{end:.1f}" y="{y}" class="count">{count}</text>'
            ).format(
                y=18 * i + 13, top=18 * i + 2.5, label=bar.label, length=max(length, 1 if bar.count else 0),
                end=126 + length, count=bar.count,
            )
        )  # fmt: skip
    return Markup('<svg width="370" height="{}" role="img">{}</svg>').format(18 * len(bars) + 4, Markup("").join(rows))


def _css(kind: TokenKind) -> str:
    return "#{:02x}{:02x}{:02x}".format(*COLOURS[kind])
