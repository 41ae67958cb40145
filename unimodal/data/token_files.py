"""Token files: documents whose images are tokens already, in shards that are read in any order.

plan.json                     what is written: tokenizer, data, image sizes, sources; appears first
train-00000.safetensors ...   documents of every source with these indices, whole or not there
corpus.jsonl  prompts.jsonl   texts for the text tokenizer; held-out documents cut before their first target, as pixels
index.json                    what was written, shard by shard; appears last

A shard holds `tokens`, those of all its images end to end (`token_starts` says where each begins), `sizes` in pixels and
`grids` in tokens, and `documents`, a JSON record each, as bytes (`document_starts`): source by source, by index. It is read
span by span and never mapped into memory: a map of a file that is cut off meanwhile would end the process.

Letters: T tokens of a shard, T' of an image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from safetensors.numpy import save

from unimodal.data.records import WINDOW, read_span, shard_order
from unimodal.data.source import BrokenDocument, described, digest
from unimodal.documents import Document, Part, read_jsonl
from unimodal.files import write_atomically
from unimodal.sequence_rules import SequenceRules
from unimodal.stored import StoredImage, check_stored
from unimodal_tokenizers.base import Grid, ImageTokens, TokenLayout

FORMAT_VERSION = 1
PLAN, INDEX, CORPUS, PROMPTS = "plan.json", "index.json", "corpus.jsonl", "prompts.jsonl"
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
HELD = 2 * WINDOW
"""Shards of which it is kept in memory where documents begin: lanes do not cross from one window to the next together."""
_TYPES = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "I64": np.int64, "F32": np.float32}


@dataclass(frozen=True)
class SourceRecord:
    """A source as it was when its documents were written; `identity` tells it from others with as many documents."""

    kind: str
    weight: float | None
    documents: int
    identity: str = ""


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


@dataclass(frozen=True)
class _Array:
    """An array in a file: where it begins, and what it is of."""

    path: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last`."""
        if not 0 <= first <= last <= self.shape[0]:
            raise ValueError(f"expected rows of {self.shape[0]}, got {first} to {last}")
        data = read_span(self.path, self.start + first * self.row, (last - first) * self.row)
        return np.frombuffer(data, self.dtype).reshape(last - first, *self.shape[1:])

    def all(self) -> np.ndarray:
        """Every row."""
        return self.rows(0, self.shape[0])


def _arrays(path: Path) -> tuple[Mapping[str, str], dict[str, _Array]]:
    """Metadata and arrays of a safetensors file; ValueError for one that is not whole."""
    length = int.from_bytes(read_span(path, 0, 8), "little")
    size = path.stat().st_size
    if 8 + length > size:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(read_span(path, 8, length))
    metadata = header.pop("__metadata__")
    found = {}
    for name, one in header.items():
        first, last = (8 + length + int(at) for at in one["data_offsets"])
        found[name] = _Array(path, first, np.dtype(_TYPES[one["dtype"]]).newbyteorder("<"), tuple(one["shape"]))
        if last - first != found[name].row * found[name].shape[0] or not 0 <= first <= last <= size:
            raise ValueError(f"{name} at {first} to {last} in a file of {size} bytes")
    return metadata, found


class Shard:
    """A shard on disk, of which documents are read as they are asked for; no file stays open.

    Args:
        path: the file.
        layout: of its tokens.

    Raises:
        BrokenDocument: no such file, or a damaged one.
    """

    def __init__(self, path: Path, layout: TokenLayout) -> None:
        self.path, self.layout = path, layout
        try:
            metadata, arrays = _arrays(path)
            self.counts: list[int] = json.loads(metadata["counts"])
            self.broken: list[str] = json.loads(metadata["broken"])
            self._tokens, self._text = arrays["tokens"], arrays["documents"]
            small = ("token_starts", "sizes", "grids", "document_starts")
            self._starts, self._sizes, self._grids, self._documents = (arrays[name].all() for name in small)
        except BrokenDocument:
            raise
        except (OSError, TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise BrokenDocument(str(path), f"expected a shard of token files, got {_line(error)}") from None

    @property
    def images(self) -> int:
        """How many."""
        return len(self._sizes)

    @property
    def tokens(self) -> int:
        """Of all images."""
        return int(self._starts[-1])

    def document(self, source: int, number: int) -> Document:
        """The document that was written as so many-th of a source.

        Raises:
            BrokenDocument: the file is gone or cut off, or this document is not what was written.
        """
        row = sum(self.counts[:source]) + number
        try:
            first, last = self._documents[row : row + 2]
            record = json.loads(self._text.rows(int(first), int(last)).tobytes())
            parts = tuple(
                Part(part["text"], part["learn"], part["role"]) if "text" in part
                else self._image(int(part["image"]), part["learn"], part["role"])
                for part in record["parts"]
            )  # fmt: skip
            return Document(parts, record["kind"])
        except BrokenDocument:
            raise
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise BrokenDocument(
                f"{self.path}: document {row}", f"expected one as written, got {_line(error)}"
            ) from None

    def _image(self, number: int, learn: bool, role: str) -> StoredImage:
        if not 0 <= number < self.images:
            raise ValueError(f"image {number} of {self.images}")
        first, last = self._starts[number : number + 2]
        stored = self._tokens.rows(int(first), int(last))  # (T', *channels)
        books = self.layout.codebooks
        if books and ((stored < 0).any() or (stored >= np.array(books)).any()):
            raise ValueError(f"ids up to {stored.max()} for codebooks of {list(books)}")
        if not books and not np.isfinite(stored).all():
            raise ValueError("tokens that are not finite")
        values = torch.from_numpy(stored.astype(np.int64 if books else np.float32))
        height, width = (int(side) for side in self._sizes[number])
        rows, columns = (int(side) for side in self._grids[number])
        grid, usual = Grid(rows, columns), self.layout.grid(height, width)
        tokens = ImageTokens(values, (usual if (usual.h, usual.w) == (grid.h, grid.w) else grid,))
        return StoredImage(tokens, (height, width), learn, role)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:200]


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
            raise ValueError(f"root: expected a folder that `unimodal tokenize` wrote, got {root}")
        if not (self.root / INDEX).is_file():
            raise ValueError(f"root: {root} is not finished; run the same `unimodal tokenize` again")
        self.plan = Plan.of_json(read_json(self.root / PLAN))
        self.counts: dict[str, list[int]] = read_json(self.root / INDEX)["counts"]

    def sources(self, split: Split) -> list[TokenSource]:
        """The documents of a split, kind by kind, without kinds of which nothing could be read."""
        kinds = dict.fromkeys(record.kind for record in self.plan.sources[split])
        return [source for kind in kinds if len(source := TokenSource(self.root, split, kind))]

    def corpus(self) -> Iterable[str]:
        """Texts for the text tokenizer."""
        with (self.root / CORPUS).open(encoding="utf-8") as file:
            yield from map(json.loads, file)


