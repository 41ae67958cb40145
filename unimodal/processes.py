"""Commands that several processes run together, as `accelerate launch` and torchrun start them.

Work is dealt in whole batches: what is computed together, and so every byte that is written, is the same for any number of
processes. The main process alone writes and prints. What goes wrong in one process ends all of them, with one line; a
failure that no user can cause has its traceback besides, where it happened.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""What both launchers set in the environment."""


class Processes:
    """Those that run a command together.

    They *meet* to exchange what went wrong, and then what each has made. A command that goes well meets equally often in
    every process; an error is brought to the next meeting, whatever that was for, and it is the last one.

    Args:
        rank: of this process, 0: the main one.
        count: how many there are; one alone never meets anybody.
        local: rank among those of one machine, each of which has a GPU.
    """

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0) -> None:
        self.rank, self.count, self.local = rank, count, local

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The `--device` of this process: of several, each has a GPU of its own."""
        if self.count == 1 or asked not in ("auto", "cuda"):
            return asked
        import torch

        return f"cuda:{self.local % torch.cuda.device_count()}" if torch.cuda.is_available() else asked

    def in_order(
        self, jobs: Sequence[J], batch: int, make: Callable[[Sequence[J]], Sequence[R]]
    ) -> Iterator[tuple[J, R]]:
        """Every job with its result, in the order of the jobs, in the main process. To the others nothing comes, but they
        have to go through it: that makes their share.

        Args:
            jobs: the same in every process.
            batch: jobs that are given to `make` at once.
            make: results of a batch; each batch is made by one process.
        """
        batches = [jobs[first : first + batch] for first in range(0, len(jobs), batch)]
        if self.main and len(batches) < min(self.count, len(jobs)):
            fitting = -(-len(jobs) // self.count)
            print(
                f"{len(batches)} batches for {self.count} processes: --batch {fitting} keeps all at work",
                file=sys.stderr,
            )
        for first in range(0, len(batches), self.count):
            dealt = batches[first : first + self.count]
            mine = dealt[self.rank : self.rank + 1]
            for some, (results,) in zip(dealt, self._collect(partial(_each, make, mine)), strict=False):
                yield from zip(some, results, strict=True)

    def agree(self, make: Callable[[], R]) -> R:
        """What the main process makes, in every process."""
        made = self.meet(lambda: make() if self.main else None)
        if self.count == 1:
            return made  # type: ignore[return-value]
        from torch import distributed

        found = [made]
        distributed.broadcast_object_list(found)
        return found[0]  # type: ignore[return-value]

    def alone(self) -> bool:
        """From here on the main process works by itself: true there. The others have nothing left to do."""
        self.meet(lambda: None)
        self.count = 1
        return self.main

    def meet(self, make: Callable[[], R]) -> R:
        """What this process makes, once all of them have made theirs.

        Raises:
            ValueError: in the main process, where any of them failed; the others end with exit code 2. But what is neither
                a ValueError nor an OSError is raised again in the process that it comes from, as it was.
        """
        if self.count == 1:
            return make()
        from torch import distributed

        failed: Exception | None = None
        try:
            made = make()
        except Exception as error:  # noqa: BLE001  # the others would wait for this process for ever
            failed = error
        said: list[str | None] = [None] * self.count
        distributed.all_gather_object(said, None if failed is None else self._say(failed))
        wrong = next((one for one in said if one is not None), None)
        if wrong is None:
            return made
        self.count = 1  # nobody comes to another meeting
        if failed is not None and (self.main or not isinstance(failed, (ValueError, OSError))):
            raise failed
        if self.main:
            raise ValueError(wrong)
        raise SystemExit(2)

    def _say(self, error: Exception) -> str:
        if isinstance(error, (ValueError, OSError)):
            return str(error) or type(error).__name__
        return f"process {self.rank} of {self.count} failed: {type(error).__name__}: {error}"

    def _collect(self, make: Callable[[], R]) -> list[R]:
        """What every process makes, by rank, in the main process; elsewhere nothing."""
        made = self.meet(make)
        if self.count == 1:
            return [made]
        from torch import distributed

        parts: list[R] | None = [made] * self.count if self.main else None
        distributed.gather_object(made, parts)
        return parts or []


_current = Processes()


def current() -> Processes:
    """The processes of the command that runs; one, unless a launcher started more."""
    return _current


def launched() -> bool:
    """Whether this is one of several processes of a launcher."""
    return all(name in os.environ for name in LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def joined_processes() -> Iterator[None]:
    """What is run inside is run by all processes of the launcher."""
    import torch
    from accelerate import PartialState

    global _current
    # Only objects of the host are exchanged. A process may wait for as long as another needs for a batch.
    state = PartialState(cpu=not torch.cuda.is_available(), backend="gloo", timeout=timedelta(days=7))
    _current = Processes(state.process_index, state.num_processes, state.local_process_index)
    failed: Exception | None = None
    try:
        try:
            yield
        except Exception as error:  # noqa: BLE001  # the others hear of it
            failed = error
        _current.meet(lambda: _raise(failed))
    finally:
        _current = Processes()
        state.destroy_process_group()


def _each(make: Callable[[J], R], things: Sequence[J]) -> list[R]:
    return [make(thing) for thing in things]


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
