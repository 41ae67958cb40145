"""Parquet files, read a row group at a time."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unimodal.data.records import WINDOW, DocumentRules, FilesOf, Layout, Record, RecordSource, find_files
from unimodal.data.source import BrokenDocument
from unimodal.files import one_line

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetSource(RecordSource):
    """Documents of Parquet files, one a row. Images are bytes, or `{"bytes", "path"}` as Hugging Face writes them.

    Args:
        paths: files, folders, patterns (`*`), ranges (`{00..12}`), one or a list.
        layout: what a row means; None: read from the first.
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
        self._groups: list[_Group] = []
        for path in find_files(paths, (".parquet",), "paths"):
            self._groups += _groups(path)
        self._held: OrderedDict[int, pa.Table] = OrderedDict()
        super().__init__([group.rows for group in self._groups], layout, rules)

    def __getstate__(self) -> dict[str, Any]:
        """Without the row groups in memory: each worker reads its own."""
        return {**self.__dict__, "_held": OrderedDict()}

    def files(self) -> list[Path]:
        """The tables."""
        return list(dict.fromkeys(group.path for group in self._groups))

    def record(self, index: int) -> Record:
        """The row at `index`."""
        number, row = self.locate(index)
        group = self._groups[number]
        if group.damage:
            raise BrokenDocument(str(group.path), group.damage)
        where = f"{group.path}: row {group.first + row}"
        fields = row_fields(self._table(number).slice(row, 1), where)
        folder = group.path.parent if self.images is None else Path(self.images)
        return Record(where, fields, FilesOf(folder))

    def _table(self, number: int) -> pa.Table:
        """A row group; those of one shuffling window stay in memory."""
        if number not in self._held:
            import pyarrow as pa
            import pyarrow.parquet as pq

            group = self._groups[number]
            try:
                with pq.ParquetFile(group.path) as file:
                    self._held[number] = file.read_row_group(group.number)
            except (pa.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                name = f"{group.path}: row group {group.number}"
                raise BrokenDocument(name, f"expected the rows that were there at the start, got {reason}") from None
            while len(self._held) > 2 * WINDOW:  # lanes do not cross from one window to the next together
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]


def row_fields(row: pa.Table, where: str) -> dict[str, object]:
    """The cells of a table of one row, images as `{"bytes", "path"}`; BrokenDocument for what Python has no value for."""
    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError) as error:  # text that is no UTF-8, a date that Python has not, ...
        raise BrokenDocument(where, f"expected values that Python can hold, got {one_line(error)}") from None


class _Group:
    """A row group: of which file, which one, its first row and how many; or what is wrong with the file."""

    def __init__(self, path: Path, number: int, first: int, rows: int, damage: str = "") -> None:
        self.path, self.number, self.first, self.rows, self.damage = path, number, first, rows, damage


def _groups(path: Path) -> list[_Group]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        # One document, always broken, stands for the file.
        return [_Group(path, 0, 0, 1, f"expected a Parquet file, got {' '.join(str(error).split())[:200]}")]
    first = np.cumsum([0, *rows])
    return [_Group(path, i, int(first[i]), n) for i, n in enumerate(rows) if n]
