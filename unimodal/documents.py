"""Documents: ordered texts and images, and how they are read from and written to files.

A document is what a user writes; no tensor appears here. Three file forms exist: JSONL (data sets), Markdown (prompts
and answers a person edits) and HTML (pages a person looks at).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unimodal.files import contained_path, one_line, printable, write_atomically
from unimodal.images import image_data_uri, load_image, png_bytes, to_rgb

GENERATED = "generated"
"""Role of a part that a model wrote or drew."""

_SHOWN_SIDE = 64  # pixels on a page: images with a shorter long side are enlarged to about this


def check_unicode(name: str, text: str) -> None:
    """ValueError for what UTF-8 cannot hold, though JSON can spell it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected Unicode text, got a lone surrogate at {error.start}") from None


@dataclass(frozen=True)
class Part:
    """One text or one image of a document.

    Args:
        content: text, or an image of any mode (`image` gives it as RGB).
        learn: whether the part is a target (an answer, an image to draw) or context only (a question, an image given).
        role: free word that recipes give defaults by; `"generated"` marks what a model made.

    Raises:
        ValueError: `content` is neither text nor image, is an image without pixels, or is text that UTF-8 cannot hold.
    """

    content: str | Image.Image
    learn: bool = True
    role: str = ""

    def __post_init__(self) -> None:
        """Refuse what no tokenizer could take, where it enters."""
        if isinstance(self.content, str):
            check_unicode("content", self.content)
        elif not isinstance(self.content, Image.Image):
            raise ValueError(f"content: expected str or PIL.Image.Image, got {type(self.content).__name__}")
        elif 0 in self.content.size:
            raise ValueError(f"content: expected an image with pixels, got size {self.content.size}")
        check_unicode("role", self.role)

    @property
    def is_text(self) -> bool:
        """Whether the part is text."""
        return isinstance(self.content, str)

    @property
    def is_image(self) -> bool:
        """Whether the part is an image."""
        return isinstance(self.content, Image.Image)

    @property
    def text(self) -> str:
        """The text; ValueError on an image part."""
        if not isinstance(self.content, str):
            raise ValueError("part: expected text, got an image")
        return self.content

    @property
    def image(self) -> Image.Image:
        """The image as RGB, whatever its mode was; ValueError on a text part."""
        if not isinstance(self.content, Image.Image):
            raise ValueError(f"part: expected an image, got the text {self.content[:40]!r}")
        return to_rgb(self.content)


@dataclass(frozen=True)
class Document:
    """Texts and images in reading order.

    Args:
        parts: the parts, a tuple.
        kind: name of the kind of document, which losses and scores are reported by.
    """

    parts: tuple[Part, ...]
    kind: str = ""

    def __post_init__(self) -> None:
        """Refuse a list or bare strings: a frozen record must not change behind its back."""
        if not isinstance(self.parts, tuple):
            raise ValueError(f"parts: expected a tuple of Part, got {type(self.parts).__name__}")
        check_unicode("kind", self.kind)
        for position, part in enumerate(self.parts):
            if not isinstance(part, Part):
                raise ValueError(f"parts[{position}]: expected Part, got {type(part).__name__}")

    @property
    def text(self) -> str:
        """All text parts joined, nothing between them."""
        return "".join(part.text for part in self.parts if part.is_text)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All images as RGB, in order."""
        return tuple(part.image for part in self.parts if part.is_image)

    def extended(self, parts: Iterable[Part]) -> Document:
        """The same document followed by `parts`."""
        return Document(self.parts + tuple(parts), self.kind)


# ---- files


@dataclass(frozen=True)
class PartRecord:
    """A part as a JSONL line names it: `content` is text, or the path of an image that is not loaded yet."""

    content: str | Path
    learn: bool = True
    role: str = ""

    def load(self) -> Part:
        """The part, its image decoded."""
        content = load_image(self.content) if isinstance(self.content, Path) else self.content
        return Part(content, self.learn, self.role)


@dataclass(frozen=True)
class DocumentRecord:
    """A document as a JSONL line names it; `where` is `file:line`, for messages."""

    parts: tuple[PartRecord, ...]
    kind: str
    where: str

    def load(self) -> Document:
        """The document, its images decoded; errors begin with `where`."""
        try:
            return Document(tuple(part.load() for part in self.parts), self.kind)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None


@dataclass(frozen=True)
class JsonLine:
    """One decoded line of a JSONL file; `where` is `file:line`."""

    record: dict[str, object]
    where: str


def read_json_lines(path: str | Path) -> list[JsonLine]:
    """The JSON objects of a JSONL file, blank lines left out.

    Raises:
        ValueError: the file is missing, is not UTF-8, or a line (named by number) is not a JSON object.
    """
    found = []
    for line in each_json_line(path):
        if isinstance(line, ValueError):
            raise line
        found.append(line)
    return found


def each_json_line(path: str | Path) -> Iterator[JsonLine | ValueError]:
    """The same one by one, with what is wrong with a line in its place.

    Raises:
        ValueError: the file is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{printable(path)}: expected a JSONL file, got no such file")
    # Split at "\n" only: JSON strings may hold other line separators of Unicode.
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{printable(path)}:{number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            record = json.loads(text)
        except UnicodeDecodeError:
            yield ValueError(f"{where}: expected UTF-8, got other bytes")
        except (ValueError, RecursionError) as error:  # no JSON, or a number of more digits than Python reads
            yield ValueError(f"{where}: expected one JSON object on the line, got {one_line(error)}")
        else:
            found = type(record).__name__
            yield (
                JsonLine(record, where)
                if isinstance(record, dict)
                else ValueError(f"{where}: expected a JSON object, got {found}")
            )


def document_record(line: JsonLine, base: Path) -> DocumentRecord:
    """Check a line `{"kind": ..., "parts": [{"text" | "image": ..., "learn": ..., "role": ...}, ...]}`.

    Args:
        line: the decoded line.
        base: folder that image paths are relative to.

    Raises:
        ValueError: an unknown key, a missing or ill-typed value, an image path that leaves `base`.
    """
    _refuse_other_keys(line.record, ("kind", "parts"), line.where)
    kind, parts = line.record.get("kind", ""), line.record.get("parts")
    if not isinstance(kind, str):
        raise ValueError(f"{line.where}: kind: expected text, got {kind!r}")
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"{line.where}: parts: expected a list with at least one part, got {_brief(parts)}")
    records = tuple(_part_record(part, base, f"{line.where}: parts[{i}]") for i, part in enumerate(parts))
    return DocumentRecord(records, kind, line.where)


