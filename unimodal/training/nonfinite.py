"""Steps whose loss or gradient is not finite: skipped on every rank, counted, and kept for a look where they do not end."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from torchvision.utils import save_image

from unimodal.files import warn
from unimodal.packing import PackedSequence
from unimodal.training.ema import EMA
from unimodal.training.run import StopOnSignal


class NonFinite(Callback):
    """Skips an optimizer step where, on any rank, the loss of a micro-batch or a gradient is infinite or not a number.

    Every parameter of every rank then has no gradient, so that the optimizer passes all of them over: no weight, no moment
    and no decay moves, nor does the moving average. The step counts as made: its documents are consumed, the learning rate
    moves on. A run of such steps ends the training behind the last of them, with a checkpoint, and leaves that step's packs
    in the run folder's `nonfinite/step_N_rank_R/`: images, `packs.json` (losses, texts, where documents are from), tensors.

    Args:
        max_skipped: steps in a row that are skipped before the run ends.

    Raises:
        ValueError: where training ends for this reason.
    """

    def __init__(self, max_skipped: int = 10) -> None:
        super().__init__()
        if max_skipped < 1:
            raise ValueError(f"nonfinite.max_skipped: expected 1 or more, got {max_skipped}")
        self.max_skipped = max_skipped
        self.skipped = self.in_a_row = 0
        self._losses: list[Tensor] = []  # of this step's micro-batches
        self._packs: list[Any] = []  # and these themselves, where the next bad step is the last
        self._reason = ""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hold on to what may have to be looked at: packs fill a device, so not before it matters."""
        if self.in_a_row + 1 >= self.max_skipped:
            self._packs.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss, without waiting for it."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Behind all backward passes of a step, before gradients are clipped."""
        bad = _finite(self._losses, optimizer).logical_not().int()
        stops = [c for c in trainer.callbacks if isinstance(c, StopOnSignal)]  # type: ignore[attr-defined]
        # Of all ranks, and in one: the only numbers that the host waits for in a step.
        flags = torch.stack([bad, *(torch.full_like(bad, stop.received is not None) for stop in stops)])
        if trainer.world_size > 1:
            torch.distributed.all_reduce(flags)
        found, *stopped = flags.tolist()
        for stop, signals in zip(stops, stopped, strict=True):
            stop.agreed = signals > 0
        if found:
            self._skip(trainer, pl_module, optimizer)
        else:
            self.in_a_row = 0
        self._losses, self._packs = [], []

    def _skip(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        step, losses = trainer.global_step + 1, torch.stack(self._losses).tolist()
        self.skipped += 1
        self.in_a_row += 1
        # Gradients are summed over ranks: a loss says whose documents it was.
        if trainer.is_global_zero or not all(map(_is_finite, losses)):
            found = next((n for n, p in module.named_parameters() if p.grad is not None and not _whole(p.grad)), None)
            what = f"losses {', '.join(f'{loss:.4g}' for loss in losses)}" + (f", gradient of {found}" if found else "")
            warn(
                f"nonfinite: step {step} is skipped, something in it is not finite (rank {trainer.global_rank}: {what}); "
                f"{self.skipped} so far, {self.in_a_row} in a row"
            )
        if self.in_a_row >= self.max_skipped:
            self._end(trainer, module, step, losses)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMA):
                callback.pass_over(step)

    def _end(self, trainer: Trainer, module: LightningModule, step: int, losses: list[float]) -> None:
        """Keep the packs, and stop behind this step."""
        root = Path(trainer.default_root_dir) / "nonfinite"
        folder = root / f"step_{step:06d}_rank_{trainer.global_rank}"
        try:
            save_packs(folder, self._packs, losses, module, trainer.train_dataloader)
            kept = f"the packs of the last are in {root}"
        except (OSError, SafetensorError) as error:
            kept = f"the packs of the last could not be kept ({error})"
        self._reason = (
            f"nonfinite.max_skipped: expected fewer than {self.max_skipped} steps in a row whose loss or gradient is not "
            f"finite, got as many up to step {step}; {kept}, --ckpt_path last goes on behind them"
        )
        trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log how many steps were skipped in the whole run."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            pl_module.log("train/skipped_steps", float(self.skipped), batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why, once the last checkpoint is written."""
        if self._reason:
            raise ValueError(self._reason)

    def state_dict(self) -> dict[str, Any]:
        """The counts. A run that ended for them goes on with none in a row."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row % self.max_skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def _finite(losses: Sequence[Tensor], optimizer: Optimizer) -> Tensor:
    """Whether all of them and every gradient are finite: one truth value on their device, which is not waited for."""
    held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # Of a sharded gradient this rank's part; the verdict is over all ranks.
    gradients = [g.to_local() if hasattr(g, "to_local") else g for g in held]
    # The 2-norm, which is one pass over the memory (the largest magnitude takes ten times as long on a CPU). Above 1e19 it
    # overflows, and counts as what it is: a step to skip.
    norms = torch._foreach_norm([g for g in gradients if g.numel()]) if gradients else []
    return torch.stack([x.float() for x in (*losses, *norms)]).isfinite().all()


def _whole(gradient: Tensor) -> bool:
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(local.isfinite().all())


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def save_packs(folder: Path, batches: Sequence[Any], losses: Sequence[float], module: Any, stream: Any) -> None:
    """Micro-batches of one step for a look: the folder appears complete or not at all.

    Args:
        folder: new; what is there under this name is replaced.
        batches: packs of a model's training, or images (B, 3, H, W) of a tokenizer's.
        losses: one a batch.
        module: what is trained; a model's text tokenizer reads the texts.
        stream: what the packs come from; knows where their documents are from.

    Raises:
        OSError, SafetensorError: no room.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        records = []
        for i, (batch, loss) in enumerate(zip(batches, losses, strict=True)):
            record: dict[str, Any] = {"loss": repr(loss)}  # JSON has no NaN
            stacks: Sequence[Tensor] = [batch] if isinstance(batch, Tensor) else []
            if isinstance(batch, PackedSequence):
                stacks = batch.images
                record |= {"tokens": batch.kinds, "documents": _documents(batch, module, stream)}
            pictures = [image for stack in stacks for image in stack]
            for k, image in enumerate(pictures):
                save_image(image.float() / 2 + 0.5, new / f"pack_{i}_image_{k:03d}.png")
            save_file(_tensors(batch), new / f"pack_{i}.safetensors")
            records.append(record | {"images": len(pictures)})
        (new / "packs.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)


def _documents(pack: PackedSequence, module: Any, stream: Any) -> list[dict[str, Any]]:
    """Number, place and text of every document of a pack."""
    text, mixture = module.model.text, getattr(stream, "mixture", None)
    ids = pack.text_ids.tolist()
    starts = [i for i, token in enumerate(ids) if token == text.special.bos]  # every document's first token
    texts = [text.decode([t for t in ids[a:b] if t >= 0]) for a, b in zip(starts, [*starts[1:], len(ids)])]
    documents: list[dict[str, Any]] = [{"number": number} for number in pack.numbers]
    if mixture is not None:
        for document in documents:
            place = mixture.place(document["number"])
            source = mixture.sources[place.source].source.kind
            document |= {"epoch": place.epoch, "source": source, "document": place.document}
    if len(texts) == len(documents):
        documents = [document | {"text": one} for document, one in zip(documents, texts, strict=True)]
    return documents


def _tensors(batch: Any) -> dict[str, Tensor]:
    """Every tensor of a batch by name."""
    if isinstance(batch, Tensor):
        return {"images": batch.detach().cpu().contiguous()}
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    found = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    found |= {f"images.{i}": stack for i, stack in enumerate(batch.images)}
    if batch.stored is not None:
        found["stored"] = batch.stored.values
    return {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}
