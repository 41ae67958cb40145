"""What a run folder says of itself: how it was made, how long it took, how its losses went."""

import csv
import json
import platform
from pathlib import Path
from typing import Any

import torch

from unimodal.evaluation.page import RunDescription
from unimodal.model import UnifiedModel
from unimodal_generators.base import ImageGenerator


def describe_run(run: Path, model: UnifiedModel) -> tuple[RunDescription, float | None]:
    """What a page says about a run, and how many seconds it trained (None when the folder does not tell)."""
    record: dict[str, Any] = {}
    if (run / "run.json").is_file():
        record = json.loads((run / "run.json").read_text())
    recipe = record.get("recipe", run.name)
    config, generator = model.backbone.config, type(model.generator).__name__
    experts = "mixture of transformers" if len(config.experts.names) > 1 else "dense decoder"
    summary = (
        f"{type(model.tokenizer).__name__} + {experts} ({config.depth} layers of width {config.width}) + {generator}"
    )
    config_file = run / "config.yaml"
    return (
        RunDescription(
            title=recipe,
            summary=summary,
            recipe=config_file.read_text() if config_file.is_file() else "",
            command=record.get("command", ""),
            machine=machine(),
            asked_digit_aim=asked_digit_aim(model.generator),
        ),
        record.get("train_seconds"),
    )


def asked_digit_aim(generator: ImageGenerator) -> float:
    """The aim for asked digits: 98 % over continuous tokens, 95 % over discrete ones."""
    return 0.98 if "continuous" in generator.accepts else 0.95


def machine() -> str:
    """Processor, cores and torch of this process."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{device}, torch {torch.__version__}"


def merged_metrics(run: Path, target: Path) -> Path | None:
    """One metrics.csv of all starts of a run (a resumed run logs behind its former start); None when nothing was logged."""
    files = sorted(run.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.removeprefix("version_")))
    rows: list[dict[str, str]] = []
    for path in files:
        with path.open(newline="") as file:
            new = list(csv.DictReader(file))
        first = min((int(row["step"]) for row in new), default=0)
        rows = [row for row in rows if int(row["step"]) < first] + new  # what was trained again counts once
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row))
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return target
