"""What happens around training: signals, samples, the run folder and its export."""

import gc
import json
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from PIL import Image
from safetensors import SafetensorError

from unimodal.attention import describe
from unimodal.documents import GENERATED, Document, write_html, write_jsonl
from unimodal.export import ExportInfo, save_export
from unimodal.files import write_atomically
from unimodal.shards import is_sharded
from unimodal.training.ema import EMA
from unimodal.training.logs import spared
from unimodal.training.unified import UnifiedTraining, continue_prompts


class Progress(TQDMProgressBar):
    """A bar over optimizer steps with the time left: the stream of documents has no end, `max_steps` has."""

    @property
    def total_train_batches(self) -> int | float:
        """Optimizer steps of the whole run, where it has a number of them."""
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Go on where the run stands: what was trained before tells nothing about the time left."""
        super().on_train_epoch_start(trainer)
        if trainer.max_steps > 0:
            bar = self.train_progress_bar
            bar.initial = bar.n = trainer.global_step
            bar.set_description("Steps")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Once a step, when its last micro-batch is done."""
        if trainer.max_steps <= 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif trainer.global_step > self.train_progress_bar.n:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Without the version number of the logger."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


class StopOnSignal(Callback):
    """Ctrl-C and SIGTERM end the run behind the step in progress, with a checkpoint; a second one ends it at once.

    So does SIGUSR1, with which SLURM can be asked to announce the end of the time that a job has. Several ranks agree on
    the step, which may be the next one, where `NonFinite` exchanges what each has found.

    Attributes:
        received: the signal that this rank got.
        agreed: whether any rank has got one, alike on all of them.
        stepped: whether a step was made since training started.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        super().__init__()
        self.received: int | None = None
        self.agreed = self.stepped = False
        self._previous: dict[int, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which would stop in the middle of a step."""
        self._step = trainer.global_step
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._restore()
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop where the optimizer has just stepped."""
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        self.stepped |= stepped
        # One rank may have got the signal alone; all of them stop behind the same step.
        if stepped and (self.agreed or (trainer.world_size == 1 and self.received is not None)):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the signals back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class RunFolder(Callback):
    """Keeps time, and leaves `run.json` and `export/` in the run folder."""

    def __init__(self, recipe: str, config: dict[str, Any], command: str) -> None:
        super().__init__()
        self.recipe, self.config, self.command = recipe, config, command
        self.seconds = 0.0
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        # What is alive now lives on: the collector need not walk through it in the middle of a step.
        gc.collect()
        gc.freeze()
        self._started = time.monotonic()
        if trainer.is_global_zero:
            model = getattr(pl_module, "model", None)
            kernel = f", {describe(model.backbone.config.attention, pl_module.device)}" if model is not None else ""
            parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            print(
                f"{self.recipe}: {parameters / 1e6:.2f} M trained parameters, precision {trainer.precision}{kernel}, "
                f"run folder {trainer.default_root_dir}"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        gc.unfreeze()
        self.seconds, self._started = self._elapsed(), 0.0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the export once the last step is made, also when a resumed run finds nothing left to train."""
        done = trainer.global_step >= trainer.max_steps
        if trainer.fast_dev_run or not done or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        try:
            self._write(trainer, pl_module, Path(trainer.default_root_dir))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"trainer.default_root_dir: expected room for {trainer.default_root_dir}/export, got {error}; "
                "once there is some, --ckpt_path last writes it"
            ) from error

    def _write(self, trainer: Trainer, pl_module: LightningModule, root: Path) -> None:
        average = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
        part: str = pl_module.part  # type: ignore[assignment]
        info = ExportInfo(part, "ema" if average else "raw", self.recipe, git_commit())
        if is_sharded(pl_module):  # no process holds it all, this one neither
            print(f"write the export with: unimodal consolidate {root}")
        else:
            if average is not None:
                average.swap(pl_module)
            try:
                save_export(root / "export", getattr(pl_module, part), self.config, info)
            finally:
                if average is not None:
                    average.swap(pl_module)
        parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        record = {"train_seconds": self.seconds, "steps": trainer.global_step, "parameters": parameters, **vars(info)}
        record |= {"command": self.command}
        write_atomically(root / "run.json", (json.dumps(record, indent=2) + "\n").encode())

    def _elapsed(self) -> float:
        return self.seconds + (time.monotonic() - self._started if self._started else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Seconds trained so far, and what an export says of its origin."""
        return {"seconds": self._elapsed(), "recipe": self.recipe, "commit": git_commit()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds = state_dict["seconds"]


class Samples(Callback):
    """Writes what a model makes of held-out prompts: the same prompts with the same seeds at every validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `samples/step_N.html` and, of what was drawn, `samples/step_N.png`. The average's weights are still in."""
        dry = trainer.fast_dev_run or trainer.sanity_checking  # type: ignore[attr-defined]
        alone = trainer.is_global_zero or (isinstance(pl_module, UnifiedTraining) and is_sharded(pl_module.model))
        if dry or not alone or not isinstance(pl_module, UnifiedTraining):
            return
        prompts: list[Document] = trainer.datamodule.prompts()  # type: ignore[attr-defined]
        written = continue_prompts(pl_module.model, prompts, range(len(prompts)))
        if not trainer.is_global_zero:  # it helped where layers are gathered as they run
            return
        # `unimodal validate` looks at a checkpoint; only training adds to the run's own samples.
        folder = Path(trainer.default_root_dir) / ("samples" if trainer.state.fn == "fit" else "validation")
        name = f"step_{trainer.global_step:06d}"
        with spared(f"{folder / name}.html", "these samples are lost"):
            folder.mkdir(parents=True, exist_ok=True)
            write_html(written, folder / f"{name}.html", f"Samples after {trainer.global_step} steps")
            drawn = [part.image for d in written for part in d.parts if part.is_image and part.role == GENERATED]
            if drawn:
                grid(drawn).save(folder / f"{name}.png")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `predictions/documents.jsonl` with its images, and `predictions/documents.html`."""
        if trainer.is_global_zero and isinstance(pl_module, UnifiedTraining):
            folder = Path(trainer.default_root_dir) / "predictions"
            folder.mkdir(parents=True, exist_ok=True)
            # A prompt without a part that was continued with nothing is no document.
            written = [document for document in pl_module.predicted if document.parts]
            write_jsonl(folder / "documents.jsonl", written, folder / "images")
            write_html(pl_module.predicted, folder / "documents.html", "Held-out prompts, continued")
            print(f"{len(pl_module.predicted)} documents in {folder}")


LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection was likely closed"
    r"|Timed out waiting \d+ ?ms|timeout after \d+ ?ms, key|Socket Timeout|Application timeout caused pair closure"
    r"|remote process exited|collective operation timeout"
)
"""How gloo, the store and NCCL say that another rank is gone, or does not answer. Of NCCL's errors no others do."""


def from_outside(error: BaseException, stepped: bool) -> str | None:
    """In one line, what ended a run that was itself in order: a worker that was killed, another rank; None if neither.

    Before a step was made, what looks like another rank's end may be a machine or a network that was never in order.
    A worker's end interrupts whatever is being done, which may then fail in its own words: causes are looked at too.
    """
    found: BaseException | None = error
    while found is not None:
        line = next(iter(str(found).splitlines()), "").strip()
        if "DataLoader worker" in line and ("killed by signal" in line or "exited unexpectedly" in line):
            return (
                "data.workers: expected worker processes that live as long as the run, got one that ended, as it does "
                f"where memory is short ({line}); continue with --ckpt_path last"
            )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if stepped and distributed and isinstance(found, RuntimeError) and LOST.search(line):
            saw = re.sub(r"^\[.*?\] ", "", line).partition(". ")[0]  # without the place in gloo's sources
            return (
                "trainer.devices: expected every rank to go on, got another that has ended or does not answer (rank "
                f"{torch.distributed.get_rank()} saw: {saw}); its own message says why; continue with --ckpt_path last"
            )
        found = found.__cause__ or found.__context__
    return None


def grid(images: Sequence[Image.Image], columns: int = 10) -> Image.Image:
    """Pictures on one sheet, small ones enlarged without smoothing."""
    side = max(max(image.size) for image in images)
    scale = max(1, 48 // side)
    cell = side * scale + 2
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (cell * min(columns, len(images)), cell * rows), "white")
    for i, image in enumerate(images):
        big = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        sheet.paste(big, (cell * (i % columns) + 1, cell * (i // columns) + 1))
    return sheet


def git_commit() -> str:
    """The commit this code is at, "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
