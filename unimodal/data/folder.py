"""A folder of your own captioned images, or of documents, as a source."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from unimodal.data.records import DocumentRules
from unimodal.data.source import BrokenDocument, described, digest, names_and_sizes
from unimodal.documents import (
    Document,
    DocumentRecord,
    JsonLine,
    Part,
    check_unicode,
    contained_path,
    document_record,
    each_json_line,
)
from unimodal.images import load_image

Task = Literal["text_to_image", "image_to_text", "image"]
FolderSplit = Literal["train", "val", "all"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")

RULES = DocumentRules()
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Captioned:
    """An image file, its path relative to the root, and its caption."""

    image: Path
    name: str
    caption: str

    @property
    def text(self) -> str:
        return self.caption


@dataclass(frozen=True)
class _Written:
    """A whole document from a JSONL line."""

    record: DocumentRecord

    @property
    def text(self) -> str:
        return "".join(part.content for part in self.record.parts if isinstance(part.content, str))


@dataclass(frozen=True)
class _Unreadable:
    """What should have been an item, and why it is none."""

    name: str
    reason: str
    text = ""


_Item = _Captioned | _Written | _Unreadable


class FolderSource:
    """Captioned images of a folder, or the documents of its one JSONL file.

    Which of the three it is, is read from the folder:

    - one `*.jsonl` directly in `root`, with lines `{"image": "a.png", "caption": "..."}` (or `"text"` for the caption);
    - one `*.jsonl` with documents, the format of `unimodal.documents.read_jsonl`: given as they stand, `task` unused;
    - no JSONL: images anywhere below `root`, each with its caption in a `.txt` of the same name beside it, unless `task`
      needs none.

    An item goes to validation when the hash of its image's relative path, a number in [0, 1), is below
    `validation_share`, so adding images moves no other image. If that leaves a split without any item, the one item
    with the smallest (for validation) or largest (for training) hash is moved there. Lines that name the same images
    stay together. Images are loaded when a document is asked for. A line or a caption that cannot be read
    is a broken document: a run skips, counts and names it.

    Args:
        root: the folder.
        split: "train" or "val"; "all" holds nothing out.
        task: which side of a captioned image is learned; "image" is every image by itself, whether it has a caption or not.
        validation_share: share of the items held out, above 0 and below 1.

    Raises:
        ValueError: `root` is no folder, nothing in it can be read, or fewer than two items, so that one split would be
            empty.
    """

    def __init__(
        self,
        root: str | Path,
        split: FolderSplit = "train",
        task: Task = "text_to_image",
        validation_share: float = 0.1,
    ) -> None:
        root = Path(root)
        if split not in get_args(FolderSplit):
            raise ValueError(f"split: expected one of {', '.join(get_args(FolderSplit))}, got {split!r}")
        if task not in get_args(Task):
            raise ValueError(f"task: expected one of {', '.join(get_args(Task))}, got {task!r}")
        if not 0 < validation_share < 1:
            raise ValueError(f"validation_share: expected a number above 0 and below 1, got {validation_share}")
        if not root.is_dir():
            raise ValueError(f"root: expected a folder, got {str(root)!r}, which is {_what(root)}")
        self.root, self.task, self.split = root, task, split
        lists = sorted(path for path in root.glob("*.jsonl") if path.is_file() and not path.name.startswith("."))
        if len(lists) > 1:
            raise ValueError(f"root: expected at most one .jsonl in {root}, got {', '.join(p.name for p in lists)}")
        self._list, self.validation_share = lists[0] if lists else None, validation_share
        items = _listed_items(lists[0], root) if lists else _files(root, captions=task != "image")
        self.kind: str = "document" if any(isinstance(item, _Written) for item in items) else task
        if split == "all":
            self._items = items
            return
        chosen = _in_validation([_key(item, root) for item in items], validation_share)
        self._items = [item for item, held_out in zip(items, chosen, strict=True) if held_out == (split == "val")]
        if not self._items:
            raise ValueError(f"root: expected at least two different images in {root}, got 1: {split} would be empty")

    def __len__(self) -> int:
        """Items of this split."""
        return len(self._items)

    def identity(self) -> str:
        """Names of the images, or name and size of the JSONL; what cannot be read just now changes nothing."""
        share = f"{self.split} without {self.validation_share:g}"
        if self._list is not None:
            return described(self, share, names_and_sizes([self._list]))
        keys = (_key(item, self.root).lstrip("/") for item in self._items)
        names = (key.rpartition(".")[0].encode("utf-8", "surrogateescape") + b"\0" for key in keys)
        return described(self, share, f"names {digest(names)}")

    def document(self, index: int, rng: np.random.Generator) -> Document:
        """The document at `index`; nothing is drawn from `rng`.

        Raises:
            IndexError: `index` is outside 0 <= index < len.
            BrokenDocument: an image, a caption or a line is broken.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        item = self._items[index]
        if isinstance(item, _Unreadable):
            raise BrokenDocument(item.name, item.reason)
        try:
            if isinstance(item, _Written):
                document = item.record.load()
                return document if document.kind else Document(document.parts, self.kind)
            image = load_image(item.image)
            drawn = self.task != "image_to_text"
            caption, picture = Part(item.caption, learn=not drawn), Part(image, learn=drawn)
        except ValueError as error:
            raise BrokenDocument(_name(item), str(error).removeprefix(f"{_name(item)}: ")) from None
        if min(image.size) < RULES.smallest_side or len(item.caption) > RULES.longest_text:
            raise BrokenDocument(
                _name(item), f"expected sides of at least {RULES.smallest_side} pixels and a caption of at most "
                f"{RULES.longest_text} characters, got {image.width} x {image.height} and {len(item.caption)}"
            )  # fmt: skip
        if self.task == "image":
            return Document((picture,), self.kind)
        return Document((caption, picture) if drawn else (picture, caption), self.kind)

    def corpus(self) -> Iterable[str]:
        """The texts of this split."""
        return () if self.task == "image" else (item.text for item in self._items if item.text)


