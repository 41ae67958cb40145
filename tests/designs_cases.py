"""A tiny world for the comparison of designs, runs that cost nothing, and a runner that says what it would do."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.designs.cost import Cost
from experiments.designs.running import Row, Run, Runner, Stage
from experiments.designs.table import DIGITS, Design, merged, model
from unimodal.evaluation.digits import sample_grid

TINY = replace(
    DIGITS,
    budget=merged(
        DIGITS.budget,
        {
            **model(backbone={"width": 16, "depth": 1, "heads": 2, "kv_heads": 2, "mlp_width": 24}),
            "data": {
                "class_path": "unimodal.data.DigitsData",
                "init_args": {"batch_tokens": 256, "validation_documents": 2, "prompts": 1},
            },
        },
    ),
)


def made(name: str, costs: list[float], steps: list[int]) -> Run:
    names = ["first", "run"][-len(costs) :]
    stages = (
        Stage(stage, {}, n, Cost(flops, 1.0, 1.0, 1, 1)) for stage, flops, n in zip(names, costs, steps, strict=True)
    )
    return Run(Design(name, "none", "none"), DIGITS, 0, tuple(stages))


class Recorded(Runner):
    """Says what it would do, and leaves what that would leave: scores tell the steps of what was scored."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.calls: list[list[str]] = []
        self.dies: str | None = None  # when it should do this

    def _call(self, command: list[str], log: Path) -> None:
        self.calls.append(command[3:] if command[2] == "unimodal.cli" else command[2:])
        given = dict(pairwise(command))
        if self.dies in command:
            raise RuntimeError("died")
        if "fit" in command:
            folder = Path(given["--trainer.default_root_dir"])
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints" / "last.ckpt").touch()
            (folder / "export").mkdir(exist_ok=True)
            steps = int(given.get("--trainer.max_steps", 0))
            (folder / "run.json").write_text(json.dumps({"steps": steps, "train_seconds": 10.0}))
        elif "evaluate" in command:
            out = Path(given["--out"])
            out.mkdir(parents=True, exist_ok=True)
            record = json.loads((Path(given["--run"]) / "run.json").read_text())
            (out / "scores.json").write_text(json.dumps(scores(0.5) | {"guidance": record["steps"]}))
            sheet(out / "samples.png")
            (out / "index.html").touch()
        elif "experiments.designs.seconds" in command:
            Path(given["--out"]).write_text('{"seconds_an_image": 1.0}')
        else:
            Path(given["--out"]).mkdir(parents=True, exist_ok=True)


def done(runner: Recorded, run: Run, flops: float) -> list[Row]:
    """Everything of a run."""
    runner.train(run, flops)
    runner.time(run)
    return runner.rows(run, flops)


def sheet(path: Path) -> None:
    """As `unimodal evaluate digits` leaves one, of ten distinguishable rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.new("RGB", (8, 8), (20 * digit, 0, 10 * draw)) for digit in range(10) for draw in range(10)]
    sample_grid(images, np.repeat(np.arange(10), 10)).save(path)


def scores(value: float) -> Row:
    row: Row = dict.fromkeys(DIGITS.scores, value)
    row |= {f"{name}_interval": [value - 0.1, value + 0.1] for name in DIGITS.scores}
    return row | dict.fromkeys(("frechet", "frechet_real", "recall", "copies", "guidance", "train_seconds"), 1.0)
