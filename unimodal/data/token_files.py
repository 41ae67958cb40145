"""Token files: documents whose images are tokens already, in shards that are read in any order.

plan.json                     what is written: tokenizer, data, image sizes, sources; appears first
train-00000.safetensors ...   documents of every source with these indices, whole or not there
corpus.jsonl  prompts.jsonl   texts for the text tokenizer; held-out documents cut before their first target, as pixels
index.json                    what was written, shard by shard; appears last

A shard holds `tokens`, those of all its images end to end (`token_starts` says where each begins), `sizes` in pixels and
`grids` in tokens, and `documents`, a JSON record each, as bytes (`document_starts`): source by source, by index.

Letters: T tokens and I images of a shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from unimodal.documents import Document, Part
from unimodal.files import write_atomically
from unimodal.stored import StoredImage
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout

FORMAT_VERSION = 1
PLAN, INDEX, CORPUS, PROMPTS = "plan.json", "index.json", "corpus.jsonl", "prompts.jsonl"
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class SourceRecord:
    """A source as it was when its documents were written."""

    kind: str
    weight: float | None
    documents: int


@dataclass(frozen=True)
class Plan:
    """What a folder of token files holds, or is to hold.

    Attributes:
        tokenizer: its fingerprint, and words about it.
        layout: of its tokens.
        image_sizes: (height, width) that images were fitted to.
        data: class_path and init_args of the data module that was read.
        seed: of the documents' draws.
        per_shard: documents of each source in a shard.
        sources: of either split.
    """

    tokenizer: Mapping[str, str]
    layout: TokenLayout
    image_sizes: Sequence[Sequence[int]]
    data: Mapping[str, Any]
    seed: int
    per_shard: int
    sources: Mapping[str, Sequence[SourceRecord]]
    format_version: int = FORMAT_VERSION

    def shards(self) -> list[tuple[Split, int]]:
        """All of them: split and number."""
        most = {split: max((source.documents for source in self.sources[split]), default=0) for split in SPLITS}
        return [(split, k) for split in SPLITS for k in range(-(-most[split] // self.per_shard))]

    def indices(self, split: Split, source: int, k: int) -> range:
        """Documents of a source that belong into shard k."""
        documents = self.sources[split][source].documents
        return range(min(k * self.per_shard, documents), min((k + 1) * self.per_shard, documents))

    def to_json(self) -> dict[str, Any]:
        """As a record."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def of_json(record: Mapping[str, Any]) -> Plan:
        """The plan of a record; ValueError for one that another version wrote."""
        version = record.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{PLAN}: expected format_version {FORMAT_VERSION}, got {version}")
        unknown = set(record) ^ {field.name for field in fields(Plan)}
        if unknown:
            raise ValueError(f"{PLAN}: unknown or missing {', '.join(sorted(unknown))}")
        layout: Any = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record["layout"].items()
        }
        sources = {split: [SourceRecord(**one) for one in found] for split, found in record["sources"].items()}
        return Plan(**{**record, "layout": TokenLayout(**layout), "sources": sources})


def shard_name(split: Split, k: int) -> str:
    """File of shard k."""
    return f"{split}-{k:05d}.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; ValueError where there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected an object, got {type(record).__name__}")
    return record


# ---- writing


class ShardWriter:
    """Gathers documents and the tokens of their images, and writes them as one file.

    Args:
        layout: of the tokens.
    """

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout
        self.records: list[bytes] = []
        self.counts: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.grids: list[tuple[int, int]] = []
        self.values: list[np.ndarray] = []
        self.broken: list[str] = []

    def begin_source(self) -> None:
        """What is added from now on is of the next source."""
        self.counts.append(0)

    def add_document(self, document: Document, images: Sequence[int]) -> None:
        """A document, given the numbers of its images."""
        numbers = iter(images)
        parts = [
            {
                **({"text": part.text} if part.is_text else {"image": next(numbers)}),
                "learn": part.learn,
                "role": part.role,
            }
            for part in document.parts
        ]
        self.records.append(json.dumps({"kind": document.kind, "parts": parts}, ensure_ascii=False).encode())
        self.counts[-1] += 1

    def add_image(self, tokens: ImageTokens, size: tuple[int, int]) -> None:
        """Tokens of the next image."""
        (grid,) = tokens.grids
        self.grids.append((grid.h, grid.w))
        self.sizes.append(size)
        self.values.append(tokens.values.cpu().numpy().astype(stored_dtype(self.layout)))

    def write(self, path: Path) -> None:
        """The file appears whole or not at all."""
        books = len(self.layout.codebooks)
        channels = (self.layout.dim,) if not books else (books,) if books > 1 else ()
        empty = np.empty((0, *channels), stored_dtype(self.layout))
        arrays = {
            "tokens": np.concatenate([empty, *self.values]),
            "token_starts": _starts([len(values) for values in self.values]),
            "sizes": np.array(self.sizes, np.int32).reshape(-1, 2),
            "grids": np.array(self.grids, np.int32).reshape(-1, 2),
            "documents": np.frombuffer(b"".join(self.records), np.uint8),
            "document_starts": _starts([len(record) for record in self.records]),
        }
        write_atomically(path, save(arrays, {"counts": json.dumps(self.counts), "broken": json.dumps(self.broken)}))


