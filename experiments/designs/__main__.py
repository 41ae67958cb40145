"""Train and score the published designs on the same documents; leave a table, plots, samples and one JSON of rows.

Every part is skipped where its result lies in --out already, and a training that was stopped goes on where it stood: give
the same command again. Rows are of all runs of that length that are done, whichever call made them. The report of each world
lies in a folder of its name.
"""

import argparse
import fcntl
import json
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from experiments.designs.cost import Costs
from experiments.designs.elsewhere import given, left_over, read_rows
from experiments.designs.report import write_report
from experiments.designs.running import Row, Run, Runner, plan
from experiments.designs.table import DESIGNS, WORLDS, Design, World, chosen
from unimodal.environment import describe_installation
from unimodal.files import write_atomically


def main(argv: list[str] | None = None) -> int:
    """Plan, train, score, report."""
    parser = argparse.ArgumentParser("python -m experiments.designs", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, scores and the report")
    parser.add_argument(
        "--world", choices=tuple(WORLDS), nargs="+", help="what is drawn and read (all; --quick: digits)"
    )
    parser.add_argument("--only", nargs="+", metavar="DESIGN", help="train these alone")
    parser.add_argument("--seeds", type=int, help="runs a design (each world's own; 1 with --quick)")
    parser.add_argument("--steps", type=int, help="optimizer steps a run (each world's own)")
    parser.add_argument("--quick", action="store_true", help="the digits alone, one seed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the threads (1)")
    parser.add_argument(
        "--rows", type=Path, nargs="+", default=[], metavar="FILE",
        help="rows.json of other machines: runs that it has are reported, and not done here",
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="say what would be trained, and what it costs, and end")
    args = parser.parse_args(argv)
    for name, value, least in (("--steps", args.steps, 3), ("--seeds", args.seeds, 1), ("--jobs", args.jobs, 1)):
        if value is not None and value < least:
            parser.error(f"{name}: expected at least {least}, got {value}")
    try:
        asked = chosen(args.only)
        elsewhere = read_rows(args.rows)
    except ValueError as error:
        parser.error(str(error))
    if not args.plan:
        args.out.mkdir(parents=True, exist_ok=True)
    costs = Costs(args.out / "costs" if args.out.is_dir() else None)
    print(describe_installation())
    comparisons = []
    for name in dict.fromkeys(args.world or (["digits"] if args.quick else WORLDS)):
        seeds = args.seeds or (1 if args.quick else WORLDS[name].seeds)
        try:
            one = Comparison.of(WORLDS[name], seeds, args.steps or WORLDS[name].steps, costs, elsewhere)
        except ValueError as error:
            parser.error(str(error))
        comparisons.append(one)
        one.describe(asked)
    for row in left_over(elsewhere, [row for one in comparisons for rows in one.given.values() for row in rows]):
        print(f"--rows: not reported, because it is of no whole run of this call: {row}")
    if args.plan:
        return 0
    with (args.out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            parser.error(f"--out: another of these commands is working in {args.out}")
        threads = None if args.jobs == 1 else max(1, torch.get_num_threads() // args.jobs)
        alone = Runner(args.out)
        try:
            for one in comparisons:
                for run in one.runs:  # others' rows are reported too
                    alone.check(run)
        except RuntimeError as error:
            parser.error(f"--out: {error}")
        failed = []
        for one in comparisons:  # world by world: what is done first is reported first
            mine = [run for run in one.of_designs(asked) if run.name not in one.given]
            failed += (failures := train(mine, one.budget, Runner(args.out, threads), args.jobs))
            failed += time_alone([run for run in mine if run.name not in failures], alone)
            one.report(alone)
    return 1 if failed else 0


@dataclass(frozen=True)
class Comparison:
    """The runs of one world.

    Attributes:
        world: what is drawn and read.
        runs: of all designs.
        budget: FLOPs of a run at equal FLOPs.
        given: rows of runs that were done elsewhere, by the runs' names.
    """

    world: World
    runs: tuple[Run, ...]
    budget: float
    given: dict[str, list[Row]]

    @classmethod
    def of(cls, world: World, seeds: int, steps: int, costs: Costs, elsewhere: Sequence[Row]) -> "Comparison":
        """All designs, so many seeds each."""
        runs = tuple(plan(design, world, seed, steps, costs) for seed in range(seeds) for design in DESIGNS)
        budget = steps * world.step_flops
        return cls(world, runs, budget, given(elsewhere, runs, budget))

    def of_designs(self, designs: Sequence[Design]) -> list[Run]:
        """The runs of some of them."""
        return [run for run in self.runs if run.design in designs]

    def report(self, runner: Runner) -> None:
        """Rows, tables and pictures of all runs that are done, in a folder that is called as the world is."""
        rows = [row for run in self.runs for row in self.given.get(run.name) or runner.rows(run, self.budget)]
        if rows:
            out = runner.out / self.world.name
            write_atomically(out / "rows.json", (json.dumps(rows, indent=2) + "\n").encode())
            write_report(rows, self.world, runner.out)
            print(f"{out / 'report.md'}, rows.json, plot.png, gallery.png; runs/{self.world.name}/NAME-SEED-STEPS")

    def describe(self, designs: Sequence[Design]) -> None:
        """What will be trained."""
        heads = f"{'TFLOP':>8}{'documents':>11}{'M parameters':>14}{'of them at equal FLOPs':>24}"
        print(f"{self.world.name:22}{'steps':>7}{heads}")
        for run in self.of_designs(designs):
            last, before = run.stages[-1], run.stages[:-1]
            documents = sum(stage.steps * stage.cost.documents for stage in run.stages)
            within = run.steps_within(self.budget) + sum(stage.steps for stage in before)
            print(
                f"{run.name:22}{run.steps:7}{run.flops / 1e12:8.1f}{documents:11,.0f}"
                f"{last.cost.parameters / 1e6:14.2f}{within:24}{'  done elsewhere' if run.name in self.given else ''}"
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


def time_alone(runs: list[Run], runner: Runner) -> list[str]:
    """How long each takes for an image; names of those that could not say."""
    failed = []
    for run in runs:
        try:
            runner.time(run)
        except RuntimeError as error:
            failed.append(run.name)
            print(f"{run.name}: not timed: {error}", flush=True)
    return failed


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
