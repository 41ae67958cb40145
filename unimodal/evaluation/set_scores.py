"""Scores of a set of images against a reference: one pass over the images a network, features never all at once for FID.

Letters: D the width of the features, N images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics import Metric

from unimodal.evaluation.image_files import (
    ImageFiles,
    Loading,
    NpzImages,
    feature_batches,
    image_paths,
    listing_sha256,
)
from unimodal.evaluation.set_protocols import PROTOCOLS, Protocol, category_of, reference_kind
from unimodal.files import file_sha256
from unimodal.metrics import image_sets
from unimodal.metrics.distances import frechet_distance
from unimodal.metrics.features import ImageFeatures, LogitFeatures, TextImageFeatures
from unimodal.metrics.moments import (
    Moments,
    StreamingMoments,
    load_features,
    load_statistics,
    save_statistics,
)

KINDS = ("frechet", "kernel", "manifold", "inception_score", "cmmd", "clip_score")
_STORED = frozenset({"kernel", "manifold", "cmmd"})
_COMPARED = frozenset({"frechet", *_STORED})

LOADING = Loading()
"""The usual way."""

NOT_COMPARABLE = "_not_comparable"
"""Ends the name of a number that too few images were enough for."""


@dataclass(frozen=True)
class Family:
    """A network, and what is computed of its features.

    Attributes:
        features: the network.
        kinds: some of `KINDS`.
    """

    features: ImageFeatures
    kinds: tuple[str, ...]

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {kind}")
        if "inception_score" in self.kinds and not isinstance(self.features, LogitFeatures):
            raise ValueError(f"inception_score: expected Inception, got {self.features.name}")
        if "clip_score" in self.kinds and not isinstance(self.features, TextImageFeatures):
            raise ValueError(f"clip_score: expected CLIP, got {self.features.name}")


@dataclass(frozen=True)
class SetOptions:
    """What numbers depend on besides images, networks and reference.

    Attributes:
        subsets: of the kernel distance.
        subset_size: images of each.
        splits: of the Inception score.
        k: neighbour of precision and recall.
        k_coverage: neighbour of density and coverage.
        allow_few: whether fewer images than features will do; numbers are then called not comparable.
    """

    subsets: int = 100
    subset_size: int = 1000
    splits: int = 10
    k: int = 3
    k_coverage: int = 5
    allow_few: bool = False


@dataclass(frozen=True)
class Reference:
    """The real set as one network sees it.

    Attributes:
        record: what it was, for the fingerprint.
        moments: of all of it.
        features: (N, D), where they are needed.
        categories: moments of each category, where the reference is a folder of them.
    """

    record: Mapping[str, Any]
    moments: Moments | None = None
    features: Tensor | None = None
    categories: Mapping[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True)
class SetScores:
    """Numbers of a set of images.

    Attributes:
        measures: name -> number. The name says what it is: `fid` is Inception's alone.
        samples: how many images.
        label: "complete", or why the numbers compare with no others.
        spec: what they depend on.
        inside: (N,) bool, which images lie among the real ones, where precision was asked for.
    """

    measures: Mapping[str, float]
    samples: int
    label: str
    spec: Mapping[str, Any]
    inside: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        """As a record."""
        return {
            "measures": dict(self.measures), "samples": self.samples, "label": self.label, "spec": dict(self.spec)
        }  # fmt: skip


def score_folder(
    images: Path | Sequence[Path],
    families: Sequence[Family],
    reference: Path | None = None,
    *,
    root: Path | None = None,
    protocol: Protocol = PROTOCOLS["custom"],
    captions: Sequence[str] | None = None,
    categories: Sequence[str] | None = None,
    options: SetOptions = SetOptions(),
    loading: Loading = LOADING,
) -> SetScores:
    """Score a folder of images, or a list of files, in constant memory (N x D more where a measure needs all features).

    Args:
        images: a folder, read with everything below it, or the files.
        families: networks and what is computed of each; none of them is loaded here.
        reference: a folder of images, an .npz of statistics, images or features, or ADM's file.
        root: the folder that files are named from in the fingerprint; None: `images`, or the one that holds all files.
        protocol: what must be kept.
        captions: the text of each image, for CLIPScore.
        categories: the category of each image; None: the folders right below `images`, where the protocol has categories.
        options: settings of the measures.
        loading: how images are read.

    Raises:
        ValueError: a protocol that is not kept, too few images, a reference of another kind or made with other features,
            an image that cannot be read.
    """
    paths = image_paths(images) if isinstance(images, Path) else list(images)
    if not paths:
        raise ValueError("images: expected at least one, got none")
    if root is None:
        root = (
            images if isinstance(images, Path) else Path(os.path.commonpath([path.absolute().parent for path in paths]))
        )
    protocol.check_images(paths)
    if any(_COMPARED & set(family.kinds) for family in families):
        if reference is None:
            raise ValueError("reference: expected a folder or an .npz, got none, and distances need one")
        protocol.check_reference(reference)
    if captions is not None and len(captions) != len(paths):
        raise ValueError(f"prompts: expected one for each of {len(paths)} images, got {len(captions)}")
    if categories is None and protocol.categories and isinstance(images, Path):
        found = [category_of(path, images) for path in paths]
        categories = found if any(found) else None
    if categories is not None and protocol.categories:
        protocol.check_categories(categories, "images")
    measures: dict[str, float] = {}
    records, inside = [], None
    for family in families:
        check_count(family, len(paths), options)
        read = read_reference(reference, family, protocol, loading) if _COMPARED & set(family.kinds) else None
        found_measures, among = _score(
            paths, family, read, captions, categories if protocol.categories else None, options, loading
        )
        inside = among if inside is None else inside
        _put(measures, found_measures, family, len(paths), read, options.subset_size)
        records.append(
            {**family.features.spec(), "measures": list(found_measures), "reference": read and dict(read.record)}
        )
    label = few_label(families, len(paths)) or "complete"
    spec = {
        "protocol": protocol.name, "images": len(paths), "images_sha256": listing_sha256(paths, root), "label": label,
        "features": records, "settings": {k: v for k, v in vars(options).items() if k != "allow_few"},
    }  # fmt: skip
    return SetScores(measures, len(paths), label, spec, inside)


def check_count(family: Family, count: int, options: SetOptions) -> None:
    """ValueError for fewer images than the family's measures need, before any work."""
    needed = {"frechet": family.features.width, "kernel": options.subset_size}
    for kind in family.kinds:
        if count < needed.get(kind, 0) and not options.allow_few:
            raise ValueError(
                f"images: expected at least {needed[kind]} for {family.features.measure(kind)}, got {count}; fewer make "
                "a number that compares with no other (--allow-few)"
            )


