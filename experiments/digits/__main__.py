"""The demo: train a digits recipe (and its tokenizer, where it has one), score it, leave a page to look at."""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from unimodal.cli import main as unimodal
from unimodal.environment import can_compile, choose_precision, describe_installation

FP32 = "the recipes were tuned and scored in fp32"


def main(argv: list[str] | None = None) -> int:
    """Every step is a command that a user may type; each is printed before it runs."""
    parser = argparse.ArgumentParser("python -m experiments.digits", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="lightning_configs/models/*.yaml")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        nargs="+",
        help="lightning_configs/tokenizers/*.yaml, trained first; replaces the recipe's",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, scores and page")
    args = parser.parse_args(argv)
    started = time.monotonic()
    precision, reason = demo_precision()
    print(describe_installation())
    print(f"precision {precision}: {reason}")
    able, why = can_compile()
    print(f"layers compiled with the {why}" if able else f"layers not compiled: {why}")
    for folder in ("tokenizer", "run"):
        shutil.rmtree(args.out / folder, ignore_errors=True)
    extra: list[str] = []
    if args.tokenizer is not None:
        run = args.out / "tokenizer"
        files = [option for path in args.tokenizer for option in ("-c", str(path))]
        step(["fit", *files, "--trainer.default_root_dir", str(run), "--trainer.precision", precision])
        held = args.out / "tokenizer.yaml"
        held.write_text(yaml.safe_dump(of_export(run / "export")))
        extra = ["-c", str(held)]
    run = args.out / "run"
    settings = ["--trainer.default_root_dir", str(run), "--trainer.precision", precision]
    step(["fit", "-c", str(args.recipe), *extra, *settings, "--model.compile", str(able).lower()])
    step(["evaluate", "digits", "--run", str(run), "--out", str(args.out)])
    trained = [json.loads(path.read_text())["train_seconds"] for path in args.out.glob("*/run.json")]
    whole = time.monotonic() - started
    print(f"trained {duration(sum(trained))}, done in {duration(whole)}: open {args.out / 'index.html'}")
    return 0


def of_export(folder: Path) -> dict[str, Any]:
    """Keys of a model's recipe that put the exported tokenizer in the place of its own."""
    tokenizer = json.loads((folder / "config.json").read_text())
    return {"model": {"init_args": {"model": {"tokenizer": tokenizer}, "tokenizer_weights": str(folder)}}}


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    return "{} min {} s".format(*divmod(round(seconds), 60))


def demo_precision() -> tuple[str, str]:
    """Lightning's precision and why."""
    precision, reason = choose_precision()
    if precision == "bf16-mixed" and not torch.cuda.is_available():
        return "32-true", f"{reason}, but {FP32}"
    return precision, reason


def step(command: list[str]) -> None:
    """One `unimodal` command; its exit code ends the demo when it is not 0."""
    print(f"\n$ unimodal {' '.join(command)}", flush=True)
    code = unimodal(command)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
