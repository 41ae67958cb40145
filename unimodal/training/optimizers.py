"""What every training of the project shares: who is decayed, and how the learning rate moves."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

Schedule = Literal["constant", "cosine", "linear"]

NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms of every dimension
)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `module` in two optimizer groups: decayed, and not decayed.

    Not decayed: every parameter of a norm or an embedding, and every parameter with fewer than two axes (biases, gains,
    scales), so that norms written by hand are found too. A module may name further ones of its own parameters in an
    attribute `no_weight_decay: tuple[str, ...]` (a bare `nn.Parameter` used as an embedding), or give them by a method of
    that name, as timm's do. A parameter shared by two modules is listed once, and is not decayed if either of them says so
    (an output head tied to an embedding).

    Args:
        module: whose parameters are trained; frozen ones (`requires_grad` False) are left out.
        weight_decay: AdamW's coefficient for the decayed group.

    Returns:
        `{"params": decayed, "weight_decay": weight_decay}` and `{"params": rest, "weight_decay": 0.0}`, empty ones left
        out.

    Raises:
        ValueError: `weight_decay` is negative.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay: expected a number of at least 0, got {weight_decay}")
    owned = [(part, name, p) for part in module.modules() for name, p in part.named_parameters(recurse=False)]
    exempt = {id(p) for part, name, p in owned if _is_exempt(part, name, p)}
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_exempt(part: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether the parameter `name` of `part` is not decayed."""
    named = getattr(part, "no_weight_decay", ())
    named = named() if callable(named) else named  # networks of timm have a method of this name
    return name in named or parameter.dim() < 2 or isinstance(part, NORMS + EMBEDDINGS)


def check_rates(lr: float, betas: tuple[float, float], weight_decay: float, warmup_steps: int, lr_floor: float) -> None:
    """ValueError, naming the setting, where AdamW or `learning_rate_scale` could not be made of them."""
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr: expected a number of 0 or more, got {lr}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected numbers from 0 to below 1, got {list(betas)}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay: expected a number of 0 or more, got {weight_decay}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: expected 0 or more, got {warmup_steps}")
    if not 0 <= lr_floor <= 1:
        raise ValueError(f"lr_floor: expected a share from 0 to 1, got {lr_floor}")


def learning_rate_scale(step: int, warmup_steps: int, total_steps: int, schedule: Schedule, floor: float) -> float:
    """The factor on the learning rate at optimizer step `step`, counted from 0.

    Steps 0 .. warmup_steps - 1 rise linearly, (step + 1) / warmup_steps, so that the first step already learns and step
    `warmup_steps - 1` runs at the full rate. After it, with s the share of the remaining steps already made:

        constant   1
        linear     1 - (1 - floor) s
        cosine     floor + (1 - floor) (1 + cos(pi s)) / 2         (SGDR, arXiv 1608.03983, eq. 5)

    Steps at or past `total_steps` stay at the floor. A training no longer than its warm-up (a trial run of one step)
    never leaves the rise.

    Args:
        step: optimizer steps already made.
        warmup_steps: length of the rise; 0 for none.
        total_steps: length of the training; not read by `constant`.
        schedule: its shape.
        floor: the last factor, as a share of the full learning rate.

    Raises:
        ValueError: a number out of its range, or an unknown schedule.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: expected at least 0, got {warmup_steps}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor: expected a share between 0 and 1, got {floor}")
    if schedule not in ("constant", "cosine", "linear"):
        raise ValueError(f"schedule: expected constant, cosine or linear, got {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    s = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    fall = s if schedule == "linear" else (1 - math.cos(math.pi * s)) / 2
    return 1 - (1 - floor) * fall


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the matrices of layers, AdamW on everything else, as one optimizer: one schedule, one state to resume.

    Both are torch's. Muon (Jordan et al. 2024; scaled as in arXiv 2502.16982, section 2.2, so that AdamW's rates are its
    rates) takes the step with its singular values set to one; an embedding, a head or a norm has no use for that.

    Args:
        matrices: parameters of two axes for Muon.
        groups: AdamW's, as `parameter_groups` gives them.
        lr: of AdamW.
        muon_lr: of Muon.
        betas: of AdamW.
        weight_decay: of Muon; AdamW's is in the groups.
    """

    def __init__(
        self, matrices: list[Tensor], groups: list[dict[str, Any]], *, lr: float, muon_lr: float,
        betas: tuple[float, float], weight_decay: float,
    ) -> None:  # fmt: skip
        if not matrices:
            raise ValueError(f"muon_lr: expected None where freeze leaves no matrix of a layer to learn, got {muon_lr}")
        self.muon = torch.optim.Muon(
            matrices, lr=muon_lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = (
            torch.optim.AdamW(groups, lr=lr, betas=betas) if groups else None
        )  # freeze may leave matrices alone
        super().__init__([*self.muon.param_groups, *(self.adamw.param_groups if self.adamw else [])], {})
        self._join()

    def _join(self) -> None:
        """Have both step on the groups and the state that this one saves and loads."""
        self.muon.param_groups, self.muon.state = self.param_groups[:1], self.state
        if self.adamw is not None:
            self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Loading puts new groups and a new state in their place."""
        super().__setstate__(state)
        self._join()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        if self.adamw is not None:
            self.adamw.step()
        return loss


def split_matrices(
    module: nn.Module, layers: nn.Module, weight_decay: float
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Trainable matrices inside `layers`, and AdamW's groups of all other parameters of `module`."""
    matrices: list[Tensor] = [p for p in layers.parameters() if p.requires_grad and p.dim() == 2]
    taken = {id(p) for p in matrices}
    groups = parameter_groups(module, weight_decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in taken]
    return matrices, [group for group in groups if group["params"]]


class ConfiguredRates(torch.optim.lr_scheduler.LambdaLR):
    """A schedule by step that keeps to what is configured where a run goes on.

    A checkpoint's optimizer and schedule come back with the rates, betas and decay that they were trained with. Those that a
    run is continued with, and that its config.yaml records, hold from there on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scale: Callable[[int], float]) -> None:
        keys = ("betas", "weight_decay")
        self._configured = [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]
        super().__init__(optimizer, scale)

    def state_dict(self) -> dict[str, Any]:
        """Without what the configuration says."""
        return {key: value for key, value in super().state_dict().items() if key != "_configured"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Where the schedule stands; the optimizer was loaded before."""
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        groups = zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, self._configured, strict=True)
        for group, rate, scale, configured in groups:
            group.update(configured)
            if group["initial_lr"] != rate:
                group["initial_lr"], group["lr"] = rate, rate * scale(self.last_epoch)


def scheduled(
    optimizer: torch.optim.Optimizer, max_steps: int, *, warmup_steps: int, schedule: Schedule, floor: float
) -> OptimizerLRScheduler:
    """An optimizer whose rates move at every step; what Lightning wants of a module.

    Raises:
        ValueError: no number of steps, which every run needs: its data has no end.
    """
    if max_steps < 1:
        raise ValueError(f"trainer.max_steps: expected at least 1 (the data has no end), got {max_steps}")
    scheduler = ConfiguredRates(
        optimizer, lambda step: learning_rate_scale(step, warmup_steps, max_steps, schedule, floor)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
