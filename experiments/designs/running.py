"""Training and scoring of one design with one seed, each part skipped where its result lies on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.designs.cost import Cost, cost
from experiments.designs.table import CONFIGS, Changes, Design, World, merged, recipe, training
from unimodal.environment import can_compile
from unimodal.files import write_atomically

Row = dict[str, Any]

TEACHER = {"digits_representation": ("experiments.digits.teacher", "digits_teacher/encoder.safetensors")}
"""Tokenizers whose frozen encoder is trained first: the module that does, and its file."""


@dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
        name: of its folder.
        config: what `unimodal fit` reads, but for weights and steps.
        steps: of the optimizer, in full.
        cost: of one step.
    """

    name: str
    config: Changes
    steps: int
    cost: Cost

    @property
    def flops(self) -> float:
        """All that it takes."""
        return self.steps * self.cost.flops


@dataclass(frozen=True)
class Run:
    """A design with a seed."""

    design: Design
    world: World
    seed: int
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        """Of folders and logs."""
        return f"{self.design.name}-{self.seed}"

    @property
    def flops(self) -> float:
        """All that training it takes, all stages together."""
        return sum(stage.flops for stage in self.stages)

    def steps_within(self, flops: float) -> int:
        """Steps of the last stage that fit into so many FLOPs, all stages counted."""
        last = self.stages[-1]
        left = flops - (self.flops - last.flops)
        # A budget that is this run's own, spent in full, must not lose a step to rounding.
        return max(0, min(last.steps, int(left / last.cost.flops + 1e-6)))


def plan(design: Design, world: World, seed: int, steps: int) -> Run:
    """Which stages a run has, and what each costs."""
    own = merged({"seed_everything": seed}, {"data": {"init_args": {"seed": seed}}})
    configs = [("run", recipe(design, world, own))]
    if design.first is not None:
        begin = merged(recipe(design, world, own), design.first.changes)
        configs = [("first", begin), ("run", merged(configs[0][1], training(freeze=list(design.first.kept))))]
    shares = [steps // len(configs)] * len(configs)
    shares[-1] += steps - sum(shares)
    made = (Stage(name, c, n, cost(c)) for (name, c), n in zip(configs, shares, strict=True))
    return Run(design, world, seed, tuple(made))


@dataclass(frozen=True)
class Runner:
    """Does what is left of a run, in subprocesses.

    Attributes:
        out: folder of all runs.
        threads: of each process; None: torch's own choice.
    """

    out: Path
    threads: int | None = None

    def tokenizer(self, name: str) -> None:
        """Train a tokenizer, and before it the teacher of its encoder."""
        folder = self.out / "tokenizers" / name
        if (folder / "export").is_dir():
            return
        options = []
        if name in TEACHER:
            module, file = TEACHER[name]
            weights = self.out / "tokenizers" / file
            if not weights.is_file():
                self._call([sys.executable, "-m", module, "--out", str(weights)], folder.parent / "teacher.log")
            options = ["--model.encoder_weights", str(weights)]
        config = CONFIGS / "tokenizers" / f"{name}.yaml"
        self._fit(config, folder, ["--trainer.enable_progress_bar", "false", *options])

    def scored(self, run: Run, flops: float) -> list[Row]:
        """One row at equal FLOPs and one at equal steps; the same scores where both are the whole run."""
        root = self.out / "runs" / run.name
        starts: list[str] = []
        for stage in run.stages[:-1]:
            assert run.design.first is not None
            self._train(run, stage, root, stage.steps, [])
            starts = ["--init", str(root / stage.name / "export")]
            if run.design.first.handed == "text":
                text = root / "text"
                if not text.is_dir():
                    exported = ["export", "hf", "--run", str(root / stage.name), "--out", str(text)]
                    self._unimodal(exported, root / "export.log")
                starts = ["--model.init_from", str(text)]
        last, rows = run.stages[-1], []
        within = run.steps_within(flops)
        points = {"flops": within, "steps": last.steps}
        for at, steps in points.items():
            if steps > 0:
                folder = root / f"at_{steps}"
                if not (folder / "scores.json").is_file():
                    self._train(run, last, root, steps, starts)
                    self._score(run, root / "run", folder)
                rows.append(self._row(run, at, steps, folder))
        return rows

    def _train(self, run: Run, stage: Stage, root: Path, steps: int, options: list[str]) -> None:
        folder = root / stage.name
        record = folder / "run.json"
        if record.is_file() and json.loads(record.read_text())["steps"] >= steps:
            return
        config = root / f"{stage.name}.yaml"
        settings = dict(stage.config)
        if run.design.tokenizer is not None:
            weights = str(self.out / "tokenizers" / run.design.tokenizer / "export")
            settings = merged(settings, training(tokenizer_weights=weights))
        write_atomically(config, yaml.safe_dump(settings, sort_keys=False).encode())
        every = ["--trainer.val_check_interval", str(stage.steps), "--checkpoint.every_n_train_steps", "100"]
        able, _ = can_compile()
        options = [*options, "--trainer.max_steps", str(steps), *every, "--model.compile", str(able).lower()]
        self._fit(config, folder, options)

    def _fit(self, config: Path, folder: Path, options: list[str]) -> None:
        going_on = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").is_file() else []
        command = ["fit", "-c", str(config), "--trainer.default_root_dir", str(folder), *options, *going_on]
        self._unimodal(command, folder.with_name(f"{folder.name}.log"))

    def _score(self, run: Run, trained: Path, folder: Path) -> None:
        able, _ = can_compile()
        options = [
            "--run",
            str(trained),
            "--out",
            str(folder),
            "--seed",
            str(run.seed),
            *(["--compile"] if able else []),
        ]
        self._unimodal(["evaluate", "digits", *options], folder.with_name(f"{folder.name}.log"))
        timed = [
            sys.executable,
            "-m",
            "experiments.designs.seconds",
            str(trained),
            "--out",
            str(folder / "seconds.json"),
        ]
        self._call(timed, folder.with_name(f"{folder.name}.log"))

    def _row(self, run: Run, at: str, steps: int, folder: Path) -> Row:
        """What is known of a run at one point."""
        scores = json.loads((folder / "scores.json").read_text())
        first, last = run.stages[:-1], run.stages[-1]
        seconds = json.loads((folder / "seconds.json").read_text())
        row: Row = {"name": run.design.name, "seed": run.seed, "world": run.world.name, "at": at}
        row |= {"recipe": run.design.recipe, "paper": run.design.paper, "optimizer_steps": steps}
        row["optimizer_steps"] += sum(stage.steps for stage in first)
        for key in ("flops", "tokens", "documents"):
            before = sum(stage.steps * getattr(stage.cost, key) for stage in first)
            row[key] = before + steps * getattr(last.cost, key)
        row |= {key: asdict(last.cost)[key] for key in ("parameters", "learning")}
        row |= seconds
        row |= {key: scores[key] for name in run.world.scores for key in (name, f"{name}_interval")}
        row |= {key: scores[key] for key in ("frechet", "frechet_real", "recall", "copies", "guidance")}
        row["train_seconds"] = scores["train_seconds"]
        return row

    def _unimodal(self, command: list[str], log: Path) -> None:
        self._call([sys.executable, "-m", "unimodal.cli", *command], log)

    def _call(self, command: list[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
        if done.returncode:
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            raise RuntimeError(
                f"{' '.join(command[2:6])} ended with {done.returncode}: {lines[-1]} (all of it in {log})"
            )
