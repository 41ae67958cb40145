"""FID, KID, precision, recall, Inception score, FD-DINOv2, CMMD and CLIPScore of a set of images.

The numbers are of the set as a whole. A verdict on one image says whether it lies among the real ones (where precision is
asked for), or else that it counts; it comes from the one pass over the images that the numbers take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unimodal.documents import Document, Part
from unimodal.evaluation.benchmark import Answer, Benchmark, Item, Row, Verdict
from unimodal.evaluation.image_files import (
    Loading,
    Prompt,
    image_paths,
    read_prompts,
)
from unimodal.evaluation.set_protocols import NEED_NO_REFERENCE, PROTOCOLS, category_of
from unimodal.evaluation.set_scores import (
    Family,
    SetOptions,
    SetScores,
    score_folder,
    write_statistics,
)
from unimodal.files import file_sha256
from unimodal.metrics.features import ImageFeatures, PixelFeatures
from unimodal.metrics.moments import Moments

if TYPE_CHECKING:
    from unimodal.evaluation.results import Summary

ProtocolName = Literal["custom", "imagenet256-50k", "coco30k", "mjhq30k"]
ResizeName = Literal["tf1", "clean", "pytorch", "crop8"]
NetworkName = Literal["inception", "dinov2", "cmmd", "pixels"]

_KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "inception": {
        "fid": ("frechet",), "kid": ("kernel",), "precision_recall": ("manifold",),
        "inception_score": ("inception_score",),
    },
    "dinov2": {"fd_dinov2": ("frechet",)},
    "cmmd": {"cmmd": ("cmmd",)},
    "clip_score": {"clip_score": ("clip_score",)},
    "pixels": {"pixels": ("frechet", "kernel", "manifold")},
}  # fmt: skip
_OPTIONS = {
    "inception": ("inception_weights", "torch-fidelity"), "dinov2": ("dino_weights", "lvd142m"),
    "cmmd": ("cmmd_weights", "openai"), "clip_score": ("clip_weights", "openai"),
}  # fmt: skip


class ImageSets(Benchmark):
    """Scores of a whole set of images, against a reference.

    Args:
        reference: folder of real images, .npz of statistics (pytorch-fid, clean-fid, ours) or images, or ADM's file.
        prompts: file of prompts or captions, one an image: .txt, .jsonl, .csv, or MJHQ-30K's .json.
        protocol: what must be kept: imagenet256-50k, coco30k, mjhq30k, or custom, which fixes nothing.
        metrics: some of fid, kid, precision_recall, inception_score, fd_dinov2, cmmd, clip_score, pixels.
        resize: Inception's: tf1 (ADM, torch-fidelity), clean (clean-fid), pytorch (pytorch-fid), crop8 (COCO).
        inception_weights: file pt_inception-2015-12-05-6726825d.pth, or torch-fidelity to download its own.
        dino_weights: file dinov2_vitl14_pretrain.pth, or lvd142m to download timm's.
        cmmd_weights: file of CLIP ViT-L/14 at 336 pixels, or openai to download it.
        clip_weights: file of CLIP ViT-L/14 for CLIPScore, or openai to download it.
        pixel_size: side of the shrunk images whose pixels are the features of the metric pixels.
        subset_size: images of a subset of the kernel distance.
        samples: images a prompt.
        allow_few: score fewer images than a metric needs; numbers are then called not comparable.
        feature_batch: images at once in a network.
        workers: processes that read images; none given: one less than there are cores, at most 16.
        device: where networks run: auto, cpu, cuda ...
    """

    name = "images"
    draws = True
    overall = "none"

    def __init__(
        self,
        reference: Path | None = None,
        prompts: Path | None = None,
        protocol: ProtocolName = "custom",
        metrics: list[str] | None = None,
        resize: ResizeName | None = None,
        inception_weights: str | None = None,
        dino_weights: str | None = None,
        cmmd_weights: str | None = None,
        clip_weights: str | None = None,
        pixel_size: int = 8,
        subset_size: int = 1000,
        samples: int = 1,
        allow_few: bool = False,
        feature_batch: int = 64,
        workers: int | None = None,
        device: str = "auto",
    ) -> None:
        self.protocol = PROTOCOLS[protocol]
        self.metrics = tuple(metrics or self.protocol.metrics)
        self.resize = resize or self.protocol.resize or "clean"
        self.protocol.check_settings(self.metrics, self.resize)
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        self.samples, self.reference, self.pixel_size = samples, reference, pixel_size
        self.weights = {
            "inception_weights": inception_weights, "dino_weights": dino_weights, "cmmd_weights": cmmd_weights,
            "clip_weights": clip_weights,
        }  # fmt: skip
        self.options = SetOptions(subset_size=subset_size, allow_few=allow_few)
        self.loading = Loading(feature_batch, workers, device)
        self.prompts: list[Prompt] | None = None if prompts is None else read_prompts(prompts)
        self.prompts_sha256 = None if prompts is None else file_sha256(prompts)
        self.scores: SetScores | None = None
        self._folder: list[Item] | None = None
        self._check_now()

    def _check_now(self) -> None:
        """What can be known before anything is generated or loaded."""
        for network, kinds in _KINDS.items():
            if set(kinds) & set(self.metrics) and network != "pixels":
                checked_weights(network, self.weights[_OPTIONS[network][0]])
        if set(self.metrics) - NEED_NO_REFERENCE:
            if self.reference is None:
                raise ValueError("reference: expected a folder of real images or an .npz, got none")
            self.protocol.check_reference(self.reference)
        given = self.weights["inception_weights"]
        if self.protocol.name != "custom" and given is not None and Path(given).is_file():
            from unimodal.metrics.inception import PUBLISHED_SHA256, is_published

            if not is_published(found := file_sha256(Path(given))):
                raise ValueError(
                    f"inception_weights: {self.protocol.name} has the published file, whose SHA-256 begins with "
                    f"{PUBLISHED_SHA256}, got {given} ({found[:8]}); protocol custom allows any"
                )
        if "clip_score" in self.metrics and self.prompts is None:
            raise ValueError("prompts: expected a file of captions for clip_score, got none")

    # ---- as a benchmark

    def items(self) -> Sequence[Item]:
        """A prompt an item, or a file an item of a folder that was taken."""
        if self._folder is not None:
            return self._folder
        if self.prompts is None:
            raise ValueError("prompts: expected a file of prompts to draw images of, got none")
        return [Item(p.id, p.category, Document((Part(p.text, learn=False),), "text_to_image")) for p in self.prompts]

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Every image counts; which ones lie among the real ones comes with the numbers of the set, see `verdicts`."""
        return [Verdict(1.0) for _ in answers]

    def verdicts(self, rows: Sequence[Row]) -> list[Row]:
        """Rows of the images that `set_measures` was given, with the verdicts that it found where precision is asked for."""
        inside = None if self.scores is None else self.scores.inside
        if inside is None:
            return list(rows)
        return [
            row | {"score": float(one), "reason": "" if one else "no real image is near it"}
            for row, one in zip(rows, inside, strict=True)
        ]

    def set_measures(self, paths: Sequence[Path], root: Path) -> dict[str, float]:
        """The numbers of the set; which image is whose is told by the folders' names, else by the order of files.

        Args:
            paths: the images.
            root: the folder that holds them all.
        """
        prompts = self._prompts_of(paths)
        self.scores = score_folder(
            list(paths),
            self.families,
            self.reference,
            root=root,
            protocol=self.protocol,
            captions=None if prompts is None else [prompt.text for prompt in prompts],
            categories=self._categories_of(paths, prompts),
            options=self.options,
            loading=self.loading,
        )
        return dict(self.scores.measures)

    def spec(self) -> dict[str, Any]:
        """Protocol, reference, prompts, and of each network weights, resize and type of numbers."""
        return {
            "protocol": self.protocol.name,
            "metrics": list(self.metrics),
            "reference": None if self.reference is None else self._reference_record(self.reference),
            "prompts_sha256": self.prompts_sha256,
            "features": [family.features.spec() for family in self.families],
            "settings": dict(vars(self.options)),
            "scored": None if self.scores is None else dict(self.scores.spec),
        }

    def _reference_record(self, path: Path) -> dict[str, Any]:
        return {"folder": path.name} if path.is_dir() else {"file": path.name, "sha256": file_sha256(path)}

    # ---- networks

    @cached_property
    def families(self) -> list[Family]:
        """Networks with what is asked of them; weights are read at the first use."""
        found = []
        for network, kinds in _KINDS.items():
            wanted = tuple(kind for name in self.metrics if name in kinds for kind in kinds[name])
            if wanted:
                weights = None if network == "pixels" else self.weights[_OPTIONS[network][0]]
                found.append(Family(make_features(network, weights, self.resize, self.pixel_size), wanted))
        return found

    # ---- a folder in any layout

    def has_layout(self, images: Path) -> bool:
        """Whether a folder holds answers to the prompts as the harness lays them out: ID/samples/NUMBER.png."""
        known = {prompt.id for prompt in self.prompts or ()}
        return any(path.parts[-3] in known and path.parts[-2] == "samples" for path in images.glob("*/samples/*.png"))

    def take_folder(self, images: Path) -> tuple[list[Row], list[Path]]:
        """Take every image below a folder as an answer, whatever the layout; `items()` are then its files.

        Returns:
            A row for results.jsonl an image, and the files.
        """
        paths = image_paths(images)
        names = [path.relative_to(images).as_posix() for path in paths]
        tasks = [category_of(path, images) if self.protocol.categories else "images" for path in paths]
        self._folder = [Item(name, task or "images", Document(())) for name, task in zip(names, tasks, strict=True)]
        rows: list[Row] = [
            {
                "id": item.id, "sample": 0, "task": item.task, "score": 1.0, "reason": "", "asked": "", "files": [item.id],
            }
            for item in self._folder
        ]  # fmt: skip
        return rows, paths

    def _prompts_of(self, paths: Sequence[Path]) -> list[Prompt] | None:
        if self.prompts is None:
            return None
        by_id = {prompt.id: prompt for prompt in self.prompts}
        owners = [path.parent.parent.name for path in paths]
        if all(owner in by_id for owner in owners):
            return [by_id[owner] for owner in owners]
        if len(paths) != len(self.prompts):
            raise ValueError(f"prompts: expected one for each of {len(paths)} images, got {len(self.prompts)}")
        return self.prompts

    def _categories_of(self, paths: Sequence[Path], prompts: Sequence[Prompt] | None) -> list[str] | None:
        if not self.protocol.categories:
            return None
        if self._folder is not None and any(item.task != "images" for item in self._folder):
            return [item.task for item in self._folder]
        return None if prompts is None else [prompt.category for prompt in prompts]


