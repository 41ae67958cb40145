"""Hugging Face `datasets`, from a folder or from the hub, whole or streamed. The library only decodes rows here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from jaxtyping import Int
from torch.utils.data._utils import worker

from unimodal.data.folder import IMAGE_SUFFIXES
from unimodal.data.parquet import row_fields
from unimodal.data.records import DocumentRules, FilesOf, Layout, RawImage, Record, RecordSource, no_files

if TYPE_CHECKING:
    import pyarrow as pa

STREAM_WINDOW = 1024
"""Rows of a stream that are shuffled together, and held in memory."""
HUB = "hub:"
METADATA = ("metadata.jsonl", "metadata.csv")
"""Files that name the images beside them."""


class HuggingFaceSource(RecordSource):
    """Rows of a data set of Hugging Face's `datasets`.

    Args:
        path: a folder (of `save_to_disk`, of data files, or of images beside a `metadata.jsonl` or `.csv` with `file_name`),
            or `hub:OWNER/NAME`, which is downloaded: nothing else is.
        split: of the data set.
        layout: what a row means; None: read from the first.
        name: configuration of the data set.
        revision: commit or tag on the hub.
        streaming: rows are read in their order as training asks for them, and nothing is kept on disk.
        documents: of a stream, how many make a round. The next round goes on behind them; behind the last row comes
            the first.
        rules: of images and texts.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        layout: Layout | None = None,
        name: str | None = None,
        revision: str | None = None,
        streaming: bool = False,
        documents: int | None = None,
        rules: DocumentRules = DocumentRules(),
    ) -> None:
        if streaming != (documents is not None):
            raise ValueError(f"documents: expected a number for a stream, and for a stream only, got {documents}")
        if documents is not None and documents < 1:
            raise ValueError(f"documents: expected at least 1, got {documents}")
        self.path, self.split, self.documents = path, split, documents
        place = [path] if path.startswith(HUB) else []  # a folder may move
        self._asked = [*place, *(word for word in (name, split, revision) if word is not None)]
        self._rows = _load(path, split, name, revision, streaming)
        self._stream = _Forward(self._rows) if streaming else None
        self._file = no_files if path.startswith(HUB) else _Below(Path(path))
        # One shard: rows are on disk in memory maps, or come in a stream.
        super().__init__([documents if documents is not None else len(self._rows)], layout, rules)

    def files(self) -> list[Path]:
        """Of a folder, all but the images."""
        if self.path.startswith(HUB):
            return []
        return sorted(
            path for path in Path(self.path).rglob("*")
            if path.suffix.lower() not in (*IMAGE_SUFFIXES, ".md", ".lock") and path.is_file()
            and not path.name.startswith("cache-")  # what `datasets` leaves beside them
            and not any(part.startswith(".") for part in path.relative_to(self.path).parts)
        )  # fmt: skip

    def identity(self) -> str:
        """With what of the data set is read."""
        return ", ".join([super().identity(), *self._asked])

    def record(self, index: int) -> Record:
        """The row at `index`; of a stream, modulo its rows."""
        where = f"{self.path} {self.split}: row {index}"
        row = self._rows[index] if self._stream is None else self._stream.row(index)
        return Record(where, row_fields(row, where), self._file)

    def order(self, epoch: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Any order; of a stream its own, shuffled within windows, going on from round to round."""
        if self.documents is None:
            return super().order(epoch, rng)
        first = epoch * self.documents
        indices = np.arange(first, first + self.documents)
        windows = indices // STREAM_WINDOW
        return np.concatenate([rng.permutation(indices[windows == w]) for w in np.unique(windows)])

    @property
    def endless(self) -> bool:
        """Whether it is a stream, of which nothing can be held out."""
        return self.documents is not None

    def _check_index(self, index: int) -> None:
        if self._stream is None:
            super()._check_index(index)
        elif index < 0:
            raise IndexError(f"index: expected at least 0, got {index}")


def is_image_folder(folder: Path) -> bool:
    """Whether there is a file that names images in the layout of `datasets`, in the folder or one below it."""
    for name in METADATA:
        for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            if path.is_file():
                with path.open("rb") as file:
                    return b"file_name" in file.readline(1 << 16)
    return False


class _Below(FilesOf):
    """Files of a folder, under the whole paths too that `datasets` makes of the names in a `metadata.jsonl`."""

    def __call__(self, name: str) -> RawImage:
        """The file; ValueError where the name leaves the folder."""
        for folder in (self.folder.absolute(), self.folder.resolve()):
            if Path(name).is_relative_to(folder):
                return super().__call__(str(Path(name).relative_to(folder)))
        return super().__call__(name)


class _Forward:
    """Rows of a stream by index: cheap from window to window, read again from the start for what lies far behind."""

    HELD = 3  # windows: lanes do not cross from one to the next together

    def __init__(self, rows: Any) -> None:
        self._all = rows
        self._rest: Iterator[pa.Table] = iter(())  # a table a row
        self._next = -1  # window that comes
        self._held: dict[int, list[pa.Table]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: each worker reads its own."""
        return {"_all": self._all, "_rest": iter(()), "_next": -1, "_held": {}}

    def row(self, index: int) -> pa.Table:
        window, place = divmod(index, STREAM_WINDOW)
        if window not in self._held:
            if window != self._next:
                self._rest = self._from(window * STREAM_WINDOW)
            self._held[window] = [next(self._rest) for _ in range(STREAM_WINDOW)]
            self._next = window + 1
            if len(self._held) > self.HELD:
                del self._held[min(self._held)]
        return self._held[window][place]

    def _from(self, start: int) -> Iterator[pa.Table]:
        """Rows from `start` on, round and round."""
        count = 0
        for row in _rows(self._all.skip(start)):
            yield row
            count += 1
        if not count and start:  # the stream has ended before: count it
            length = sum(1 for _ in _rows(self._all))
            yield from self._from(start % length) if length else ()
        while True:
            for row in _rows(self._all):
                count += 1
                yield row
            if not count:
                raise ValueError("path: expected a stream with rows, got none")


def _rows(dataset: Any) -> Iterator[Any]:
    """All rows, in a loader's worker too: there `datasets` would give a share of the shards, but here each worker reads the
    rows that it is asked for.
    """
    rows = iter(dataset)
    while True:
        info, worker._worker_info = worker._worker_info, None
        try:
            row = next(rows, None)
        finally:
            worker._worker_info = info
        if row is None:
            return
        yield row


def _refuse_links(folder: Path) -> None:
    """A card may name files elsewhere, which the user did not name."""
    for name in ("README.md", ".huggingface.yaml"):
        path = folder / name
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        front = (
            text.split("---")[1]
            if name == "README.md" and text.startswith("---")
            else ""
            if name == "README.md"
            else text
        )
        try:
            card = yaml.safe_load(front)
        except yaml.YAMLError as error:
            raise ValueError(f"path: expected a data set, got {path}, whose settings are no YAML") from error
        configs = card.get("configs") if isinstance(card, dict) else None
        if "://" in str(configs):
            raise ValueError(f"path: expected files of {folder} alone, got its {name}, whose data_files name others")


def _load(path: str, split: str, name: str | None, revision: str | None, streaming: bool) -> Any:
    import datasets

    remote = path.startswith(HUB)
    if not remote and not Path(path).is_dir():
        raise ValueError(f"path: expected a folder, or {HUB}OWNER/NAME for one on the hub, got {path}")
    if not remote:
        _refuse_links(Path(path))
    try:
        if not remote and any((Path(path) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(path)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[split]
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            place = path.removeprefix(HUB) if remote else str(Path(path).absolute())  # a bare "json" is a format to it
            rows = datasets.load_dataset(place, name, split=split, revision=revision, streaming=streaming)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]  # the cause says what a file lacks
        raise ValueError(f"path: expected a data set with the split {split}, got {path}: {reason}") from None
    return rows.with_format("arrow")  # as stored: what cannot be decoded must not stop the reading of a row
