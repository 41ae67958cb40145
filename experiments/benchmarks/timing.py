"""Timing of candidates in turn, so that whatever else the machine does meets all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each run of one candidate."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The least disturbed run."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """What a user would see."""
        return statistics.median(self.seconds)


def interleave(
    candidates: Mapping[str, Callable[[], object]], repeats: int, *, warmup: int = 2, inner: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:  # fmt: skip
    """Run every candidate once a round, `repeats` rounds, each round in another order.

    A run calls the candidate `inner` times and counts their mean; `wait` ends a run where calls return early (CUDA).
    """
    names = list(candidates)
    for name in names:
        for _ in range(warmup):
            candidates[name]()
    wait()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with _uncollected():
        for number in range(repeats):
            shift = number % max(len(names), 1)
            if number:
                gc.collect()
            for name in names[shift:] + names[:shift]:
                run = candidates[name]
                started = time.perf_counter()
                for _ in range(inner):
                    run()
                wait()
                seconds[name].append((time.perf_counter() - started) / inner)
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection inside a run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """That many threads of torch inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