def evaluate_folder(benchmark: ImageSets, images: Path, out: Path) -> Summary:
    """Score any folder of images, in whatever layout, and write the results: all that lies there is one image a prompt.

    Args:
        benchmark: what is measured.
        images: the folder.
        out: folder of the results.

    Raises:
        ValueError: more than one image a prompt is asked for, or more or fewer images than prompts.
    """
    from unimodal.evaluation.harness import report

    if benchmark.samples != 1:
        raise ValueError(
            f"samples: expected 1 for a folder whose images are told by their order alone, got {benchmark.samples}; several "
            "images a prompt lie in ID/samples/NUMBER.png, ID from --prompts"
        )
    rows, paths = benchmark.take_folder(images)
    measures = benchmark.set_measures(paths, images)
    return report(
        benchmark, benchmark.verdicts(rows), out, images, {"model": None, "sampling": None, "seed": None}, measures
    )


def make_features(network: str, weights: str | None, resize: str = "clean", pixel_size: int = 8) -> ImageFeatures:
    """A network by its name in options; only the one that is asked for is imported.

    Raises:
        ValueError: no weights given, or a file that is missing or does not fit.
    """
    if network == "pixels":
        return PixelFeatures(pixel_size)
    source = checked_weights(network, weights)

    def inception() -> ImageFeatures:
        from unimodal.metrics.inception import RESIZES, InceptionFeatures

        return InceptionFeatures(source, RESIZES[resize]())

    def dino() -> ImageFeatures:
        from unimodal.metrics.dino import DinoFeatures

        return DinoFeatures(source)

    def cmmd() -> ImageFeatures:
        from unimodal.metrics.clip import CMMD_MODEL, ClipFeatures, SquareFirst

        return ClipFeatures(CMMD_MODEL, source, SquareFirst)

    def clip() -> ImageFeatures:
        from unimodal.metrics.clip import ClipFeatures

        return ClipFeatures(weights=source)

    makers: dict[str, Callable[[], ImageFeatures]] = {
        "inception": inception, "dinov2": dino, "cmmd": cmmd, "clip_score": clip
    }  # fmt: skip
    return makers[network]()


