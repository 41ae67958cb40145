"""Mean and covariance of features: gathered batch by batch in constant memory, kept in files, read from others' files.

Letters: B a batch, N all features, D their width.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unimodal.files import file_sha256, write_atomically

POOLED, SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")
"""Keys of Inception's pooled features, and of the spatial ones that ADM keeps beside them for sFID."""

IMAGES = "arr_0"
"""Key of images in ADM's files: (N, H, W, 3) uint8."""

FEATURES = "feats"
"""Key of features (N, D) in clean-fid's files for KID, and in ours."""


@dataclass(frozen=True, eq=False)
class Moments:
    """First two moments of a set of features.

    Attributes:
        n: how many features; None where a file does not say.
        mean: (D,) float64.
        cov: (D, D) float64, divided by n - 1.
    """

    n: int | None
    mean: np.ndarray
    cov: np.ndarray

    def __post_init__(self) -> None:
        mean, cov = np.asarray(self.mean, dtype=np.float64), np.asarray(self.cov, dtype=np.float64)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "cov", cov)
        if mean.ndim != 1 or not len(mean):
            raise ValueError(f"mean: expected shape (D,), got {mean.shape}")
        if cov.shape != (len(mean), len(mean)):
            raise ValueError(f"cov: expected shape {(len(mean), len(mean))} as the mean has it, got {cov.shape}")
        if self.n is not None and self.n < 2:
            raise ValueError(f"n: expected at least 2 features, got {self.n}")
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError("mean and cov: expected finite numbers, got nan or infinity")
        if np.abs(cov - cov.T).max() > 1e-6 * max(np.abs(cov).max(), 1e-300):
            raise ValueError("cov: expected a symmetric matrix")

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    @classmethod
    def of(cls, features: np.ndarray | Tensor, name: str = "features") -> Moments:
        """Moments of features (N, D), all at once, in float64.

        Raises:
            ValueError: not (N, D) with N >= 2, or not finite.
        """
        values = checked_features(name, features, 2)
        return cls(len(values), values.mean(0), np.atleast_2d(np.cov(values, rowvar=False)))


def checked_features(name: str, values: np.ndarray | Tensor, at_least: int) -> np.ndarray:
    """`values` as (N, D) float64 with N >= `at_least`; ValueError, naming `name`, where they are anything else."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) < at_least:
        raise ValueError(f"{name}: expected (N, D) with N >= {at_least}, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite numbers, got nan or infinity")
    return values


class StreamingMoments:
    """Sum, sum of outer products and count in float64: D^2 + D + 1 numbers, however many features come.

    Args:
        width: D.
        device: where the sums lie.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, features: Float[Tensor, "B D"]) -> None:
        """Add a batch."""
        values = features.detach().to(self.sum)
        self.count += len(values)
        self.sum += values.sum(0)
        self.outer += values.T @ values

    def merge(self, other: StreamingMoments) -> None:
        """Add what another has gathered."""
        self.count += other.count
        self.sum += other.sum.to(self.sum)
        self.outer += other.outer.to(self.outer)

    def moments(self) -> Moments:
        """Of all that came; ValueError for fewer than two features."""
        return moments_of_sums(self.count, self.sum, self.outer)


