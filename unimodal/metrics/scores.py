"""Means by task, added up over ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TaskScores(Metric):
    """Mean score of every task and their unweighted mean, `overall`.

    Args:
        tasks: their names; scores of a task come from any rank, and any number of times.
    """

    higher_is_better = True
    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, tasks: Sequence[str], **settings: Any) -> None:
        super().__init__(**settings)
        self.tasks = tuple(tasks)
        self.add_state("sums", torch.zeros(len(self.tasks), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.tasks), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tasks: Sequence[str], scores: Sequence[float]) -> None:
        """Add answers: the task and the score, 0..1, of each.

        Raises:
            ValueError: an unknown task, or not one score a task.
        """
        for task, score in zip(tasks, scores, strict=True):
            if task not in self.tasks:
                raise ValueError(f"tasks: expected some of {', '.join(self.tasks)}, got {task}")
            self.sums[self.tasks.index(task)] += score
            self.counts[self.tasks.index(task)] += 1

    def compute(self) -> dict[str, Tensor]:
        """Task -> mean; a task without an answer is left out, and then there is no `overall`."""
        means = {task: self.sums[i] / self.counts[i] for i, task in enumerate(self.tasks) if int(self.counts[i]) > 0}
        if len(means) == len(self.tasks) and means:
            means["overall"] = torch.stack(list(means.values())).mean()
        return means