def few_label(families: Sequence[Family], count: int) -> str:
    """Why numbers of so few images compare with no others; empty where they do."""
    widths = [family.features.width for family in families if "frechet" in family.kinds]
    few = [width for width in widths if count < width]
    return f"not comparable: {count} images for {max(few)} features" if few else ""


def read_reference(path: Path | None, family: Family, protocol: Protocol, loading: Loading) -> Reference:
    """What a reference is to one network: read where it was computed before, else computed."""
    assert path is not None
    kind, features = reference_kind(path), family.features
    stored = bool(_STORED & set(family.kinds))
    if kind == "folder":
        paths = image_paths(path)
        record = {"folder": path.name, "images": len(paths), "listing_sha256": listing_sha256(paths, path)}
        grouped = [category_of(one, path) for one in paths] if protocol.categories else None
        return _computed(ImageFiles(paths, features.preparation), record, features, stored, grouped, loading)
    record = {"file": path.name, "sha256": file_sha256(path)}
    if kind == "images":
        images = NpzImages(path, features.preparation)
        return _computed(images, record | {"images": len(images)}, features, stored, None, loading)
    moments, kept = None, None
    if kind in ("statistics", "adm"):
        statistics = load_statistics(path)
        _check_made_alike(path, statistics.provenance, features)
        moments = statistics.moments
        record |= {"images": moments.n}
        kept = None if statistics.features is None else torch.from_numpy(statistics.features)
    if kind == "adm" and stored:
        images = NpzImages(path, features.preparation)
        kept = _computed(images, record, features, True, None, loading).features
        record |= {"images_of_neighbours": len(images)}
    if kind == "features":
        kept = torch.from_numpy(load_features(path))
        moments = Moments.of(kept)
    for found in (None if moments is None else moments.width, None if kept is None else kept.shape[1]):
        if found not in (None, features.width):
            raise ValueError(f"reference: {features.name} has {features.width} features, {path} has {found}")
    if stored and kept is None:
        wanted = ", ".join(features.measure(one) for one in family.kinds if one in _STORED)
        raise ValueError(
            f"reference: {wanted} compares features one by one, and {path} holds statistics alone: give a folder, or "
            "statistics made with --keep-features"
        )
    return Reference(record, moments, kept)


