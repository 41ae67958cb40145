"""JSON Lines, and the one JSON list that conversations come in, read record by record at their place in the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from unimodal.data.records import (
    DocumentRules,
    FilesOf,
    Layout,
    Record,
    RecordSource,
    Spans,
    find_files,
    read_span,
)
from unimodal.data.source import BrokenDocument

_CHUNK = 1 << 24
_BLANK = np.isin(np.arange(256), list(b" \t\r\n"))  # JSON's, by byte


class JsonlSource(RecordSource):
    """Documents of JSON Lines files, or of `.json` files that hold one list.

    Lines are found once, by the ends of lines, and decoded when they are read: a malformed line is one broken document.

    Args:
        paths: files, folders, patterns (`*`), ranges (`{00..12}`), one or a list.
        layout: what a record means; None: read from the first.
        images: folder that image names are relative to and may not leave; None: the folder of the file.
        rules: of images and texts.
    """

    def __init__(
        self,
        paths: str | list[str],
        layout: Layout | None = None,
        images: str | None = None,
        rules: DocumentRules = DocumentRules(),
    ) -> None:
        if images is not None and not Path(images).is_dir():
            raise ValueError(f"images: expected a folder, got {images}, which is none")
        self.images = images
        self._files = [_spans(path) for path in find_files(paths, (".jsonl", ".json"), "paths")]
        super().__init__([len(spans) for spans in self._files], layout, rules)

    def files(self) -> list[Path]:
        """The lists."""
        return [spans.path for spans in self._files]

    def record(self, index: int) -> Record:
        """The line at `index`."""
        file, number = self.locate(index)
        spans = self._files[file]
        if number == len(spans.start):
            raise BrokenDocument(str(spans.path), spans.damage)
        where = f"{spans.path}:{spans.number[number]}"
        data = read_span(spans.path, int(spans.start[number]), int(spans.length[number]))
        folder = spans.path.parent if self.images is None else Path(self.images)
        return Record(where, decode_object(data, where), FilesOf(folder))


def decode_object(data: bytes, where: str) -> dict[str, object]:
    """One JSON object; BrokenDocument otherwise."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BrokenDocument(where, "expected UTF-8, got other bytes") from None
    except json.JSONDecodeError as error:
        raise BrokenDocument(where, f"expected one JSON object, got another thing at byte {error.pos}") from None
    except (RecursionError, ValueError):  # Python reads numbers up to 4300 digits
        raise BrokenDocument(
            where, "expected one JSON object, got one nested too deeply or a number too long"
        ) from None
    if not isinstance(value, dict):
        raise BrokenDocument(where, f"expected a JSON object, got {type(value).__name__}")
    return value


def _spans(path: Path) -> Spans:
    empty = np.zeros(0, np.int64)
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return Spans(path, empty, empty, empty, "expected JSON, got an empty file")
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        file.seek(0)
        return _list_spans(path, file.read()) if first == b"[" else _line_spans(path, file)


def _line_spans(path: Path, file: BinaryIO) -> Spans:
    """Lines end at "\\n" only (JSON strings may hold other line separators); those of blanks alone are left out."""
    ends: list[np.ndarray] = []
    filled: list[np.ndarray] = []
    at, said = 0, False  # whether the line that the last chunk ended in holds anything
    while chunk := file.read(_CHUNK):
        data = np.frombuffer(chunk, np.uint8)
        newlines = np.flatnonzero(data == ord("\n"))
        pieces = np.logical_or.reduceat(~_BLANK[data], np.concatenate([[0], newlines]))  # what each line has here
        pieces[0] |= said
        ends.append(newlines + at)
        filled.append(pieces[:-1])
        at, said = at + len(chunk), bool(pieces[-1])
    end, kept = np.concatenate([*ends, [at]]), np.concatenate([*filled, [said]])
    start = np.concatenate([[0], end[:-1] + 1])
    return Spans(path, start[kept], (end - start)[kept], np.flatnonzero(kept) + 1)


def _list_spans(path: Path, data: bytes) -> Spans:
    """Elements of the one list of a file; behind a mistake nothing can be found, which is damage."""
    starts: list[int] = []
    lengths: list[int] = []
    damage = ""
    decoder = json.JSONDecoder()
    try:
        text = data.decode("utf-8")
        at, byte = text.index("[") + 1, 0
        byte = len(text[:at].encode())
        while True:
            gap = _blank(text, at)
            if text[gap : gap + 1] == "]":
                if rest := text[gap + 1 :].strip():
                    raise ValueError(f"{rest[:20]!r} behind its end")
                break
            _, end = decoder.raw_decode(text, gap)
            byte += gap - at  # blanks and commas are one byte each
            size = len(text[gap:end].encode())
            starts.append(byte)
            lengths.append(size)
            at, byte = end, byte + size
            comma = _blank(text, at)
            if text[comma : comma + 1] not in (",", "]"):
                raise ValueError(f"no comma at character {comma}")
            if text[comma] == ",":
                at, byte = comma + 1, byte + comma + 1 - at
    except (ValueError, RecursionError) as error:
        reason = "other bytes than UTF-8" if isinstance(error, UnicodeDecodeError) else " ".join(str(error).split())
        damage = f"expected a JSON list, got {reason} behind {len(starts)} records"
    numbers = np.arange(1, len(starts) + 1)
    return Spans(path, np.array(starts, np.int64), np.array(lengths, np.int64), numbers, damage)


def _blank(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