def _part_record(part: object, base: Path, where: str) -> PartRecord:
    if not isinstance(part, dict):
        raise ValueError(f"{where}: expected an object, got {_brief(part)}")
    _refuse_other_keys(part, ("text", "image", "learn", "role"), where)
    if ("text" in part) == ("image" in part):
        raise ValueError(f"{where}: expected either text or image, got {'both' if 'text' in part else 'neither'}")
    learn, role = part.get("learn", True), part.get("role", "")
    if not isinstance(learn, bool):
        raise ValueError(f"{where}: learn: expected true or false, got {learn!r}")
    if not isinstance(role, str):
        raise ValueError(f"{where}: role: expected text, got {role!r}")
    if "image" in part:
        return PartRecord(contained_path(part["image"], base, where), learn, role)
    if not isinstance(part["text"], str):
        raise ValueError(f"{where}: text: expected text, got {part['text']!r}")
    return PartRecord(part["text"], learn, role)


def read_jsonl(path: str | Path) -> list[Document]:
    """All documents of a JSONL file, images loaded; image paths are relative to the file's folder and stay inside it.

    Raises:
        ValueError: naming the file and line.
    """
    path = Path(path)
    return [document_record(line, path.parent).load() for line in read_json_lines(path)]


def write_jsonl(path: str | Path, documents: Iterable[Document], images: str | Path | None = None) -> None:
    """Write one document a line, images as PNG files; `read_jsonl` gives the same documents back.

    Args:
        path: the JSONL file.
        documents: what to write.
        images: folder for the images, inside the folder of `path`; default: `<stem>-images` beside it.

    Raises:
        ValueError: `images` lies outside the folder of `path`.
    """
    path = Path(path)
    folder = path.parent / f"{path.stem}-images" if images is None else Path(images)
    base = path.parent.resolve()
    if not folder.resolve().is_relative_to(base):
        raise ValueError(f"images: expected a folder inside {printable(path.parent)}, got {printable(folder)}")
    lines = []
    for index, document in enumerate(documents):
        parts: list[dict[str, object]] = []
        for position, part in enumerate(document.parts):
            if part.is_image:
                file = folder.resolve() / f"{index:06d}-{position:02d}.png"
                write_atomically(file, png_bytes(part.image))
                content: dict[str, object] = {"image": file.relative_to(base).as_posix()}
            else:
                content = {"text": part.text}
            parts.append({**content, "learn": part.learn, "role": part.role})
        lines.append(json.dumps({"kind": document.kind, "parts": parts}, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines).encode("utf-8"))


# ---- Markdown

_LINK = re.compile(r"!\[[^\]\n]*\]\((?:<(?P<quoted>[^>\n]+)>|(?P<plain>[^)\n]+))\)")
_ESCAPED = re.compile(r"!(\\+)\[")
_ESCAPABLE = re.compile(r"!(\\*)\[")