class TokenSource:
    """Documents that `unimodal tokenize` wrote: their images are tokens; every choice in them was made then.

    Args:
        root: folder of token files.
        split: "train", or what the tokenized data held out.
        kind: of the documents, where there are several; None: all of them.

    Raises:
        ValueError: `root` holds no token files, or is not finished; no such `split` or `kind`.
    """

    def __init__(self, root: str | Path, split: Split = "train", kind: str | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        files = TokenFiles(Path(root))
        self.root, self.split, self._plan = Path(root), split, files.plan
        kinds = [record.kind for record in files.plan.sources[split]]
        if kind is not None and kind not in kinds:
            raise ValueError(f"kind: expected one of {', '.join(dict.fromkeys(kinds))}, got {kind!r}")
        self._one = kind or (kinds[0] if len(set(kinds)) == 1 else None)
        self.kind = self._one or "document"
        self._chosen = [i for i, one in enumerate(kinds) if self._one in (None, one)]
        self._names = [shard_name(one, k) for one, k in files.plan.shards() if one == split]
        held = [files.counts[name] for name in self._names]
        self._held = np.array(held, np.int64).reshape(len(held), len(kinds))  # documents of each shard and source
        self._sizes = self._held[:, self._chosen].sum(axis=1)
        self._ends = np.cumsum(self._sizes)
        self._shards: dict[int, Shard] = {}

    def __len__(self) -> int:
        """Documents that were written."""
        return int(self._sizes.sum())

    def document(self, index: int, rng: np.random.Generator) -> Document:
        """The document at `index`; nothing is drawn from `rng`.

        Raises:
            IndexError: `index` is outside 0 <= index < len.
            BrokenDocument: a shard is gone or damaged, or the document in it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        k = int(np.searchsorted(self._ends, index, side="right"))
        number = index - int(self._ends[k] - self._sizes[k])
        for source in self._chosen:
            if number < self._held[k, source]:
                break
            number -= int(self._held[k, source])
        shard = self._shard(k)
        document = shard.document(source, number)
        for part in document.parts:
            if isinstance(part, StoredImage) and list(part.size) not in self._plan.image_sizes:
                expected = f"expected images of {self._plan.image_sizes}, got one of {list(part.size)}"
                raise BrokenDocument(f"{shard.path}: {self.kind} {number}", expected)
        return document

    def order(self, epoch: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Shards in random order, so many shuffled together as for tars; where there are no more, all: as without shards."""
        return shard_order(self._sizes, rng) if len(self._sizes) > WINDOW else rng.permutation(len(self))

    def identity(self) -> str:
        """With the plan that the files were written by, and how many documents there are in each."""
        plan = json.dumps(self._plan.to_json(), sort_keys=True).encode()
        return described(self, self.split, f"plan {digest([plan])}", f"shards {digest([self._held.tobytes()])}")

    def corpus(self) -> Iterable[str]:
        """Texts of all documents of these files."""
        return TokenFiles(self.root).corpus()

    def check(self, fingerprint: str, rules: SequenceRules) -> None:
        """ValueError where a model's tokenizer did not make these tokens, or its recipe has no use for them."""
        made = self._plan.tokenizer
        if made["fingerprint"] != fingerprint:
            raise ValueError(
                f"root: {self.root} holds tokens of another tokenizer than model.tokenizer (recipe "
                f"{made['recipe']}, {made['fingerprint'][:12]}), expected {fingerprint[:12]}; is tokenizer_weights given?"
            )
        check_stored(self._plan.image_sizes, rules)

    def prompts(self) -> list[Document]:
        """Held-out documents with pixels, cut before their first target; of several kinds, in turn."""
        kinds: dict[str, list[Document]] = {}
        for document in read_jsonl(self.root / PROMPTS):
            kinds.setdefault(document.kind, []).append(document)
        if self._one in kinds:
            return kinds[self._one]
        return [document for some in zip_longest(*kinds.values()) for document in some if document is not None]

    def _shard(self, k: int) -> Shard:
        if k not in self._shards:
            shard = Shard(self.root / self._names[k], self._plan.layout)
            if shard.counts != self._held[k].tolist():
                found = f"{shard.counts} documents of each source"
                raise BrokenDocument(str(shard.path), f"expected {self._held[k].tolist()}, as in {INDEX}, got {found}")
            while len(self._shards) >= HELD:
                del self._shards[next(iter(self._shards))]
            self._shards[k] = shard
        return self._shards[k]
