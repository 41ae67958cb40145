"""What a run does a second, which share of the machine that is, what it waits for and what it leaves out.

All of it is logged at every `trainer.log_every_n_steps`-th optimizer step, over the steps since. Between two of those
there are readings of the clock and sums of a few numbers of the host; nothing here waits for the device.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from unimodal.training.flops import product_peak
from unimodal.training.work import Work, work_of

clock = time.perf_counter


class Stopwatch:
    """Time of training, and the part of it between micro-batches. Paused, it counts neither."""

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0
        self._since: float | None = None  # when what is not in `seconds` yet began
        self._ended = 0.0  # the last micro-batch

    def begin(self) -> None:
        """A micro-batch begins; behind a pause, the clock does."""
        now = clock()
        if self._since is None:
            self._since = now
        else:
            self.waited += now - self._ended

    def end(self) -> None:
        """It ended."""
        self._ended = clock()

    def pause(self) -> None:
        """Until the next micro-batch begins."""
        if self._since is not None:
            self.seconds += clock() - self._since
            self._since = None

    def clear(self) -> None:
        """Count anew from here; the wait for the next micro-batch is in."""
        self.seconds = self.waited = 0.0
        self._since = self._ended = clock()


@dataclass
class Reading:
    """Of one rank, since it last logged."""

    seconds: float
    waited: float  # of those, between micro-batches
    memory: int  # bytes, the most so far
    peak: float  # FLOPs a second of the device's best matrix product
    units: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)  # documents of each source, of all ranks in the whole run


def summary(readings: list[Reading], rates: dict[str, float]) -> dict[str, float]:
    """What is logged of all ranks' readings: sums of what they did, by the slowest one's time."""
    units, skipped = total([r.units for r in readings]), readings[0].skipped
    seconds = max(r.seconds for r in readings)
    found = {
        "memory_gb": max(r.memory for r in readings) / 1e9,
        "data_wait": max(r.waited / r.seconds for r in readings),
    }
    if units:
        flops = sum(n * rates.get(name, 0.0) for name, n in units.items()) / seconds
        found |= {"tokens_per_s": units["tokens"] / seconds, "images_per_s": units["images"] / seconds}
        found |= {"flops_per_s": flops, "peak_share": flops / sum(r.peak for r in readings)}
    if skipped:
        found |= {"skipped": sum(skipped.values())} | {f"skipped/{name}": n for name, n in skipped.items() if n}
    return {f"watch/{name}": float(value) for name, value in found.items()}


def total(counts: list[dict[str, int]]) -> Counter[str]:
    """Sums by name; ranks may lack some."""
    sums: Counter[str] = Counter()
    for one in counts:
        sums.update(one)
    return sums


class Watch(Callback):
    """Logs how a training goes on, all ranks together.

    | name under `watch/` | what it is |
    |---|---|
    | tokens_per_s | of packs, without filling and with both copies of an image; of images, for a tokenizer |
    | images_per_s | each once |
    | flops_per_s | useful FLOPs, see `unimodal.training.work` |
    | peak_share | of the fastest matrix products that the devices reached when the run began, in its precision |
    | memory_gb | most that was allocated on one device; without one, most that one process had resident |
    | data_wait | share of the time that passed between micro-batches: the loader, and the transfer of what it gives |
    | skipped, skipped/SOURCE | documents left out in the whole run, broken or too long |

    Validation, the writing of checkpoints and the logging itself are no part of the time.

    Attributes:
        on: whether it measures: where something is logged.

    Args:
        wandb: project of Weights & Biases to log to as well; None: to none.

    Raises:
        ValueError: `wandb` is given and that package is not installed.
    """

    def __init__(self, wandb: str | None = None) -> None:
        super().__init__()
        if wandb is not None and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"watch.wandb: expected the package wandb (pip install wandb) for project {wandb}, got none"
            )
        self.wandb = wandb
        self._work: Work | None = None
        self._peak = 0.0
        self._units: Counter[str] = Counter()
        self._watch = Stopwatch()
        self._step = 0
        self.on = False

    def logger(self, name: str, folder: Path) -> Logger | None:
        """Weights & Biases' for a run, where that is asked for. WANDB_MODE=offline needs no account."""
        return None if self.wandb is None else WandbLogger(name=name, project=self.wandb, save_dir=folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the device can do, where anything is logged."""
        self.on = bool(trainer.loggers and trainer.log_every_n_steps) and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if not self.on:
            return
        device = pl_module.device
        with trainer.precision_plugin.forward_context():
            one = torch.ones(1, 1, device=device)
            self._peak = product_peak(device, (one @ one).dtype)  # under autocast, that of matrix products
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self._work, self._step = work_of(pl_module), trainer.global_step
        self._units, self._watch = Counter(), Stopwatch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read the clock."""
        if self.on:
            self._watch.begin()
            if self._work is not None:
                self._work.begin(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read it again, count, and log where it is time to."""
        if not self.on:
            return
        if self._work is not None:
            self._units.update(self._work.units(batch))
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if stepped and self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(trainer, pl_module)
        else:
            self._watch.end()

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        self._pause(module)
        readings = gather(self._read(trainer, module))
        units = total([reading.units for reading in readings])
        if self._work is not None and (missing := self._work.missing(units)):  # on all ranks alike
            for rates in gather(self._work.measure(missing, trainer.precision_plugin.forward_context)):
                self._work.rates |= rates
        rates = {} if self._work is None else self._work.rates
        module.log_dict(summary(readings, rates), batch_size=1)
        self._units.clear()
        self._watch.clear()

    def _read(self, trainer: Trainer, module: LightningModule) -> Reading:
        broken = getattr(trainer.train_dataloader, "broken", None)
        skipped = {} if broken is None else broken.skipped
        watch = self._watch
        return Reading(watch.seconds, watch.waited, memory(module.device), self._peak, dict(self._units), skipped)

    def _pause(self, module: LightningModule) -> None:
        if self.on and module.device.type == "cuda":
            torch.cuda.synchronize(module.device)  # what was asked of it belongs to the time before
        self._watch.pause()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not training."""
        self._pause(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Not training either."""
        self._pause(pl_module)


def memory(device: torch.device) -> int:
    """Bytes: the most that tensors held on a device so far, or, on the CPU, that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def gather(mine: Any) -> list[Any]:
    """What every rank gives."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found