def _files(root: Path, captions: bool) -> list[_Item]:
    images = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not captions:
        if not images:
            raise ValueError(f"root: expected images in {root}, got none")
        return [_Captioned(image, image.relative_to(root).as_posix(), "") for image in images]
    items: list[_Item] = []
    bare: list[Path] = []
    for image in images:
        beside = image.with_suffix(".txt")
        if not beside.is_file():
            bare.append(image)
            continue
        try:
            caption = beside.read_text(encoding="utf-8-sig").strip()
        except (UnicodeDecodeError, OSError) as error:
            found = "other bytes" if isinstance(error, UnicodeDecodeError) else str(error)
            items.append(_Unreadable(str(beside), f"expected a caption in UTF-8, got {found}"))
            continue
        if not caption:
            items.append(_Unreadable(str(beside), "expected a caption, got an empty file"))
            continue
        items.append(_Captioned(image, image.relative_to(root).as_posix(), caption))
    _refuse_only_broken(items)
    if not items:
        raise ValueError(
            f"root: expected images with .txt captions beside them, or one .jsonl, in {root}; "
            f"got {len(images)} images and no caption beside any"
        )
    if bare:
        _log.warning(
            "%s: %d of %d images have no caption and are left out, e.g. %s", root, len(bare), len(images), bare[0]
        )
    return items


def _listed_items(path: Path, root: Path) -> list[_Item]:
    lines = list(each_json_line(path))
    if not lines:
        raise ValueError(f"{path}: expected at least one line, got an empty file")
    first = next((line for line in lines if isinstance(line, JsonLine)), None)
    written = first is not None and "parts" in first.record
    items: list[_Item] = []
    for line in lines:
        try:
            items.append(_listed_item(line, root, written))
        except ValueError as error:
            name, _, reason = str(error).removeprefix(str(path)).partition(": ")
            items.append(_Unreadable(f"{path}{name}", reason))
    _refuse_only_broken(items)
    return items


def _listed_item(line: JsonLine | ValueError, root: Path, written: bool) -> _Item:
    if isinstance(line, ValueError):
        raise line
    if ("parts" in line.record) != written:
        raise ValueError(f"{line.where}: expected {'a document' if written else 'a caption'} as on the first line")
    item: _Item = _Written(document_record(line, root)) if written else _captioned_line(line, root)
    try:
        check_unicode("text", item.text)
    except ValueError as error:
        raise ValueError(f"{line.where}: {error}") from None
    for image in _images(item):
        if (what := _what(image)) != "a file":
            found = f"{image.name!r}, which is {what}"
            raise ValueError(f"{line.where}: image: expected an image file, got {found}")
    return item


def _refuse_only_broken(items: list[_Item]) -> None:
    """Say what is wrong with the first where nothing else is there."""
    if items and all(isinstance(item, _Unreadable) for item in items):
        raise ValueError(f"{_name(items[0])}: {items[0].reason}")  # type: ignore[union-attr]


def _captioned_line(line: JsonLine, root: Path) -> _Captioned:
    texts = [key for key in ("caption", "text") if key in line.record]
    if len(texts) != 1:
        raise ValueError(f"{line.where}: expected either caption or text, got {' and '.join(texts) or 'neither'}")
    for key in line.record:
        if key not in ("image", *texts):
            raise ValueError(f"{line.where}: expected keys image and {texts[0]}, got {key!r}")
    caption = line.record[texts[0]]
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"{line.where}: {texts[0]}: expected a caption, got {caption!r}")
    image = contained_path(line.record.get("image"), root, line.where)
    return _Captioned(image, _relative(image, root), caption.strip())


def _name(item: _Item) -> str:
    if isinstance(item, _Unreadable):
        return item.name
    return str(item.image) if isinstance(item, _Captioned) else item.record.where


def _images(item: _Item) -> list[Path]:
    if isinstance(item, _Captioned):
        return [item.image]
    if isinstance(item, _Unreadable):
        return []
    return [part.content for part in item.record.parts if isinstance(part.content, Path)]


def _key(item: _Item, root: Path) -> str:
    """What decides an item's split: the relative paths of its images; its text where it has none."""
    if isinstance(item, _Captioned):
        return item.name
    if isinstance(item, _Unreadable):
        return item.name.removeprefix(str(root))
    return "\n".join(_relative(path, root) for path in _images(item)) or item.text


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root.resolve()).as_posix()  # paths of a JSONL come resolved


def _in_validation(keys: list[str], share: float) -> list[bool]:
    places = {
        key: int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
        for key in keys
    }
    held_out = {key for key, place in places.items() if place < share}
    if len(places) >= 2:
        order = sorted(places, key=lambda key: (places[key], key))
        held_out = (held_out or {order[0]}) - ({order[-1]} if len(held_out) == len(places) else set())
    return [key in held_out for key in keys]


def _what(path: Path) -> str:
    try:
        return "a file" if path.is_file() else "a folder" if path.is_dir() else "missing"
    except OSError:  # as on systems that have no names so long
        return "no name of a file"
