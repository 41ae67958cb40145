"""What a run writes beside checkpoints: none of it ends a training because a disk is full."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from unimodal.files import warn, write_atomically


@contextmanager
def spared(what: str, loss: str) -> Iterator[None]:
    """Something that is worth less than the training it is about: where it cannot be written, that is said.

    Args:
        what: is written.
        loss: what is missing then.
    """
    try:
        yield
    except OSError as error:
        warn(f"{what} could not be written ({error}); training goes on, {loss}")


class _Rows(ExperimentWriter):
    """metrics.csv: rows that there is no room for wait in memory; what is in the file stays."""

    def save(self) -> None:
        """Append the rows that wait; where there are new columns, write the file anew, whole or not at all."""
        if not self.metrics:
            return
        path, known = Path(self.metrics_file_path), list(self.metrics_keys)
        new = self._record_new_keys()
        try:
            if new or not path.is_file():
                there = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []
                write_atomically(path, self._lines([*there, *self.metrics], header=True))
            else:
                _append(path, self._lines(self.metrics, header=False))
        except OSError:
            self.metrics_keys = known
            raise
        self.metrics = []

    def _lines(self, rows: list[dict[str, Any]], header: bool) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()


def _append(path: Path, data: bytes) -> None:
    """All of it or nothing."""
    size = path.stat().st_size
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError:
        os.truncate(path, size)
        raise


class Table(CSVLogger):
    """CSVLogger that outlives a full disk."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The rows of this run."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Rows(log_dir=self.log_dir)
        return self._experiment

    def save(self) -> None:
        """Write the rows, or keep them until there is room."""
        with spared(f"{self.log_dir}/metrics.csv", "its rows wait in memory"):
            super().save()


class Board(TensorBoardLogger):
    """TensorBoardLogger that outlives a full disk."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars; where that fails, these are lost and a new file is begun with the next ones."""
        self._try(lambda: super(Board, self).log_metrics(metrics, step))

    @rank_zero_only
    def save(self) -> None:
        """Write what waits."""
        self._try(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what waits, and close."""
        self._try(lambda: super(Board, self).finalize(status))

    def _try(self, write: Any) -> None:
        with spared(f"{self.log_dir} (TensorBoard)", "its latest points are lost"):
            try:
                write()
            except (OSError, ValueError) as error:  # the latter made of the former, by Lightning
                cause = error if isinstance(error, OSError) else error.__cause__
                if not isinstance(cause, OSError):
                    raise
                broken, self._experiment = self._experiment, None
                with suppress(OSError):
                    if broken is not None:
                        broken.close()
                raise cause from None
