"""`unimodal tokenize`: the documents of a data module with their images as tokens, written shard by shard.

A shard is written whole or not at all, and its documents are fixed by its number: whoever is killed leaves whole shards, and
the same command makes those that are missing. Documents of several sources with the same indices share a shard, and images
that they share (one to be drawn, one to be described) are encoded once.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser
from tqdm import tqdm

from unimodal.data.source import BrokenDocument, Source, identity
from unimodal.data.token_files import (
    CORPUS,
    INDEX,
    PLAN,
    PROMPTS,
    SPLITS,
    Plan,
    Shard,
    ShardWriter,
    SourceRecord,
    Split,
    read_json,
    shard_name,
)
from unimodal.documents import write_jsonl
from unimodal.environment import usable_device
from unimodal.export import load_tokenizer, one_line, read_info
from unimodal.files import read_yaml, write_atomically
from unimodal.images import fit_image
from unimodal.packing import to_tensor
from unimodal.stored import tokenizer_fingerprint
from unimodal_tokenizers.base import ImageTokenizer

if TYPE_CHECKING:
    from unimodal.data.module import DocumentData

KEPT_PROMPTS = 20
"""Held-out documents of each source that are kept with their pixels, for samples during training."""


@dataclass(frozen=True)
class Job:
    """What each process needs to write shards.

    Attributes:
        tokenizer: run folder, or an export.
        weights: averaged ("ema"), or of the last step ("raw").
        out: folder of the token files.
        plan: what they hold.
        batch: images encoded at once.
        device: cpu, cuda, cuda:1 ...
    """

    tokenizer: Path
    weights: str
    out: Path
    plan: Plan
    batch: int
    device: str


def tokenize(
    tokenizer: Path,
    data: Path,
    out: Path,
    image_sizes: Sequence[tuple[int, int]],
    *,
    weights: str = "ema",
    seed: int = 0,
    per_shard: int = 4096,
    batch: int = 64,
    workers: int = 1,
    device: str = "auto",
    most_broken: float = 0.01,
) -> dict[str, Any]:
    """Write token files, or what is missing of them; returns their index.

    Args:
        tokenizer: run folder, or an export, of the tokenizer.
        data: a YAML file with a `data` block, or a folder that `FolderData` reads.
        out: folder of the token files.
        image_sizes: (height, width) that images are fitted to: the recipe's `sequence.image_sizes`.
        weights: of the tokenizer, averaged ("ema") or of the last step ("raw").
        seed: of the documents' draws, where a source has any.
        per_shard: documents of each source in a shard.
        batch: images encoded at once.
        workers: processes; one works in this one.
        device: cpu, cuda, cuda:1 ..., or auto.
        most_broken: share of the documents that may be unreadable; they are left out, counted and named.

    Raises:
        ValueError: an argument is wrong, `out` holds something else, too much cannot be read.
    """
    for name, value in (("--per-shard", per_shard), ("--batch", batch), ("--workers", workers)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 <= most_broken < 1:
        raise ValueError(f"--most-broken: expected a share from 0 to below 1, got {most_broken}")
    device = str(usable_device(device))
    config = data_config(data)
    module = build_data(config)
    plan = make_plan(tokenizer, weights, module, config, image_sizes, seed, per_shard)
    settle(out, plan)
    job = Job(tokenizer, weights, out, plan, batch, device)
    missing = [shard for shard in plan.shards() if not (out / shard_name(*shard)).is_file()]
    broken = Broken(plan, most_broken)
    for shard in plan.shards():
        if shard not in missing:
            broken.add(Shard(out / shard_name(*shard), plan.layout))
    with tqdm(total=len(plan.shards()), initial=len(plan.shards()) - len(missing), unit="shard", disable=None) as bar:
        for shard in _written(job, missing, min(workers, max(len(missing), 1))):
            broken.add(Shard(out / shard_name(*shard), plan.layout))
            bar.update()
    return finish(out, plan, module)


def data_config(data: Path) -> dict[str, Any]:
    """class_path and init_args of a data module: of a YAML file, or of a folder."""
    if data.is_dir():
        return {
            "class_path": "unimodal.data.FolderData", "init_args": {"root": str(data.resolve()), "batch_tokens": 1}
        }  # fmt: skip
    if not data.is_file():
        raise ValueError(f"--data: expected a folder or a YAML file, got {data}, which does not exist")
    record = read_yaml(data, "--data")
    config = record.get("data") if isinstance(record, dict) else None
    if not isinstance(config, dict) or "class_path" not in config:
        raise ValueError(f"--data: expected a data block with a class_path in {data}, got none")
    return config


def build_data(config: Mapping[str, Any]) -> DocumentData:
    """The data module of a config; ValueError in one line where it does not fit."""
    from unimodal.data.module import DocumentData

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DocumentData, "data", required=True)
    try:
        return parser.instantiate(parser.parse_object({"data": deepcopy(dict(config))})).data
    except ArgumentError as error:
        raise ValueError(f"--data: {one_line(str(error))}") from error


def split_sources(module: DocumentData, split: Split) -> list[tuple[Source, float | None]]:
    """Sources of a split that are read at all, with their weights."""
    if split == "val":
        return [(source, 1.0) for source in module.validation_sources()]
    return [(one.source, one.weight) for one in module.training_sources() if one.used]


def make_plan(
    tokenizer: Path, weights: str, module: DocumentData, config: Mapping[str, Any],
    image_sizes: Sequence[tuple[int, int]], seed: int, per_shard: int,
) -> Plan:  # fmt: skip
    """What is to be written."""
    loaded = load_tokenizer(tokenizer, weights)
    if not image_sizes:
        raise ValueError("--size: expected at least one WIDTHxHEIGHT, got none")
    for height, width in image_sizes:
        loaded.layout.grid(height, width)  # refuses what the stride does not divide
    info = read_info(tokenizer if (tokenizer / "export.json").is_file() else tokenizer / "export")
    sources: dict[str, list[SourceRecord]] = {
        str(split): [
            SourceRecord(source.kind, weight, len(source), identity(source))
            for source, weight in split_sources(module, split)
        ]
        for split in SPLITS
    }
    made = {"fingerprint": tokenizer_fingerprint(loaded), "class": type(loaded).__name__, "recipe": info.recipe}
    return Plan(made, loaded.layout, [list(size) for size in image_sizes], dict(config), seed, per_shard, sources)


def settle(out: Path, plan: Plan) -> None:
    """Write the plan, or check that `out` follows it already.

    Raises:
        ValueError: other files are there, or token files of another tokenizer or of other data.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {out}")
    if not (out / PLAN).is_file():
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"--out: {out} holds other files; take a new folder")
        write_atomically(out / PLAN, (json.dumps(plan.to_json(), indent=2) + "\n").encode())
        return
    held, asked = Plan.of_json(read_json(out / PLAN)).to_json(), plan.to_json()
    if held["tokenizer"] != asked["tokenizer"]:
        old, new = (f"{one['recipe']} {one['fingerprint'][:12]}" for one in (held["tokenizer"], asked["tokenizer"]))
        raise ValueError(
            f"--tokenizer: {out} holds tokens of another tokenizer ({old}), got {new}; take another folder"
        )
    for key in asked:
        if held[key] != asked[key]:
            raise ValueError(
                f"--out: {out} holds tokens made with {key} {held[key]}, got {asked[key]}; take another folder"
            )


