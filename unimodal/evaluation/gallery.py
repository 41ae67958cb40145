"""The page of an evaluation: failures first, boxes drawn, reasons; a static file that needs no server."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from PIL import Image

from unimodal.evaluation.benchmark import Item, Row
from unimodal.files import write_atomically
from unimodal.images import png_bytes

if TYPE_CHECKING:
    from unimodal.evaluation.results import Summary

SIDE = 224
"""Pixels that an image is shown at, its longer side."""
MOST = 4000
"""Cards on one page; the rest is in results.jsonl, and the page says so."""


@dataclass(frozen=True)
class Mark:
    """A box in percent of the image, and its words."""

    left: float
    top: float
    width: float
    height: float
    words: str


@dataclass(frozen=True)
class Picture:
    """An image of an answer as the page shows it."""

    link: str
    width: int
    height: int
    enlarged: bool
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Card:
    """One answer."""

    row: Row
    asked: tuple[Picture, ...]
    pictures: tuple[Picture, ...]
    verdict: str  # right, partly, wrong


def write_gallery(out: Path, rows: Sequence[Row], summary: Summary, answers: Path, items: Sequence[Item]) -> Path:
    """Write `out/index.html`; images are linked where they lie, relative to the page.

    Args:
        out: folder of the results.
        rows: scored answers.
        summary: their numbers.
        answers: folder that the rows' files are in.
        items: what was asked; images of prompts are copied into `out/asked`.
    """
    from unimodal.evaluation import results

    ordered = sorted(rows, key=lambda row: (float(row["score"]), row["task"], row["id"], row["sample"]))
    by_id = {item.id: item for item in items}
    cards = [_card(out, row, answers, by_id.get(row["id"])) for row in ordered[:MOST]]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("gallery.html").read_text(encoding="utf-8"))
    page = template.render(
        headline=results.headline(summary),
        summary=summary,
        cards=cards,
        left_out=len(rows) - len(cards),
        percent=results.percent,
        ends=results.ends,
        plain=results.plain,
        plain_ends=results.plain_ends,
        fingerprint=json.dumps(dict(summary.fingerprint), indent=2),
    )
    path = out / "index.html"
    write_atomically(path, page.encode("utf-8"))
    return path


def _card(out: Path, row: Row, answers: Path, item: Item | None) -> Card:
    images = [name for name in row["files"] if name.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))]
    # Boxes belong to the image when there is one; of several, the row says which by "image".
    boxes = row.get("boxes", [])
    pictures = tuple(
        _picture(out, answers / name, [box for box in boxes if box.get("image", 0) == number])
        for number, name in enumerate(images)
    )
    score = float(row["score"])
    asked = () if item is None else tuple(_picture(out, path, []) for path in _asked(out, item))
    return Card(row, asked, pictures, "right" if score >= 1 else "wrong" if score <= 0 else "partly")


def _asked(out: Path, item: Item) -> list[Path]:
    """The images of a prompt, as files."""
    paths = []
    for number, part in enumerate(part for part in item.prompt.parts if part.is_image):
        path = out / "asked" / f"{item.id}-{number}.png"
        write_atomically(path, png_bytes(part.image))
        paths.append(path)
    return paths


def _picture(out: Path, path: Path, boxes: Sequence[dict[str, Any]]) -> Picture:
    with Image.open(path) as image:
        width, height = image.size
    factor = SIDE / max(width, height)
    factor = float(max(1, int(factor))) if factor > 1 else factor  # small ones by a whole factor, without smoothing
    marks = []
    for box in boxes:
        x1, y1, x2, y2 = box["box"]
        words = " ".join(str(box[key]) for key in ("colour", "label") if box.get(key))
        words += f" {box['score']:.2f}" if box.get("score") is not None else ""
        marks.append(
            Mark(100 * x1 / width, 100 * y1 / height, 100 * (x2 - x1) / width, 100 * (y2 - y1) / height, words)
        )
    link = quote(os.path.relpath(path, out).replace(os.sep, "/"))
    return Picture(link, round(width * factor), round(height * factor), factor > 1, tuple(marks))
