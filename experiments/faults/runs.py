"""Tiny trainings through the command line, each in a process of its own that can be killed, and what they trained on."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from unimodal.cli import main
from unimodal.training import UnifiedTraining

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "lightning_configs" / "models" / "digits_mot_flow.yaml"
TINY = """
model:
  init_args:
    model:
      backbone: {width: 16, depth: 1, heads: 1, kv_heads: 1, mlp_width: 16, vocabulary: 300}
    warmup_steps: 2
    ema_decay: 0.7
trainer: {max_steps: 12, val_check_interval: 1000, precision: 32-true, accelerator: cpu, enable_progress_bar: false}
checkpoint: {every_n_train_steps: 2}
"""
RUN = Path("run")
"""The run folder: every fault has a working folder of its own."""
PATIENCE = 240.0
"""Seconds that a run may take; one that hangs is killed, and its row says so."""


@dataclass(frozen=True)
class Ended:
    """A run that is over.

    Args:
        code: its exit code; negative: the signal that killed it; None: it hung, and was killed after `PATIENCE`.
        said: what it wrote to the terminal.
        seconds: from the moment that was waited from.
    """

    code: int | None
    said: str
    seconds: float

    def line(self, *words: str) -> str:
        """The first line a user saw with all of these words, or "": a table has no place for tracebacks."""
        lines = [line.strip() for line in self.said.splitlines()]
        return next((line for line in lines if all(word in line for word in words)), "")

    @property
    def clean(self) -> bool:
        """Whether it ended by itself and without a traceback."""
        return self.code is not None and "Traceback" not in self.said


class Process:
    """A command in a process group of its own, forked from this one: nothing is imported again.

    Args:
        arguments: of the command line.
        folder: of its run; what it says is in FOLDER.said, what it trained on in FOLDER.steps.
        before: done in the new process first: what provokes the fault from within.
        environment: added.
    """

    def __init__(
        self, arguments: Sequence[str], folder: Path, before: Callable[[], None] | None = None, **environment: str
    ) -> None:
        self.said = folder.with_suffix(".said")
        self.steps = folder.with_suffix(".steps")
        self.pid = os.fork()
        if not self.pid:
            self._run(list(arguments), before, environment)
        self._started = time.monotonic()

    def _run(self, arguments: list[str], before: Callable[[], None] | None, environment: dict[str, str]) -> NoReturn:
        code = 70
        try:
            os.setpgid(0, 0)
            file = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            # Whatever this process has done about its own output (a test catches it) is not the new one's.
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            logging.getLogger().handlers.clear()
            os.environ.update(environment)
            watch(self.steps)
            if before is not None:
                before()
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # noqa: BLE001  # none may leave a process that was forked
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def until(self, step: int) -> None:
        """Wait until it has begun so many steps, or has ended."""
        deadline = time.monotonic() + PATIENCE
        while len(steps(self.steps)) < step and time.monotonic() < deadline:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
            time.sleep(0.005)

    def kill(self, number: int, group: bool = False) -> None:
        """Send it a signal, or its workers too, and count the seconds from here."""
        self._started = time.monotonic()
        (os.killpg if group else os.kill)(self.pid, number)

    def end(self) -> Ended:
        """Wait for it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return Ended(None, self.said.read_text(), time.monotonic() - self._started)
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, self.said.read_text(errors="replace"), time.monotonic() - self._started)


@dataclass(frozen=True)
class Step:
    """A micro-batch that was trained on: its step, its loss bit for bit, and its documents, as (epoch, number)."""

    step: int
    loss: str
    documents: tuple[tuple[int, int], ...]


def watch(path: Path) -> None:
    """Write down every micro-batch of this process before it is trained on; nothing else differs."""
    original = UnifiedTraining.training_step

    def step(self: UnifiedTraining, batch: Any, batch_idx: int) -> Any:
        loss = original(self, batch, batch_idx)
        place = self.trainer.train_dataloader.mixture.place  # type: ignore[union-attr]
        documents = [(place(n).epoch, place(n).document) for n in batch.numbers]
        time.sleep(0.05)  # so that a step can be aimed at
        with path.open("a") as file:
            file.write(json.dumps([self.trainer.global_step, float(loss.detach()).hex(), documents]) + "\n")
        return loss

    UnifiedTraining.training_step = step  # type: ignore[method-assign]


def steps(path: Path) -> list[Step]:
    """What was trained on, in order."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [Step(step, loss, tuple(map(tuple, documents))) for step, loss, documents in map(json.loads, lines)]


def trained(path: Path) -> set[int]:
    """Documents of the first epoch that were trained on."""
    return {document for step in steps(path) for epoch, document in step.documents if epoch == 0}


def arguments(folder: Path, data: Path, source: str = "TarSource", *options: str) -> list[str]:
    """A training on files of documents, all of which are trained on."""
    entry = {"source": {"class_path": f"unimodal.data.{source}", "init_args": {"paths": str(data)}}}
    settings = {
        "sources": {"web": entry}, "validation": {"web": entry}, "batch_tokens": 512,
        "validation_documents": 40, "prompts": 1,
    }  # fmt: skip
    config = {**yaml.safe_load(TINY), "data": {"class_path": "unimodal.data.MixtureData", "init_args": settings}}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return ["fit", "-c", str(RECIPE), "-c", str(path), "--trainer.default_root_dir", str(folder), *options]