class Broken:
    """Documents that could not be read, while shards come in.

    Args:
        plan: how many there are.
        most: share that may be broken.
    """

    def __init__(self, plan: Plan, most: float) -> None:
        self.documents = sum(source.documents for split in SPLITS for source in plan.sources[split])
        self.share, self.most, self.count = most, math.floor(most * self.documents), 0

    def add(self, shard: Shard) -> None:
        """ValueError, naming one, when there are too many."""
        self.count += len(shard.broken)
        if self.count > self.most:
            raise ValueError(
                f"--data: expected at most {self.most} of {self.documents} documents to be unreadable (--most-broken "
                f"{self.share}), got {self.count}: {shard.broken[-1]}"
            )


def finish(out: Path, plan: Plan, module: DocumentData) -> dict[str, Any]:
    """Write texts, prompts and, last, the index, which it returns."""
    with _whole(out / CORPUS) as temporary, temporary.open("w", encoding="utf-8") as file:
        for text in module.corpus():
            file.write(json.dumps(text, ensure_ascii=False) + "\n")
    module.prompt_count, module.seed = KEPT_PROMPTS, plan.seed
    write_jsonl(out / PROMPTS, [prompt for prompt in module.prompts() if prompt.parts])  # not what is all to be written
    index: dict[str, Any] = {"counts": {}, "documents": 0, "images": 0, "tokens": 0, "broken": []}
    for name in (shard_name(*shard) for shard in plan.shards()):
        shard = Shard(out / name, plan.layout)
        index["counts"][name] = shard.counts
        index["documents"] += sum(shard.counts)
        index["images"] += shard.images
        index["tokens"] += shard.tokens
        index["broken"] += shard.broken
    write_atomically(out / INDEX, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
    for left in out.glob(".*.tmp"):  # of processes that were killed while they wrote
        left.unlink(missing_ok=True)
    return index


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file that is written beside `path` and takes its name at the end."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    temporary.replace(path)


# ---- shards


def _written(job: Job, missing: Sequence[tuple[Split, int]], workers: int) -> Iterator[tuple[Split, int]]:
    """Shards as they are done, in this process or in several."""
    if workers == 1:
        writer = Writer(job)
        for shard in missing:
            writer.write(*shard)
            yield shard
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(job,)) as pool:
        futures = {pool.submit(_write, *shard): shard for shard in missing}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(cancel_futures=True)


