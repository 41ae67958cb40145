"""What watching a training costs: blocks of the same steps with and without it, in turn, in one run."""

import contextlib
import gc
import io
import itertools
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from experiments.benchmarks import models
from experiments.benchmarks.cases import Case, Settings
from experiments.benchmarks.results import Result
from experiments.benchmarks.timing import Timing
from experiments.benchmarks.training import BATCH, SIDE, TEXT
from unimodal.packing import PackedSequence
from unimodal.training.lightning_cli import quiet
from unimodal.training.nonfinite import NonFinite
from unimodal.training.run import Progress, StopOnSignal
from unimodal.training.unified import UnifiedTraining
from unimodal.training.watch import Watch

BLOCK = 10  # steps, the last of which is logged: the default of `log_every_n_steps`
NEVER = 10**9


class SamePack(LightningDataModule):
    """One pack again and again."""

    def __init__(self, pack: PackedSequence) -> None:
        super().__init__()
        self.pack, self.position = pack.announce(pack.counts), ()

    def train_dataloader(self) -> Iterable[PackedSequence]:
        """Without end."""
        return itertools.repeat(self.pack)


class Alternate(Callback):
    """Turns all that is logged, counted, guarded and shown on and off from block to block, and times the blocks.

    Pairs of blocks begin with either by turns. The first pair warms up, and takes what is measured once a run.

    Args:
        watch, bar: logging and the bar over the steps.
        guards: callbacks that are taken away as a whole; all are back in the last step, so that they can end.
    """

    def __init__(self, watch: Watch, bar: Progress, guards: list[Callback]) -> None:
        super().__init__()
        self.watch, self.bar, self.guards = watch, bar, guards
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A block ends where the next begins: what the loggers write is in its time."""
        block, place = divmod(batch_idx, BLOCK)
        if place:
            return
        now = time.perf_counter()
        if block > 2:
            self.seconds[self.watch.on].append((now - self._began) / BLOCK)
        pair, second = divmod(block, 2)
        self.watch.on = (bool(second) ^ (pair % 2 == 0)) or batch_idx + 1 == trainer.max_steps
        others = [c for c in trainer.callbacks if c not in self.guards]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, *self.guards] if self.watch.on else others  # type: ignore[attr-defined]
        trainer.log_every_n_steps = BLOCK if self.watch.on else NEVER  # type: ignore[attr-defined]
        (self.bar.enable if self.watch.on else self.bar.disable)()
        gc.collect()
        self._began = time.perf_counter()


def watching_overhead(settings: Settings) -> Result:
    """Time of a step with all that `fit` logs, counts, guards and shows, over that of a bare one."""
    config, side = models.peer_s(settings.quick), settings.size(SIDE, 2)
    model = models.unified(config, (side,)).train()
    pack = models.batch(model, settings.size(BATCH, 2), TEXT, side)
    module, watch, bar = UnifiedTraining(model, lr=3e-4), Watch(), Progress(refresh_rate=10)
    guards: list[Callback] = [NonFinite(), StopOnSignal()]
    alternate = Alternate(watch, bar, guards)
    quiet()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        Trainer(
            accelerator="cpu", default_root_dir=folder, log_every_n_steps=BLOCK, limit_val_batches=0, max_epochs=-1,
            max_steps=2 * BLOCK * (settings.repeats + 1) + 1, enable_model_summary=False, enable_checkpointing=False,
            use_distributed_sampler=False, logger=[CSVLogger(folder), TensorBoardLogger(folder)],
            callbacks=[alternate, watch, bar, LearningRateMonitor("step"), *guards],
        ).fit(module, SamePack(pack))  # fmt: skip
    on, off = (Timing(tuple(alternate.seconds[watched])) for watched in (True, False))
    return Result(
        name="", value=on.best / off.best, unit="x", peer="bare steps", value_median=on.median / off.median,
        extra={"steps": BLOCK * settings.repeats, "log_every_n_steps": BLOCK},
    ).timed(on, off)  # fmt: skip


CASES: dict[str, Case] = {"watching_overhead": watching_overhead}
