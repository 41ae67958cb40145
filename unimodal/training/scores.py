"""Benchmarks and metrics of image sets in validation, with the averaged weights, every rank its share."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from unimodal.data.source import BrokenDocument, Stored, whole
from unimodal.decoding import decode
from unimodal.decoding_settings import DecodingSettings
from unimodal.documents import Document
from unimodal.evaluation.benchmark import Answer, Benchmark
from unimodal.evaluation.harness import answer_seed
from unimodal.images import fit_image
from unimodal.metrics.image_sets import SetMetric
from unimodal.metrics.scores import TaskScores
from unimodal.shards import is_sharded, together

if TYPE_CHECKING:
    from unimodal.data.module import DocumentData
    from unimodal.model import UnifiedModel

BATCH = 64
"""Answers at once; changes no score."""


class ValidationScores(Callback):
    """Logs `val/NAME/TASK` and `val/NAME/overall` of benchmarks, and `val/CLASS/FEATURES` of metrics of image sets.

    Args:
        benchmarks: each is asked in full, so give them few items.
        image_metrics: of images drawn for held-out captions, against the images or the texts of these captions.

    Raises:
        ValueError: a benchmark of sets, a metric that takes no images, or two that would be logged under one name.
    """

    def __init__(self, benchmarks: Sequence[Benchmark], image_metrics: Sequence[Metric] = ()) -> None:
        super().__init__()
        self.image_metrics = list(image_metrics)
        self.benchmarks = list(benchmarks)
        for benchmark in self.benchmarks:
            if benchmark.overall == "none":
                raise ValueError(
                    f"model.benchmarks: {benchmark.name} scores sets alone; give model.image_metrics instead"
                )
        for metric in self.image_metrics:
            if not {"real", "texts"} & _taken(metric):
                raise ValueError(
                    "model.image_metrics: expected metrics of images beside real ones or texts "
                    f"(unimodal.metrics.image_sets), got {type(metric).__name__}"
                )
        named = {
            "benchmarks": [b.name for b in self.benchmarks],
            "image_metrics": list(map(logged_name, self.image_metrics)),
        }
        for key, names in named.items():
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"model.{key}: expected each name once, got {twice[0]} twice: one log would mix both")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average's weights are in; results are logged on every rank alike."""
        if trainer.fast_dev_run or trainer.sanity_checking:  # type: ignore[attr-defined]
            return
        stage = "test" if trainer.testing else "val"
        model: UnifiedModel = pl_module.model  # type: ignore[assignment]
        # Layers that are gathered as they run want all ranks to do the same: then each has all answers.
        sharded = is_sharded(model)
        rank, ranks = (0, 1) if sharded else (trainer.global_rank, trainer.world_size)
        for benchmark in self.benchmarks:
            tasks = list(dict.fromkeys(item.task for item in benchmark.items()))
            metric = TaskScores(tasks, sync_on_compute=not sharded).to(pl_module.device)
            with together(model):
                ask(benchmark, model, metric, rank, ranks)
            for name, value in metric.compute().items():
                pl_module.log(f"{stage}/{benchmark.name}/{name}", value.float())
        if self.image_metrics:
            documents = captioned_images(trainer.datamodule)[rank::ranks]  # type: ignore[attr-defined]
            with together(model):
                compare_images(self.image_metrics, model, documents)
            for distance in self.image_metrics:
                distance.sync_on_compute = not sharded
                found = distance.compute()
                values = found if isinstance(found, dict) else {"": found}
                for name, value in values.items():
                    pl_module.log(
                        f"{stage}/{logged_name(distance)}{name and '/'}{name}", torch.as_tensor(value).float()
                    )
                distance.reset()


def logged_name(metric: Metric) -> str:
    """CLASS/FEATURES, or CLASS alone of a metric without a network."""
    features = metric.features_name if isinstance(metric, SetMetric) else ""
    return f"{type(metric).__name__}{features and '/'}{features}"


def _taken(metric: Metric) -> set[str]:
    """Arguments of its `update`."""
    return set(inspect.signature(metric.update).parameters)


def captioned_images(data: DocumentData) -> list[tuple[str, Document]]:
    """Number and content of the held-out documents of a text and a learned image, as many as are validated.

    Raises:
        ValueError: there is none, or of all of them only the tokens are held.
    """
    found = []
    for s, source in enumerate(data.validation_sources()):
        if isinstance(whole(source), Stored):  # no pixels to compare with
            continue
        for i in range(min(data.validation_documents, len(source))):
            try:
                document = source.document(i, np.random.default_rng((data.seed, s, i)))
            except BrokenDocument:  # named when it is validated on
                continue
            if [part.is_image for part in document.parts] == [False, True]:
                found.append((f"{s}/{i}", document))
    if not found:
        raise ValueError("model.image_metrics: expected held-out documents of a text and pixels, got none")
    return found


def compare_images(metrics: Sequence[Metric], model: UnifiedModel, documents: Sequence[tuple[str, Document]]) -> None:
    """Draw an image for every caption and show both to the metrics."""
    settings = DecodingSettings("image", max_tokens=0, max_images=1)
    for metric in metrics:
        metric.to(model.device)
    for first in range(0, len(documents), BATCH):
        chunk = documents[first : first + BATCH]
        prompts = [Document(document.parts[:1], document.kind) for _, document in chunk]
        drawn = decode(model, prompts, settings, [answer_seed(0, name, 0) for name, _ in chunk])
        height, width = model.sequence.image_sizes[0]
        real = [fit_image(document.images[0], [(height, width)]) for _, document in chunk]
        for metric in metrics:
            images = _uint8([document.images[-1] for document in drawn]).to(model.device)
            if "texts" in _taken(metric):
                metric.update(images, texts=[prompt.text for prompt in prompts])
            else:
                metric.update(_uint8(real).to(model.device), real=True)
                metric.update(images, real=False)


def _uint8(images: Sequence[np.ndarray | Image.Image]) -> Tensor:
    """(B, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def ask(benchmark: Benchmark, model: UnifiedModel, metric: TaskScores, rank: int = 0, ranks: int = 1) -> None:
    """Every answer of one rank's share, judged and added to the metric."""
    settings = benchmark.settings(model.generator.sampling)
    jobs = [(item, sample) for item in benchmark.items() for sample in range(benchmark.samples)][rank::ranks]
    for first in range(0, len(jobs), BATCH):
        chunk = jobs[first : first + BATCH]
        seeds = [answer_seed(0, item.id, sample) for item, sample in chunk]
        parts = benchmark.answer(model, [item for item, _ in chunk], settings, seeds)
        answers = [Answer(item, sample, p) for (item, sample), p in zip(chunk, parts, strict=True)]
        metric.update([item.task for item, _ in chunk], [v.score for v in benchmark.judge(answers)])
