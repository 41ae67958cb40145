"""Checkpoints: written whole or not at all, the last ones and the best kept, a damaged one passed over."""

import json
import os
import random
import re
import struct
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from unimodal.files import remove, warn, whole_file, write_atomically
from unimodal.training.sharded_files import Writer, agreed, consolidated, damage_of

# Whatever reading a damaged archive stumbles over.
DAMAGE = (OSError, EOFError, ValueError, RuntimeError, LookupError, struct.error, zipfile.BadZipFile)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every byte is as it was written.

    torch.save writes an archive with a CRC-32 of every tensor, which torch.load does not look at; it does look at headers
    that have none. A folder, which a sharded run writes, lists the checksums of its files.
    """
    if path.is_dir():
        return damage_of(path)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is None:
            torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except UnpicklingError:
        return None  # as it was written, with more than weights in it: who reads it refuses it
    except DAMAGE as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return f"{broken} has another checksum than when it was written" if broken else None


def newest_intact(folder: Path, look: bool = True) -> Path | None:
    """The checkpoint that `last.ckpt` names, or the newest one before it that is not damaged; None if there is none.

    Args:
        folder: of checkpoints.
        look: whether to find out what is damaged.

    Raises:
        ValueError: all of them are damaged.
    """
    last = folder / "last.ckpt"
    steps = _by_step(folder)
    paths = [path for _, path in sorted(steps.items(), reverse=True)]
    if last.exists():
        target = last.resolve()
        named = next((step for step, path in steps.items() if path.resolve() == target), None)
        paths = [last, *(steps[step] for step in sorted(steps, reverse=True) if named is None or step < named)]
    for path in paths:
        problem = damage(path) if look else None
        if problem is None:
            return path
        warn(f"checkpoint: {path.resolve()} is damaged and passed over ({problem})")
    if paths:
        raise ValueError(f"ckpt_path: expected an undamaged checkpoint in {folder}, got {len(paths)} damaged ones")
    return None


def _by_step(folder: Path) -> dict[int, Path]:
    found = ((re.fullmatch(r"step_(\d+)\.ckpt", path.name), path) for path in folder.glob("step_*.ckpt"))
    return {int(match[1]): path for match, path in found if match}


class CheckpointFiles(TorchCheckpointIO):
    """Writes under a temporary name, to the disk and then to its place. No room is reported, and is no reason to stop."""

    def __init__(self) -> None:
        self.written = True  # the last one

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Write a whole file or nothing."""
        try:
            with whole_file(Path(path)) as file:
                writer = Writer(file)
                torch.save(checkpoint, writer)  # type: ignore[arg-type]  # what is written is not read back
                if writer.error is not None:
                    raise writer.error
                if Path(path).is_dir():  # of this step, by ranks that were sharded
                    remove(Path(path))
        except OSError as error:
            # Raised on one rank, it would leave the others waiting.
            self.written = False
            warn(f"checkpoint: {path} could not be written ({error}); training goes on, earlier ones are kept")
        else:
            self.written = True

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, place: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Of a file, or of a folder that a sharded run has written."""
        path = agreed(Path(path))
        return consolidated(path) if path.is_dir() else super().load_checkpoint(path, map_location, True)


class Checkpoints(Checkpoint):
    """Writes `step_N.ckpt` in the run folder's `checkpoints/`; the links `last.ckpt` and `best.ckpt` name two of them.

    Args:
        every_n_train_steps: optimizer steps from one to the next; one more is written where a run ends or is stopped, and
            behind a validation that is the best so far.
        keep_last: how many are kept, beside the best.
        monitor: what is best, as validation logs it; null keeps none for it.
        mode: whether a low or a high value is good.
    """

    def __init__(
        self,
        every_n_train_steps: int = 250,
        keep_last: int = 2,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        super().__init__()
        for name, value in (("every_n_train_steps", every_n_train_steps), ("keep_last", keep_last)):
            if value < 1:
                raise ValueError(f"checkpoint.{name}: expected 1 or more, got {value}")
        self.every, self.keep_last, self.monitor, self.mode = every_n_train_steps, keep_last, monitor, mode
        self.files = CheckpointFiles()
        self._folder = Path()
        self._best: float | None = None
        self._step = self._saved = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and what was best in it; sweep out what a killed run left half written."""
        self._folder = Path(trainer.default_root_dir) / "checkpoints"
        best = self._folder / "best.json"
        if stage == "fit" and best.is_file():
            record = json.loads(best.read_text(encoding="utf-8"))
            self._best = record["value"] if record["monitor"] == self.monitor else None
        if stage == "fit" and trainer.is_global_zero:
            for path in self._folder.glob(".*.tmp"):
                remove(path)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Begin with a whole step: Lightning steps where its count of micro-batches divides by their number in a step,
        which may be another than it was.
        """
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        made = loop.get("epoch_loop.batch_progress", {}).get("current", {})
        missing = -made.get("ready", 0) % trainer.accumulate_grad_batches
        made.update({name: made[name] + missing for name in ("ready", "started", "processed", "completed") if missing})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count on from here."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save behind every so many optimizer steps."""
        before, self._step = self._step, trainer.global_step
        if self._step // self.every > before // self.every:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is the best so far."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.monitor is None:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"checkpoint.monitor: expected one of {known}, got {self.monitor}")
        value = float(trainer.callback_metrics[self.monitor])
        better = self._best is None or (value < self._best if self.mode == "min" else value > self._best)
        # One rank decides for all: ranks may differ in a rounding, and only the first has read what was best before.
        better = trainer.strategy.broadcast(better and value == value)  # not a number is not the best
        if not (better and self._save(trainer)):
            return
        self._best = value
        if trainer.is_global_zero:
            record = {"monitor": self.monitor, "value": value, "step": trainer.global_step}
            self._link("best.ckpt")  # first: a value without its checkpoint would keep what is better out
            write_atomically(self._folder / "best.json", (json.dumps(record) + "\n").encode())
            self._prune()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> bool:
        """Write the checkpoint of this step, unless it is there; whether it is."""
        step = trainer.global_step
        if self._saved == step:
            return True
        trainer.save_checkpoint(self._folder / f"step_{step:06d}.ckpt")  # on all ranks
        if not trainer.strategy.broadcast(self.files.written):
            return False
        self._saved = step
        if trainer.is_global_zero:
            self._link("last.ckpt")
            self._prune()
        return True

    def _link(self, name: str) -> None:
        temporary = self._folder / f".{name}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"step_{self._saved:06d}.ckpt")
        temporary.replace(self._folder / name)

    def _prune(self) -> None:
        """Remove what is neither the best nor one of the last; what lies ahead is of a run that went on from here before."""
        best, steps = (self._folder / "best.ckpt").resolve(), _by_step(self._folder)
        for step in sorted(step for step in steps if step <= self._saved)[: -self.keep_last]:
            if steps[step].resolve() != best:
                remove(steps[step])


class RandomStates(Callback):
    """Keeps the states of the global random generators, of every rank. Losses here do not draw from them; others may."""

    def __init__(self) -> None:
        super().__init__()
        self._resumed: list[dict[str, Any]] = []
        self._device = torch.device("cpu")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on drawing where the run was; on another number of ranks there is no such place."""
        self._device = pl_module.device
        if len(self._resumed) == trainer.world_size:
            _set_random_state(self._resumed[trainer.global_rank], self._device)

    def state_dict(self) -> dict[str, Any]:
        """Of every rank: all of them ask at once."""
        own = _random_state(self._device)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"ranks": [own]}
        ranks: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until everything is built."""
        self._resumed = state_dict["ranks"]


def _random_state(device: torch.device) -> dict[str, Any]:
    """Tensors and plain values only, so that checkpoints load without code."""
    _, keys, *rest = np.random.get_state()
    version, integers, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, torch.tensor(integers), gauss],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    version, integers, gauss = state["python"]
    random.setstate((version, tuple(integers.tolist()), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
