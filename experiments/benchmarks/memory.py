"""Memory of the loss: live bytes of tensors, op by op."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.benchmarks.cases import Case, Settings, worst
from experiments.benchmarks.peers import full_logits_loss
from experiments.benchmarks.results import Result
from experiments.benchmarks.timing import interleave
from unimodal_generators.cross_entropy import linear_cross_entropy

T = TypeVar("T")


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside, now and at most. What an operator needs in passing is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, count what it made."""
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def peak_bytes(run: Callable[[], T], device: str = "cpu") -> tuple[int, T]:
    """Most bytes alive at once of what `run` makes, and what it returns."""
    if device.startswith("cuda"):  # there the allocator itself counts
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = run()
        return torch.cuda.max_memory_allocated() - before, out
    with LiveBytes() as mode:
        out = run()
    return mode.peak, out


def loss_inputs(rows: int, width: int, vocabulary: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Hidden states, a head, and targets."""
    rng = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=rng, device=device, dtype=dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, generator=rng, device=device, dtype=dtype)).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (rows,), generator=rng, device=device)


def loss_runs(inputs: Any) -> dict[str, Callable[[], list[Tensor]]]:
    """Loss and gradients, ours and with all logits at once."""
    hidden, weight, targets = inputs

    def run(loss: Callable[[], Tensor]) -> list[Tensor]:
        value = loss()
        return [value, *torch.autograd.grad(value, (hidden, weight))]

    return {
        "ours": lambda: run(lambda: linear_cross_entropy(hidden, [weight], targets)),
        "peer": lambda: run(lambda: full_logits_loss(hidden, weight, targets)),
    }


def loss_memory(settings: Settings) -> Result:
    """How many times less the loss over 128k ids holds at once, its gradients counted on both sides."""
    device = settings.device
    full = (4096, 256, 128_000) if device == "cpu" else (8192, 2048, 128_000)
    rows, width, ids = settings.size(full, (24, 8, 100_000))
    runs = loss_runs(loss_inputs(rows, width, ids, device))
    (ours, found), (peer, expected) = (peak_bytes(runs[name], device) for name in ("ours", "peer"))
    error = worst(list(zip(found, expected)))
    del found, expected
    times = interleave(runs, settings.size(3, 1), warmup=0, wait=settings.wait)
    return Result(
        name="", value=peer / ours, unit="x", peer="cross_entropy on full logits", correct=error,
        tolerance=1e-4, extra={"bytes": ours, "peer_bytes": peer, "bytes_per_row": ours / rows},
    ).timed(times["ours"], times["peer"])  # fmt: skip


CASES: dict[str, Case] = {"loss_memory": loss_memory}