_WRITER: list[Writer] = []  # of a process of the pool


def _begin(job: Job) -> None:
    torch.set_num_threads(1)
    _WRITER[:] = [Writer(job)]


def _write(split: Split, k: int) -> None:
    _WRITER[0].write(split, k)


class Writer:
    """Writes shards.

    Args:
        job: of all of them.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.plan = job, job.plan
        self.tokenizer = load_tokenizer(job.tokenizer, job.weights).to(job.device)
        module = build_data(job.plan.data)
        self.sources = {split: [source for source, _ in split_sources(module, split)] for split in SPLITS}

    def write(self, split: Split, k: int) -> None:
        """Shard k: read, encode, write."""
        shard = ShardWriter(self.plan.layout)
        encoder = Encoder(self.tokenizer, shard, self.job.batch)
        sizes = [(height, width) for height, width in self.plan.image_sizes]
        for s, source in enumerate(self.sources[split]):
            shard.begin_source()
            for index in self.plan.indices(split, s, k):
                try:
                    document = source.document(index, np.random.default_rng((self.plan.seed, s, index)))
                    images = [fit_image(image, sizes) for image in document.images]
                    encoder.check(images)
                except BrokenDocument as error:
                    shard.broken.append(f"{source.kind} {index}: {error}")
                    continue
                shard.add_document(document, [encoder.add(image) for image in images])
        encoder.flush()
        shard.write(self.job.out / shard_name(split, k))


class Encoder:
    """Encodes images into a shard, many at a time, equal ones once.

    Args:
        tokenizer: that encodes.
        shard: that the tokens are added to.
        batch: images at once.
    """

    def __init__(self, tokenizer: ImageTokenizer, shard: ShardWriter, batch: int) -> None:
        self.tokenizer, self.shard, self.batch = tokenizer, shard, batch
        self._numbers: dict[bytes, int] = {}
        self._waiting: list[np.ndarray] = []

    def check(self, images: Sequence[np.ndarray]) -> None:
        """BrokenDocument if one of them has no tokens."""
        for pixels in images:
            try:
                self.tokenizer.check_image(to_tensor([pixels])[0])
            except ValueError as error:
                raise BrokenDocument("its image", str(error)) from error

    def add(self, pixels: np.ndarray) -> int:
        """The number of an image in the shard."""
        key = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._waiting.append(pixels)
            if len(self._waiting) == self.batch:
                self.flush()
        return self._numbers[key]

    def flush(self) -> None:
        """Encode what waits."""
        if not self._waiting:
            return
        device = next(
            (t.device for t in [*self.tokenizer.parameters(), *self.tokenizer.buffers()]), torch.device("cpu")
        )
        with torch.no_grad():
            tokens = self.tokenizer.encode_each([to_tensor([pixels])[0].to(device) for pixels in self._waiting])
        for pixels, one in zip(self._waiting, tokens.split(), strict=True):
            self.shard.add_image(one, (pixels.shape[0], pixels.shape[1]))
        self._waiting = []