def _check_made_alike(path: Path, provenance: Mapping[str, Any], features: ImageFeatures) -> None:
    """Our own files say how they were made; others' do not."""
    made, now = provenance.get("features"), features.spec()
    if made is None:
        return
    for key in sorted(now.keys() | made.keys()):
        if made.get(key) != now.get(key):
            raise ValueError(f"reference: {path} was made with {key} {made.get(key)}, got {now.get(key)}")


def _computed(
    images: Dataset, record: Mapping[str, Any], features: ImageFeatures, stored: bool, groups: Sequence[str] | None,
    loading: Loading,
) -> Reference:  # fmt: skip
    total = StreamingMoments(features.width, loading.place)
    parts = {name: StreamingMoments(features.width, loading.place) for name in dict.fromkeys(groups or ())}
    kept: list[Tensor] = []
    for start, batch in _counted(feature_batches(images, features, loading, "reference")):
        total.update(batch)
        _by_group(parts, groups, start, batch)
        if stored:
            kept.append(batch.cpu())
    categories = {name: part.moments() for name, part in parts.items()}
    return Reference(record, total.moments(), torch.cat(kept) if stored else None, categories)


def _score(
    paths: Sequence[Path], family: Family, reference: Reference | None, captions: Sequence[str] | None,
    groups: Sequence[str] | None, options: SetOptions, loading: Loading,
) -> tuple[dict[str, float], np.ndarray | None]:  # fmt: skip
    """One pass over the images; also which of them lie among the real ones, where precision is asked for."""
    features = family.features
    metrics = {kind: _metric(kind, features, reference, len(paths), options) for kind in family.kinds}
    if "clip_score" in metrics and captions is None:
        raise ValueError("prompts: expected a file of captions for clip_score, got none")
    groups = groups if reference is not None and reference.categories else None
    parts = {name: StreamingMoments(features.width, loading.place) for name in dict.fromkeys(groups or ())}
    for metric in metrics.values():
        metric.to(loading.place)
    images = ImageFiles(paths, features.preparation)
    for start, batch in _counted(feature_batches(images, features, loading, features.name)):
        _by_group(parts, groups, start, batch)
        for kind, metric in metrics.items():
            if kind == "clip_score":
                assert captions is not None
                assert isinstance(features, TextImageFeatures)
                with torch.no_grad():
                    metric.update(batch, features.texts(captions[start : start + len(batch)]))
            elif kind == "inception_score":
                assert isinstance(features, LogitFeatures)
                metric.update(features.logits(batch))
            else:
                metric.update(batch, real=False)
    found: dict[str, float] = {}
    inside = None
    for kind, metric in metrics.items():
        if isinstance(metric, image_sets.PrecisionRecall):
            scores = metric.scores()
            found, inside = found | scores.by_name(), scores.inside
        else:
            found[kind] = float(metric.compute())
    if reference is not None and "frechet" in metrics:
        for name, part in parts.items():
            moments, real = part.moments(), reference.categories[name]
            for count in (moments.n, real.n):
                _check_count(f"{name}: images", count, features.width, features.measure("frechet"), options)
            found[f"frechet/{name}"] = frechet_distance(real, moments)
    return found, inside


