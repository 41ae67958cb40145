"""Exponential moving average of the weights that are trained."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from unimodal.shards import reshard


class EMA(Callback):
    """Keeps an average of the trained weights, validates with it, and stores it in checkpoints.

    shadow += (1 - d) (weight - shadow) with d = min(decay, (1 + step) / (10 + step)), so that the first steps are soon
    forgotten (the warm-up of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay: expected 0 (off) to below 1, got {decay}")
        self.decay = decay
        self.shadow: dict[str, Tensor] = {}
        self._step = 0
        self._swapped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as they are, unless a checkpoint brought an average."""
        weights = _trained(pl_module)
        if not self.shadow:
            self.shadow = {name: p.detach().clone() for name, p in weights.items()}
        self._check(weights)
        self.shadow = {name: self.shadow[name].to(p.device) for name, p in weights.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count on from here; only now is the step of a checkpoint restored."""
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Follow the weights once an optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        weights = _trained(pl_module)
        torch._foreach_lerp_(list(self.shadow.values()), [weights[n].detach() for n in self.shadow], 1 - decay)

    def pass_over(self, step: int) -> None:
        """Do not follow optimizer step `step`: it was skipped, so that the weights have not moved."""
        self._step = step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate with the average."""
        if self.shadow and not self._swapped:
            self.swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on with the weights."""
        if self._swapped:
            self.swap(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Never leave the average where the weights belong: a checkpoint may be saved next."""
        if self._swapped:
            self.swap(pl_module)

    @torch.no_grad()
    def swap(self, pl_module: LightningModule) -> None:
        """Exchange weights and average."""
        reshard(pl_module)
        weights = _trained(pl_module)
        self._check(weights)
        for name, weight in weights.items():
            self.shadow[name] = self.shadow[name].to(weight.device)
            held = weight.detach().clone()
            weight.copy_(self.shadow[name])
            self.shadow[name].copy_(held)
        self._swapped = not self._swapped

    def _check(self, weights: dict[str, torch.nn.Parameter]) -> None:
        other = sorted(self.shadow.keys() ^ weights.keys())
        if other:
            raise ValueError(
                f"freeze: expected what the checkpoint was trained with, got {len(other)} weights that differ "
                f"({other[0]} ...); an export (init) can be trained on with others"
            )

    def state_dict(self) -> dict[str, Any]:
        """The average, by parameter name."""
        return {"shadow": self.shadow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from an average."""
        self.shadow = state_dict["shadow"]


def _trained(module: LightningModule) -> dict[str, torch.nn.Parameter]:
    """Of what a run is to yield (`part`): a discriminator that is trained beside it has no average."""
    prefix = f"{part}." if (part := getattr(module, "part", "")) else ""
    return {name: p for name, p in module.named_parameters() if p.requires_grad and name.startswith(prefix)}
