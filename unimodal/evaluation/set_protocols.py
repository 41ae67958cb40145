"""How published numbers of image sets are made: what each protocol fixes, as data, and the refusal to keep half of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unimodal.evaluation.image_files import check_sizes, image_paths, mapped_images
from unimodal.metrics.moments import FEATURES, IMAGES, POOLED, SPATIAL, load_statistics, npz_keys

ReferenceKind = Literal["folder", "statistics", "images", "features", "adm"]
"""A folder of images; an .npz of mu and sigma, of images, of features, or of statistics and images as ADM ships it."""

METRICS = ("fid", "kid", "precision_recall", "inception_score", "fd_dinov2", "cmmd", "clip_score", "pixels")
"""What can be asked for; `pixels` stands for Frechet and kernel distance, precision and recall of shrunk images."""

NEED_NO_REFERENCE = frozenset({"inception_score", "clip_score"})


@dataclass(frozen=True)
class Protocol:
    """What a published number fixes.

    Attributes:
        name: in options and results.
        samples: how many images; None: any.
        size: their width and height; None: any.
        resize: Inception's; None: any.
        metrics: what it reports.
        reference: what the images are compared with, in words.
        kinds: what may be given as the reference; empty: anything.
        reference_samples: how many images a folder or .npz of reference images holds, or statistics that say it are of;
            None: any.
        categories: folders, of equally many images, in which numbers are also taken apart.
        source: where it is laid down.
    """

    name: str
    samples: int | None = None
    size: tuple[int, int] | None = None
    resize: str | None = None
    metrics: tuple[str, ...] = ("fid",)
    reference: str = "any"
    kinds: tuple[ReferenceKind, ...] = ()
    reference_samples: int | None = None
    categories: tuple[str, ...] = ()
    source: str = ""

    def check_settings(self, metrics: Sequence[str], resize: str) -> None:
        """ValueError where less is measured, or images are resized otherwise, than the protocol says."""
        for name in metrics:
            if name not in METRICS:
                raise ValueError(f"metrics: expected some of {', '.join(METRICS)}, got {name}")
        if self.resize not in (None, resize):
            raise ValueError(f"resize: {self.name} has {self.resize}, got {resize}; protocol custom allows any")
        missing = [name for name in self.metrics if name not in metrics]
        if self.name != "custom" and missing:
            raise ValueError(f"metrics: {self.name} has {', '.join(self.metrics)}, and {', '.join(missing)} is missing")

    def check_images(self, paths: Sequence[Path]) -> None:
        """ValueError where there are more or fewer images, or others, than the protocol says."""
        if self.samples not in (None, len(paths)):
            raise ValueError(f"images: {self.name} has {self.samples}, got {len(paths)}; protocol custom allows any")
        if self.size is not None:
            check_sizes(paths, self.size)

    def check_reference(self, path: Path) -> None:
        """ValueError where the reference is of another kind than the protocol says."""
        kind = reference_kind(path)
        if self.kinds and kind not in self.kinds:
            raise ValueError(f"reference: {self.name} has {self.reference}, got {path} ({WORDS[kind]})")
        if kind == "adm" and self.size is not None:
            expected = (self.reference_samples, self.size[1], self.size[0], 3)
            found = mapped_images(path).shape
            if found != expected:
                raise ValueError(f"reference: {self.name} has images {expected} beside its statistics, got {found}")
        if kind == "statistics" and self.reference_samples is not None:
            count = load_statistics(path).moments.n
            if count not in (None, self.reference_samples):  # files of others do not say
                raise ValueError(
                    f"reference: {self.name} has {self.reference_samples} images, got statistics of {count} ({path})"
                )
        if kind == "folder" and self.reference_samples is not None:
            paths = image_paths(path)
            if len(paths) != self.reference_samples:
                raise ValueError(f"reference: {self.name} has {self.reference_samples} images, got {len(paths)}")
            if self.categories:
                self.check_categories([category_of(one, path) for one in paths], "reference")

    def check_categories(self, found: Sequence[str], what: str) -> None:
        """ValueError where categories are others, or not equally full."""
        counts = Counter(found)
        each = len(found) // max(1, len(self.categories))
        if counts != dict.fromkeys(self.categories, each):
            words = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            raise ValueError(
                f"{what}: {self.name} has {each} images in each of {', '.join(self.categories)}, got {words}"
            )


def reference_kind(path: Path) -> ReferenceKind:
    """What kind of reference a path is; ValueError where it is none."""
    if path.is_dir():
        return "folder"
    keys = npz_keys(path)
    if {*POOLED, *SPATIAL, IMAGES} <= keys:
        return "adm"
    if set(POOLED) <= keys:
        return "statistics"
    if IMAGES in keys:
        return "images"
    if FEATURES in keys:
        return "features"
    raise ValueError(f"reference: expected mu and sigma, arr_0 or feats in {path}, got {', '.join(sorted(keys))}")


WORDS: Mapping[ReferenceKind, str] = {
    "folder": "a folder of images", "statistics": "statistics", "images": "images in an .npz",
    "features": "features in an .npz", "adm": "ADM's file of statistics and images",
}  # fmt: skip


def category_of(path: Path, root: Path) -> str:
    """The folder right below `root` that an image lies in, or an empty word."""
    parts = path.relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("custom", reference="what was given"),
        Protocol(
            "imagenet256-50k", 50_000, (256, 256), "tf1", ("fid", "inception_score", "precision_recall"),
            "ADM's VIRTUAL_imagenet256_labeled.npz: statistics of the training set, and 10,000 of its images",
            ("adm",), 10_000, source="openai/guided-diffusion, evaluations",
        ),
        Protocol(
            "coco30k", 30_000, (256, 256), "crop8", ("fid",),
            "MS-COCO_val2014_fid_stats.npz, or statistics of val2014 made with the same resize",
            ("statistics",), 40_504, source="boomb0om/text2image-benchmark; images drawn at 256x256 as most papers do",
        ),
        Protocol(
            "mjhq30k", 30_000, (1024, 1024), "clean", ("fid",),
            "the images of playgroundai/MJHQ-30K, 3,000 in each of ten folders, or statistics of them",
            ("folder", "statistics"), 30_000,
            ("animals", "art", "fashion", "food", "indoor", "landscape", "logo", "people", "plants", "vehicles"),
            "playgroundai/MJHQ-30K: clean-fid at 1024x1024",
        ),
    )
}  # fmt: skip
"""Protocol by name. `custom` fixes nothing."""