def moments_of_sums(count: int, total: Float[Tensor, " D"], outer: Float[Tensor, "D D"]) -> Moments:
    """Moments from count, sum and sum of outer products, all float64."""
    if count < 2:
        raise ValueError(f"features: expected at least 2, got {count}")
    mean = total / count
    cov = (outer - count * torch.outer(mean, mean)) / (count - 1)
    cov = (cov + cov.T) / 2  # equal features leave nothing but rounding, which need not be symmetric
    return Moments(count, mean.cpu().numpy(), cov.cpu().numpy())


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a file of reference statistics holds.

    Attributes:
        moments: of the features.
        provenance: how they were made, as our own files say; empty for others' files.
        sha256: of the file.
        features: (N, D), where the file keeps them.
    """

    moments: Moments
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    features: np.ndarray | None = None


def save_statistics(
    path: Path,
    moments: Moments,
    provenance: Mapping[str, Any],
    features: np.ndarray | None = None,
) -> None:
    """Write statistics that pytorch-fid, clean-fid and ADM's evaluator read too (keys `mu` and `sigma`).

    Args:
        path: an .npz.
        moments: of the features.
        provenance: how they were made, as JSON.
        features: (N, D), kept for KID, precision and recall where given.
    """
    if path.suffix != ".npz":
        raise ValueError(f"out: expected a name ending in .npz, got {path}")
    arrays = {"mu": moments.mean, "sigma": moments.cov, "provenance": np.array(json.dumps(dict(provenance)))}
    if moments.n is not None:
        arrays["n"] = np.array(moments.n, dtype=np.int64)
    if features is not None:
        arrays[FEATURES] = features
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy types keyword arrays as its own switch
    write_atomically(path, buffer.getvalue())


def load_statistics(path: Path, keys: tuple[str, str] = POOLED) -> Statistics:
    """Read ours, pytorch-fid's, clean-fid's, EDM's (.npz) and ADM's statistics; nothing is unpickled.

    Args:
        path: the file.
        keys: `POOLED`, or `SPATIAL` for sFID's in an ADM file.

    Raises:
        ValueError: no such file, damaged, pickled, images alone, or other keys than a statistics file has.
    """
    with open_npz(path) as file:
        if not set(keys) <= set(file.files):
            _refuse_contents(path, file.files, keys)
        mean, cov = _array(path, file, keys[0]), _array(path, file, keys[1])
        count = int(_array(path, file, "n")) if "n" in file.files else None
        features = _array(path, file, FEATURES) if FEATURES in file.files and keys == POOLED else None
        provenance: Any = {}
        if "provenance" in file.files:
            try:
                provenance = json.loads(str(_array(path, file, "provenance")))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: expected JSON in provenance, got {error}") from None
    try:
        moments = Moments(count, mean, cov)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Statistics(moments, provenance, file_sha256(path), features)


def load_features(path: Path) -> np.ndarray:
    """Features (N, D) of a file of ours or of clean-fid's for KID."""
    with open_npz(path) as file:
        if FEATURES not in file.files:
            raise ValueError(f"{path}: expected features under the key {FEATURES}, got {', '.join(file.files)}")
        return _array(path, file, FEATURES)


def npz_keys(path: Path) -> frozenset[str]:
    """What arrays a file holds."""
    with open_npz(path) as file:
        return frozenset(file.files)


def open_npz(path: Path) -> Any:
    """`numpy.load` without pickles; ValueError where the file is no .npz."""
    if path.suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"{path}: expected an .npz, got a pickle (EDM2 keeps statistics so), and nothing is unpickled here: load it "
            "where you trust it and save mu and sigma with numpy.savez"
        )
    if not path.is_file():
        raise ValueError(
            f"{path}: expected a file of statistics, got {'a folder' if path.is_dir() else 'no such file'}"
        )
    try:
        file = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an .npz, got a damaged or pickled file ({error})") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(f"{path}: expected an .npz with several arrays, got one array")
    return file


def _array(path: Path, file: Any, key: str) -> np.ndarray:
    try:
        return file[key]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: the array {key} is damaged or pickled ({str(error).splitlines()[0]})") from None


def _refuse_contents(path: Path, found: list[str], keys: tuple[str, str]) -> None:
    if keys == POOLED and IMAGES in found:
        raise ValueError(
            f"{path}: expected statistics (mu, sigma), got images (arr_0): make statistics of them first with "
            "`unimodal evaluate statistics`, or give the file as images"
        )
    if keys == POOLED and FEATURES in found:
        raise ValueError(f"{path}: expected statistics (mu, sigma), got features alone (clean-fid's file for KID)")
    raise ValueError(f"{path}: expected the arrays {keys[0]} and {keys[1]}, got {', '.join(found) or 'none'}")
