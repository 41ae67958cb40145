"""Benchmarks in validation, with the averaged weights, every rank its share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning import Callback, LightningModule, Trainer

from unimodal.evaluation.benchmark import Answer, Benchmark
from unimodal.evaluation.harness import answer_seed
from unimodal.metrics.scores import TaskScores

if TYPE_CHECKING:
    from unimodal.model import UnifiedModel

BATCH = 64
"""Answers at once; changes no score."""


class ValidationScores(Callback):
    """Logs `val/NAME/TASK` and `val/NAME/overall` of benchmarks that train nobody sees.

    Args:
        benchmarks: each is asked in full, so give them few items.
    """

    def __init__(self, benchmarks: Sequence[Benchmark]) -> None:
        super().__init__()
        self.benchmarks = list(benchmarks)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average's weights are in; results are logged on every rank alike."""
        if trainer.fast_dev_run or trainer.sanity_checking:  # type: ignore[attr-defined]
            return
        for benchmark in self.benchmarks:
            metric = TaskScores(dict.fromkeys(item.task for item in benchmark.items())).to(pl_module.device)
            ask(benchmark, pl_module.model, metric, trainer.global_rank, trainer.world_size)  # type: ignore[arg-type]
            stage = "test" if trainer.testing else "val"
            for name, value in metric.compute().items():
                pl_module.log(f"{stage}/{benchmark.name}/{name}", value.float())


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
