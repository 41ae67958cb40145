"""`unimodal data check`: what is in a data set, what is broken in it, and what a recipe makes of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from tqdm import tqdm

from unimodal.data.folder import FolderSource
from unimodal.data.hub import HuggingFaceSource, is_image_folder
from unimodal.data.jsonl import JsonlSource
from unimodal.data.parquet import ParquetSource
from unimodal.data.records import spread
from unimodal.data.source import BrokenDocument, Source, Stored
from unimodal.data.tar import TarSource
from unimodal.data.token_files import PLAN
from unimodal.documents import Document
from unimodal.export import one_line
from unimodal.model import UnifiedModel
from unimodal.packing import Pixels, SequencedDocument
from unimodal.stored import StoredImage
from unimodal.text import TextTokenizer
from unimodal_generators.base import TokenKind

KEPT = 100
"""Broken items of a source that reports can name; all of them go to a file."""
_SUFFIXES = {".tar": TarSource, ".parquet": ParquetSource, ".jsonl": JsonlSource, ".json": JsonlSource}
_SHAPES = (("tall, over 2:1", 0.5), ("tall", 0.8), ("square", 1.25), ("wide", 2.0), ("wide, over 2:1", math.inf))


@dataclass
class Drawn:
    """A document for the page, and how the recipe lays it out."""

    name: str
    document: Document
    sequenced: SequencedDocument | None


@dataclass(frozen=True)
class Bar:
    """A bin of a histogram and its count."""

    label: str
    count: int


class Octaves:
    """A histogram whose bins double: 0, 1, 2-3, 4-7 ... It holds counts, however many values come."""

    def __init__(self, values: Iterable[int] = ()) -> None:
        self._bins: Counter[int] = Counter()
        for value in values:
            self.add(value)

    def add(self, value: int) -> None:
        """One value more."""
        self._bins[int(value).bit_length()] += 1

    @property
    def bars(self) -> list[Bar]:
        """From the first bin that is not empty to the last."""
        if not self._bins:
            return []
        return [Bar(_octave(b), self._bins[b]) for b in range(min(self._bins), max(self._bins) + 1)]


@dataclass
class Findings:
    """What reading a source came to: sums and histograms, nothing for each document.

    Attributes:
        name: of the source.
        form: its container, and its layout where it has one.
        total: documents.
        broken: what is wrong, by name of the document or file, the first `KEPT`; `skipped` documents were lost to all.
        named: names that something is wrong with.
        text: characters of documents' texts, where there are any.
        sides: of images in pixels, the root of their area.
        shapes: images by width over height.
        parts: kinds of part: texts and images, learned and given.
        lengths: tokens of documents.
        tokens: by kind; empty without a recipe.
        targets: learned text tokens and image targets.
        sizes: how many images the recipe brings to which (height, width).
        too_long: documents beyond the recipe's context length.
    """

    name: str
    form: str
    total: int
    read: int = 0
    skipped: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    named: int = 0
    text: Octaves = field(default_factory=Octaves)
    sides: Octaves = field(default_factory=Octaves)
    shapes: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    lengths: Octaves = field(default_factory=Octaves)
    tokens: Counter[TokenKind] = field(default_factory=Counter)
    targets: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    too_long: int = 0
    drawn: list[Drawn] = field(default_factory=list)


def open_path(path: str) -> Source:
    """A source for a path, told by what is there: a file by its suffix, a folder by the files in it.

    Raises:
        ValueError: nothing that is known.
    """
    folder = Path(path)
    if not folder.is_dir():
        kind = _SUFFIXES.get(folder.suffix)
        if kind is None:
            known = ", ".join(_SUFFIXES)
            raise ValueError(f"PATH: expected a folder, or files {known}, got {path}")
        return kind(path)
    if (folder / PLAN).is_file():
        raise ValueError(
            f"PATH: expected documents with pixels, got token files in {path}; check what they were made of"
        )
    if any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")) or is_image_folder(folder):
        return HuggingFaceSource(path)
    for suffix in (".tar", ".parquet"):
        if any(folder.rglob(f"*{suffix}")):
            return _SUFFIXES[suffix](path)
    if any(folder.glob("*.jsonl")) or not any(folder.rglob("*.json")):
        return FolderSource(folder, "all")
    return JsonlSource(path)


@dataclass
class Recipe:
    """What of recipes the check needs: the model, without weights, and the sources they name."""

    model: UnifiedModel
    sources: dict[str, Source]


def read_recipe(configs: Sequence[Path]) -> Recipe:
    """The model of the last config that has one, on no device, and the sources of the last that names any.

    Raises:
        ValueError: a config is missing or wrong, or there is no model in any.
    """
    model: dict[str, Any] | None = None
    sources: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for path in configs:
        if not path.is_file():
            raise ValueError(f"--config: expected a YAML file, got {path}, which does not exist")
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config: {path} is no YAML ({' '.join(str(error).split())})") from None
        config = config if isinstance(config, dict) else {}
        settings = (config.get("model") or {}).get("init_args") or settings
        model = settings.get("model", model)
        sources = ((config.get("data") or {}).get("init_args") or {}).get("sources") or sources
    if model is None:
        raise ValueError(f"--config: expected model.init_args.model in {', '.join(map(str, configs))}, got none")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(UnifiedModel, "model", required=True)
    parser.add_argument("--sources", type=dict[str, _Named], default={})
    wanted = model if "class_path" in model else {"class_path": "unimodal.model.UnifiedModel", "init_args": model}
    try:
        parsed = parser.parse_object({"model": wanted, "sources": sources})
        with torch.device("meta"):  # only shapes are asked for
            made = parser.instantiate(parsed)
    except ArgumentError as error:
        raise ValueError(f"--config: {one_line(str(error))}") from None
    for key in ("init", "init_from"):
        if settings.get(key) is not None:
            made.model.text = TextTokenizer.load(Path(settings[key]) / "tokenizer.json")
    return Recipe(made.model, {name: entry.source for name, entry in made.sources.items()})


@dataclass(frozen=True)
class _Named:
    source: Source
    weight: float | None = None


def examine(
    name: str, source: Source, model: UnifiedModel | None, sample: int | None, drawn: int, seed: int = 0,
    broken: IO[str] | None = None,
) -> Findings:  # fmt: skip
    """Read a source, all of it or a sample spread over it.

    Args:
        name: for the report.
        source: what is read.
        model: of a recipe, with its text tokenizer; None: nothing is said of tokens.
        sample: most documents that are read; None: all.
        drawn: documents that are kept to be drawn.
        seed: of the recipe's draws.
        broken: where everything that is broken is written, a line a name.

    Raises:
        ValueError: its images are stored as tokens.
    """
    if isinstance(source, Stored):
        raise ValueError(f"{name}: expected documents with pixels, got token files; check what they were made of")
    layout = getattr(source, "layout", None)
    form = type(source).__name__ + ("" if layout is None else f", {type(layout).__name__}")
    found = Findings(name, form, len(source))
    indices = np.arange(len(source)) if sample is None else spread(len(source), sample)
    shown = set(indices[np.arange(drawn) * len(indices) // drawn].tolist())
    due = 0  # a document that is broken is drawn by the one after it
    seen: set[int] = set()  # hashes of names: these are many where everything is broken
    sequencer = None if model is None else model.sequencer
    for index in map(int, tqdm(indices, desc=name, unit="document", leave=False, disable=None)):
        key = (seed, 0, index)
        due += index in shown
        found.read += 1
        try:
            document = source.document(index, np.random.default_rng(key))
        except BrokenDocument as error:
            found.skipped += 1
            if hash(error.name) not in seen:
                seen.add(hash(error.name))
                _note(found, error, broken)
            continue
        _count(found, document)
        sequenced = None
        if sequencer is not None:
            sequenced = sequencer.document(document, key)
            _count_tokens(found, sequenced, sequencer.rules.context_length)
        if due:
            due -= 1
            found.drawn.append(Drawn(f"{name}, document {index}", document, sequenced))
    return found


def _note(found: Findings, error: BrokenDocument, broken: IO[str] | None) -> None:
    found.named += 1
    if len(found.broken) < KEPT:
        found.broken[error.name] = error.reason
    if broken is not None:
        broken.write(f"{error}\n")


def _count(found: Findings, document: Document) -> None:
    if document.text:
        found.text.add(len(document.text))
    for part in document.parts:
        found.parts[f"{'texts' if part.is_text else 'images'} {'learned' if part.learn else 'given'}"] += 1
        if part.is_image:
            width, height = part.image.size
            found.sides.add(round(math.sqrt(width * height)))
            found.shapes[next(name for name, limit in _SHAPES if width / height <= limit)] += 1


def pixels(image: Pixels | StoredImage) -> Pixels:
    """The image: no path that is checked gives stored tokens."""
    assert not isinstance(image, StoredImage)
    return image


def _count_tokens(found: Findings, sequenced: SequencedDocument, context_length: int) -> None:
    for segment in sequenced.segments:
        found.tokens[segment.kind] += segment.length
    found.lengths.add(sequenced.length)
    images = sum(s.block.n_targets for s in sequenced.segments if s.block is not None)
    found.targets += sum(sum(s.targets) for s in sequenced.segments) + images
    found.sizes.update(pixels(image).shape[:2] for image in sequenced.images)
    found.too_long += sequenced.length > context_length


def _octave(bits: int) -> str:
    if bits <= 1:
        return str(bits)
    return f"{_short(2 ** (bits - 1))}-{_short(2**bits - 1)}"


def _short(n: int) -> str:
    return str(n) if n < 10_000 else f"{n / 1000:.0f}k" if n < 10_000_000 else f"{n / 1e6:.0f}M"


def histograms(found: Findings) -> dict[str, list[Bar]]:
    """What is counted of a source, by title; without those that are empty."""
    every = {
        "characters of a document": found.text.bars,
        "pixels of an image's side (root of its area)": found.sides.bars,
        "shapes of images": [Bar(name, found.shapes[name]) for name, _ in _SHAPES] if found.shapes else [],
        "tokens of a document": found.lengths.bars,
    }
    return {title: bars for title, bars in every.items() if bars}


def report(found: Findings, context_length: int | None, most: int = 20) -> str:
    """The findings for a terminal."""
    lines = [f"{found.name}: {found.total} documents ({found.form}), {found.read} read, {found.skipped} broken"]
    lines += [f"  {', '.join(f'{count} {what}' for what, count in sorted(found.parts.items()))}"] if found.parts else []
    if found.tokens:
        total = found.tokens.total()
        shares = ", ".join(f"{k.name.lower()} {found.tokens[k] / total:.1%}" for k in TokenKind if found.tokens[k])
        lines.append(f"  {total} tokens ({shares}), {found.targets} targets")
        lines.append("  " + ", ".join(f"{n} images at {h} x {w}" for (h, w), n in found.sizes.most_common(12)))
        if found.too_long:
            lines.append(
                f"  {found.too_long} documents are longer than sequence.context_length {context_length}: skipped"
            )
    for title, bars in histograms(found).items():
        lines.append(f"  {title}")
        widest, largest = max(len(bar.label) for bar in bars), max(bar.count for bar in bars)
        for bar in bars:
            lines.append(
                f"    {bar.label:>{widest}} {'█' * math.ceil(30 * bar.count / max(largest, 1)):30} {bar.count}"
            )
    lines += [f"  broken: {name}: {reason}" for name, reason in list(found.broken.items())[:most]]
    if found.named > most:
        lines.append(f"  and {found.named - most} more, in broken.txt")
    return "\n".join(line for line in lines if line.strip())
