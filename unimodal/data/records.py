"""Records: rows of files whose meaning a layout knows, and the sources made of the two.

A *container* (JSONL, Parquet, tar, a Hugging Face dataset) finds a record by its index; a *layout* (pairs, interleaved,
conversation ...) says which texts and images it holds and what of them is learned. Any layout goes with any container.
"""

from __future__ import annotations

import glob
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import nn

from unimodal.data.source import BrokenDocument, described, names_and_sizes
from unimodal.documents import Document, Part
from unimodal.files import contained_path
from unimodal.images import decode_image

WINDOW = 8
"""Shards whose documents are shuffled together: so many are read from at a time."""
CORPUS_DOCUMENTS = 20_000
"""Documents, spread evenly over a source, that the text tokenizer is trained on."""
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


@dataclass(frozen=True)
class RawImage:
    """The file of an image that is not read yet."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class RawPart:
    """A part whose image is not read yet."""

    content: str | RawImage
    learn: bool = True
    role: str = ""


@dataclass(frozen=True)
class Record:
    """One row: named values, and the files that values may name.

    Args:
        where: what messages call it: file and line, shard and key.
        fields: decoded JSON, cells of a row, or members of a tar by their suffix.
        file: the image file of a name, within what the record belongs to and nowhere else.
    """

    where: str
    fields: Mapping[str, object]
    file: Callable[[str], RawImage]

    def text(self, name: str) -> str:
        """The text in a field."""
        value = self.fields.get(name)
        if isinstance(value, bytes):
            value = _utf8(value, name)
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected text, got {brief(value)}")
        return value

    def image(self, name: str) -> RawImage:
        """The image in a field."""
        return self.as_image(self.fields.get(name), name)

    def as_image(self, value: object, name: str) -> RawImage:
        """An image from a value: bytes, `{"bytes": ..., "path": ...}`, or the name of a file of the record.

        Raises:
            ValueError: anything else, and addresses: nothing is fetched because a record says so.
        """
        if isinstance(value, RawImage):
            return value
        if isinstance(value, Mapping):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            data = value
            return RawImage(name, lambda: data)
        if isinstance(value, str) and _ADDRESS.match(value):
            raise ValueError(
                f"{name}: expected an image, got the address {brief(value)}, and addresses are not fetched"
            )
        if isinstance(value, str) and value:
            return self.file(value)
        raise ValueError(f"{name}: expected an image, got {brief(value)}")


@runtime_checkable
class Layout(Protocol):
    """What the fields of a record mean."""

    @property
    def kind(self) -> str:
        """Kind of its documents."""
        ...

    def parts(self, record: Record) -> tuple[RawPart, ...]:
        """Texts and images in reading order; ValueError, naming the field, where the record is not of this layout."""
        ...


@dataclass(frozen=True)
class DocumentRules:
    """What is made of the images and texts of a source, and which are refused as broken.

    Args:
        transforms: of torchvision.transforms.v2, applied to each image in turn; random ones draw the same for every image
            of a document, and the same again in the same epoch of the same run.
        smallest_side: pixels; a smaller image (1 x 1: a tracking pixel) is broken.
        longest_text: characters; a document with a longer text is broken.
    """

    transforms: Sequence[nn.Module] = ()
    smallest_side: int = 2
    longest_text: int = 200_000

    def __post_init__(self) -> None:
        for name in ("smallest_side", "longest_text"):
            if getattr(self, name) < 1:
                raise ValueError(f"rules.{name}: expected at least 1, got {getattr(self, name)}")
        try:
            self._transformed(Image.new("RGB", (256, 256)), 0)
        except TypeError as error:
            raise ValueError(f"rules.transforms: expected images of PIL in and out, got {error}") from None
        except Exception:  # noqa: BLE001  # such as a crop that is larger than this image: the data's may be as large
            pass

    def image(self, raw: RawImage, seed: int) -> Image.Image:
        """The decoded image, transformed."""
        data = raw.read()
        if not data:
            raise ValueError(f"{raw.name}: expected an image, got an empty file")
        try:
            image = decode_image(io.BytesIO(data))
        except ValueError as error:
            raise ValueError(f"{raw.name}: {error}") from None
        if min(image.size) < self.smallest_side:
            raise ValueError(
                f"{raw.name}: expected sides of at least {self.smallest_side} pixels, got {image.width} x {image.height}"
            )
        return self._transformed(image, seed) if self.transforms else image

    def _transformed(self, image: Image.Image, seed: int) -> Image.Image:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone: the run's draws on a device go on
            for transform in self.transforms:
                image = transform(image)
        if not isinstance(image, Image.Image):
            raise TypeError(f"{type(image).__name__} that comes out")
        return image

    def check(self, parts: Sequence[RawPart]) -> None:
        """Refuse texts that are too long or no Unicode, and records of nothing."""
        if not parts:
            raise ValueError("expected at least one text or image, got none")
        for part in parts:
            if not isinstance(part.content, str):
                continue
            if len(part.content) > self.longest_text:
                raise ValueError(
                    f"expected texts of at most rules.longest_text {self.longest_text} characters, got {len(part.content)}"
                )
            if not part.content.isascii():
                Part(part.content)  # refuses lone surrogates, which JSON can spell and no tokenizer takes


class RecordSource(ABC):
    """Documents found by an index over records, read when they are asked for.

    Args:
        shards: how many documents lie in each run of consecutive indices that is best read together.
        layout: what a record means; None: read from the first record that can be read.
        rules: of images and texts.
    """

    def __init__(
        self, shards: Sequence[int], layout: Layout | None = None, rules: DocumentRules = DocumentRules()
    ) -> None:
        from unimodal.data.layouts import guess_layout

        self.shards: Int[np.ndarray, " s"] = np.array(shards, np.int64)
        self._ends = np.cumsum(self.shards)
        self.rules = rules
        self.layout = layout if layout is not None else guess_layout(self)

    def locate(self, index: int) -> tuple[int, int]:
        """The shard that holds the document at `index`, and its number there."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.shards[shard])

    @abstractmethod
    def record(self, index: int) -> Record:
        """The record at `index`.

        Raises:
            BrokenDocument: it cannot be read.
        """

    @property
    def kind(self) -> str:
        """The layout's."""
        return self.layout.kind

    def files(self) -> Sequence[Path]:
        """Which records come from, in their order; images beside them are not among these."""
        return ()

    def identity(self) -> str:
        """Names and sizes of the files, so that others are not taken for them."""
        return described(self, names_and_sizes(self.files()))

    def __len__(self) -> int:
        """Records, broken ones included: they are known when they are read."""
        return int(self.shards.sum())

    def raw(self, index: int) -> tuple[RawPart, ...]:
        """The parts at `index`, their images not yet read.

        Raises:
            IndexError: `index` is outside 0 <= index < len.
            BrokenDocument: the record cannot be read, or is not of the layout.
        """
        self._check_index(index)
        record = self.record(index)
        try:
            parts = self.layout.parts(record)
            self.rules.check(parts)
        except ValueError as error:
            raise _broken(record.where, error) from None
        return parts

    def document(self, index: int, rng: np.random.Generator) -> Document:
        """The document at `index`; random transforms draw from `rng`.

        Raises:
            IndexError: `index` is outside 0 <= index < len.
            BrokenDocument: a record or an image of it cannot be read.
        """
        raw = self.raw(index)
        seed = int(rng.integers(2**63)) if self.rules.transforms else 0
        parts = []
        for part in raw:
            try:
                content = part.content if isinstance(part.content, str) else self.rules.image(part.content, seed)
                parts.append(Part(content, part.learn, part.role))
            except (ValueError, OSError) as error:
                raise _broken(self.record(index).where, error) from None
        return Document(tuple(parts), self.kind)

    def order(self, epoch: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """That of `shard_order`."""
        return shard_order(self.shards, rng)

    def corpus(self) -> Iterable[str]:
        """The texts of up to `CORPUS_DOCUMENTS` documents, without what is broken."""
        for index in spread(len(self), CORPUS_DOCUMENTS):
            try:
                yield from (part.content for part in self.raw(int(index)) if isinstance(part.content, str))
            except BrokenDocument:
                continue  # named when training reads it

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")


@dataclass(frozen=True)
class Spans:
    """Where the records of one file are: record i is bytes start[i] to start[i] + length[i]."""

    path: Path
    start: Int[np.ndarray, " n"]
    length: Int[np.ndarray, " n"]
    number: Int[np.ndarray, " n"]  # of the line or element, from 1
    damage: str = ""  # what is wrong with the file; one more document, always broken, stands for it

    def __len__(self) -> int:
        return len(self.start) + bool(self.damage)


def shard_order(sizes: Int[np.ndarray, " s"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Shards in random order; the documents of each `WINDOW` of them shuffled together."""
    starts = np.cumsum(sizes) - sizes
    shards = rng.permutation(len(sizes))
    windows = [shards[i : i + WINDOW] for i in range(0, len(shards), WINDOW)]
    return np.concatenate(
        [rng.permutation(np.concatenate([starts[s] + np.arange(sizes[s]) for s in window])) for window in windows]
    )


def spread(n: int, most: int) -> Int[np.ndarray, " k"]:
    """Up to `most` indices of 0 .. n - 1, evenly spread, rising."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64)) if n else np.zeros(0, np.int64)


def read_span(path: Path, start: int, length: int) -> bytes:
    """Bytes of a file; opened anew each time, so that a source travels to workers and a replaced file is no riddle.

    Raises:
        BrokenDocument: the file is gone or has become shorter.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            data = file.read(length)
            while len(data) < length and (more := file.read(length - len(data))):
                data += more
    except OSError as error:
        raise BrokenDocument(str(path), f"expected the file that was there at the start, got {error}") from None
    if len(data) < length:
        raise BrokenDocument(str(path), f"expected {length} bytes at {start}, got {len(data)}: the file is cut off")
    return data


def find_files(paths: str | Sequence[str], suffixes: Sequence[str], key: str) -> list[Path]:
    """Files named by paths, folders (everything below), patterns with `*` and ranges `{000..123}`; in order.

    Raises:
        ValueError: an address, or a name that finds nothing; begins with `key`.
    """
    found: list[Path] = []
    for name in [paths] if isinstance(paths, str) else paths:
        if _ADDRESS.match(name):
            raise ValueError(f"{key}: expected files on this machine, got the address {name}")
        for one in _ranged(name, key):
            if Path(one).is_dir():
                here = sorted(p for p in Path(one).rglob("*") if p.name.endswith(tuple(suffixes)) and p.is_file())
            elif glob.has_magic(one) and not Path(one).exists():
                here = [Path(p) for p in sorted(glob.glob(one, recursive=True))]
            else:
                here = [Path(one)]
            missing = [p for p in here if not p.is_file()]
            if missing or not here:
                raise ValueError(f"{key}: expected {' or '.join(suffixes)}, got {one}, where there is none")
            found += here
    if not found:
        raise ValueError(f"{key}: expected at least one file, got none")
    return found


def _ranged(name: str, key: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if match is None:
        return [name]
    first, last = match.groups()
    if int(last) < int(first):
        raise ValueError(f"{key}: expected a range that rises, got {match[0]} in {name}")
    numbers = range(int(first), int(last) + 1)
    return [
        one for n in numbers for one in _ranged(f"{name[: match.start()]}{n:0{len(first)}d}{name[match.end() :]}", key)
    ]


@dataclass(frozen=True)
class FilesOf:
    """Image files of a folder by relative name; none outside it."""

    folder: Path

    def __call__(self, name: str) -> RawImage:
        """The file; ValueError where the name leaves the folder."""
        path = contained_path(name, self.folder, "record")
        return RawImage(name, path.read_bytes)


def no_files(name: str) -> RawImage:
    """For records that have no files beside them."""
    raise ValueError(f"expected an image in the record itself, got the file name {brief(name)}")


def brief(value: object) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name}: expected UTF-8, got other bytes") from None


def _broken(where: str, error: Exception) -> BrokenDocument:
    return error if isinstance(error, BrokenDocument) else BrokenDocument(where, " ".join(str(error).split())[:300])