def _metric(kind: str, features: ImageFeatures, reference: Reference | None, count: int, options: SetOptions) -> Metric:
    if kind == "clip_score":
        return image_sets.ClipScore()
    if kind == "inception_score":
        return image_sets.InceptionScore(options.splits)
    assert reference is not None
    if kind == "frechet":
        if reference.moments is None:
            raise ValueError(f"reference: expected statistics or images for {features.measure(kind)}")
        _check_count("reference", reference.moments.n, features.width, features.measure(kind), options)
        return image_sets.FrechetDistance(features.width, reference.moments, allow_few=options.allow_few)
    known = reference.features
    assert known is not None
    if kind == "kernel":
        _check_count("reference", len(known), options.subset_size, features.measure(kind), options)
        size = min(options.subset_size, count, len(known)) if options.allow_few else options.subset_size
        return image_sets.KernelDistance(options.subsets, size, reference=known)
    if kind == "manifold":
        return image_sets.PrecisionRecall(options.k, options.k_coverage, reference=known)
    return image_sets.ClipDistance(reference=known)


def _check_count(what: str, count: int | None, needed: int, name: str, options: SetOptions) -> None:
    if count is not None and count < needed and not options.allow_few:
        raise ValueError(f"{what}: expected at least {needed} images for {name}, got {count} (--allow-few)")


def _put(
    measures: dict[str, float], found: Mapping[str, float], family: Family, count: int, reference: Reference | None,
    subset_size: int,
) -> None:  # fmt: skip
    """Under the names that say what the numbers are."""
    features = family.features
    sizes = [count, *([reference.moments.n] if reference and reference.moments and reference.moments.n else [])]
    few = {"frechet": min(sizes) < features.width, "kernel": min(sizes) < subset_size}
    for name, value in found.items():
        kind, slash, category = name.partition("/")
        ending = NOT_COMPARABLE if few.get(kind) else ""
        measures[f"{features.measure(kind)}{ending}{slash}{category}"] = value


def _counted(batches: Iterator[Tensor]) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for batch in batches:
        yield start, batch
        start += len(batch)


def _by_group(parts: Mapping[str, StreamingMoments], groups: Sequence[str] | None, start: int, batch: Tensor) -> None:
    if not groups:
        return
    names = np.array(groups[start : start + len(batch)])
    for name in dict.fromkeys(names.tolist()):
        parts[name].update(batch[torch.from_numpy(names == name).to(batch.device)])


def write_statistics(
    images: Path,
    features: ImageFeatures,
    out: Path,
    *,
    keep_features: bool = False,
    loading: Loading = LOADING,
) -> Moments:
    """Make reference statistics of a folder (or an .npz) of images.

    Args:
        images: a folder, read with everything below it, or an .npz with `arr_0`.
        features: the network.
        out: an .npz.
        keep_features: whether all features are kept beside the statistics, for KID, precision and recall.
        loading: how images are read.

    Returns:
        The moments that were written.
    """
    if out.suffix != ".npz" or out.is_dir():
        raise ValueError(f"out: expected a name ending in .npz, got {out}{', a folder' if out.is_dir() else ''}")
    if not images.exists():
        raise ValueError(f"images: expected a folder or an .npz, got {images}, which is missing")
    source: ImageFiles | NpzImages
    if images.is_dir():
        paths = image_paths(images)
        source, record = ImageFiles(paths, features.preparation), {"listing_sha256": listing_sha256(paths, images)}
    else:
        source, record = NpzImages(images, features.preparation), {"sha256": file_sha256(images)}
    found = _computed(source, {}, features, keep_features, None, loading)
    assert found.moments is not None
    provenance = {"images": len(source), "source": images.name, **record, "features": features.spec()}
    kept = None if found.features is None else found.features.numpy()
    save_statistics(out, found.moments, provenance, kept)
    return found.moments