def read_markdown(text: str, base: str | Path) -> Document:
    r"""Text with `![alt](file)` links as a document; everything between links is kept as it stands.

    One newline at the very end is dropped (editors add it). `!\[` stands for a literal `![`. All parts are context
    (`learn` False): a prompt is not a target.

    Args:
        text: the Markdown; no other syntax than image links is read.
        base: folder that file names are relative to.

    Raises:
        ValueError: no part at all, a link to the network, or an image that is missing or broken (named).
    """
    text = re.sub(r"\r?\n\Z", "", text)
    parts: list[Part] = []
    position = 0

    def add_text(raw: str) -> None:
        if raw:
            parts.append(Part(_ESCAPED.sub(lambda found: "!" + found[1][1:] + "[", raw), learn=False))

    for link in _LINK.finditer(text):
        add_text(text[position : link.start()])
        name = (link["quoted"] or link["plain"]).strip()
        if re.match(r"(?i)(https?|ftp|data|file):", name):
            raise ValueError(f"image: expected a file name, got the address {name[:60]!r}")
        parts.append(Part(load_image(Path(base) / name), learn=False))
        position = link.end()
    add_text(text[position:])
    if not parts:
        raise ValueError("text: expected text or an image link, got an empty prompt")
    return Document(tuple(parts))


def write_markdown(document: Document, path: str | Path) -> None:
    """Write a document as Markdown, its images beside it as `<stem>-<number>.png`.

    `read_markdown` gives the texts and images back; neighbouring texts become one, `learn` and `role` are not kept.
    """
    path = Path(path)
    stem = re.sub(r"[^\w.-]", "_", path.stem)
    pieces: list[str] = []
    pending, number = "", 0
    for part in document.parts:
        if part.is_text:
            pending += part.text
            continue
        number += 1
        name = f"{stem}-{number}.png"
        write_atomically(path.parent / name, png_bytes(part.image))
        pieces += [_escape_links(pending), f"![image {number}]({name})"]
        pending = ""
    pieces += [_escape_links(pending), "\n"]
    write_atomically(path, "".join(pieces).encode("utf-8"))


def _escape_links(text: str) -> str:
    return _ESCAPABLE.sub(lambda found: "!\\" + found[1] + "[", text)


# ---- HTML

DOCUMENT_CSS = """
.document { white-space: pre-wrap; line-height: 1.6; margin: 0.8em 0; padding: 0.7em 1em; border: 1px solid #ddd;
  border-radius: 6px; background: #fff; overflow-wrap: anywhere; }
.document img { vertical-align: middle; max-width: 100%; border: 2px solid #ccc; margin: 2px; }
.document span.generated { background: #dff3e4; border-bottom: 2px solid #2e8b57; padding: 1px 3px; }
.document img.generated { border-color: #2e8b57; box-shadow: 0 0 0 2px #dff3e4; }
.pixelated { image-rendering: pixelated; }
"""
"""Style of what `document_html` writes; a page that uses the one includes the other."""


def document_html(document: Document) -> str:
    """One document as an HTML fragment: text escaped, images embedded, generated parts marked by class."""
    pieces = []
    for part in document.parts:
        generated = part.role == GENERATED
        if part.is_image:
            pieces.append(image_html(part.image, generated))
        elif generated:
            pieces.append(f'<span class="generated">{html.escape(part.text)}</span>')
        else:
            pieces.append(f"<span>{html.escape(part.text)}</span>")
    return f'<div class="document">{"".join(pieces)}</div>'


def image_html(image: Image.Image, generated: bool = False) -> str:
    """An `<img>` with the image inside; a small one is enlarged by a whole factor without smoothing."""
    factor = max(1, _SHOWN_SIDE // max(image.size))
    classes = [name for name, used in (("generated", generated), ("pixelated", factor > 1)) if used]
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    width, height = image.width * factor, image.height * factor
    label = "generated image" if generated else "image"
    return f'<img{attribute} width="{width}" height="{height}" alt="{label}" src="{image_data_uri(image)}">'


def write_html(documents: Sequence[Document], path: str | Path, title: str) -> None:
    """Write documents as one page that needs no other file; what a model made is marked green."""
    body = "\n".join(document_html(document) for document in documents)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fafafa; }}{DOCUMENT_CSS}.key {{ border: 0; background: none; padding: 0; }}</style></head>
<body><h1>{html.escape(title)}</h1>
<p class="document key"><span>given</span> · <span class="generated">generated</span></p>
{body}
</body></html>
"""
    write_atomically(path, page.encode("utf-8"))


# ---- messages


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_other_keys(record: dict[str, object], known: tuple[str, ...], where: str) -> None:
    for key in record:
        if key not in known:
            raise ValueError(f"{where}: expected keys among {', '.join(known)}, got {key!r}")
