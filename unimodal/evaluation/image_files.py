"""Sets of images on disk, their prompts, and their features, read by workers in constant memory.

Letters: B images of a batch, H W their pixels, D the width of the features, N images of a set.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from unimodal.data.folder import IMAGE_SUFFIXES
from unimodal.environment import usable_device
from unimodal.images import load_image
from unimodal.metrics.features import ImageFeatures, Preparation
from unimodal.metrics.moments import IMAGES, npz_keys

_MOST_WORKERS = 16
TEXT_KEYS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Loading:
    """How images are read; no number depends on it beyond rounding.

    Attributes:
        batch: images at once.
        workers: processes that read and prepare; None: one less than there are cores, at most 16.
        device: of the network: auto, cpu, cuda ...
    """

    batch: int = 64
    workers: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"feature_batch: expected at least 1, got {self.batch}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers: expected 0 or more, got {self.workers}")

    @property
    def processes(self) -> int:
        """Workers."""
        return min(_MOST_WORKERS, max(1, (os.cpu_count() or 2) - 1)) if self.workers is None else self.workers

    @property
    def place(self) -> torch.device:
        """The device; ValueError for one that cannot be used."""
        return usable_device(self.device)


def image_paths(root: Path) -> list[Path]:
    """All images below a folder, sorted by name, numbers in it as numbers (2.png before 10.png).

    Hidden ones, and a `grid.png` beside `samples/`, are left out.

    Raises:
        ValueError: no folder, or no image in it.
    """
    if not root.is_dir():
        raise ValueError(f"images: expected a folder, got {root}, {'a file' if root.exists() else 'which is missing'}")
    found = [
        path
        for path in sorted(root.rglob("*"), key=lambda path: _natural(path.relative_to(root).as_posix()))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and not (path.name == "grid.png" and path.with_name("samples").is_dir())
        and path.is_file()
    ]
    if not found:
        raise ValueError(f"images: expected images in {root}, got none")
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"([0-9]+)", name)]


def listing_sha256(paths: Sequence[Path], root: Path) -> str:
    """SHA-256 of names and sizes of files, which tells sets apart without reading them.

    Names are relative to `root`, however it and the files are spelt.
    """
    digest = hashlib.sha256()
    for path in paths:
        name = Path(os.path.relpath(path, root)).as_posix()
        digest.update(f"{name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def check_sizes(paths: Sequence[Path], size: tuple[int, int]) -> None:
    """ValueError naming the first image of another (width, height); only headers are read."""
    for path in paths:
        try:
            with Image.open(path) as image:
                found = image.size
        except (OSError, ValueError, SyntaxError):
            load_image(path)  # says what is wrong with it
            raise
        if found != size:
            raise ValueError(f"{path}: expected {size[0]}x{size[1]} pixels, got {found[0]}x{found[1]}")


# ---- datasets: an item is a prepared image, or the words of what is wrong with it


class ImageFiles(Dataset):
    """Files as a network takes them.

    Args:
        paths: the files.
        preparation: of each image.
    """

    def __init__(self, paths: Sequence[Path], preparation: Preparation) -> None:
        self.paths, self.preparation = [str(path) for path in paths], preparation

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        # Raised in a worker, an error would arrive as a page of traceback.
        try:
            return self.preparation(load_image(self.paths[index]))
        except ValueError as error:
            return str(error)


class NpzImages(Dataset):
    """Images (N, H, W, 3) uint8 under `arr_0`, as ADM writes them; mapped, so that none of them is read before its turn.

    Args:
        path: the .npz, not compressed.
        preparation: of each image.
    """

    def __init__(self, path: Path, preparation: Preparation) -> None:
        self.path, self.preparation = path, preparation
        self._images: np.ndarray | None = None
        self.shape = mapped_images(path).shape

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: int) -> Tensor | str:
        if self._images is None:
            self._images = mapped_images(self.path)
        return self.preparation(Image.fromarray(np.array(self._images[index])))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}  # a map is opened in each process anew


def mapped_images(path: Path) -> np.ndarray:
    """The array `arr_0` of an .npz, mapped into memory.

    Raises:
        ValueError: no such array, compressed, or of another shape or type.
    """
    if IMAGES not in npz_keys(path):
        raise ValueError(f"{path}: expected images under the key {IMAGES}, got {', '.join(sorted(npz_keys(path)))}")
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{IMAGES}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: expected images as numpy.savez writes them, got compressed ones; save them anew")
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(entry.header_offset + 30 + name + extra)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        start = file.tell()
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"{path}: expected {IMAGES} (N, H, W, 3) of uint8, got {shape} of {dtype}")
    return np.memmap(path, np.uint8, "r", start, shape)


# ---- features


def feature_batches(
    images: Dataset, features: ImageFeatures, loading: Loading, what: str
) -> Iterator[Float[Tensor, "_ D"]]:
    """Features of all images in their order, on the device, while workers prepare the next ones.

    Args:
        images: `ImageFiles` or `NpzImages`.
        features: the network; it is moved to the device.
        loading: batch, workers, device.
        what: word for the progress bar.

    Raises:
        ValueError: an image that cannot be read.
    """
    device = loading.place
    features.to(device)
    loader = DataLoader(
        images,
        batch_size=loading.batch,
        num_workers=loading.processes,
        collate_fn=by_shape,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if loading.processes else None,
    )
    with tqdm(total=len(images), desc=what, unit="image", leave=False, disable=None) as bar:  # type: ignore[arg-type]
        for pieces in loader:
            for piece in pieces:
                if isinstance(piece, str):
                    raise ValueError(piece)
                with torch.no_grad():
                    found = features(piece.to(device, non_blocking=True))
                yield found
                bar.update(len(found))


def by_shape(images: Sequence[Tensor | str]) -> list[Tensor | str]:
    """A batch, in order, cut where the size of images changes."""
    groups: list[list[Tensor]] = []
    for image in images:
        if isinstance(image, str):
            return [image]
        if groups and groups[-1][0].shape == image.shape:
            groups[-1].append(image)
        else:
            groups.append([image])
    return [torch.stack(group) for group in groups]


# ---- prompts


@dataclass(frozen=True)
class Prompt:
    """What an image was asked for with."""

    id: str
    text: str
    category: str = "images"


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file, in order.

    A .txt has one a line. A .jsonl has an object a line, a .csv a row, with `prompt`, `caption` or `text`, and perhaps
    `category`. A .json maps names to such objects (MJHQ-30K's meta_data.json). They are named by their number.

    Raises:
        ValueError: another kind of file, a damaged one, or one without prompts.
    """
    if not path.is_file():
        raise ValueError(f"prompts: expected a file, got {path}, {'a folder' if path.is_dir() else 'which is missing'}")
    if path.suffix not in (".txt", ".jsonl", ".json", ".csv"):
        raise ValueError(f"prompts: expected a .txt, .jsonl, .json or .csv, got {path}")
    try:
        records = _prompt_records(path)
    except UnicodeDecodeError:
        raise ValueError(f"prompts: {path}: expected UTF-8, got other bytes") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"prompts: {path}: {error}") from None
    if not records:
        raise ValueError(f"prompts: expected prompts in {path}, got none")
    return [_prompt(path, number, record) for number, record in enumerate(records)]


def _prompt_records(path: Path) -> list[Any]:
    content = path.read_text(encoding="utf-8-sig")
    # Lines end at "\n" only: texts may hold other line separators of Unicode.
    if path.suffix == ".txt":
        return [{"prompt": line.strip()} for line in content.split("\n") if line.strip()]
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(content), strict=True))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in content.split("\n") if line.strip()]
    found = json.loads(content)
    if not isinstance(found, (dict, list)):
        raise ValueError(f"expected an object or a list of records, got {found!r:.80}")
    return list(found.values()) if isinstance(found, dict) else found


def _prompt(path: Path, number: int, record: Any) -> Prompt:
    texts = [record[key] for key in TEXT_KEYS if record.get(key)] if isinstance(record, dict) else []
    if not texts or not isinstance(texts[0], str):
        raise ValueError(
            f"prompts: {path}: expected prompt, caption or text in record {number + 1}, got {record!r:.80}"
        )
    return Prompt(f"{number:05d}", texts[0], str(record.get("category") or "images"))