def checked_weights(network: str, weights: str | None) -> str:
    """A name that is downloaded, or a file that is there; ValueError naming the option otherwise."""
    option, hub = _OPTIONS[network]
    if weights is None or (weights != hub and not Path(weights).is_file()):
        found = "none" if weights is None else f"{weights}, which is missing"
        raise ValueError(f"{option}: expected a file of weights, or {hub} to download them, got {found}")
    return weights


def save_statistics(
    images: Path,
    out: Path,
    network: NetworkName = "inception",
    weights: str | None = None,
    resize: ResizeName = "clean",
    pixel_size: int = 8,
    keep_features: bool = False,
    feature_batch: int = 64,
    workers: int | None = None,
    device: str = "auto",
) -> Moments:
    """Make reference statistics of a folder of images: `unimodal evaluate statistics`.

    Args:
        images: folder of images, read with everything below it, or an .npz of images as ADM writes them.
        out: the .npz that is written.
        network: inception, dinov2, cmmd (CLIP at 336 pixels) or pixels.
        weights: file of the network's weights, or its name on a hub: torch-fidelity, lvd142m, openai.
        resize: Inception's: tf1, clean, pytorch, crop8.
        pixel_size: side of the shrunk images, for pixels.
        keep_features: keep every feature as well, for KID, precision, recall and CMMD.
        feature_batch: images at once.
        workers: processes that read images; none given: one less than there are cores, at most 16.
        device: where the network runs: auto, cpu, cuda ...

    Returns:
        The moments that were written.
    """
    loading = Loading(feature_batch, workers, device)
    features = make_features(network, weights, resize, pixel_size)
    return write_statistics(images, features, out, keep_features=keep_features, loading=loading)
