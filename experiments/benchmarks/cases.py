"""What every group of rows shares: how large and how often, and the comparison with a reference."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from experiments.benchmarks.results import Result
from experiments.benchmarks.timing import Timing
from unimodal.environment import can_compile

T = TypeVar("T")
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-1}


@dataclass
class Settings:
    """How large and how often. What several rows are made of is measured once."""

    quick: bool = False  # tiny sizes, once: shows that a row runs, says nothing about speed
    device: str = "cpu"
    repeats: int = 12  # runs of each candidate
    made: dict[Any, Any] = field(default_factory=dict)

    @property
    def warmup(self) -> int:
        """Runs before those that count."""
        return 1 if self.quick else 2

    @property
    def compiles(self) -> bool:
        """Whether candidates are also compiled."""
        return not self.quick and can_compile()[0]

    def size(self, full: T, small: T) -> T:
        """`full`, or `small` when quick."""
        return small if self.quick else full

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gave the first time."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give memory back before the next large model is made."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


Case = Callable[[Settings], Result]


def variants(settings: Settings, name: str, make: Callable[[bool], Callable[[], T]]) -> dict[str, Callable[[], T]]:
    """`make(compiled)` as it is written and, where this machine can, compiled; as `name/eager` and `name/compiled`."""
    found = {f"{name}/eager": make(False)}
    if settings.compiles:
        found[f"{name}/compiled"] = make(True)
    return found


class Fastest(NamedTuple):
    """The best of several ways to one end."""

    way: str
    timing: Timing

    @property
    def compiled(self) -> bool:
        """Whether it was the compiled one."""
        return self.way.endswith("compiled")


def fastest(times: Mapping[str, Timing], name: str) -> Fastest:
    """Among the ways `name/...`."""
    ways = [Fastest(way, timing) for way, timing in times.items() if way.startswith(f"{name}/")]
    return min(ways, key=lambda found: found.timing.best)


def bests(times: Mapping[str, Timing]) -> dict[str, float]:
    """Seconds of every candidate, for the record."""
    return {way: timing.best for way, timing in times.items()}


def relative(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest number of the reference."""
    a, b = ours.detach().double().cpu(), reference.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest of their relative errors."""
    return float(torch.tensor([relative(a, b) for a, b in pairs], dtype=torch.float64).max())  # keeps a NaN


def grads(run: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """Output and gradients of every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]
