"""Training and scoring of one design with one seed, each part skipped where its result lies on disk."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from experiments.designs.cost import Cost, Costs
from experiments.designs.table import CONFIGS, Changes, Design, World, merged, recipe, training
from unimodal.environment import can_compile
from unimodal.evaluation.run import machine
from unimodal.files import write_atomically

Row = dict[str, Any]

TEACHER = {
    f"{world}_diffused": (f"experiments.{world}.teacher", f"{world}_teacher/encoder.safetensors")
    for world in ("digits", "shapes")
}
"""Tokenizers whose frozen encoder is trained first: the module that does, and its file."""
FIRST_SEED = 1000
"""Added to the seed in a first stage: the second must not see the same documents again."""
TIMED_SEED = 0
"""Whose run says how long an image takes: that does not depend on the seed."""


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
        """Of folders and logs; runs of other lengths are others."""
        return f"{self.design.name}-{self.seed}-{self.steps}"

    @property
    def tokenizer(self) -> str | None:
        """Recipe of the tokenizer that is trained before."""
        return self.world.tokenizer(self.design)

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def flops(self) -> float:
        """All that training it takes, all stages together."""
        return sum(stage.flops for stage in self.stages)

    def steps_within(self, flops: float) -> int:
        """Steps of the last stage that fit into so many FLOPs, all stages counted."""
        last = self.stages[-1]
        if flops >= self.flops:  # asked first: rounding must not take a step of a run that may be whole
            return last.steps
        left = flops - sum(stage.flops for stage in self.stages[:-1])
        return max(0, int(left / last.cost.flops))

    def points(self, flops: float) -> dict[str, int]:
        """Where it is scored: steps of the last stage at equal FLOPs and at equal steps."""
        return {at: n for at, n in (("flops", self.steps_within(flops)), ("steps", self.stages[-1].steps)) if n > 0}


def plan(design: Design, world: World, seed: int, steps: int, costs: Costs) -> Run:
    """Which stages a run has, and what each costs, which does not depend on the seed."""

    def stage(name: str, config: Changes, steps: int) -> Stage:
        return Stage(name, config, steps, costs.of(config))

    own = recipe(design, world, {"seed_everything": seed})
    if design.first is None:
        return Run(design, world, seed, (stage("run", own, steps),))
    before = round(steps * design.first.share)
    begin = own
    for more in (design.first.changes, world.reading, {"seed_everything": FIRST_SEED + seed}):
        begin = merged(begin, more)
    end = merged(own, training(freeze=list(design.first.kept)))
    return Run(design, world, seed, (stage("first", begin, before), stage("run", end, steps - before)))


def digest(run: Run, flops: float) -> str:
    """Of everything that a run is trained and scored by, wherever it lies."""
    stages = [(stage.name, stage.steps, stage.config) for stage in run.stages]
    tokenizer = None if run.tokenizer is None else (run.tokenizer, _tokenizer_recipe(run.tokenizer)[1])
    handed = None if run.design.first is None else run.design.first.handed
    whole = [stages, tokenizer, handed, run.world.scoring, run.world.versions, run.points(flops)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Runner:
    """Does what is left of a run, in subprocesses.

    Attributes:
        out: folder of all runs.
        threads: of each process; None: torch's own choice.
    """

    out: Path
    threads: int | None = None
    _children: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _one_tokenizer: Lock = field(default_factory=Lock)

    def folder(self, run: Run) -> Path:
        """Of everything a run leaves."""
        return self.out / "runs" / run.world.name / run.name

    def train(self, run: Run, flops: float) -> None:
        """Train a run to each of its points, and score it there."""
        self.check(run)
        points = dict.fromkeys(run.points(flops).values())
        left = [steps for steps in points if not self._page(run, steps).is_file()]
        if not left:
            return
        if run.tokenizer is not None:
            with self._one_tokenizer:
                self._tokenizer(run.tokenizer)
        starts = list(self._first(run))
        for steps in left:
            self._train(run, run.stages[-1], steps, starts)
            scored, (able, _) = self._page(run, steps).parent, can_compile()
            write_atomically(scored.with_suffix(".json"), json.dumps(run.world.versions).encode())
            asked = [*run.world.scoring, "--run", str(self.folder(run) / "run"), "--out", str(scored)]
            asked += ["--seed", str(run.seed), *(["--compile"] if able else [])]
            self._call([sys.executable, "-m", *asked], scored.with_name(f"{scored.name}.log"))

    def check(self, run: Run) -> None:
        """Refuse to go on with, or to report, what was trained or scored by other settings than today's."""
        for page in sorted(self.folder(run).glob("at_*/index.html")):
            record = page.parent.with_suffix(".json")
            versions = json.loads(record.read_text()) if record.is_file() else None
            if versions != run.world.versions:
                raise RuntimeError(
                    f"{page.parent} was scored by versions {versions}, today's are {run.world.versions}: delete "
                    f"{self.folder(run)} to train and score it again"
                )
        for stage in run.stages:
            config = self.folder(run) / f"{stage.name}.yaml"
            if config.with_suffix("").is_dir() and _settings(config) != _placeless(self._config(run, stage)):
                raise RuntimeError(
                    f"{config} is no longer what the design says: delete {config.parent} to train it again"
                )
        if run.tokenizer is not None:
            folder, (recipe, settings) = self.out / "tokenizers" / run.tokenizer, _tokenizer_recipe(run.tokenizer)
            config = folder.with_suffix(".yaml")
            if (folder / "export").is_dir() and _settings(config) != _placeless(settings):
                raise RuntimeError(
                    f"{config} is no longer what {recipe} says: delete {folder} and the runs that use it to train them again"
                )

    def _config(self, run: Run, stage: Stage) -> str:
        """What `unimodal fit` reads, with the tokenizer that the run has."""
        settings = dict(stage.config)
        if run.tokenizer is not None:
            weights = str(self.out / "tokenizers" / run.tokenizer / "export")
            settings = merged(settings, training(tokenizer_weights=weights))
        return yaml.safe_dump(settings, sort_keys=False)

    def _page(self, run: Run, steps: int) -> Path:
        """What scoring writes last."""
        return self.folder(run) / f"at_{steps}" / "index.html"

    def time(self, run: Run) -> None:
        """How long an image takes, of one seed; to be asked where nothing else runs."""
        target = self.folder(run) / "seconds.json"
        if run.seed == TIMED_SEED and not target.is_file():
            trained = str(self.folder(run) / "run")
            command = [sys.executable, "-m", "experiments.designs.seconds", trained, "--world", run.world.name]
            self._call([*command, "--out", str(target)], target.with_suffix(".log"))

    def rows(self, run: Run, flops: float) -> list[Row]:
        """One row at equal FLOPs and one at equal steps, the same scores where both are the whole run.

        None of a run that is not done.
        """
        points = run.points(flops)
        marks = [self._page(run, steps) for steps in points.values()]
        marks += [self.folder(run) / "seconds.json"] if run.seed == TIMED_SEED else []
        if not all(mark.is_file() for mark in marks):
            return []
        return [self._row(run, at, steps, flops) for at, steps in points.items()]

    def stop(self) -> None:
        """End what runs; a training leaves a checkpoint that it goes on from."""
        for child in list(self._children):
            child.terminate()

    def _tokenizer(self, name: str) -> None:
        """Train a tokenizer, and before it the teacher of its encoder."""
        folder, (recipe, settings) = self.out / "tokenizers" / name, _tokenizer_recipe(name)
        if (folder / "export").is_dir():
            return
        options = ["--trainer.enable_progress_bar", "false"]
        if name in TEACHER:
            module, file = TEACHER[name]
            weights = folder.parent / file
            if not weights.is_file():
                self._call([sys.executable, "-m", module, "--out", str(weights)], folder.parent / "teacher.log")
            options += ["--model.encoder_weights", str(weights)]
        write_atomically(folder.with_suffix(".yaml"), settings.encode())
        self._fit(recipe, folder, options)

    def _first(self, run: Run) -> Iterator[str]:
        """Train the stages before the last; options that the last starts with."""
        for stage in run.stages[:-1]:
            self._train(run, stage, stage.steps, [])
            trained = self.folder(run) / stage.name
            assert run.design.first is not None
            if run.design.first.handed == "model":
                yield from ("--init", str(trained / "export"))
            else:
                text = self.folder(run) / "text"
                if not text.is_dir():
                    self._unimodal(
                        ["export", "hf", "--run", str(trained), "--out", str(text)], text.with_suffix(".log")
                    )
                yield from ("--model.init_from", str(text))

    def _train(self, run: Run, stage: Stage, steps: int, options: list[str]) -> None:
        folder = self.folder(run) / stage.name
        config, record = folder.with_suffix(".yaml"), folder / "run.json"
        trained = json.loads(record.read_text())["steps"] if record.is_file() else 0
        if trained > steps:
            raise RuntimeError(f"{folder} is trained for {trained} steps, past {steps}: delete {folder.parent}")
        if trained == steps:
            return
        write_atomically(config, self._config(run, stage).encode())
        every = ["--trainer.val_check_interval", str(stage.steps), "--checkpoint.every_n_train_steps", "100"]
        able, _ = can_compile()
        options = [*options, "--trainer.max_steps", str(steps), *every, "--model.compile", str(able).lower()]
        self._fit(config, folder, options)

    def _fit(self, config: Path, folder: Path, options: list[str]) -> None:
        going_on = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").is_file() else []
        command = ["fit", "-c", str(config), "--trainer.default_root_dir", str(folder), *options, *going_on]
        self._unimodal(command, folder.with_suffix(".log"))

    def _row(self, run: Run, at: str, steps: int, flops: float) -> Row:
        """What is known of a run at one point."""
        folder = self.folder(run)
        scored = folder / f"at_{steps}"
        scores = json.loads((scored / "scores.json").read_text())
        before, last = run.stages[:-1], run.stages[-1]
        row: Row = {"name": run.design.name, "seed": run.seed, "world": run.world.name, "at": at}
        row |= {"recipe": run.design.recipe, "paper": run.design.paper, "optimizer_steps": steps}
        row["optimizer_steps"] += sum(stage.steps for stage in before)
        row |= {"planned_steps": run.steps, "flops_budget": flops, "settings": digest(run, flops), "machine": machine()}
        for key in ("flops", "tokens", "documents"):
            spent = sum(stage.steps * getattr(stage.cost, key) for stage in before)
            row[key] = spent + steps * getattr(last.cost, key)
        row |= {"parameters": last.cost.parameters, "learning": last.cost.learning}
        if run.seed == TIMED_SEED:
            row |= json.loads((folder / "seconds.json").read_text())
        row |= {key: scores[key] for name in run.world.scores for key in (name, f"{name}_interval")}
        row |= {key: scores[key] for key in run.world.noted}
        earlier = [json.loads((folder / stage.name / "run.json").read_text())["train_seconds"] for stage in before]
        row["train_seconds"] = scores["train_seconds"] + sum(earlier)
        row["samples"] = str((scored / "samples.png").relative_to(self.out))
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
            # In a session of its own: Ctrl-C reaches a child through `stop` alone, and once (a second one ends it at once).
            child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        if code:
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            raise RuntimeError(f"{' '.join(command[2:6])} ended with {code}: {lines[-1]} (all of it in {log})")


def _settings(config: Path) -> Any:
    """What a training was given; None where nobody knows."""
    return _placeless(config.read_text(encoding="utf-8")) if config.is_file() else None


def _placeless(config: str) -> Any:
    """Settings without where the tokenizer lies: a folder of runs may be moved, and named in several ways."""
    settings = yaml.safe_load(config)
    given = settings.get("model", {}).get("init_args", {})
    if given.get("tokenizer_weights"):
        given["tokenizer_weights"] = Path(given["tokenizer_weights"]).parent.name
    return settings


def _tokenizer_recipe(name: str) -> tuple[Path, str]:
    """A tokenizer's recipe, and what it says without its comments."""
    recipe = CONFIGS / "tokenizers" / f"{name}.yaml"
    return recipe, yaml.safe_dump(yaml.safe_load(recipe.read_text(encoding="utf-8")), sort_keys=False)
