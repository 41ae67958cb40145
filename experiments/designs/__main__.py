"""Train and score the published designs on the same documents; leave a table, plots, samples and one JSON of rows.

Every part is skipped where its result lies in --out already, and a training that was stopped goes on where it stood: give
the same command again. Rows are of all runs of that length that are done, whichever call made them.
"""

import argparse
import fcntl
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NoReturn

import torch

from experiments.designs.report import write_report
from experiments.designs.running import Run, Runner, plan
from experiments.designs.table import DESIGNS, WORLDS, World, chosen
from unimodal.environment import describe_installation
from unimodal.files import write_atomically


def main(argv: list[str] | None = None) -> int:
    """Plan, train, score, report."""
    parser = argparse.ArgumentParser("python -m experiments.designs", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, scores and the report")
    parser.add_argument("--world", choices=tuple(WORLDS), default="digits", help="what is drawn and read (digits)")
    parser.add_argument("--only", nargs="+", metavar="DESIGN", help="train these alone")
    parser.add_argument("--seeds", type=int, help="runs a design (the world's own; 1 with --quick)")
    parser.add_argument("--steps", type=int, help="optimizer steps a run (the world's own)")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the threads (1)")
    parser.add_argument("--plan", action="store_true", help="say what would be trained, and what it costs, and end")
    args = parser.parse_args(argv)
    world: World = WORLDS[args.world]
    steps = world.steps if args.steps is None else args.steps
    seeds = (1 if args.quick else world.seeds) if args.seeds is None else args.seeds
    for name, value, least in (("--steps", steps, 3), ("--seeds", seeds, 1), ("--jobs", args.jobs, 1)):
        if value < least:
            parser.error(f"{name}: expected at least {least}, got {value}")
    try:
        asked = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    print(describe_installation())
    runs = [plan(design, world, seed, steps) for seed in range(seeds) for design in DESIGNS]
    budget = steps * world.step_flops
    mine = [run for run in runs if run.design in asked]
    describe(mine, budget)
    if args.plan:
        return 0
    there = args.out / "rows.json"
    reported = {row["world"] for row in json.loads(there.read_text())} if there.is_file() else {world.name}
    if reported != {world.name}:
        parser.error(
            f"--out: expected a folder of the {world.name}, got {args.out}, with a report on {', '.join(reported)}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            parser.error(f"--out: another of these commands is working in {args.out}")
        threads = None if args.jobs == 1 else max(1, torch.get_num_threads() // args.jobs)
        alone = Runner(args.out)
        try:
            for run in runs:
                alone.check(run)
        except RuntimeError as error:
            parser.error(f"--out: {error}")
        failed = train(mine, budget, Runner(args.out, threads), args.jobs)
        for run in mine:
            if run.name not in failed:
                alone.time(run)
        rows = [row for run in runs for row in alone.rows(run, budget)]
    if rows:
        write_atomically(args.out / "rows.json", (json.dumps(rows, indent=2) + "\n").encode())
        write_report(rows, world, args.out)
        print(f"{args.out / 'report.md'}, rows.json, plot.png, gallery.png; runs/{world.name}/NAME-SEED-STEPS")
    return 1 if failed else 0


def describe(runs: list[Run], budget: float) -> None:
    """What will be trained."""
    print(f"{'run':22}{'steps':>7}{'TFLOP':>8}{'documents':>11}{'M parameters':>14}{'of them at equal FLOPs':>24}")
    for run in runs:
        last, before = run.stages[-1], run.stages[:-1]
        documents = sum(stage.steps * stage.cost.documents for stage in run.stages)
        within = run.steps_within(budget) + sum(stage.steps for stage in before)
        print(
            f"{run.name:22}{run.steps:7}{run.flops / 1e12:8.1f}{documents:11,.0f}{last.cost.parameters / 1e6:14.2f}"
            f"{within:24}"
        )


def train(runs: list[Run], budget: float, runner: Runner, jobs: int) -> list[str]:
    """All of them; a run that fails leaves the others alone, and its reason is said. Names of those."""
    failed: list[str] = []
    started = time.monotonic()
    before = signal.signal(signal.SIGTERM, _interrupt)
    pool = ThreadPoolExecutor(jobs)
    try:
        asked = {pool.submit(runner.train, run, budget): run for run in runs}
        for done in as_completed(asked):
            run = asked[done]
            error = done.exception()
            if error is not None:
                failed.append(run.name)
            result = "done" if error is None else f"failed: {type(error).__name__}: {error}"
            print(f"{time.monotonic() - started:7.0f} s  {run.name}: {result}", flush=True)
    finally:  # also on Ctrl-C: nothing new begins, and what runs ends behind its step
        pool.shutdown(wait=False, cancel_futures=True)
        runner.stop()
        pool.shutdown()
        signal.signal(signal.SIGTERM, before)
    return failed


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