def stored_dtype(layout: TokenLayout) -> type[np.generic]:
    """The smallest type that holds every token: ids as unsigned 16 bits where they fit, vectors as they are encoded."""
    if not layout.codebooks:
        return np.float32
    return np.uint16 if max(layout.codebooks) <= 2**16 else np.int64


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]).astype(np.int64)


# ---- reading


class Shard:
    """A shard on disk, read where it is asked.

    Args:
        path: the file.
        layout: of its tokens.

    Raises:
        ValueError: no such file, or a damaged one.
    """

    def __init__(self, path: Path, layout: TokenLayout) -> None:
        self.path, self.layout = path, layout
        try:
            self._file = safe_open(path, framework="np")
            metadata = self._file.metadata()
            self.counts: list[int] = json.loads(metadata["counts"])
            self.broken: list[str] = json.loads(metadata["broken"])
            small = ("token_starts", "sizes", "grids", "document_starts")
            self._starts, self._sizes, self._grids, self._documents = (self._file.get_tensor(name) for name in small)
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: expected a shard of token files, got {error}") from None

    @property
    def images(self) -> int:
        """How many."""
        return len(self._sizes)

    @property
    def tokens(self) -> int:
        """Of all images."""
        return int(self._starts[-1])

    def document(self, source: int, number: int) -> Document:
        """The document that was written as so many-th of a source."""
        row = sum(self.counts[:source]) + number
        first, last = self._documents[row : row + 2]
        record = json.loads(self._file.get_slice("documents")[int(first) : int(last)].tobytes())
        parts = tuple(
            Part(part["text"], part["learn"], part["role"]) if "text" in part
            else self._image(part["image"], part["learn"], part["role"])
            for part in record["parts"]
        )  # fmt: skip
        return Document(parts, record["kind"])

    def _image(self, number: int, learn: bool, role: str) -> StoredImage:
        first, last = self._starts[number : number + 2]
        values: Tensor = torch.from_numpy(
            self._file.get_slice("tokens")[int(first) : int(last)].astype(
                np.int64 if self.layout.codebooks else np.float32
            )
        )
        height, width = (int(side) for side in self._sizes[number])
        rows, columns = (int(side) for side in self._grids[number])
        grid, usual = Grid(rows, columns), self.layout.grid(height, width)
        tokens = ImageTokens(values, (usual if (usual.h, usual.w) == (grid.h, grid.w) else grid,))
        return StoredImage(tokens, (height, width), learn, role)


class TokenFiles:
    """A finished folder of token files.

    Args:
        root: the folder.

    Raises:
        ValueError: no token files, or not finished.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        if not (self.root / PLAN).is_file():
            raise ValueError(f"data.root: expected a folder that `unimodal tokenize` wrote, got {root}")
        if not (self.root / INDEX).is_file():
            raise ValueError(f"data.root: {root} is not finished; run the same `unimodal tokenize` again")
        self.plan = Plan.of_json(read_json(self.root / PLAN))
        self.counts: dict[str, list[int]] = read_json(self.root / INDEX)["counts"]

    def sources(self, split: Split) -> list[TokenSource]:
        """The sources of a split, without those of which nothing could be read."""
        found = [TokenSource(self.root, split, number) for number in range(len(self.plan.sources[split]))]
        return [source for source in found if len(source)]

    def corpus(self) -> Iterable[str]:
        """Texts for the text tokenizer."""
        with (self.root / CORPUS).open(encoding="utf-8") as file:
            yield from map(json.loads, file)


class TokenSource:
    """Documents of one source, of which the images are tokens; every choice in them was made when they were written.

    Args:
        root: folder of token files.
        split: "train" or "val".
        number: of the source.
    """

    def __init__(self, root: Path, split: Split, number: int) -> None:
        files = TokenFiles(root)
        self.root, self.split, self.number, self._plan = Path(root), split, number, files.plan
        record = files.plan.sources[split][number]
        self.kind, self.weight = record.kind, record.weight
        held = [files.counts[shard_name(one, k)][number] for one, k in files.plan.shards() if one == split]
        self._ends = np.cumsum(np.array(held, np.int64))
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        """Documents that were written."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def document(self, index: int, rng: np.random.Generator) -> Document:
        """The document at `index`; nothing is drawn from `rng`.

        Raises:
            IndexError: `index` is outside 0 <= index < len.
            ValueError: the shard is damaged (named).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        k = int(np.searchsorted(self._ends, index, side="right"))
        if k not in self._open:
            self._open[k] = Shard(self.root / shard_name(self.split, k), self._plan.layout)
        return self._open[k].document(self.number, index - (int(self._ends[k - 1]) if k else 0))

    def corpus(self) -> Iterable[str]:
        """Texts of all sources of these files."""
        return TokenFiles(self.root).corpus()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a file is opened in each process anew
